"""Names and shapes of every tensor in an LTX-2 checkpoint, at any geometry. Standard library only.

With the default (real) geometry the result equals the released files' inventories name for name and shape for shape. With a small
one it describes a reduced checkpoint of exactly the same structure, which is what synthetic test checkpoints are made from.

Source: headers of ``ltx-2-19b-dev.safetensors`` and ``ltx-2.3-22b-dev.safetensors``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .structure_audio import audio_config, audio_vae_shapes, vocoder_shapes

Shapes = dict[str, tuple[int, ...]]

DIT_PREFIX = "model.diffusion_model."
CONNECTOR = "video_embeddings_connector."
PROJECTION_PREFIX = "text_embedding_projection."
VAE_PREFIX = "vae."
TIMESTEP_FREQUENCIES = 256
PATCH = 48  # 3 colours x 4 x 4 pixels: what the VAE's first and last convolutions see

# Blocks of the video VAE as the files' metadata lists them. The decoder runs its list from the last entry to the first.
_RES = "res_x"
VAE_BLOCKS = {
    "2.0": {
        "encoder_blocks": [
            (_RES, {"num_layers": 4}), ("compress_space_res", {"multiplier": 2}), (_RES, {"num_layers": 6}),
            ("compress_time_res", {"multiplier": 2}), (_RES, {"num_layers": 6}), ("compress_all_res", {"multiplier": 2}),
            (_RES, {"num_layers": 2}), ("compress_all_res", {"multiplier": 2}), (_RES, {"num_layers": 2}),
        ],
        "decoder_blocks": [
            (_RES, {"num_layers": 5, "inject_noise": False}), ("compress_all", {"residual": True, "multiplier": 2}),
            (_RES, {"num_layers": 5, "inject_noise": False}), ("compress_all", {"residual": True, "multiplier": 2}),
            (_RES, {"num_layers": 5, "inject_noise": False}), ("compress_all", {"residual": True, "multiplier": 2}),
            (_RES, {"num_layers": 5, "inject_noise": False}),
        ],
    },
    "2.3": {
        "encoder_blocks": [
            (_RES, {"num_layers": 4}), ("compress_space_res", {"multiplier": 2}), (_RES, {"num_layers": 6}),
            ("compress_time_res", {"multiplier": 2}), (_RES, {"num_layers": 4}), ("compress_all_res", {"multiplier": 2}),
            (_RES, {"num_layers": 2}), ("compress_all_res", {"multiplier": 1}), (_RES, {"num_layers": 2}),
        ],
        "decoder_blocks": [
            (_RES, {"num_layers": 4}), ("compress_space", {"multiplier": 2}), (_RES, {"num_layers": 6}),
            ("compress_time", {"multiplier": 2}), (_RES, {"num_layers": 4}), ("compress_all", {"multiplier": 1}),
            (_RES, {"num_layers": 2}), ("compress_all", {"multiplier": 2}), (_RES, {"num_layers": 2}),
        ],
    },
}  # fmt: skip

_STRIDE = {"compress_space": 4, "compress_time": 2, "compress_all": 8}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a checkpoint. The defaults are the released 22B model's (2.3); ``Geometry.real`` gives either version's."""

    version: str = "2.3"
    num_layers: int = 48
    heads: int = 32
    head_dim: int = 128
    audio_head_dim: int = 64
    latent_channels: int = 128
    gemma_width: int = 3840
    gemma_layers: int = 48
    connector_layers: int = 8
    connector_heads: int = 32
    connector_head_dim: int = 128
    registers: int = 128
    vae_channels: int = 128  # the encoder's first and the decoder's last width
    audio_vae_channels: int = 128  # the host wants 128 here, because its statistics have as many numbers
    audio_vae_multipliers: tuple[int, ...] = (1, 2, 4)
    audio_res_blocks: int = 2
    vocoder_widths: tuple[int, ...] = (1536, 512)  # channels after the first layer of each generator

    def __post_init__(self):
        if self.version not in VAE_BLOCKS:
            raise ValueError(f"Unknown LTX-2 version {self.version!r}; choose one of {', '.join(VAE_BLOCKS)}.")
        if self.version == "2.0" and self.connector_width != self.gemma_width:
            raise ValueError(
                f"In LTX-2 2.0 the connector is as wide as the text encoder ({self.gemma_width}); {self.connector_heads} heads of "
                f"{self.connector_head_dim} make {self.connector_width}."
            )
        if self.version == "2.3" and self.connector_width != self.width:
            raise ValueError(
                f"In LTX-2.3 the connector is as wide as the transformer ({self.width}); {self.connector_heads} heads of "
                f"{self.connector_head_dim} make {self.connector_width}."
            )
        if self.vae_channels % 8:
            raise ValueError(f"The VAE's base width is {self.vae_channels}; it must be a multiple of 8.")

    @classmethod
    def real(cls, version: str) -> "Geometry":
        """The released checkpoints."""
        if version == "2.0":
            return cls(version="2.0", connector_layers=2, connector_heads=30, vocoder_widths=(1024,))
        return cls(version=version)

    @classmethod
    def small(cls, version: str = "2.3", *, gemma_width: int = 640, gemma_layers: int = 18, **sizes) -> "Geometry":
        """A reduced checkpoint for tests: 2 layers of 4 heads x 64, a narrow VAE, matched to a Gemma of the given size.

        ``sizes`` replaces any field. In 2.0 the connector's width is the text encoder's, in 2.3 the transformer's.
        """
        base = {"version": version, "num_layers": 2, "heads": 4, "head_dim": 64, "gemma_width": gemma_width, "gemma_layers": gemma_layers,
                "connector_layers": 2, "vae_channels": 8, "audio_vae_channels": 8, "audio_res_blocks": 1,
                "vocoder_widths": (64, 32) if version == "2.3" else (32,)}  # fmt: skip
        base.update(sizes)
        base.setdefault("audio_head_dim", max(1, base["head_dim"] // 2))
        if version == "2.0":
            head = 128 if gemma_width % 128 == 0 else gemma_width // 2
            base.setdefault("connector_head_dim", head)
            base.setdefault("connector_heads", gemma_width // base["connector_head_dim"])
        else:
            base.setdefault("connector_heads", base["heads"])
            base.setdefault("connector_head_dim", base["head_dim"])
        return cls(**base)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def audio_width(self) -> int:
        return self.heads * self.audio_head_dim

    @property
    def connector_width(self) -> int:
        return self.connector_heads * self.connector_head_dim

    @property
    def gated(self) -> bool:
        return self.version != "2.0"

    @property
    def table_rows(self) -> int:
        return 9 if self.gated else 6

    @property
    def projection_inputs(self) -> int:
        return self.gemma_width * (self.gemma_layers + 1)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _attention(name: str, g: Geometry, width: int, query: int, context: int, out: int, heads: int):
    yield f"{name}.q_norm.weight", (width,)
    yield f"{name}.k_norm.weight", (width,)
    yield from _linear(f"{name}.to_q", width, query)
    yield from _linear(f"{name}.to_k", width, context)
    yield from _linear(f"{name}.to_v", width, context)
    yield from _linear(f"{name}.to_out.0", out, width)
    if g.gated:
        yield from _linear(f"{name}.to_gate_logits", heads, query)


def _feed_forward(name: str, width: int):
    yield from _linear(f"{name}.net.0.proj", 4 * width, width)
    yield from _linear(f"{name}.net.2", width, 4 * width)


def _adaln(name: str, rows: int, width: int):
    yield from _linear(f"{name}.emb.timestep_embedder.linear_1", width, TIMESTEP_FREQUENCIES)
    yield from _linear(f"{name}.emb.timestep_embedder.linear_2", width, width)
    yield from _linear(f"{name}.linear", rows * width, width)


def dit_shapes(g: Geometry) -> Shapes:
    """The video transformer without connector: bare names."""
    w = g.width
    shapes: Shapes = {"scale_shift_table": (2, w)}
    shapes.update(_linear("patchify_proj", w, g.latent_channels))
    shapes.update(_linear("proj_out", g.latent_channels, w))
    shapes.update(_adaln("adaln_single", g.table_rows, w))
    if g.gated:
        shapes.update(_adaln("prompt_adaln_single", 2, w))
    else:
        shapes.update(_linear("caption_projection.linear_1", w, g.gemma_width))
        shapes.update(_linear("caption_projection.linear_2", w, w))
    for n in range(g.num_layers):
        block = f"transformer_blocks.{n}."
        shapes[block + "scale_shift_table"] = (g.table_rows, w)
        if g.gated:
            shapes[block + "prompt_scale_shift_table"] = (2, w)
        shapes.update(_attention(block + "attn1", g, w, w, w, w, g.heads))
        shapes.update(_attention(block + "attn2", g, w, w, w, w, g.heads))
        shapes.update(_feed_forward(block + "ff", w))
    return shapes


def _connector_shapes(g: Geometry, name: str, width: int, heads: int) -> Shapes:
    shapes: Shapes = {f"{name}learnable_registers": (g.registers, width)}
    for n in range(g.connector_layers):
        block = f"{name}transformer_1d_blocks.{n}."
        shapes.update(_attention(block + "attn1", g, width, width, width, width, heads))
        shapes.update(_feed_forward(block + "ff", width))
    return shapes


def connector_shapes(g: Geometry) -> Shapes:
    """The video embeddings connector: names start with ``video_embeddings_connector.``."""
    return _connector_shapes(g, CONNECTOR, g.connector_width, g.connector_heads)


def projection_shapes(g: Geometry, audio: bool = False) -> Shapes:
    """The text projection, without prefix. 2.3 has one each for video and audio (with biases), 2.0 one for both (without)."""
    if not g.gated:
        return {"aggregate_embed.weight": (g.gemma_width, g.projection_inputs)}
    shapes: Shapes = dict(_linear("video_aggregate_embed", g.connector_width, g.projection_inputs))
    if audio:
        shapes.update(_linear("audio_aggregate_embed", g.audio_width, g.projection_inputs))
    return shapes


def audio_dit_shapes(g: Geometry) -> Shapes:
    """The audio stream inside the transformer, with its connector: bare names."""
    w, a, rows = g.width, g.audio_width, g.table_rows
    shapes: Shapes = {"audio_scale_shift_table": (2, a)}
    shapes.update(_linear("audio_patchify_proj", a, g.latent_channels))
    shapes.update(_linear("audio_proj_out", g.latent_channels, a))
    shapes.update(_adaln("audio_adaln_single", rows, a))
    shapes.update(_adaln("av_ca_video_scale_shift_adaln_single", 4, w))
    shapes.update(_adaln("av_ca_audio_scale_shift_adaln_single", 4, a))
    shapes.update(_adaln("av_ca_a2v_gate_adaln_single", 1, w))
    shapes.update(_adaln("av_ca_v2a_gate_adaln_single", 1, a))
    if g.gated:
        shapes.update(_adaln("audio_prompt_adaln_single", 2, a))
        shapes.update(_connector_shapes(g, "audio_embeddings_connector.", a, g.connector_heads))
    else:
        shapes.update(_linear("audio_caption_projection.linear_1", a, g.gemma_width))
        shapes.update(_linear("audio_caption_projection.linear_2", a, a))
        shapes.update(_connector_shapes(g, "audio_embeddings_connector.", g.connector_width, g.connector_heads))
    for n in range(g.num_layers):
        block = f"transformer_blocks.{n}."
        shapes[block + "audio_scale_shift_table"] = (rows, a)
        shapes[block + "scale_shift_table_a2v_ca_video"] = (5, w)
        shapes[block + "scale_shift_table_a2v_ca_audio"] = (5, a)
        if g.gated:
            shapes[block + "audio_prompt_scale_shift_table"] = (2, a)
        shapes.update(_attention(block + "audio_attn1", g, a, a, a, a, g.heads))
        shapes.update(_attention(block + "audio_attn2", g, a, a, a, a, g.heads))
        shapes.update(_attention(block + "audio_to_video_attn", g, a, w, a, w, g.heads))
        shapes.update(_attention(block + "video_to_audio_attn", g, a, a, w, a, g.heads))
        shapes.update(_feed_forward(block + "audio_ff", a))
    return shapes


def _conv(name: str, outputs: int, inputs: int):
    yield f"{name}.conv.weight", (outputs, inputs, 3, 3, 3)
    yield f"{name}.conv.bias", (outputs,)


def _res_block(name: str, layers: int, channels: int):
    for j in range(layers):
        yield from _conv(f"{name}.res_blocks.{j}.conv1", channels, channels)
        yield from _conv(f"{name}.res_blocks.{j}.conv2", channels, channels)


def _stride(kind: str) -> int:
    return _STRIDE[kind.removesuffix("_res")]


def vae_shapes(g: Geometry) -> Shapes:
    """The video VAE: bare names (``encoder.``, ``decoder.``, ``per_channel_statistics.``)."""
    blocks = VAE_BLOCKS[g.version]
    shapes: Shapes = {}

    channels = g.vae_channels
    shapes.update(_conv("encoder.conv_in", channels, PATCH))
    for i, (kind, settings) in enumerate(blocks["encoder_blocks"]):
        name = f"encoder.down_blocks.{i}"
        if kind == _RES:
            shapes.update(_res_block(name, settings["num_layers"], channels))
        else:
            outputs = channels * settings["multiplier"]
            shapes.update(_conv(f"{name}.conv", outputs // _stride(kind), channels))
            channels = outputs
    shapes.update(_conv("encoder.conv_out", g.latent_channels + 1, channels))  # means and one shared log-variance

    channels = 8 * g.vae_channels
    shapes.update(_conv("decoder.conv_in", channels, g.latent_channels))
    for i, (kind, settings) in enumerate(reversed(blocks["decoder_blocks"])):
        name = f"decoder.up_blocks.{i}"
        if kind == _RES:
            shapes.update(_res_block(name, settings["num_layers"], channels))
        else:
            outputs = channels // settings["multiplier"]
            shapes.update(_conv(f"{name}.conv", outputs * _stride(kind), channels))
            channels = outputs
    shapes.update(_conv("decoder.conv_out", PATCH, channels))

    shapes["per_channel_statistics.mean-of-means"] = (g.latent_channels,)
    shapes["per_channel_statistics.std-of-means"] = (g.latent_channels,)
    return shapes


def sound_shapes(g: Geometry) -> Shapes:
    """Audio VAE and vocoder, prefixes included."""
    return audio_vae_shapes(g) | vocoder_shapes(g)


def checkpoint_shapes(
    g: Geometry, *, audio: bool = False, vae: bool = True, projection: bool = True, connector: bool = True
) -> Shapes:
    """One single-file checkpoint with the released files' names and prefixes."""
    shapes = {DIT_PREFIX + name: shape for name, shape in dit_shapes(g).items()}
    if connector:
        shapes.update({DIT_PREFIX + name: shape for name, shape in connector_shapes(g).items()})
    if audio:
        sound = audio_dit_shapes(g)
        shapes.update(
            {
                DIT_PREFIX + n: s
                for n, s in sound.items()
                if connector or not n.startswith("audio_embeddings_connector.")
            }
        )
        shapes.update(sound_shapes(g))
    if projection:
        shapes.update({PROJECTION_PREFIX + name: shape for name, shape in projection_shapes(g, audio).items()})
    if vae:
        shapes.update({VAE_PREFIX + name: shape for name, shape in vae_shapes(g).items()})
    return shapes


def config(g: Geometry) -> dict:
    """The files' metadata ``config`` for this geometry (transformer, vae, scheduler), as released but for the sizes."""
    transformer = {
        "_class_name": "AVTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": g.head_dim,
        "caption_channels": g.gemma_width,
        "cross_attention_dim": g.width,
        "in_channels": g.latent_channels,
        "out_channels": g.latent_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "num_attention_heads": g.heads,
        "num_layers": g.num_layers,
        "qk_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        "av_ca_timestep_scale_multiplier": 1000.0,
        "causal_temporal_positioning": True,
        "audio_num_attention_heads": g.heads,
        "audio_attention_head_dim": g.audio_head_dim,
        "audio_out_channels": g.latent_channels,
        "audio_cross_attention_dim": g.audio_width,
        "audio_positional_embedding_max_pos": [20],
        "av_cross_ada_norm": True,
        "use_embeddings_connector": True,
        "connector_attention_head_dim": g.connector_head_dim,
        "connector_num_attention_heads": g.connector_heads,
        "connector_num_layers": g.connector_layers,
        "connector_positional_embedding_max_pos": [4096],
        "connector_num_learnable_registers": g.registers,
        "connector_norm_output": True,
        "use_middle_indices_grid": True,
        "rope_type": "split",
        "frequencies_precision": "float64",
    }
    if g.gated:
        transformer.update({
            "apply_gated_attention": True,
            "connector_apply_gated_attention": True,
            "caption_projection_first_linear": False,
            "caption_projection_second_linear": False,
            "caption_proj_input_norm": False,
            "connector_learnable_registers_std": 1,
            "caption_proj_before_connector": True,
            "audio_connector_attention_head_dim": g.audio_head_dim,
            "audio_connector_num_attention_heads": g.connector_heads,
            "cross_attention_adaln": True,
            "text_encoder_norm_type": "per_token_rms",
        })  # fmt: skip
    vae = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": g.latent_channels,
        **{
            side: [[kind, dict(settings)] for kind, settings in blocks]
            for side, blocks in VAE_BLOCKS[g.version].items()
        },
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": False,
        "normalize_latent_channels": False,
    }
    if g.gated or g.vae_channels != 128:  # the 2.0 files leave the widths out: readers then assume 128
        vae.update({"encoder_base_channels": g.vae_channels, "decoder_base_channels": g.vae_channels})
    if g.gated:
        vae["spatial_padding_mode"] = "zeros"
    scheduler = {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "sampler": "LinearQuadratic"}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler, **audio_config(g)}
