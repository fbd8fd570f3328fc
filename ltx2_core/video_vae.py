"""The causal video VAE of LTX-2 and LTX-2.3: encoder, decoder, latent statistics; decoding and encoding roll through time.

Pixels are (B, 3, F, H, W) in [-1, 1] with F = 8k + 1 and H, W multiples of 32; latents are (B, 128, 1 + (F-1)/8, H/32, W/32), normalised by the
per-channel statistics as the transformer wants them. Names of parameters are the checkpoint's.

Decoding is always rolling: a clip goes through the network a few latent frames at a time and deeper, wider levels split their input again, so
memory does not depend on the clip's length. A chunk as long as the clip is the plain decode; every chunking gives the same frames.

Sources: ltx-core ``model/video_vae``; ComfyUI ``comfy/ldm/lightricks/vae/causal_video_autoencoder.py``.
"""

import torch
from torch import nn

from .vae_blocks import CausalConv3d, Downsample, ResStack, Rolling, Upsample, patchify, unpatchify
from .vae_config import VAEConfig, VAEConfigError

SPLIT_BYTES = 128 * 2**20  # activations larger than this are split in time before a block; see tiling.py for plans from free memory


def flow(stages, x, rolling, last, split_bytes):
    """Send x (B, C, F, H, W) through the stages depth first; yields the last stage's outputs in order.

    A stage gets no more frames at once than keep its widest tensor within split_bytes (at least one), so late stages never see a whole chunk.
    """
    waiting = [(0, x, last)]
    del x
    while waiting:
        depth, x, last = waiting.pop()
        stage = stages[depth]
        B, _, n, H, W = x.shape
        fitting = max(1, split_bytes // (B * stage.frame_elements(H, W) * x.element_size()))
        if n > fitting:
            take = -(-n // -(-n // fitting))  # even pieces
            take += take % 2 if depth and take < fitting else 0
            if take < n:
                waiting.append((depth, x[:, :, take:], last))
                x, last = x[:, :, :take], False
        y = stage(x, rolling, last)
        del x
        if y is None:
            continue
        if depth + 1 == len(stages):
            yield y
        else:
            waiting.append((depth + 1, y, last))
        del y


class _Stem:
    """``conv_in`` as a stage."""

    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x, rolling, last):
        return self.conv(x, rolling, last)

    def frame_elements(self, height, width):
        return self.conv.out_channels * height * width


class _Head(_Stem):
    """``conv_out(silu(pixel_norm(x)))`` as a stage."""

    def __call__(self, x, rolling, last):
        return self.conv(x, rolling, last, activate=True)

    def frame_elements(self, height, width):
        return max(self.conv.conv.in_channels, self.conv.out_channels) * height * width


class _Side(nn.Module):
    """conv_in, a list of blocks, conv_out: what encoder and decoder share."""

    def _stages(self, blocks):
        return [_Stem(self.conv_in), *blocks, _Head(self.conv_out)]


class Encoder(_Side):
    """Pixels to un-normalised latent means."""

    def __init__(self, config: VAEConfig, **build):
        super().__init__()
        conv = build | {"causal": True, "padding": config.encoder_padding}
        self.patch_size, self.latent_channels = config.patch_size, config.latent_channels
        width = config.encoder_base_channels
        self.conv_in = CausalConv3d(config.pixel_channels * config.patch_size**2, width, **conv)
        self.down_blocks = nn.ModuleList()
        for block in config.encoder_blocks:
            if block.kind == "res":
                self.down_blocks.append(ResStack(width, block.layers, **conv))
            else:
                self.down_blocks.append(Downsample(width, width * block.multiplier, block.stride, **conv))
                width *= block.multiplier
        self.conv_out = CausalConv3d(width, config.latent_channels + 1, **conv)  # means and one shared log-variance

    def roll(self, pixels, rolling, last, split_bytes):
        """The clip's next frames (B, 3, n, H, W); yields the latent means (B, C, m, H/32, W/32) that are now decided."""
        x = patchify(pixels, self.patch_size)
        for moments in flow(self._stages(self.down_blocks), x, rolling, last, split_bytes):
            yield moments[:, : self.latent_channels]


class Decoder(_Side):
    """Un-normalised latents to pixels."""

    def __init__(self, config: VAEConfig, **build):
        super().__init__()
        conv = build | {"causal": False, "padding": config.decoder_padding}
        self.patch_size = config.patch_size
        width = config.decoder_width
        self.conv_in = CausalConv3d(config.latent_channels, width, **conv)
        self.up_blocks = nn.ModuleList()
        for block in config.decoder_blocks:
            if block.kind == "res":
                self.up_blocks.append(ResStack(width, block.layers, **conv))
            else:
                self.up_blocks.append(Upsample(width, width // block.multiplier, block.stride, block.residual, **conv))
                width //= block.multiplier
        self.conv_out = CausalConv3d(width, config.pixel_channels * config.patch_size**2, **conv)

    def roll(self, latent, rolling, last, split_bytes):
        """The clip's next latent frames (B, C, n, H, W); yields the pixels (B, 3, m, 32H, 32W) that are now decided."""
        for patches in flow(self._stages(self.up_blocks), latent, rolling, last, split_bytes):
            yield unpatchify(patches, self.patch_size)


class PerChannelStatistics(nn.Module):
    """Normalised latent = (latent - mean) / std, per channel. The buffers' names are the checkpoint's."""

    def __init__(self, channels, device=None):
        super().__init__()
        self.register_buffer("std-of-means", torch.ones(channels, device=device))
        self.register_buffer("mean-of-means", torch.zeros(channels, device=device))

    def _buffer(self, name, like):
        return self.get_buffer(name).to(device=like.device, dtype=like.dtype).view(1, -1, 1, 1, 1)

    def normalize(self, latent):
        return (latent - self._buffer("mean-of-means", latent)) / self._buffer("std-of-means", latent)

    def un_normalize(self, latent):
        return latent * self._buffer("std-of-means", latent) + self._buffer("mean-of-means", latent)


class VideoVAE(nn.Module):
    """Encoder and decoder. operations: a namespace with Conv3d, such as torch.nn or the host's casting operations."""

    def __init__(self, config: VAEConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        build = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder = Encoder(config, **build) if config.has_encoder else None
        self.decoder = Decoder(config, **build) if config.has_decoder else None
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels, device=device)

    def _rolling(self, x):
        return Rolling(torch.channels_last_3d if x.device.type == "cuda" else torch.contiguous_format)

    def _need(self, side, purpose):
        module = getattr(self, side)
        if module is None:
            raise VAEConfigError(f"This VAE file holds no {side}, which {purpose} needs; load the complete video VAE of the same LTX-2 version.")
        return module

    def decode_output_shape(self, latent_shape):
        """Pixel shape (B, 3, F, H, W) of a decoded latent of the given shape."""
        B, _, f, H, W = latent_shape
        scale = self.config.spatial_scale
        return B, self.config.pixel_channels, self.config.pixel_frames(f), H * scale, W * scale

    def decode_stream(self, latent, chunk=None, split_bytes=SPLIT_BYTES):
        """Yield pixels (B, 3, n, H, W) in [-1, 1], in order, as soon as they are decided.

        chunk: latent frames fed at a time (None: all at once, split inside by split_bytes). The first frames come after the decoder's half-width in
        time, then eight per latent frame.
        """
        decoder = self._need("decoder", "decoding")
        frames = latent.shape[2]
        chunk = frames if chunk is None else chunk
        rolling = self._rolling(latent)
        for start in range(0, frames, chunk):
            part = self.per_channel_statistics.un_normalize(latent[:, :, start : start + chunk])
            yield from decoder.roll(part, rolling, start + chunk >= frames, split_bytes)

    def decode(self, latent, chunk=None, split_bytes=SPLIT_BYTES):
        """Normalised latent (B, C, F', H', W') -> pixels (B, 3, 8(F'-1)+1, 32H', 32W') in [-1, 1]."""
        return torch.cat(list(self.decode_stream(latent, chunk, split_bytes)), dim=2)

    def encode_stream(self, chunks, split_bytes=SPLIT_BYTES):
        """chunks: iterable of consecutive pixels (B, 3, n, H, W), any n; yields normalised latents (B, C, m, H', W') in order.

        Frames beyond 8k + 1 never complete a latent frame and so are left out.
        """
        encoder = self._need("encoder", "encoding")
        rolling = None
        for pixels in chunks:
            rolling = self._rolling(pixels) if rolling is None else rolling
            for means in encoder.roll(pixels, rolling, False, split_bytes):
                yield self.per_channel_statistics.normalize(means)

    def encode(self, pixels, split_bytes=SPLIT_BYTES):
        """Pixels (B, 3, F, H, W) in [-1, 1] -> normalised latent; F is cut to 8k + 1."""
        frames = self.config.pixel_frames(self.config.latent_frames(pixels.shape[2]))
        return torch.cat(list(self.encode_stream([pixels[:, :, :frames]], split_bytes)), dim=2)
