"""What an audio VAE with its vocoder looks like, read from names and shapes; the ``config`` metadata only confirms it.

Sources: the ``audio_vae`` and ``vocoder`` blocks of the ``config`` metadata in Lightricks' LTX-2 and LTX-2.3 checkpoints; ltx-core
``model/audio_vae``.
"""

import re
from dataclasses import dataclass
from types import SimpleNamespace

from ..files.structure_audio import audio_config

SAMPLE_RATE = 16000  # samples per second of the waveform that the mel spectrogram is made of
HOP_LENGTH = 160  # samples per mel frame
MEL_BINS = 64
TIME_FACTOR = 4  # mel frames per latent frame; the first latent frame holds one
LATENTS_PER_SECOND = SAMPLE_RATE / HOP_LENGTH / TIME_FACTOR  # 25
LATENT_CHANNELS = 8
LATENT_BINS = MEL_BINS // TIME_FACTOR  # 16
DILATIONS = (1, 3, 5)
UPSAMPLE_RATES = {
    16: 6,
    15: 5,
    8: 2,
    4: 2,
    11: 5,
    12: 6,
}  # kernel of an upsampling layer -> its rate, in every released vocoder

_AUTOENCODER = re.compile(r"^(?:(?:audio_vae|autoencoder)\.)((?:encoder|decoder|per_channel_statistics)\..+)$")
_BARE = re.compile(r"^(?:encoder|decoder)\.(?:conv_in|conv_out|mid|up|down)\.|^per_channel_statistics\.")


class AudioVAEConfigError(ValueError):
    """The tensors do not describe an audio VAE of LTX-2 or LTX-2.3."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class VocoderConfig:
    """One generator. ``end``: "tanh" (2.0), "clamp" (2.3) or "none" (bandwidth extension)."""

    mel_channels: int  # stereo * mel bins
    width: int  # channels after conv_pre; every level halves them
    rates: tuple[int, ...]
    kernels: tuple[int, ...]
    block_kernels: tuple[int, ...]
    snake: bool  # anti-aliased SnakeBeta activations instead of leaky ReLU
    end: str


@dataclass(frozen=True)
class AudioVAEConfig:
    """Geometry of an audio VAE; a part that no file holds is None or False."""

    widths: tuple[int, ...] = ()  # channels per resolution, finest first
    res_blocks: int = 2  # of an encoder level; a decoder level has one more
    has_encoder: bool = False
    has_decoder: bool = False
    vocoder: VocoderConfig | None = None
    bandwidth: VocoderConfig | None = None  # 2.3: generator of the upper band
    bandwidth_bins: int = MEL_BINS
    bandwidth_fft: int = 512

    @property
    def version(self):
        """ "2.0" or "2.3" by the vocoder, None without one: the autoencoder is the same in both."""
        return None if self.vocoder is None else "2.3" if self.vocoder.snake else "2.0"

    @property
    def output_rate(self):
        """Samples per second of a decoded waveform."""
        return 48000 if self.bandwidth else 24000 if self.vocoder and not self.vocoder.snake else SAMPLE_RATE

    def to_metadata(self):
        """The ``audio_vae`` and ``vocoder`` entries of the ``config`` metadata, as the released files have them; what is absent is left out."""
        generators = [generator for generator in (self.vocoder, self.bandwidth) if generator]
        sizes = SimpleNamespace(
            version=self.version or "2.0", vocoder_widths=[generator.width for generator in generators], audio_res_blocks=self.res_blocks,
            audio_vae_channels=self.widths[0] if self.widths else 0,
            audio_vae_multipliers=[width // self.widths[0] for width in self.widths],
        )  # fmt: skip
        if not generators:
            sizes.vocoder_widths = [0]
        described = audio_config(sizes)
        held = {"audio_vae": self.has_encoder or self.has_decoder, "vocoder": bool(generators)}
        return {part: entry for part, entry in described.items() if held[part]}


def audio_vae_names(names, shape):
    """{canonical name: name in the file} of the audio VAE's and the vocoder's tensors; empty when there are none.

    names: the file's tensor names; shape: function name -> shape. Canonical names are the full checkpoint's (``audio_vae.…``, ``vocoder.…``).
    A file with one of the two alone may have bare names: its convolutions have four axes where a video VAE's have five.
    """
    names = list(names)
    found = {}
    for name in names:
        match = _AUTOENCODER.match(name)
        if match:
            found["audio_vae." + match[1]] = name
        elif name.startswith("vocoder."):
            found[name] = name
    if not any(name.startswith("audio_vae.") for name in found):
        conv = next((name for name in names if name.endswith("coder.conv_in.conv.weight") and _BARE.match(name)), None)
        if conv and len(shape(conv)) == 4:
            found |= {"audio_vae." + name: name for name in names if _BARE.match(name)}
    if not any(name.startswith("vocoder.") for name in found) and "conv_pre.weight" in names:
        found |= {"vocoder." + name: name for name in names}
    return found


def audio_vae_config(shapes):
    """AudioVAEConfig from canonical names and shapes (torch order). Raises AudioVAEConfigError."""
    parts = {
        "has_encoder": "audio_vae.encoder.conv_in.conv.weight" in shapes,
        "has_decoder": "audio_vae.decoder.conv_in.conv.weight" in shapes,
    }
    fields = {}
    if parts["has_encoder"]:
        fields["widths"], fields["res_blocks"] = _levels(shapes, "audio_vae.encoder.down", 0)
    if parts["has_decoder"]:
        fields["widths"], blocks = _levels(shapes, "audio_vae.decoder.up", 0)
        fields["res_blocks"] = blocks - 1
    for side, name, axis in (("encoder", "conv_out", 0), ("decoder", "conv_in", 1)):
        found = shapes.get(f"audio_vae.{side}.{name}.conv.weight")
        wanted = LATENT_CHANNELS * (2 if side == "encoder" else 1)
        if found and found[axis] != wanted:
            raise AudioVAEConfigError(
                f"The audio VAE's {side} has {found[axis]} latent channels, {wanted} are expected; this is another model's audio VAE."
            )
    nested = "vocoder.vocoder.conv_pre.weight" in shapes
    stem = "vocoder.vocoder." if nested else "vocoder."
    if stem + "conv_pre.weight" in shapes:
        fields["vocoder"] = _vocoder(shapes, stem, last=True)
    if nested and "vocoder.bwe_generator.conv_pre.weight" in shapes:
        fields["bandwidth"] = _vocoder(shapes, "vocoder.bwe_generator.", last=False)
        basis, bins = shapes.get("vocoder.mel_stft.stft_fn.forward_basis"), shapes.get("vocoder.mel_stft.mel_basis")
        if basis is None or bins is None:
            raise AudioVAEConfigError(
                "The vocoder lacks 'mel_stft', which its bandwidth extension needs; download the file again."
            )
        fields |= {"bandwidth_bins": bins[0], "bandwidth_fft": basis[2]}
    if not any(parts.values()) and "vocoder" not in fields:
        raise AudioVAEConfigError(
            "No audio VAE and no vocoder in here; give a file that holds the audio VAE of LTX-2 or LTX-2.3."
        )
    return AudioVAEConfig(**parts, **fields)


def _levels(shapes, stem, axis):
    """(channels of each level, residual blocks per level) under ``stem``."""
    widths, blocks = [], 0
    while (first := shapes.get(f"{stem}.{len(widths)}.block.0.conv1.conv.weight")) is not None:
        blocks = 0
        while f"{stem}.{len(widths)}.block.{blocks}.conv1.conv.weight" in shapes:
            blocks += 1
        widths.append(first[axis])
    if not widths:
        raise AudioVAEConfigError(
            f"'{stem}.0.block.0.conv1' is missing from the audio VAE; the file is incomplete, download it again."
        )
    return tuple(widths), blocks


def _vocoder(shapes, stem, last):
    width, mel_channels, _ = shapes[stem + "conv_pre.weight"]
    kernels = []
    while (up := shapes.get(f"{stem}ups.{len(kernels)}.weight")) is not None:
        kernels.append(up[2])
    block_kernels = []
    while (
        len(block_kernels) < 3
        and (block := shapes.get(f"{stem}resblocks.{len(block_kernels)}.convs1.0.weight")) is not None
    ):
        block_kernels.append(block[2])
    unknown = [kernel for kernel in kernels if kernel not in UPSAMPLE_RATES]
    if not kernels or not block_kernels or unknown:
        raise AudioVAEConfigError(
            f"The vocoder's upsampling layers have kernels {kernels} and its residual blocks {block_kernels}; "
            "this pack knows the vocoders of LTX-2 and LTX-2.3."
        )
    snake = stem + "act_post.act.alpha" in shapes
    rates = tuple(UPSAMPLE_RATES[kernel] for kernel in kernels)
    end = "none" if not last else "clamp" if snake else "tanh"
    return VocoderConfig(mel_channels, width, rates, tuple(kernels), tuple(block_kernels), snake, end)
