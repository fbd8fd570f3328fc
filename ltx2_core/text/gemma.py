"""Gemma-3 text model, any size, returning every hidden state.

The names of parameters are those of the host and of transformers' ``Gemma3ForCausalLM`` (``model.layers.0.self_attn.q_proj.weight``);
``hf_name`` maps llama.cpp's GGUF names to them. Only the text part is here: no logits, no vision tower, no cache.

Two differences in what the weights mean, both settled while loading (``loading/text_files.py``):

* **Norms hold the factor itself**, ``1 + w``. llama.cpp stores that; safetensors store ``w``.
* The hidden state of a layer and everything between the matrix products is float32, whatever ``dtype`` the products run in:
  Gemma's residual stream reaches tens of thousands, where bfloat16 has no digits left for the small channels.

Letters: n tokens, D width, nh query heads, nkv key/value heads, hd head width, L layers.

Sources: transformers ``models/gemma3/modeling_gemma3.py``; ComfyUI ``comfy/text_encoders/llama.py``; llama.cpp
``convert_hf_to_gguf.py`` and ``src/models/gemma3.cpp``.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..transformer import fused
from . import gemma_fused as passes

LOCAL_ROPE_THETA = 10_000.0
GLOBAL_ROPE_THETA = 1_000_000.0
LOCAL_LAYERS_PER_GLOBAL = 5
"""Layers 5, 11, 17, ... attend to everything; the five before each of them only to a sliding window."""

GATHERED_BYTES = 128 << 20
"""Hidden states that wait on the GPU for their way to main memory."""


class GemmaConfigError(ValueError):
    """The tensors are not those of a Gemma-3 text model."""


@dataclass(frozen=True)
class _Size:
    name: str
    sliding_window: int
    rope_factor: float
    query_width: int


# What shapes cannot tell, by (width, layers). Source: config.json of google/gemma-3-*; llama.cpp src/models/gemma3.cpp (27B scale).
SIZES = {
    (640, 18): _Size("270M", 512, 1.0, 256),
    (1152, 26): _Size("1B", 512, 1.0, 256),
    (2560, 34): _Size("4B", 1024, 8.0, 256),
    (3840, 48): _Size("12B", 1024, 8.0, 256),
    (5376, 62): _Size("27B", 1024, 8.0, 168),
}


@dataclass(frozen=True)
class GemmaConfig:
    """Geometry of a Gemma-3 text model. ``query_width``: attention scores are scaled by ``query_width ** -0.5``."""

    vocab_size: int
    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_width: int
    sliding_window: int
    sliding_layers: tuple[bool, ...]
    rope_theta: float
    rope_local_theta: float
    rope_factor: float
    norm_eps: float

    @property
    def num_hidden_states(self) -> int:
        """Embeddings, then the output of every layer."""
        return self.num_layers + 1

    @property
    def size_name(self) -> str:
        """``"12B"``, or a description of an unusual geometry."""
        size = SIZES.get((self.width, self.num_layers))
        return size.name if size else f"{self.num_layers} layers of width {self.width}"

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping | None = None) -> "GemmaConfig":
        """Read the geometry off the shapes of tensors under their transformers names; ``metadata`` are a GGUF's key/values.

        Where the metadata says something that shapes also say, they must agree. Rope scaling and window come from the metadata, else
        from the table of released sizes, else there is no scaling and a window of 1024. Raises GemmaConfigError.
        """
        metadata = metadata or {}

        def shape(name: str) -> tuple[int, ...]:
            if name not in shapes:
                raise GemmaConfigError(f"tensor '{name}' is missing, so this is not a complete Gemma-3 text model.")
            return tuple(shapes[name])

        vocab_size, width = shape("model.embed_tokens.weight")
        layers = {int(m[1]) for m in map(re.compile(r"model\.layers\.(\d+)\.").match, shapes) if m}
        num_layers = len(layers)
        if layers != set(range(num_layers)):
            missing = sorted(set(range(max(layers) + 1)) - layers)
            raise GemmaConfigError(f"the file has layers up to {max(layers)} but lacks {missing[:5]}; it is incomplete, download it again.")
        head_dim = shape("model.layers.0.self_attn.q_norm.weight")[0]
        q_rows = shape("model.layers.0.self_attn.q_proj.weight")[0]
        kv_rows = shape("model.layers.0.self_attn.k_proj.weight")[0]
        ffn_width = shape("model.layers.0.mlp.gate_proj.weight")[0]
        if q_rows % head_dim or kv_rows % head_dim:
            raise GemmaConfigError(f"attention has {q_rows} query and {kv_rows} key rows, which are not multiples of the head width {head_dim}.")

        arch = metadata.get("general.architecture", "gemma3")
        for key, found in (
            ("block_count", num_layers),
            ("embedding_length", width),
            ("feed_forward_length", ffn_width),
            ("attention.head_count", q_rows // head_dim),
            ("attention.head_count_kv", kv_rows // head_dim),
            ("attention.key_length", head_dim),
        ):
            said = metadata.get(f"{arch}.{key}")
            if said is not None and int(said) != found:
                raise GemmaConfigError(f"the file's metadata say {key} = {int(said)}, its tensors say {found}; the file is damaged or mislabelled.")

        size = SIZES.get((width, num_layers), _Size("", 1024, 1.0, head_dim))
        return cls(
            vocab_size=vocab_size,
            width=width,
            ffn_width=ffn_width,
            num_layers=num_layers,
            num_heads=q_rows // head_dim,
            num_kv_heads=kv_rows // head_dim,
            head_dim=head_dim,
            query_width=size.query_width,
            sliding_window=int(metadata.get(f"{arch}.attention.sliding_window", size.sliding_window)),
            sliding_layers=_sliding_layers(metadata.get(f"{arch}.attention.sliding_window_pattern"), num_layers),
            rope_theta=float(metadata.get(f"{arch}.rope.freq_base", GLOBAL_ROPE_THETA)),
            rope_local_theta=float(metadata.get(f"{arch}.rope.freq_base_swa", LOCAL_ROPE_THETA)),
            rope_factor=_rope_factor(metadata, arch, size.rope_factor),
            norm_eps=float(metadata.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)),
        )

    @classmethod
    def from_gguf(cls, gguf) -> "GemmaConfig":
        """Geometry of an open GGUF file: anything with ``metadata`` and ``tensors`` (name -> object with ``shape``)."""
        shapes = {hf_name(name): tuple(info.shape) for name, info in gguf.tensors.items()}
        return cls.from_shapes(shapes, gguf.metadata)


def _sliding_layers(pattern, num_layers: int) -> tuple[bool, ...]:
    """Which layers use the sliding window. ``pattern``: period (int), one flag per layer, or None for Gemma-3's six."""
    if pattern is None:
        pattern = LOCAL_LAYERS_PER_GLOBAL + 1
    if not isinstance(pattern, (int, float)):
        flags = tuple(bool(x) for x in pattern)
        if len(flags) == num_layers:
            return flags
        return tuple(flags[i % len(flags)] for i in range(num_layers))
    return tuple((i + 1) % int(pattern) != 0 for i in range(num_layers))


def _rope_factor(metadata: Mapping, arch: str, default: float) -> float:
    kind = metadata.get(f"{arch}.rope.scaling.type")
    if kind is None and f"{arch}.rope.scaling.factor" not in metadata:
        return default
    if kind in (None, "linear"):
        return float(metadata.get(f"{arch}.rope.scaling.factor", 1.0))
    if kind == "none":
        return 1.0
    raise GemmaConfigError(f"the file asks for rope scaling '{kind}'; Gemma-3 uses 'linear' or none.")


_GGUF_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF_TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; names that llama.cpp does not use stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _GGUF_TOP_NAMES:
        return f"model.{_GGUF_TOP_NAMES[parts[0]]}.{parts[1]}"
    return name


def is_norm(name: str) -> bool:
    """Whether a tensor (transformers name) is the weight of an RMS norm."""
    return name.endswith(("norm.weight", "layernorm.weight"))


def rope_table(n: int, head_dim: int, theta: float, factor: float, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of ``position / factor * theta ** (-2j / hd)``, float32, each [n, hd/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inv_freq = 1.0 / (theta**exponent) / factor
    angle = torch.arange(n, dtype=torch.float32, device=device)[:, None] * inv_freq  # (n, hd/2)
    return angle.cos(), angle.sin()


class Gemma3Attention(nn.Module):
    """Causal attention with grouped queries; q and k are normalised per head before the rotation."""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        self.config = config
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        linear = {"bias": False, "dtype": dtype, "device": device}
        self.q_proj = operations.Linear(config.width, q_width, **linear)
        self.k_proj = operations.Linear(config.width, kv_width, **linear)
        self.v_proj = operations.Linear(config.width, kv_width, **linear)
        self.o_proj = operations.Linear(q_width, config.width, **linear)
        self.q_norm = operations.RMSNorm(config.head_dim, eps=config.norm_eps, dtype=torch.float32, device=device)
        self.k_norm = operations.RMSNorm(config.head_dim, eps=config.norm_eps, dtype=torch.float32, device=device)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, n, D]; ``mask`` [n, n] bool, None for plain causal attention. Returns [B, n, D]."""
        c = self.config
        q, k, v = fused.linears((self.q_proj, self.k_proj, self.v_proj), x)  # (B, n, D) -> (B, n, heads*hd) each
        q, k = passes.norm_rope(q, k, self.q_norm, self.k_norm, rope)  # (B, n, heads*hd) -> (B, heads, n, hd)
        out = passes.attention(q, k, passes.heads(v, c.head_dim), mask, c.query_width**-0.5)
        return fused.linear(self.o_proj, out)


class Gemma3MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))"""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        linear = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj = operations.Linear(config.width, config.ffn_width, **linear)
        self.up_proj = operations.Linear(config.width, config.ffn_width, **linear)
        self.down_proj = operations.Linear(config.ffn_width, config.width, **linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.linear(self.down_proj, passes.geglu(*fused.linears((self.gate_proj, self.up_proj), x)))


class Gemma3Layer(nn.Module):
    """Attention and feed-forward, each between two norms: x += post(f(pre(x)))."""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        norm = {"eps": config.norm_eps, "dtype": torch.float32, "device": device}
        self.self_attn = Gemma3Attention(config, operations, dtype, device)
        self.mlp = Gemma3MLP(config, operations, dtype, device)
        self.input_layernorm = operations.RMSNorm(config.width, **norm)
        self.post_attention_layernorm = operations.RMSNorm(config.width, **norm)
        self.pre_feedforward_layernorm = operations.RMSNorm(config.width, **norm)
        self.post_feedforward_layernorm = operations.RMSNorm(config.width, **norm)

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """x [B, n, D] float32 -> the same; matrix products run in ``dtype``."""
        h = self.self_attn(passes.norm(self.input_layernorm, x, dtype), rope, mask)
        x, h = passes.add_norm(x, h, self.post_attention_layernorm, self.pre_feedforward_layernorm, dtype)
        return passes.add_norm(x, self.mlp(h), self.post_feedforward_layernorm, None, dtype, overwrite=True)[0]


class Gemma3Stack(nn.Module):
    """The modules under ``model.``."""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.width, dtype=dtype, device=device)
        self.layers = nn.ModuleList(Gemma3Layer(config, operations, dtype, device) for _ in range(config.num_layers))
        self.norm = operations.RMSNorm(config.width, eps=config.norm_eps, dtype=torch.float32, device=device)


class Gemma3Model(nn.Module):
    """Gemma-3 text model. ``dtype`` is the dtype of the matrix products (float32 or bfloat16; float16 overflows)."""

    def __init__(self, config: GemmaConfig, operations=nn, dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        if dtype == torch.float16:
            raise ValueError("Gemma-3's activations overflow float16; use bfloat16 or float32.")
        self.config = config
        self.dtype = dtype
        self.model = Gemma3Stack(config, operations, dtype, device)

    def hidden_states(
        self, ids: torch.Tensor, device=None, layer_scope: Callable[[int, nn.Module], contextlib.AbstractContextManager] | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the L+1 hidden states [B, n, D], float32, as they are made.

        #0 is the scaled embedding, #k the output of layer k-1, and the last one has gone through the final norm too. ``ids`` [B, n]
        holds real tokens only, the first at position 0. Work is done on ``device`` (default: where the final norm is); the embedding
        table may stay elsewhere, only rows of it travel. ``layer_scope(i, layer)`` is entered around layer i: a loader that streams
        weights brings them in there and sends them away.
        """
        c, stack = self.config, self.model
        n = ids.shape[1]
        device = torch.device(device) if device is not None else stack.norm.weight.device
        rows = stack.embed_tokens(ids.to(stack.embed_tokens.weight.device))
        x = rows.to(device).float() * math.sqrt(c.width)  # (B, n) -> (B, n, D)
        ropes = {
            True: rope_table(n, c.head_dim, c.rope_local_theta, 1.0, x.device),
            False: rope_table(n, c.head_dim, c.rope_theta, c.rope_factor, x.device),
        }
        window = sliding_mask(n, c.sliding_window, x.device) if n > c.sliding_window else None
        yield x
        for i, layer in enumerate(stack.layers):
            sliding = c.sliding_layers[i]
            with layer_scope(i, layer) if layer_scope else contextlib.nullcontext():
                x = layer(x, ropes[sliding], window if sliding else None, self.dtype)
            yield x if i + 1 < c.num_layers else stack.norm(x)

    def forward(self, ids: torch.Tensor, device=None, layer_scope=None, collect_device="cpu") -> torch.Tensor:
        """ids [1, n] or [n] -> all hidden states [L+1, n, D], float32, on ``collect_device``. ``device``, ``layer_scope`` as above."""
        ids = ids.view(1, -1)
        device = torch.device(device) if device is not None else self.model.norm.weight.device
        out = torch.empty(self.config.num_hidden_states, ids.shape[1], self.config.width, dtype=torch.float32, device=collect_device)  # (L+1, n, D)
        waits = out.device.type == "cpu" and device.type != "cpu"
        return collect(self.hidden_states(ids, device, layer_scope), out, device, GATHERED_BYTES if waits else 0)


def gathered_bytes(config: GemmaConfig, tokens: int) -> int:
    """Bytes of hidden states that wait on a GPU for their way to main memory while this many tokens run."""
    state = 4 * tokens * config.width
    return max(state, min(GATHERED_BYTES, config.num_hidden_states * state))


def collect(states: Iterator[torch.Tensor], out: torch.Tensor, device: torch.device, gathered_bytes: int) -> torch.Tensor:
    """Copy states [1, n, D], one per entry of ``out`` [L+1, n, D], which is returned; first into at most ``gathered_bytes`` on ``device``, if any.

    A copy from the GPU to main memory waits until the GPU is there, and the GPU then for the next launch: a few large ones cost less.
    """
    at_once = max(1, min(len(out), gathered_bytes // max(1, out[0].numel() * out.itemsize)))
    gathered = torch.empty_like(out[:at_once], device=device) if gathered_bytes else None
    for i, x in enumerate(states):
        if gathered is None:
            out[i].copy_(x[0])
            continue
        gathered[i % at_once].copy_(x[0])
        if (i + 1) % at_once == 0 or i + 1 == len(out):
            first = i - i % at_once
            out[first : i + 1].copy_(gathered[: i + 1 - first])
    return out


def sliding_mask(n: int, window: int, device) -> torch.Tensor:
    """[n, n] bool, True where query q may see key k: k <= q and q - k < window."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)
    return (distance >= 0) & (distance < window)
