"""What a set of DiT weights is: version, geometry and constants, read from tensor names and shapes alone.

Letters used for shapes throughout ``ltx2_core``: ``B`` batch, ``T`` video tokens, ``S`` text tokens, ``D`` width of the
transformer, ``nh``/``hd`` heads and head width, ``C F H W`` latent channels, frames, height, width (so H is never heads).

Shapes tell nearly everything. What they cannot tell (RoPE constants, the head count of a model without attention gates) comes
from the file's ``config`` metadata where it is present, else from the named constants below. Where metadata and shapes speak
about the same thing and differ, that is an error which shows both.

Source of the values: the ``config`` metadata of Lightricks' ``ltx-2-19b-dev`` and ``ltx-2.3-22b-dev`` and
Lightricks/LTX-2 ``ltx_core/model/transformer/model_configurator.py``.
"""

import logging
from dataclasses import dataclass

from ..files.errors import WeightFileError
from ..files.names import AUDIO_CONNECTOR, CONNECTOR
from ..files.text import table, visible
from ..files.values import count_layers, number, sizes

logger = logging.getLogger(__name__)

# LTX-2 models are trained with these; a GGUF without metadata does not say them.
HEAD_DIM = 128  # both versions, DiT and connector
RELEASED_WIDTHS = (4096, 3840)  # DiT, and 2.0's connector
ROPE_THETA = 10000.0
ROPE_MAX_POS = (20, 2048, 2048)  # seconds, pixels, pixels
CONNECTOR_MAX_POS = 4096  # tokens
TIMESTEP_SCALE = 1000.0
NORM_EPS = 1e-6
QK_NORM_EPS = 1e-6
CAPTION_CHANNELS = 3840  # hidden size of Gemma-3 12B
AUDIO_HEAD_DIM = 64  # audio stream and, in 2.3, its connector
AUDIO_MAX_POS = 20  # seconds
# The cross-modal gates see sigma times this. A GGUF without metadata says nothing, and the official code's own default of 1 is not
# what the released models were trained with.
CROSS_GATE_TIMESTEP_SCALE = 1000.0
VAE_SCALE_FACTORS = (8, 32, 32)  # pixel frames, rows and columns per latent


MODEL_NAMES = {"2.0": "LTX-2", "2.3": "LTX-2.3"}  # version -> what its makers call it


class ConfigError(WeightFileError):
    """The tensors do not describe an LTX-2 model this pack can run, or the metadata contradicts them."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class ConnectorConfig:
    """Geometry of the embeddings connector, the small transformer between text features and DiT."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    num_learnable_registers: int
    apply_gated_attention: bool
    ff_dim: int
    rope_theta: float = ROPE_THETA
    rope_max_pos: int = CONNECTOR_MAX_POS
    norm_eps: float = NORM_EPS

    @property
    def inner_dim(self):
        """Width: heads times head width."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class AudioConfig:
    """Geometry of the audio stream beside the video's, and of the attention between the two. ``connector``: as in LTX2Config."""

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    cross_attention_dim: int  # width of the attention between the streams
    ff_dim: int
    connector: ConnectorConfig | None = None
    rope_max_pos: int = AUDIO_MAX_POS
    cross_gate_timestep_scale: float = CROSS_GATE_TIMESTEP_SCALE

    @property
    def inner_dim(self):
        """Width A: heads times head width."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class LTX2Config:
    """Geometry of the DiT. ``connector`` is None when no file at hand holds one, ``audio`` None for video alone."""

    version: str  # "2.0" or "2.3"
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    cross_attention_dim: int
    caption_channels: int  # width of the text features' source (2.0: input of caption_projection)
    cross_attention_adaln: bool  # nine-row tables and prompt modulation (2.3)
    apply_gated_attention: bool  # per-head output gates (2.3)
    caption_proj_before_connector: bool  # True: no caption projection inside the DiT (2.3)
    ff_dim: int
    connector: ConnectorConfig | None = None
    audio: AudioConfig | None = None
    rope_theta: float = ROPE_THETA
    rope_max_pos: tuple[int, ...] = ROPE_MAX_POS
    timestep_scale_multiplier: float = TIMESTEP_SCALE
    norm_eps: float = NORM_EPS
    qk_norm_eps: float = QK_NORM_EPS
    vae_scale_factors: tuple[int, int, int] = VAE_SCALE_FACTORS

    @property
    def inner_dim(self):
        """Width D: heads times head width."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_dim(self):
        """Width of the context the DiT takes: 2.3 the connector's output as it is, 2.0 the input of its caption projection."""
        return self.cross_attention_dim if self.caption_proj_before_connector else self.caption_channels

    @property
    def audio_context_dim(self):
        """The same for the audio stream."""
        return self.audio.inner_dim if self.caption_proj_before_connector else self.caption_channels


def transformer_metadata(metadata):
    """The ``transformer`` block of a file's ``config`` metadata as a dict without nulls; empty when there is none.

    metadata: mapping of header entries; ``config`` is a JSON string (or an already decoded dict) that holds the block, or is the
    block itself, as in the config files beside diffusers' weights. Numbers are checked, those written as strings become numbers. A GGUF without the
    entry may say its head count under llama.cpp's key. Raises ConfigError for a ``config`` that is no JSON table.
    """
    config = metadata.get("config") if metadata else None
    try:
        block = table(config, "the file's 'config' metadata") if config else {}
        if "transformer" in block or "num_attention_heads" not in block:
            block = table(block.get("transformer") or {}, "the 'transformer' part of the file's 'config' metadata")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    block = {key: _checked(key, value) for key, value in block.items() if value is not None}
    if "num_attention_heads" not in block and metadata:
        heads = metadata.get(f"{metadata.get('general.architecture')}.attention.head_count")
        if type(heads) is int:
            block["num_attention_heads"] = _checked("num_attention_heads", heads)
    return block


# What the entries of the block are that this module reads.
_WHOLE = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "cross_attention_dim", "caption_channels",
    "connector_num_layers", "connector_num_attention_heads", "connector_attention_head_dim", "connector_num_learnable_registers",
    "audio_num_attention_heads", "audio_attention_head_dim", "audio_in_channels", "audio_out_channels", "audio_cross_attention_dim",
    "audio_connector_num_attention_heads", "audio_connector_attention_head_dim",
)  # fmt: skip
_REAL = {
    "positional_embedding_theta": 1e-3,
    "norm_eps": 0,
    "timestep_scale_multiplier": 1e-6,
    "av_ca_timestep_scale_multiplier": 1e-6,
}
_LISTS = {
    "positional_embedding_max_pos": 3,
    "connector_positional_embedding_max_pos": 1,
    "audio_positional_embedding_max_pos": 1,
}


def _checked(key, value):
    """The value of an entry, of the type that it must have."""
    what = f"'{key}' in the config metadata"
    if key in _WHOLE:
        return number(value, what, int, ConfigError)
    if key in _REAL:
        return number(value, what, float, ConfigError, _REAL[key])
    if key in _LISTS:
        values = value if isinstance(value, (list, tuple)) else [value]
        if len(values) != _LISTS[key]:
            raise ConfigError(
                f"{what} is {visible(value)}; expected {_LISTS[key]} numbers. The metadata is damaged or another model's."
            )
        return tuple(number(one, what, int, ConfigError) for one in values)
    return value


def _agree(what, from_shapes, from_metadata):
    """from_shapes, after checking that metadata (None: silent) says the same."""
    if from_metadata is not None and from_metadata != from_shapes:
        raise ConfigError(
            f"{what}: the tensors say {from_shapes}, the file's config metadata says {from_metadata}; "
            "the metadata belongs to another model, remove it or take the file from its original source."
        )
    return from_shapes


def _heads(what, width, gate_heads, meta_heads, meta_head_dim):
    """(heads, head width) of an attention of this width.

    The head count is the length of the gate's output where there are gates; q_norm spans all heads, so without gates the
    shapes are silent: then metadata, then HEAD_DIM.
    """
    if gate_heads is not None:
        heads = _agree(f"{what} heads", gate_heads, meta_heads)
    elif meta_heads is not None:
        heads = meta_heads
    elif meta_head_dim is not None:
        heads = width // meta_head_dim
    else:
        heads = width // HEAD_DIM
        if width not in RELEASED_WIDTHS:
            logger.warning(
                "%s: the file does not tell the head count of a model %d wide; taken are %d heads of %d.",
                what,
                width,
                heads,
                HEAD_DIM,
            )
    if heads == 0 or width % heads:
        raise ConfigError(
            f"{what}: the width {width} does not split into heads of {meta_head_dim or HEAD_DIM}, and nothing in the file tells the head count; "
            "add 'num_attention_heads' to its config metadata."
        )
    head_dim = _agree(f"{what} head width", width // heads, meta_head_dim)
    if head_dim % 2:
        raise ConfigError(f"{what}: a head width of {head_dim} cannot be rotated in halves; an even one is needed.")
    return heads, head_dim


def _first(shapes, name, axis=0):
    """Length of one axis of a matrix, None when it is absent."""
    return None if name not in shapes else _size(shapes, name, axis)


def _size(shapes, name, axis):
    """Length of one axis of a matrix that must be there."""
    return sizes(shapes, name, 2, ConfigError)[axis]


def connector_config_from_shapes(shapes, metadata=None, stem=CONNECTOR):
    """ConnectorConfig from canonical names (``video_embeddings_connector.…``) and shapes, None when the connector is not there.

    shapes: mapping name -> shape; metadata: the file's header entries; stem: CONNECTOR or AUDIO_CONNECTOR. Raises ConfigError.
    """
    meta = transformer_metadata(metadata)
    layers = count_layers(shapes, stem + "transformer_1d_blocks", ConfigError)
    registers = _first(shapes, stem + "learnable_registers")
    if not layers or registers is None:
        return None
    what, block = ("audio connector" if stem == AUDIO_CONNECTOR else "connector"), stem + "transformer_1d_blocks.0."
    width = _size(shapes, stem + "learnable_registers", 1)
    gate_heads = _first(shapes, block + "attn1.to_gate_logits.weight")
    heads, head_dim = meta.get("connector_num_attention_heads"), meta.get("connector_attention_head_dim")
    if stem == AUDIO_CONNECTOR:  # 2.0's is as the video's and has no entries of its own
        heads, head_dim = (
            meta.get("audio_connector_num_attention_heads", heads),
            meta.get("audio_connector_attention_head_dim", head_dim),
        )
    heads, head_dim = _heads(what, width, gate_heads, heads, head_dim)
    max_pos = meta.get("connector_positional_embedding_max_pos", CONNECTOR_MAX_POS)
    return ConnectorConfig(
        num_layers=_agree(f"{what} layers", layers, meta.get("connector_num_layers")),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_learnable_registers=_agree(f"{what} registers", registers, meta.get("connector_num_learnable_registers")),
        apply_gated_attention=_agree(
            f"{what} gates", gate_heads is not None, meta.get("connector_apply_gated_attention")
        ),
        ff_dim=_size(shapes, block + "ff.net.0.proj.weight", 0),
        rope_theta=float(meta.get("positional_embedding_theta", ROPE_THETA)),
        rope_max_pos=max_pos[0] if isinstance(max_pos, tuple) else max_pos,
        norm_eps=float(meta.get("norm_eps", NORM_EPS)),
    )


def has_audio(shapes):
    """Whether these canonical names hold an audio stream and its attention to the video."""
    return "audio_patchify_proj.weight" in shapes and "transformer_blocks.0.audio_to_video_attn.to_q.weight" in shapes


def _audio_config(shapes, meta, metadata):
    """AudioConfig, after :func:`has_audio`."""
    block = "transformer_blocks.0."
    needed = ("audio_proj_out.weight", block + "audio_attn1.to_q.weight", block + "audio_ff.net.0.proj.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ConfigError(f"The audio stream lacks {missing[0]}; the file is incomplete, download it again.")
    width, channels = sizes(shapes, "audio_patchify_proj.weight", 2, ConfigError)
    gate_heads = _first(shapes, block + "audio_attn1.to_gate_logits.weight")
    head_dim = meta.get("audio_attention_head_dim")
    if head_dim is None and gate_heads is None and width % AUDIO_HEAD_DIM == 0:
        head_dim = AUDIO_HEAD_DIM
    heads, head_dim = _heads("audio", width, gate_heads, meta.get("audio_num_attention_heads"), head_dim)
    cross = _size(shapes, block + "audio_to_video_attn.to_q.weight", 0)
    max_pos = meta.get("audio_positional_embedding_max_pos", AUDIO_MAX_POS)
    return AudioConfig(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=_agree("audio channels", channels, meta.get("audio_in_channels")),
        out_channels=_agree(
            "audio output channels", _size(shapes, "audio_proj_out.weight", 0), meta.get("audio_out_channels")
        ),
        cross_attention_dim=_agree("audio cross-attention width", cross, meta.get("audio_cross_attention_dim")),
        ff_dim=_size(shapes, block + "audio_ff.net.0.proj.weight", 0),
        connector=connector_config_from_shapes(shapes, metadata, AUDIO_CONNECTOR),
        rope_max_pos=max_pos[0] if isinstance(max_pos, tuple) else max_pos,
        cross_gate_timestep_scale=float(meta.get("av_ca_timestep_scale_multiplier", CROSS_GATE_TIMESTEP_SCALE)),
    )


def config_from_shapes(shapes, metadata=None, audio=False):
    """LTX2Config from the DiT's canonical names (no prefix) and shapes; the connectors' too where they are among them.

    shapes: mapping name -> shape in torch order, audio names already dropped or not; metadata: the file's header entries; audio: describe
    the audio stream too. Raises ConfigError when the tensors are not an LTX-2 (2.0) or LTX-2.3 transformer or the metadata contradicts them.
    """
    meta = transformer_metadata(metadata)
    block = "transformer_blocks.0."
    needed = (
        "patchify_proj.weight",
        "proj_out.weight",
        block + "scale_shift_table",
        block + "attn2.to_k.weight",
        block + "ff.net.0.proj.weight",
    )
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ConfigError(
            f"Not an LTX-2 transformer: {missing[0]} is missing; give a file that holds the LTX-2 or LTX-2.3 video model."
        )

    rows, width = sizes(shapes, block + "scale_shift_table", 2, ConfigError)
    gated = block + "attn1.to_gate_logits.weight" in shapes
    projection = "caption_projection.linear_1.weight" in shapes
    if rows == 9 and gated and not projection:
        version = "2.3"
    elif rows == 6 and not gated and projection:
        version = "2.0"
    else:
        raise ConfigError(
            f"Unknown LTX variant: {rows}-row modulation tables, attention gates {'present' if gated else 'absent'}, caption projection "
            f"{'present' if projection else 'absent'}; this pack runs 2.0 (6 rows, no gates, projection) and 2.3 (9 rows, gates, no projection)."
        )
    if meta.get("rope_type", "split") != "split" or meta.get("frequencies_precision", "float64") != "float64":
        raise ConfigError(
            f"The config metadata asks for RoPE '{meta.get('rope_type', 'split')}' with {meta.get('frequencies_precision', 'float64')} frequencies; "
            "LTX-2 models use 'split' with float64, so this file is another model."
        )

    heads, head_dim = _heads(
        "DiT",
        width,
        _first(shapes, block + "attn1.to_gate_logits.weight"),
        meta.get("num_attention_heads"),
        meta.get("attention_head_dim"),
    )
    captions = _first(shapes, "caption_projection.linear_1.weight", 1)
    if audio and not has_audio(shapes):
        raise ConfigError(
            "The file holds the video model alone; sound needs a file with the audio stream (audio_patchify_proj, audio_attn1, …)."
        )
    return LTX2Config(
        audio=_audio_config(shapes, meta, metadata) if audio else None,
        version=version,
        num_layers=_agree("layers", count_layers(shapes, "transformer_blocks", ConfigError), meta.get("num_layers")),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=_agree("input channels", _size(shapes, "patchify_proj.weight", 1), meta.get("in_channels")),
        out_channels=_agree("output channels", _size(shapes, "proj_out.weight", 0), meta.get("out_channels")),
        cross_attention_dim=_agree(
            "cross-attention width", _size(shapes, block + "attn2.to_k.weight", 1), meta.get("cross_attention_dim")
        ),
        caption_channels=_agree("caption channels", captions, meta.get("caption_channels"))
        if projection
        else meta.get("caption_channels", CAPTION_CHANNELS),
        cross_attention_adaln=_agree("cross-attention modulation", version == "2.3", meta.get("cross_attention_adaln")),
        apply_gated_attention=_agree("attention gates", gated, meta.get("apply_gated_attention")),
        caption_proj_before_connector=_agree(
            "caption projection before the connector", not projection, meta.get("caption_proj_before_connector")
        ),
        ff_dim=_size(shapes, block + "ff.net.0.proj.weight", 0),
        connector=connector_config_from_shapes(shapes, metadata),
        rope_theta=float(meta.get("positional_embedding_theta", ROPE_THETA)),
        rope_max_pos=tuple(meta.get("positional_embedding_max_pos", ROPE_MAX_POS)),
        timestep_scale_multiplier=float(meta.get("timestep_scale_multiplier", TIMESTEP_SCALE)),
        norm_eps=float(meta.get("norm_eps", NORM_EPS)),
    )
