"""Gemma 3 and Gemma 4 text models, returning every hidden state.

The names of parameters are those of the host and of transformers' ``Gemma3ForCausalLM`` (``model.layers.0.self_attn.q_proj.weight``);
``files/gemma.py`` maps llama.cpp's GGUF names to them. The two generations differ in what ``GemmaConfig`` says about their attention;
Gemma 4 also normalises the values, takes them from the keys in full layers, and scales the stream after every layer.

Two things about the weights are settled while loading:

* **Norms hold the factor itself.** Gemma 3's safetensors store ``w`` for ``1 + w``; its GGUFs and all of Gemma 4 store the factor.
* The hidden state of a layer and everything between the matrix products is float32, whatever ``dtype`` the products run in:
  Gemma's residual stream reaches tens of thousands, where bfloat16 has no digits left for the small channels.

Letters: n tokens, D width, nh query heads, nkv key/value heads, hd head width, L layers.

Sources: transformers ``models/gemma3/modeling_gemma3.py``, ``models/gemma4_unified``; ComfyUI ``comfy/text_encoders/llama.py``; llama.cpp
``src/models/gemma3.cpp``.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn

from ..transformer import fused
from . import gemma_fused as passes
from .config import AttentionKind, GemmaConfig

GATHERED_BYTES = 128 << 20
"""Hidden states that wait on the GPU for their way to main memory."""

Rope = tuple[torch.Tensor, torch.Tensor]
LayerScope = Callable[[int, nn.Module], contextlib.AbstractContextManager]


class LayerCache(Protocol):
    """Where a layer keeps keys and values of earlier tokens (``generate.py``)."""

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v [B, nkv, n, hd] of new tokens; return the keys and values that these tokens may look at."""


def rope_table(
    positions: torch.Tensor, head_dim: int, theta: float, factor: float = 1.0, rotated: int | None = None
) -> Rope:
    """cos and sin of ``position / factor * theta ** (-2j / hd)``, float32, each [n, hd/2], for positions [n].

    Pairs from ``rotated`` on (default: none) have the angle 0.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    inv_freq = 1.0 / (theta**exponent) / factor
    if rotated is not None and rotated < len(inv_freq):
        inv_freq[rotated:].zero_()
    angle = positions.float()[:, None] * inv_freq  # (n, hd/2)
    return angle.cos(), angle.sin()


class GemmaAttention(nn.Module):
    """Causal attention with grouped queries; q and k are normalised per head before the rotation."""

    def __init__(self, config: GemmaConfig, kind: AttentionKind, operations, dtype, device):
        super().__init__()
        self.config, self.kind = config, kind
        q_width, kv_width = config.num_heads * kind.head_dim, kind.num_kv_heads * kind.head_dim
        linear = {"bias": False, "dtype": dtype, "device": device}
        self.q_proj = operations.Linear(config.width, q_width, **linear)
        self.k_proj = operations.Linear(config.width, kv_width, **linear)
        self.v_proj = operations.Linear(config.width, kv_width, **linear) if kind.own_values else None
        self.o_proj = operations.Linear(q_width, config.width, **linear)
        self.q_norm = operations.RMSNorm(kind.head_dim, eps=config.norm_eps, dtype=torch.float32, device=device)
        self.k_norm = operations.RMSNorm(kind.head_dim, eps=config.norm_eps, dtype=torch.float32, device=device)

    def forward(
        self, x: torch.Tensor, rope: Rope, mask: torch.Tensor | None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """x [B, n, D]; ``mask`` [n, keys] bool, None for plain causal attention. Returns [B, n, D]."""
        c, head_dim = self.config, self.kind.head_dim
        layers = (self.q_proj, self.k_proj) if self.v_proj is None else (self.q_proj, self.k_proj, self.v_proj)
        q, k, *own = fused.linears(layers, x)  # (B, n, D) -> (B, n, heads*hd) each
        v = passes.heads(own[0] if own else k, head_dim)  # (B, n, nkv*hd) -> (B, nkv, n, hd)
        if c.generation == 4:
            v = passes.value_norm(v, c.norm_eps)  # before k is overwritten
        q, k = passes.norm_rope(q, k, self.q_norm, self.k_norm, rope)  # (B, n, heads*hd) -> (B, heads, n, hd)
        if cache is not None:
            k, v = cache.extend(k, v)
        return fused.linear(self.o_proj, passes.attention(q, k, v, mask, c.query_width**-0.5))


class GemmaMLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))"""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        linear = {"bias": False, "dtype": dtype, "device": device}
        self.gate_proj = operations.Linear(config.width, config.ffn_width, **linear)
        self.up_proj = operations.Linear(config.width, config.ffn_width, **linear)
        self.down_proj = operations.Linear(config.ffn_width, config.width, **linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fused.linear(self.down_proj, passes.geglu(*fused.linears((self.gate_proj, self.up_proj), x)))


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms: x += post(f(pre(x))); in Gemma 4 all of x is then scaled by a number."""

    def __init__(self, config: GemmaConfig, kind: AttentionKind, operations, dtype, device):
        super().__init__()
        norm = {"eps": config.norm_eps, "dtype": torch.float32, "device": device}
        self.self_attn = GemmaAttention(config, kind, operations, dtype, device)
        self.mlp = GemmaMLP(config, operations, dtype, device)
        self.input_layernorm = operations.RMSNorm(config.width, **norm)
        self.post_attention_layernorm = operations.RMSNorm(config.width, **norm)
        self.pre_feedforward_layernorm = operations.RMSNorm(config.width, **norm)
        self.post_feedforward_layernorm = operations.RMSNorm(config.width, **norm)
        if config.generation == 4:
            scale = torch.empty(1, dtype=torch.float32, device=device)
            self.layer_scalar = nn.Parameter(scale, requires_grad=False)
        else:
            self.layer_scalar = None

    def forward(
        self,
        x: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        dtype: torch.dtype,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x [B, n, D] float32 -> the same; matrix products run in ``dtype``."""
        h = self.self_attn(passes.norm(self.input_layernorm, x, dtype), rope, mask, cache)
        x, h = passes.add_norm(x, h, self.post_attention_layernorm, self.pre_feedforward_layernorm, dtype)
        x = passes.add_norm(x, self.mlp(h), self.post_feedforward_layernorm, None, dtype, overwrite=True)[0]
        return x if self.layer_scalar is None else x * self.layer_scalar.to(x.device)


class GemmaStack(nn.Module):
    """The modules under ``model.``."""

    def __init__(self, config: GemmaConfig, operations, dtype, device):
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.width, dtype=dtype, device=device)
        kinds = {sliding: config.attention(sliding) for sliding in (True, False)}
        self.layers = nn.ModuleList(
            GemmaLayer(config, kinds[s], operations, dtype, device) for s in config.sliding_layers
        )
        self.norm = operations.RMSNorm(config.width, eps=config.norm_eps, dtype=torch.float32, device=device)


class GemmaModel(nn.Module):
    """Gemma text model. ``dtype`` is the dtype of the matrix products (float32 or bfloat16; float16 overflows)."""

    def __init__(self, config: GemmaConfig, operations=nn, dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        if dtype == torch.float16:
            raise ValueError("Gemma's activations overflow float16; use bfloat16 or float32.")
        self.config = config
        self.dtype = dtype
        self.model = GemmaStack(config, operations, dtype, device)

    def embed(self, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
        """ids [B, n] -> scaled embeddings [B, n, D], float32 on ``device``. The table may lie elsewhere; only rows of it travel."""
        table = self.model.embed_tokens
        return table(ids.to(table.weight.device)).to(device).float() * math.sqrt(self.config.width)

    def run_layers(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        masks: dict[bool, torch.Tensor | None],
        caches: list[LayerCache] | None = None,
        layer_scope: LayerScope | None = None,
    ) -> Iterator[torch.Tensor]:
        """Yield the output [B, n, D] of every layer for embeddings x at ``positions`` [n]; the last one is normed.

        masks: [n, keys] bool or None (causal) for sliding (True) and full (False) layers. caches: one per layer.
        """
        c, stack = self.config, self.model
        kinds = {sliding: c.attention(sliding) for sliding in set(c.sliding_layers)}
        ropes = {s: rope_table(positions, k.head_dim, k.rope_theta, k.rope_factor, k.rotated) for s, k in kinds.items()}
        for i, (layer, sliding) in enumerate(zip(stack.layers, c.sliding_layers)):
            with layer_scope(i, layer) if layer_scope else contextlib.nullcontext():
                x = layer(x, ropes[sliding], masks[sliding], self.dtype, caches[i] if caches else None)
            yield x if i + 1 < c.num_layers else stack.norm(x)

    def hidden_states(
        self, ids: torch.Tensor, device=None, layer_scope: LayerScope | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the L+1 hidden states [B, n, D], float32, as they are made.

        #0 is the scaled embedding, #k the output of layer k-1, and the last one has gone through the final norm too. ``ids`` [B, n]
        holds real tokens only, the first at position 0. Work is done on ``device`` (default: where the final norm is).
        ``layer_scope(i, layer)`` is entered around layer i: a loader that streams weights brings them in there and sends them away.
        """
        n = ids.shape[1]
        x = self.embed(ids, self._device(device))
        yield x
        yield from self.run_layers(
            x, torch.arange(n, device=x.device), self.causal_masks(n, x.device), layer_scope=layer_scope
        )

    def causal_masks(self, n: int, device) -> dict[bool, torch.Tensor | None]:
        """``masks`` of ``run_layers`` for n tokens from position 0 on."""
        window = self.config.sliding_window
        return {True: sliding_mask(n, window, device) if n > window else None, False: None}

    def _device(self, device) -> torch.device:
        return torch.device(device) if device is not None else self.model.norm.weight.device

    def forward(self, ids: torch.Tensor, device=None, layer_scope=None, collect_device="cpu") -> torch.Tensor:
        """ids [1, n] or [n] -> all hidden states [L+1, n, D], float32, on ``collect_device``. ``device``, ``layer_scope`` as above."""
        ids = ids.view(1, -1)
        device = self._device(device)
        shape = (self.config.num_hidden_states, ids.shape[1], self.config.width)  # (L+1, n, D)
        out = torch.empty(shape, dtype=torch.float32, device=collect_device)
        waits = out.device.type == "cpu" and device.type != "cpu"
        return collect(self.hidden_states(ids, device, layer_scope), out, device, GATHERED_BYTES if waits else 0)


def gathered_bytes(config: GemmaConfig, tokens: int) -> int:
    """Bytes of hidden states that wait on a GPU for their way to main memory while this many tokens run."""
    state = 4 * tokens * config.width
    return max(state, min(GATHERED_BYTES, config.num_hidden_states * state))


def collect(
    states: Iterator[torch.Tensor], out: torch.Tensor, device: torch.device, gathered_bytes: int
) -> torch.Tensor:
    """Copy states [1, n, D], one per entry of ``out`` [L+1, n, D], which is returned; first into ``gathered_bytes`` on ``device``, if any.

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


Gemma3Model = GemmaModel  # its name until loaders say GemmaModel
