"""Mel spectrogram to waveform: HiFi-GAN (2.0), or BigVGAN at 16 kHz and a second one that adds the band above (2.3).

Arithmetic is float32 throughout: over a hundred convolutions in a row, bfloat16 is audible. Names of parameters are the checkpoint's, and
so are the filters of the anti-aliased activations (the stored ones are rounded to bfloat16, computed ones give other sound).

Source: Lightricks/LTX-2 ``ltx_core/model/audio_vae/{vocoder,resnet}.py``.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .config import DILATIONS
from .mel import LOG_FLOOR, ROLLOFF, SINC_ZEROS

SLOPE, LAST_SLOPE = 0.1, 0.01  # of the leaky ReLUs
FILTER_TAPS = 12
BAND_HOP = 80  # samples per mel frame of the bandwidth extension
BAND_RATIO = 3  # 16 kHz -> 48 kHz


class _Filter(nn.Module):
    """Holds a low-pass filter under the checkpoint's name."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filter", torch.empty(1, 1, FILTER_TAPS))


class _Downsample(nn.Module):
    def __init__(self):
        super().__init__()
        self.lowpass = _Filter()


class _SnakeBeta(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels))
        self.beta = nn.Parameter(torch.empty(channels))


class AntiAliasedSnake(nn.Module):
    """x + sin(x e^alpha)^2 / e^beta per channel, computed at twice the rate between two low-pass filters."""

    def __init__(self, channels):
        super().__init__()
        self.act = _SnakeBeta(channels)
        self.upsample = _Filter()
        self.downsample = _Downsample()

    def forward(self, x):
        """[B, C, N] -> same."""
        channels, samples = x.shape[1:]
        up = self.upsample.filter.expand(channels, -1, -1)
        x = (
            2
            * F.conv_transpose1d(F.pad(x, (5, 5), mode="replicate"), up, stride=2, groups=channels)[
                ..., 15 : 15 + 2 * samples
            ]
        )
        alpha, beta = self.act.alpha[:, None].exp(), self.act.beta[:, None].exp()
        x = x + (x * alpha).sin().square() / (beta + 1e-9)
        down = self.downsample.lowpass.filter.expand(channels, -1, -1)
        return F.conv1d(F.pad(x, (5, 6), mode="replicate"), down, stride=2, groups=channels)


class _Leaky(nn.Module):
    def forward(self, x):
        return F.leaky_relu(x, SLOPE)


class ResBlock(nn.Module):
    """Three times x + conv2(act2(conv1(act1 x))), with growing dilation in conv1."""

    def __init__(self, channels, kernel, snake, operations=nn):
        super().__init__()
        self.convs1 = nn.ModuleList(
            operations.Conv1d(channels, channels, kernel, dilation=d, padding=(kernel - 1) * d // 2) for d in DILATIONS
        )
        self.convs2 = nn.ModuleList(
            operations.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in DILATIONS
        )
        self.acts1, self.acts2 = (
            nn.ModuleList(AntiAliasedSnake(channels) if snake else _Leaky() for _ in DILATIONS) for _ in range(2)
        )

    def forward(self, x):
        """[B, C, N] -> same."""
        for act1, conv1, act2, conv2 in zip(self.acts1, self.convs1, self.acts2, self.convs2):
            x = x + conv2(act2(conv1(act1(x))))
        return x


class Vocoder(nn.Module):
    """Mel [B, 2, m, bins] -> waveform [B, 2, m * product of rates]."""

    def __init__(self, config, operations=nn):
        super().__init__()
        self.config = config
        width, levels = config.width, len(config.rates)
        self.conv_pre = operations.Conv1d(config.mel_channels, width, 7, padding=3)
        self.ups = nn.ModuleList(
            operations.ConvTranspose1d(width >> n, width >> (n + 1), kernel, stride=rate, padding=(kernel - rate) // 2)
            for n, (rate, kernel) in enumerate(zip(config.rates, config.kernels))
        )
        self.resblocks = nn.ModuleList(
            ResBlock(width >> (n + 1), kernel, config.snake, operations)
            for n in range(levels)
            for kernel in config.block_kernels
        )
        if config.snake:
            self.act_post = AntiAliasedSnake(width >> levels)
        self.conv_post = operations.Conv1d(width >> levels, 2, 7, padding=3, bias=not config.snake)

    def forward(self, mel):
        config = self.config
        x = self.conv_pre(mel.transpose(2, 3).flatten(1, 2))  # (B, 2, m, bins) -> (B, 2*bins, m) -> (B, C, m)
        per_level = len(config.block_kernels)
        for n, up in enumerate(self.ups):
            x = up(x if config.snake else F.leaky_relu(x, SLOPE))
            total = None
            for block in self.resblocks[n * per_level : (n + 1) * per_level]:
                y = block(x)
                total = y if total is None else total.add_(y)
            x = total / per_level
        x = self.conv_post(self.act_post(x) if config.snake else F.leaky_relu(x, LAST_SLOPE))
        return x.tanh() if config.end == "tanh" else x.clamp(-1, 1) if config.end == "clamp" else x


class _Basis(nn.Module):
    def __init__(self, fft):
        super().__init__()
        self.register_buffer("forward_basis", torch.empty(2 * (fft // 2 + 1), 1, fft))


class _MelBasis(nn.Module):
    """Short-time spectrum by convolution with stored bases, then a stored mel matrix."""

    def __init__(self, bins, fft):
        super().__init__()
        self.stft_fn = _Basis(fft)
        self.register_buffer("mel_basis", torch.empty(bins, fft // 2 + 1))

    def forward(self, waveform):
        """[B, 2, N], N a multiple of the hop -> log-mel [B, 2, N / hop, bins]."""
        basis = self.stft_fn.forward_basis
        x = F.pad(waveform.flatten(0, 1).unsqueeze(1), (basis.shape[2] - BAND_HOP, 0))
        real, imaginary = F.conv1d(x, basis, stride=BAND_HOP).chunk(2, dim=1)
        mel = self.mel_basis @ (real.square() + imaginary.square()).sqrt()
        return mel.clamp(min=LOG_FLOOR).log().transpose(1, 2).unflatten(0, waveform.shape[:2])


@functools.lru_cache(maxsize=1)
def _triple_filter():
    """[1, 1, 43] float32: windowed sinc for three times the rate."""
    width = math.ceil(SINC_ZEROS / ROLLOFF)
    time = (np.arange(2 * width * BAND_RATIO + 1) / BAND_RATIO - width) * ROLLOFF
    window = np.cos(np.clip(time, -SINC_ZEROS, SINC_ZEROS) * math.pi / SINC_ZEROS / 2) ** 2
    return torch.from_numpy((np.sinc(time) * window * ROLLOFF / BAND_RATIO).astype(np.float32)).view(1, 1, -1)


def triple_rate(waveform):
    """[B, C, N] -> [B, C, 3N], interpolated."""
    channels, samples = waveform.shape[1:]
    taps = _triple_filter().to(waveform).expand(channels, -1, -1)
    pad = taps.shape[-1] // 2 // BAND_RATIO  # 7
    x = BAND_RATIO * F.conv_transpose1d(
        F.pad(waveform, (pad, pad), mode="replicate"), taps, stride=BAND_RATIO, groups=channels
    )
    start = 2 * pad * BAND_RATIO
    return x[..., start : start + BAND_RATIO * samples]


class BandwidthVocoder(nn.Module):
    """Mel -> 16 kHz waveform -> mel of that -> what is missing above 8 kHz, added at 48 kHz. [B, 2, m, 64] -> [B, 2, 480 m]."""

    def __init__(self, config, operations=nn):
        super().__init__()
        self.vocoder = Vocoder(config.vocoder, operations)
        self.bwe_generator = Vocoder(config.bandwidth, operations)
        self.mel_stft = _MelBasis(config.bandwidth_bins, config.bandwidth_fft)

    def forward(self, mel):
        low = self.vocoder(mel)
        samples = low.shape[-1]
        low = F.pad(low, (0, -samples % BAND_HOP))
        high = self.bwe_generator(self.mel_stft(low))
        return (high + triple_rate(low)).clamp(-1, 1)[..., : BAND_RATIO * samples]
