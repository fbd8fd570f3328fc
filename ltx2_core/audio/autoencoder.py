"""The audio autoencoder: a small image network over (time, mel bin), causal in time.

Mel spectrograms are [B, 2, 4L-3, 64] (stereo, log magnitudes), latents [B, 8, L, 16], normalised per channel and bin. Names of parameters
are the checkpoint's.

Source: Lightricks/LTX-2 ``ltx_core/model/audio_vae``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .config import LATENT_BINS, LATENT_CHANNELS

STEREO = 2
NORM_EPS = 1e-6


def pixel_norm_silu(x):
    """silu(x / sqrt(mean over channels of x^2 + eps)). [B, C, T, F] -> same."""
    return F.silu(x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + NORM_EPS))


class CausalConv2d(nn.Module):
    """3x3 (or 1x1) convolution that sees no later time row: zeros, two rows in front, one bin on each side."""

    def __init__(self, channels_in, channels_out, kernel=3, operations=nn):
        super().__init__()
        self.conv = operations.Conv2d(channels_in, channels_out, kernel)
        self.pad = (1, 1, 2, 0) if kernel == 3 else None

    def forward(self, x):
        """[B, C, T, F] -> [B, C', T, F]."""
        return self.conv(F.pad(x, self.pad) if self.pad else x)


class ResBlock(nn.Module):
    """conv2(silu(norm(conv1(silu(norm x))))) + x, through a 1x1 convolution where the width changes."""

    def __init__(self, channels_in, channels_out, **build):
        super().__init__()
        self.conv1 = CausalConv2d(channels_in, channels_out, **build)
        self.conv2 = CausalConv2d(channels_out, channels_out, **build)
        self.nin_shortcut = CausalConv2d(channels_in, channels_out, 1, **build) if channels_in != channels_out else None

    def forward(self, x):
        y = self.conv2(pixel_norm_silu(self.conv1(pixel_norm_silu(x))))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Downsample(nn.Module):
    """Half the rows and bins."""

    def __init__(self, channels, operations=nn):
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 2, 0)))


class Upsample(nn.Module):
    """Twice the bins and, but for the first row, twice the rows: T -> 2T - 1."""

    def __init__(self, channels, operations=nn):
        super().__init__()
        self.conv = CausalConv2d(channels, channels, operations=operations)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))[:, :, 1:]


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution where ``resample`` is given."""

    def __init__(self, channels_in, channels_out, blocks, resample=None, **build):
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(channels_in if n == 0 else channels_out, channels_out, **build) for n in range(blocks)
        )
        if resample is not None:
            setattr(self, resample.__name__.lower(), resample(channels_out, **build))

    def forward(self, x):
        for module in (*self.block, *(child for name, child in self.named_children() if name != "block")):
            x = module(x)
        return x


class Middle(nn.Module):
    """Two residual blocks."""

    def __init__(self, channels, **build):
        super().__init__()
        self.block_1 = ResBlock(channels, channels, **build)
        self.block_2 = ResBlock(channels, channels, **build)

    def forward(self, x):
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """[B, 2, T, 64] -> latent means [B, 8, ceil(T/4), 16], not normalised."""

    def __init__(self, config, **build):
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv2d(STEREO, widths[0], **build)
        self.down = nn.ModuleList(
            Level(widths[max(0, n - 1)], width, config.res_blocks, Downsample if n + 1 < len(widths) else None, **build)
            for n, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], **build)
        self.conv_out = CausalConv2d(widths[-1], 2 * LATENT_CHANNELS, **build)

    def forward(self, mel):
        x = self.conv_in(mel)
        for level in self.down:
            x = level(x)
        return self.conv_out(pixel_norm_silu(self.mid(x)))[:, :LATENT_CHANNELS]  # the rest are log-variances


class Decoder(nn.Module):
    """Latents [B, 8, L, 16], not normalised -> [B, 2, 4L-3, 64]."""

    def __init__(self, config, **build):
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv2d(LATENT_CHANNELS, widths[-1], **build)
        self.mid = Middle(widths[-1], **build)
        self.up = nn.ModuleList(
            Level(widths[min(n + 1, len(widths) - 1)], width, config.res_blocks + 1, Upsample if n else None, **build)
            for n, width in enumerate(widths)
        )
        self.conv_out = CausalConv2d(widths[0], STEREO, **build)

    def forward(self, latent):
        x = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(pixel_norm_silu(x))


class Statistics(nn.Module):
    """Normalised latent = (latent - mean) / std, per channel and bin (index c * 16 + bin). The buffers' names are the checkpoint's."""

    def __init__(self):
        super().__init__()
        for name in ("std-of-means", "mean-of-means"):
            self.register_buffer(name, torch.empty(LATENT_CHANNELS * LATENT_BINS))

    def _values(self):
        return (
            self.get_buffer(name).view(1, LATENT_CHANNELS, 1, LATENT_BINS) for name in ("mean-of-means", "std-of-means")
        )

    def normalise(self, latent):
        """[B, 8, L, 16] -> same."""
        mean, std = self._values()
        return (latent - mean) / std

    def denormalise(self, latent):
        """[B, 8, L, 16] -> same."""
        mean, std = self._values()
        return latent * std + mean


class AudioAutoencoder(nn.Module):
    """Encoder, decoder (each None where its weights are not at hand) and latent statistics."""

    def __init__(self, config, **build):
        super().__init__()
        self.encoder = Encoder(config, **build) if config.has_encoder else None
        self.decoder = Decoder(config, **build) if config.has_decoder else None
        self.per_channel_statistics = Statistics()
