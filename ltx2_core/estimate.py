"""What a run will take, before it is made: memory of each stage, arithmetic, and time by the speed of a product measured here.

Arithmetic is counted in floating-point operations (a multiplication with its addition is two). Reading files from a disk is not in the time.
"""

import time
from dataclasses import asdict, dataclass

import torch

from .loading.vae import load_vae
from .offload.streamer import TEXT_ROWS, Bundle, activation_bytes
from .sampling.settings import Settings
from .vae import tiling
from .vae.config import VAEConfig

# Which part of a large product's speed the stages reach: attention, norms and decoding take the rest.
SAMPLE_EFFICIENCY, DECODE_EFFICIENCY = 0.7, 0.35
KERNEL = 27  # weights of a 3x3x3 convolution per pair of channels


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device per stage, operations per stage, and seconds. least_bytes: the smallest memory budget that can sample."""

    device: str
    tokens: int
    passes: int
    text_bytes: int
    sample_bytes: int
    decode_bytes: int
    least_bytes: int
    sample_flops: int
    decode_flops: int
    flops_per_second: float
    sample_seconds: float
    decode_seconds: float

    def as_dict(self) -> dict:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        gb = 2**30
        rate = self.flops_per_second / 1e12
        return [
            f"  memory:   text {self.text_bytes / gb:.1f} GB, sampling {self.sample_bytes / gb:.1f} GB, decoding {self.decode_bytes / gb:.1f} GB "
            f"on {self.device}, one after the other; weights stream within a --memory-budget from {self.least_bytes / gb:.1f} GB",
            f"  work:     {self.tokens} tokens, {self.passes} passes, {self.sample_flops / 1e12:.1f} TFLOP to sample and "
            f"{self.decode_flops / 1e12:.1f} to decode; {rate:.2g} TFLOP/s measured",
            f"  time:     about {_duration(self.sample_seconds)} to sample and {_duration(self.decode_seconds)} to decode, "
            "beside reading the files and the prompt",
        ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(pipeline, run: Settings, guide_frames: int = 0) -> Estimate:
    """Of one run of an LTX2Pipeline with these settings. guide_frames: latent frames that images add."""
    frames, height, width = run.latent_shape
    tokens = (frames + guide_frames) * height * width
    calls = len(run.sigmas) - 1 if run.sampler == "euler" else 2 * (len(run.sigmas) - 1) + 1
    passes = run.guidance.passes * calls
    config = pipeline.dit.config
    activations = activation_bytes(tokens, config.inner_dim, pipeline.dtype, config.inner_dim * config.ff_dim)
    blocks = [Bundle(block).nbytes for block in pipeline.dit.transformer_blocks]
    ends = Bundle(pipeline.dit, skip=[pipeline.dit.transformer_blocks]).nbytes
    text = sum(
        report.part_bytes.get("gemma", 0) + report.part_bytes.get("projection", 0) for report in pipeline.parts.text
    )
    vae = load_vae(pipeline.vae_sources, dtype=pipeline.dtype)
    vae_bytes = sum(value.nbytes for value in vae.state_dict().values()) // 2  # one side at a time
    shape = (1, config.in_channels, frames, height, width)
    decoding = vae_bytes + tiling.estimate_bytes(vae.config, "decoder", shape, pipeline.dtype.itemsize)
    sample_flops, decode_flops = (
        passes * pass_flops(pipeline.dit, tokens),
        decoder_flops(vae.config, frames, height, width),
    )
    rate = measured_rate(pipeline.device, pipeline.dtype)
    return Estimate(
        str(pipeline.device), tokens, passes, text, sum(blocks) + ends + activations, decoding, ends + activations + 2 * max(blocks),
        sample_flops, decode_flops, rate, sample_flops / rate / SAMPLE_EFFICIENCY, decode_flops / rate / DECODE_EFFICIENCY,
    )  # fmt: skip


def pass_flops(dit, tokens: int, text_tokens: int = TEXT_ROWS) -> int:
    """Operations of one pass of the transformer's blocks over ``tokens`` tokens."""
    total = 0
    for block in dit.transformer_blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                rows = text_tokens if name in ("attn2.to_k", "attn2.to_v") else tokens
                total += 2 * rows * module.weight.shape[0] * module.weight.shape[1]
    width = dit.config.inner_dim
    return total + len(dit.transformer_blocks) * 4 * tokens * (tokens + text_tokens) * width


def decoder_flops(config: VAEConfig, frames: int, height: int, width: int) -> int:
    """Operations of the decoder's convolutions for a latent of ``frames`` x ``height`` x ``width``."""
    channels, total = config.decoder_width, 0

    def conv(inputs, outputs):
        return 2 * KERNEL * inputs * outputs * frames * height * width

    total += conv(config.latent_channels, channels)
    for block in config.decoder_blocks:
        if block.kind == "res":
            total += 2 * block.layers * conv(channels, channels)
            continue
        pt, ph, pw = block.stride
        out = channels // block.multiplier
        total += conv(channels, out * pt * ph * pw)
        channels, frames, height, width = out, frames * pt - (pt - 1), height * ph, width * pw
    return total + conv(channels, config.pixel_channels * config.patch_size**2)


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large product on this device; takes a fraction of a second."""
    size = 512 if device.type == "cpu" else 4096
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # reading a number waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
