"""What a video VAE looks like: read from the ``config`` metadata, or from names and shapes when a file has none.

Sources: the ``vae`` part of the ``config`` metadata in Lightricks' LTX-2 and LTX-2.3 checkpoints; ltx-core ``model/video_vae``; ComfyUI
``comfy/ldm/lightricks/vae/causal_video_autoencoder.py``. Both block lists here are in the order in which data runs through them; the metadata
lists the decoder's blocks the other way round.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..files.errors import WeightFileError
from ..files.structure import VAE_BLOCKS
from ..files.text import table, visible
from ..files.values import count_layers, number, sizes
from .diffusion_config import DiffusionDecoderConfig

MOST_BLOCKS = 64  # of one side; the released ones have nine
DIFFUSES = "decoder.conv_in_x_t.weight"
"""The tensor that tells LTX-2.5's diffusion decoder."""

STRIDES = {"space": (1, 2, 2), "time": (2, 1, 1), "all": (2, 2, 2)}
_KIND_OF_FACTOR = {2: "time", 4: "space", 8: "all"}


class VAEConfigError(WeightFileError):
    """The tensors or the metadata do not describe an LTX-2 video VAE that this pack runs."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class VAEBlock:
    """One entry of a block list: ``layers`` residual blocks, or one resampler of the given kind.

    kind: "res", "space", "time" or "all" (which axes are halved or doubled). multiplier: the width is multiplied (encoder) or divided (decoder) by
    it. residual: a decoder resampler adds its rearranged input (LTX-2 2.0).
    """

    kind: str
    layers: int = 0
    multiplier: int = 1
    residual: bool = False

    @property
    def stride(self) -> tuple[int, int, int]:
        return STRIDES[self.kind]


def res(layers: int) -> VAEBlock:
    return VAEBlock("res", layers=layers)


@dataclass(frozen=True)
class VAEConfig:
    """Geometry of one video VAE. ``has_encoder`` and ``has_decoder`` say which halves a file holds."""

    encoder_blocks: tuple[VAEBlock, ...]
    decoder_blocks: tuple[VAEBlock, ...]
    encoder_base_channels: int = 128
    decoder_base_channels: int = 128
    latent_channels: int = 128
    pixel_channels: int = 3
    patch_size: int = 4
    encoder_padding: str = "zeros"
    decoder_padding: str = "zeros"
    has_encoder: bool = True
    has_decoder: bool = True
    diffusion: DiffusionDecoderConfig | None = None  # LTX-2.5's other decoder; ``decoder_blocks`` is then empty

    def __post_init__(self):
        for side, mode in (("encoder", self.encoder_padding), ("decoder", self.decoder_padding)):
            if mode not in ("zeros", "reflect"):
                raise VAEConfigError(
                    f"The {side}'s spatial padding is '{mode}'; this pack knows 'zeros' and 'reflect'."
                )
        if not (self.has_encoder or self.has_decoder):
            raise VAEConfigError("A video VAE needs an encoder or a decoder; this description has neither.")

    @property
    def decoder_width(self) -> int:
        """Channels after the decoder's ``conv_in``."""
        if self.diffusion is not None:
            return self.diffusion.stage_channels[0]
        return self.decoder_base_channels * math.prod(block.multiplier for block in self.decoder_blocks)

    def _blocks(self) -> tuple[VAEBlock, ...]:
        return self.decoder_blocks if self.has_decoder else self.encoder_blocks

    @property
    def temporal_scale(self) -> int:
        """Pixel frames per latent frame (8 in the released models)."""
        if self.diffusion is not None:
            return self.diffusion.temporal_scale
        return math.prod(block.stride[0] for block in self._blocks() if block.kind != "res")

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent along height and width (32 in the released models)."""
        if self.diffusion is not None:
            return self.diffusion.spatial_scale
        return self.patch_size * math.prod(block.stride[1] for block in self._blocks() if block.kind != "res")

    def pixel_frames(self, latent_frames: int) -> int:
        """F' latent frames decode to scale * (F' - 1) + 1 pixel frames."""
        return self.temporal_scale * (latent_frames - 1) + 1

    def latent_frames(self, pixel_frames: int) -> int:
        """F pixel frames encode to 1 + (F - 1) // scale latent frames; surplus frames at the end are dropped."""
        return 1 + (pixel_frames - 1) // self.temporal_scale

    def to_metadata(self) -> dict:
        """The ``vae`` part of the ``config`` metadata, in the released checkpoints' own terms (used when writing a file)."""

        def listed(blocks, resampler):
            for block in blocks:
                if block.kind == "res":
                    yield ["res_x", {"num_layers": block.layers}]
                else:
                    yield [
                        resampler.format(block.kind),
                        {"multiplier": block.multiplier} | ({"residual": True} if block.residual else {}),
                    ]

        described = {
            "_class_name": "CausalVideoAutoencoder",
            "dims": 3,
            "in_channels": self.pixel_channels,
            "out_channels": self.pixel_channels,
            "latent_channels": self.latent_channels,
            "encoder_blocks": list(listed(self.encoder_blocks, "compress_{}_res")),
            "decoder_blocks": list(listed(reversed(self.decoder_blocks), "compress_{}")),
            "scaling_factor": 1.0,
            "norm_layer": "pixel_norm",
            "patch_size": self.patch_size,
            "latent_log_var": "uniform",
            "use_quant_conv": False,
            "causal_decoder": False,
            "timestep_conditioning": False,
            "normalize_latent_channels": False,
            "encoder_base_channels": self.encoder_base_channels,
            "decoder_base_channels": self.decoder_base_channels,
        }
        if self.decoder_padding == self.encoder_padding:
            described["spatial_padding_mode"] = self.decoder_padding
        elif self.decoder_padding == "zeros":
            described |= {"encoder_spatial_padding_mode": "reflect", "decoder_spatial_padding_mode": "zeros"}
        return described


def reduced(config: VAEConfig, base_channels: int, latent_channels: int | None = None) -> VAEConfig:
    """The same block lists with another base width (and latent width): for small trained or synthetic VAEs."""
    return replace(
        config,
        encoder_base_channels=base_channels,
        decoder_base_channels=base_channels,
        latent_channels=config.latent_channels if latent_channels is None else latent_channels,
    )


_PARTS = ("encoder.", "decoder.", "per_channel_statistics.")
_PREFIXES = ("vae.", "first_stage_model.", "video_vae.", "model.vae.")


def vae_names(names) -> dict[str, str]:
    """{name without prefix: name in the file} of a file's VAE tensors; empty when it has none. Prefixed tensors win over bare ones."""
    for prefix in (*_PREFIXES, ""):
        found = {
            name.removeprefix(prefix): name
            for name in names
            if name.startswith(prefix) and name.removeprefix(prefix).startswith(_PARTS)
        }
        if any(not name.startswith("per_channel_statistics.") for name in found):
            return found
    return {}


def _refuse_other_networks(names) -> None:
    """Raise for autoencoders that other models use, by their marker tensors. names: without the ``vae.`` prefix."""
    has = set(names).__contains__

    def any_matches(pattern):
        found = re.compile(pattern)
        return any(found.search(name) for name in names)

    runs_elsewhere = "Load it with ComfyUI's own VAE loader; for this pack use the video VAE of LTX-2 or LTX-2.3."
    if has("decoder.22.bias"):
        raise VAEConfigError(f"This is a tiny preview decoder (TAE), not the video VAE. {runs_elsewhere}")
    if any_matches(
        r"^decoder\..*time_embedder\.|^encoder\.down_blocks\.\d+\.conv\.weight$|\.conv_shortcut\.|^decoder\.timestep_scale_multiplier$"
    ):
        raise VAEConfigError(f"This is the VAE of LTX-Video 0.9, whose latents differ from LTX-2's. {runs_elsewhere}")
    if any_matches(r"\.(mid_block|resnets|upsamplers|downsamplers)\."):
        raise VAEConfigError(
            "This VAE has diffusers' tensor names; use the file in Lightricks' naming ('decoder.up_blocks.0.res_blocks.0.conv1.conv.weight')."
        )
    if any_matches(r"^(audio_vae|vocoder)\.") and not any_matches(r"^(encoder|decoder)\."):
        raise VAEConfigError(f"This is the audio VAE, not the video VAE. {runs_elsewhere}")


def _blocks_of(shapes, side, stem) -> list[list[str]]:
    """Names inside each block of one side, in order."""
    inner: dict[str, list[str]] = {}
    for name in shapes:
        if name.startswith(f"{side}.{stem}."):
            index, _, rest = name[len(side) + len(stem) + 2 :].partition(".")
            inner.setdefault(index, []).append(rest)
    indices = [str(i) for i in range(len(inner))]
    if not inner or len(inner) > MOST_BLOCKS or set(inner) != set(indices):
        found = sorted(inner)[:MOST_BLOCKS]
        raise VAEConfigError(
            f"The {side}'s blocks are numbered {visible(found)}; expected 0, 1, 2, ... without gaps. This is no LTX-2 video VAE."
        )
    return [inner[index] for index in indices]


def _conv_channels(shapes, name):
    name = f"{name}.conv.weight"
    if name not in shapes:
        raise VAEConfigError(f"'{name}' is missing; the file is not a complete LTX-2 video VAE.")
    return sizes(shapes, name, 5, VAEConfigError)[:2]


def _side_blocks(shapes, side, stem) -> list[VAEBlock]:
    """Block list of one side in execution order; resampler kinds follow from conv widths."""
    blocks, width = [], _conv_channels(shapes, f"{side}.conv_in")[0]
    held = _blocks_of(shapes, side, stem)
    for i, inner in enumerate(held):
        block = f"{side}.{stem}.{i}"
        layers = count_layers(inner, "res_blocks", VAEConfigError)
        if layers:
            blocks.append(res(layers))
            continue
        conv_out, conv_in = _conv_channels(shapes, f"{block}.conv")
        # the width after a resampler is what the next convolution reads
        follower = f"{side}.{stem}.{i + 1}"
        if f"{follower}.res_blocks.0.conv1.conv.weight" in shapes:
            following = _conv_channels(shapes, f"{follower}.res_blocks.0.conv1")[1]
        elif i + 1 < len(held):
            following = _conv_channels(shapes, f"{follower}.conv")[1]
        else:
            following = _conv_channels(shapes, f"{side}.conv_out")[1]
        down = side == "encoder"
        factor = following / conv_out if down else conv_out / following
        multiplier = following / width if down else width / following
        if conv_in != width or factor not in _KIND_OF_FACTOR or multiplier != int(multiplier):
            raise VAEConfigError(
                f"'{block}' turns {width} channels into {following} through {conv_out}; no LTX-2 resampler does that. This is no LTX-2 video VAE."
            )
        blocks.append(VAEBlock(_KIND_OF_FACTOR[factor], multiplier=int(multiplier)))
        width = following
    return blocks


def _from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    has_encoder = "encoder.conv_in.conv.weight" in shapes
    diffuses = DIFFUSES in shapes
    has_decoder = diffuses or "decoder.conv_in.conv.weight" in shapes
    if not (has_encoder or has_decoder):
        raise VAEConfigError(
            "Neither 'encoder.conv_in.conv.weight' nor 'decoder.conv_in.conv.weight' is here; the file holds no LTX-2 video VAE."
        )
    values = {"has_encoder": has_encoder, "has_decoder": has_decoder, "encoder_blocks": (), "decoder_blocks": ()}
    if has_encoder:
        values["encoder_blocks"] = tuple(_side_blocks(shapes, "encoder", "down_blocks"))
        values["encoder_base_channels"], patched = _conv_channels(shapes, "encoder.conv_in")
        values["latent_channels"] = (
            _conv_channels(shapes, "encoder.conv_out")[0] - 1
        )  # means and one shared log-variance
    if diffuses:
        values["diffusion"] = DiffusionDecoderConfig()
        values["latent_channels"], patched = (
            sizes(shapes, name, 2, VAEConfigError)[1] for name in ("decoder.conv_in.weight", DIFFUSES)
        )
    elif has_decoder:
        blocks = _side_blocks(shapes, "decoder", "up_blocks")
        # Residual resamplers and reflect padding leave no trace in the tensors: only 2.0 has three "all" resamplers and nothing else.
        is_2_0 = [block.kind for block in blocks if block.kind != "res"] == ["all"] * 3
        values["decoder_blocks"] = tuple(replace(block, residual=is_2_0 and block.kind != "res") for block in blocks)
        values["decoder_padding"] = "reflect" if is_2_0 else "zeros"
        values["decoder_base_channels"] = _conv_channels(shapes, "decoder.conv_out")[1]
        values["latent_channels"] = _conv_channels(shapes, "decoder.conv_in")[1]
        patched = _conv_channels(shapes, "decoder.conv_out")[0]
    values["pixel_channels"] = 3
    values["patch_size"] = math.isqrt(patched // 3)
    if 3 * values["patch_size"] ** 2 != patched:
        raise VAEConfigError(f"The VAE has {patched} patched pixel channels; expected 3 times a square (48 in LTX-2).")
    return VAEConfig(**values)


def _entry(entry, side) -> tuple[str, Mapping]:
    """(name, settings) of one entry of a block list in the metadata."""
    name, params = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
    params = {"num_layers": params} if type(params) is int else params
    if not isinstance(name, str) or not isinstance(params, Mapping):
        raise VAEConfigError(
            f"The metadata lists the {side} block {visible(entry)}; expected a name with settings. The file is damaged or another model's."
        )
    return name, params


def _whole(described: Mapping, key: str, default: int | None = None) -> int:
    """A whole number in the metadata."""
    return number(described.get(key, default), f"'{key}' in the VAE's metadata", int, VAEConfigError)


def _listed_blocks(listed, side) -> tuple[VAEBlock, ...]:
    pattern = re.compile(r"compress_(space|time|all)_res" if side == "encoder" else r"compress_(space|time|all)")
    blocks = []
    if not isinstance(listed, (list, tuple)) or len(listed) > MOST_BLOCKS:
        raise VAEConfigError(
            f"The metadata's list of {side} blocks is {visible(listed)}; expected at most {MOST_BLOCKS} blocks."
        )
    for entry in listed:
        name, params = _entry(entry, side)
        if name == "res_x" and not params.get("inject_noise", False):
            blocks.append(res(_whole(params, "num_layers")))
        elif match := pattern.fullmatch(name):
            default = 2 if side == "encoder" else 1
            blocks.append(
                VAEBlock(
                    match[1],
                    multiplier=_whole(params, "multiplier", default),
                    residual=bool(params.get("residual", False)),
                )
            )
        else:
            raise VAEConfigError(
                f"The metadata lists the {side} block '{visible(name)}' {visible(params)}, which LTX-2 does not have; this is another model's VAE."
            )
    return tuple(blocks if side == "encoder" else reversed(blocks))


def _from_metadata(described: Mapping) -> VAEConfig:
    name = described.get("_class_name", "CausalVideoAutoencoder")
    if name == "CausalDiffusionVAE":
        return _diffusion_from_metadata(described)
    if name != "CausalVideoAutoencoder":
        raise VAEConfigError(
            f"The metadata names the VAE class '{name}'; this pack runs 'CausalVideoAutoencoder' (LTX-2 and LTX-2.3)."
        )
    # a key that is absent means what the official code assumes for this class
    for key, absent, supported in (
        ("dims", 3, 3),
        ("norm_layer", "pixel_norm", "pixel_norm"),
        ("latent_log_var", "uniform", "uniform"),
        ("causal_decoder", False, False),
        ("timestep_conditioning", False, False),
        ("use_quant_conv", False, False),
    ):
        if described.get(key, absent) != supported:
            raise VAEConfigError(
                f"The metadata sets '{key}' to {described[key]!r}; LTX-2 has {supported!r}, so this is another model's VAE."
            )
    if "encoder_blocks" not in described or "decoder_blocks" not in described:
        raise VAEConfigError(
            "The metadata's 'vae' part lists no 'encoder_blocks' and 'decoder_blocks'; this is another model's VAE."
        )
    padding = described.get("spatial_padding_mode")
    return VAEConfig(
        encoder_blocks=_listed_blocks(described["encoder_blocks"], "encoder"),
        decoder_blocks=_listed_blocks(described["decoder_blocks"], "decoder"),
        encoder_base_channels=_whole(described, "encoder_base_channels", 128),
        decoder_base_channels=_whole(described, "decoder_base_channels", 128),
        latent_channels=_whole(described, "latent_channels", 128),
        pixel_channels=_whole(described, "in_channels", 3),
        patch_size=_whole(described, "patch_size", 4),
        encoder_padding=described.get("encoder_spatial_padding_mode", padding or "zeros"),
        decoder_padding=described.get("decoder_spatial_padding_mode", padding or "reflect"),
    )


def _diffusion_from_metadata(described: Mapping) -> VAEConfig:
    """LTX-2.5's diffusion VAE: the encoder of LTX-2.3, described by itself, and the other decoder."""
    encoder, diffusion = described.get("encoder", {}), DiffusionDecoderConfig.from_metadata(described)
    return VAEConfig(
        encoder_blocks=_listed_blocks(encoder.get("blocks", []), "encoder"),
        decoder_blocks=(),
        encoder_base_channels=_whole(encoder, "base_channels", 128),
        latent_channels=diffusion.latent_channels,
        pixel_channels=diffusion.pixel_channels,
        patch_size=diffusion.patch_size,
        encoder_padding=encoder.get("spatial_padding_mode", "zeros"),
        diffusion=diffusion,
    )


def _vae_part(metadata) -> Mapping | None:
    """The ``vae`` part of the ``config`` metadata (a JSON string in files), or None."""
    config = (metadata or {}).get("config")
    try:
        config = table(config, "the 'config' metadata") if config else {}
        part = config.get("vae", config if "_class_name" in config else None)
        return table(part, "the 'vae' part of the 'config' metadata") if part else None
    except ValueError as error:
        raise VAEConfigError(f"{error}") from error


def _sketch(config: VAEConfig, side: str) -> str:
    blocks = config.encoder_blocks if side == "encoder" else config.decoder_blocks
    return " ".join(f"res{b.layers}" if b.kind == "res" else f"{b.kind}{b.multiplier}" for b in blocks)


def vae_config_from_shapes(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping | None = None) -> VAEConfig:
    """Geometry from tensor names and shapes; what the metadata says besides (padding, residual resamplers) takes precedence.

    shapes: logical shapes, with the ``vae.`` prefix or without. metadata: a file's key-value metadata; only its ``config`` entry is read.
    Raises VAEConfigError when this is another model's VAE, or when shapes and metadata disagree.
    """
    shapes = {name: shapes[stored] for name, stored in vae_names(shapes).items()} or shapes
    _refuse_other_networks(shapes)
    described = _vae_part(metadata)
    config = None if described is None else _from_metadata(described)
    found = _from_shapes(shapes)
    if config is None:
        return found
    for side, present in (("encoder", found.has_encoder), ("decoder", found.has_decoder)):
        if present and _sketch(found, side) != _sketch(config, side):
            raise VAEConfigError(
                f"The {side}'s tensors make up the blocks '{_sketch(found, side)}' but the metadata describes '{_sketch(config, side)}'; "
                "the file was put together from two models."
            )
    widths = {
        "latent_channels": found.latent_channels,
        "patch_size": found.patch_size,
        "pixel_channels": found.pixel_channels,
    }
    if found.has_encoder:
        widths["encoder_base_channels"] = found.encoder_base_channels
    if found.has_decoder:
        widths["decoder_base_channels"] = found.decoder_base_channels
    for name, value in widths.items():
        if getattr(config, name) != value:
            raise VAEConfigError(
                f"The tensors say {name} = {value} but the metadata says {getattr(config, name)}; the file was put together from two models."
            )
    return replace(config, has_encoder=found.has_encoder, has_decoder=found.has_decoder)


def _released(version: str, padding: str) -> VAEConfig:
    listed = VAE_BLOCKS[version]
    sides = {f"{side}_blocks": _listed_blocks(listed[f"{side}_blocks"], side) for side in ("encoder", "decoder")}
    return VAEConfig(**sides, decoder_padding=padding)


LTX2_3_VAE, LTX2_0_VAE = _released("2.3", "zeros"), _released("2.0", "reflect")
