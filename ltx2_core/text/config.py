"""Geometry of a Gemma text model, read off the shapes of its tensors and a GGUF's metadata.

Gemma 3 (LTX-2, LTX-2.3) and Gemma 4 12B (LTX-2.5) share one description. Nothing here needs torch.

Sources: ``config.json`` of google/gemma-3-* and google/gemma-4-12b; transformers ``models/gemma3``, ``models/gemma4_unified``; llama.cpp
``convert_hf_to_gguf.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..files.errors import WeightFileError
from ..files.gemma import hf_name, is_norm
from ..files.text import visible
from ..files.values import count_layers, number, sizes

LOCAL_ROPE_THETA = 10_000.0
GLOBAL_ROPE_THETA = 1_000_000.0
LOCAL_LAYERS_PER_GLOBAL = 5
"""Layers 5, 11, 17, ... attend to everything; the five before each of them only to a sliding window."""


class GemmaConfigError(WeightFileError):
    """The tensors are not those of a Gemma-3 or Gemma-4 text model that LTX-2 can use."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


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
class AttentionKind:
    """What the attention layers of one kind, sliding or full, have in common.

    window: keys a query sees, itself included, or None for all before it. rotated: pairs of the head that are rotated; the rest is not.
    own_values: False where the values are the keys before norm and rotation.
    """

    head_dim: int
    num_kv_heads: int
    window: int | None
    rope_theta: float
    rope_factor: float
    rotated: int
    own_values: bool


@dataclass(frozen=True)
class GemmaConfig:
    """Geometry of a Gemma text model.

    ``query_width``: attention scores are scaled by ``query_width ** -0.5``. ``head_dim`` and ``num_kv_heads`` are those of sliding layers;
    full layers have the same unless ``full_head_dim`` and ``full_kv_heads`` say otherwise. ``generation``: 3 or 4.
    """

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
    full_head_dim: int | None = None
    full_kv_heads: int | None = None
    generation: int = 3

    @property
    def num_hidden_states(self) -> int:
        """Embeddings, then the output of every layer."""
        return self.num_layers + 1

    @property
    def size_name(self) -> str:
        """``"12B"``, or a description of an unusual geometry."""
        size = SIZES.get((self.width, self.num_layers))
        return size.name if size else f"{self.num_layers} layers of width {self.width}"

    @property
    def logit_softcap(self) -> float | None:
        """Logits are ``cap * tanh(logit / cap)`` where there is a cap."""
        return 30.0 if self.generation == 4 else None

    def attention(self, sliding: bool) -> AttentionKind:
        """The attention of sliding or of full layers. Gemma 4's full layers rotate the first quarter of their pairs and share keys and values."""
        if sliding:
            pairs = self.head_dim // 2
            return AttentionKind(
                self.head_dim, self.num_kv_heads, self.sliding_window, self.rope_local_theta, 1.0, pairs, True
            )
        head_dim, gemma4 = self.full_head_dim or self.head_dim, self.generation == 4
        rotated = head_dim // 8 if gemma4 else head_dim // 2
        return AttentionKind(
            head_dim,
            self.full_kv_heads or self.num_kv_heads,
            None,
            self.rope_theta,
            self.rope_factor,
            rotated,
            not gemma4,
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping | None = None) -> "GemmaConfig":
        """Read the geometry off the shapes of tensors under their transformers names; ``metadata`` are a GGUF's key/values.

        Where the metadata says something that shapes also say, they must agree. Rope scaling and window come from the metadata, else
        from the table of released sizes, else there is no scaling and a window of 1024. Raises GemmaConfigError.
        """
        metadata = metadata or {}

        def shape(name: str) -> tuple[int, ...]:
            if name not in shapes:
                raise GemmaConfigError(f"tensor '{name}' is missing, so this is not a complete Gemma text model.")
            return sizes(shapes, name, 1 if is_norm(name) else 2, GemmaConfigError)

        def said(key: str, kind: type, default=None, least: float | None = 1):
            value = metadata.get(f"{arch}.{key}")
            return (
                default
                if value is None
                else number(value, f"'{key}' in the file's metadata", kind, GemmaConfigError, least)
            )

        def heads(layer: int) -> tuple[int, int, int]:
            """(head width, query heads, key heads) of a layer."""
            attention = f"model.layers.{layer}.self_attn"
            head_dim = shape(f"{attention}.q_norm.weight")[0]
            rows = [shape(f"{attention}.{name}_proj.weight")[0] for name in "qk"]
            if any(n % head_dim for n in rows):
                raise GemmaConfigError(
                    f"attention has {rows[0]} query and {rows[1]} key rows, which are not multiples of the head width {head_dim}."
                )
            return head_dim, rows[0] // head_dim, rows[1] // head_dim

        vocab_size, width = shape("model.embed_tokens.weight")
        num_layers = count_layers(shapes, "model.layers", GemmaConfigError)
        if not num_layers:
            raise GemmaConfigError(
                "the file has no layers ('model.layers.0…'), so this is not a complete Gemma text model."
            )
        generation = 4 if "model.layers.0.layer_scalar" in shapes else 3
        arch = metadata.get("general.architecture")
        arch = arch if isinstance(arch, str) else f"gemma{generation}"
        if generation == 4:
            if any("per_layer" in name for name in shapes):
                raise GemmaConfigError(
                    "this is Gemma 4 E2B or E4B (it has embeddings per layer), which writes prompts; LTX-2.5 is conditioned on Gemma 4 12B."
                )
            sliding_layers = tuple(f"model.layers.{i}.self_attn.v_proj.weight" in shapes for i in range(num_layers))
        else:
            pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
            sliding_layers = _sliding_layers(pattern, num_layers)
        head_dim, num_heads, num_kv_heads = heads(0)
        ffn_width = shape("model.layers.0.mlp.gate_proj.weight")[0]
        full = (
            heads(sliding_layers.index(False))
            if generation == 4 and False in sliding_layers
            else (head_dim, num_heads, num_kv_heads)
        )

        kv_heads = metadata.get(f"{arch}.attention.head_count_kv")
        kv_heads = (
            kv_heads[0] if isinstance(kv_heads, list) and kv_heads else kv_heads
        )  # one number per layer in Gemma 4
        for key, value, found in (
            ("block_count", said("block_count", int), num_layers),
            ("embedding_length", said("embedding_length", int), width),
            ("feed_forward_length", said("feed_forward_length", int), ffn_width),
            ("attention.head_count", said("attention.head_count", int), num_heads),
            (
                "attention.head_count_kv",
                None if kv_heads is None else number(kv_heads, "'attention.head_count_kv'", int, GemmaConfigError),
                num_kv_heads,
            ),
            ("attention.key_length", said("attention.key_length", int), full[0]),
        ):
            if value is not None and value != found:
                raise GemmaConfigError(
                    f"the file's metadata say {key} = {value}, its tensors say {found}; the file is damaged or mislabelled."
                )

        size = SIZES.get((width, num_layers), _Size("", 1024, 1.0, head_dim))
        return cls(
            vocab_size=vocab_size,
            width=width,
            ffn_width=ffn_width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            query_width=1 if generation == 4 else size.query_width,
            sliding_window=said("attention.sliding_window", int, size.sliding_window),
            sliding_layers=sliding_layers,
            rope_theta=said("rope.freq_base", float, GLOBAL_ROPE_THETA),
            rope_local_theta=said("rope.freq_base_swa", float, LOCAL_ROPE_THETA),
            rope_factor=_rope_factor(metadata, arch, 1.0 if generation == 4 else size.rope_factor),
            norm_eps=said("attention.layer_norm_rms_epsilon", float, 1e-6, least=0),
            full_head_dim=full[0] if full[0] != head_dim else None,
            full_kv_heads=full[2] if full[2] != num_kv_heads else None,
            generation=generation,
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
    if isinstance(pattern, list) and pattern:
        flags = tuple(bool(x) for x in pattern)
        if len(flags) == num_layers:
            return flags
        return tuple(flags[i % len(flags)] for i in range(num_layers))
    period = number(pattern, "'attention.sliding_window_pattern' in the file's metadata", int, GemmaConfigError)
    return tuple((i + 1) % period != 0 for i in range(num_layers))


def _rope_factor(metadata: Mapping, arch: str, default: float) -> float:
    kind = metadata.get(f"{arch}.rope.scaling.type")
    if kind is None and f"{arch}.rope.scaling.factor" not in metadata:
        return default
    if kind in (None, "linear"):
        return number(
            metadata.get(f"{arch}.rope.scaling.factor", 1.0),
            "'rope.scaling.factor' in the file's metadata",
            float,
            GemmaConfigError,
            1e-6,
        )
    if kind == "none":
        return 1.0
    raise GemmaConfigError(f"the file asks for rope scaling '{visible(kind)}'; Gemma uses 'linear' or none.")


def size_for_inputs(inputs: int) -> str | None:
    """Name of the released Gemma whose hidden states are ``inputs`` numbers per token ("12B"), None when none fits."""
    return next((size.name for (width, layers), size in SIZES.items() if width * (layers + 1) == inputs), None)
