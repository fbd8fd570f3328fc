"""The causal video VAE of LTX-2 and LTX-2.3: encoder, decoder, latent statistics; decoding and encoding roll through time.

Pixels are (B, 3, F, H, W) in [-1, 1] with F = 8k + 1 and H, W multiples of 32; latents are (B, 128, 1 + (F-1)/8, H/32, W/32), normalised by the
per-channel statistics as the transformer wants them. Names of parameters are the checkpoint's.

Decoding is always rolling: a clip goes through the network a few latent frames at a time and deeper, wider levels split their input again, so
memory does not depend on the clip's length. A chunk as long as the clip is the plain decode; every chunking gives the same frames.

Sources: ltx-core ``model/video_vae``; ComfyUI ``comfy/ldm/lightricks/vae/causal_video_autoencoder.py``.
"""

import logging

import torch
from torch import nn

from . import streaming, tiling
from .blocks import CausalConv3d, Downsample, ResStack, Upsample, flow, patchify, unpatchify
from .config import VAEConfig, VAEConfigError
from .diffusion_decoder import DiffusionDecoder

logger = logging.getLogger(__name__)


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
    """Encoder and decoder. operations: a namespace with Conv3d, such as torch.nn or the host's casting operations.

    compute_dtype: activations' dtype; None: that of the tensor passed in (hosts that cast weights on the fly). Under autograd nothing is cut or
    written in place, so the modules can be trained as they are.
    """

    def __init__(self, config: VAEConfig, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        self.compute_dtype = None
        build = {"operations": operations, "dtype": dtype, "device": device}
        self.encoder = Encoder(config, **build) if config.has_encoder else None
        decoder = None
        if config.has_decoder:
            decoder = (
                Decoder(config, **build) if config.diffusion is None else DiffusionDecoder(config.diffusion, **build)
            )
        self.decoder = decoder
        self.per_channel_statistics = PerChannelStatistics(config.latent_channels, device=device)

    def _need(self, side, purpose):
        module = getattr(self, side)
        if module is None:
            raise VAEConfigError(
                f"This VAE file holds no {side}, which {purpose} needs; load the complete video VAE of the same LTX-2 version."
            )
        return module

    def decode_output_shape(self, latent_shape):
        """Pixel shape (B, 3, F, H, W) of a decoded latent of the given shape."""
        B, _, f, H, W = latent_shape
        scale = self.config.spatial_scale
        return B, self.config.pixel_channels, self.config.pixel_frames(f), H * scale, W * scale

    def _trains(self, x):
        """Whether autograd records a call on x."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )

    def plan(self, side, latent_shape, dtype, device, free_memory=None, tile=None) -> tiling.VAEPlan:
        """How a clip of latent_shape would be cut on the device. free_memory: bytes beside the weights (None: ask the device). tile: pixels."""
        free = tiling.free_bytes(device) if free_memory is None else free_memory
        return tiling.plan(self.config, side, latent_shape, dtype.itemsize, free, tile)

    def _run(self, side, roll, pieces, latent_shape, dtype, device, plan, free_memory):
        """Outputs of one side by plan, planned smaller once if memory runs out. pieces(plan): a fresh iterator over (tensor, last)."""
        scale = self.config.spatial_scale
        scales = (1, scale) if side == "decoder" else (scale, 1)
        plan = self.plan(side, latent_shape, dtype, device, free_memory) if plan is None else plan
        if torch.is_grad_enabled():
            plan = tiling.VAEPlan(1 << 62, *((span,) for span in ((0, latent_shape[3]), (0, latent_shape[4]))))
        logger.debug("VAE %s: %s", side, plan.describe())

        def free():
            return tiling.free_bytes(device) if free_memory is None else free_memory

        def give_up(last_plan):
            fits = (
                None
                if free() is None
                else tiling.largest_that_fits(self.config, side, latent_shape, dtype.itemsize, free())
            )
            hint = f"about {fits[0]}x{fits[1]} would fit" if fits else "unload other models or run the VAE on the CPU"
            width, height = latent_shape[4] * scale, latent_shape[3] * scale
            return tiling.VAEMemoryError(
                f"The VAE ran out of memory twice at {width}x{height}, at last with {last_plan.describe()}; {hint}."
            )

        yield from streaming.with_retry(
            lambda chosen: streaming.run(roll, pieces(chosen), chosen, device, *scales),
            plan,
            lambda failed: tiling.smaller(failed, self.config, side, latent_shape, dtype.itemsize, free()),
            give_up,
        )

    def decode_stream(self, latent, chunk=None, *, device=None, plan=None, free_memory=None):
        """Yield pixels (B, 3, n, H, W) in [-1, 1], in order, as soon as they are decided.

        latent: normalised, (B, C, F', H', W'). chunk: latent frames fed at a time (None: as many as a step holds). device: where to compute (None:
        where the latent is). plan: from ``plan()``; None: made from free_memory (bytes; None: what the device has). The first pixels come once the
        network's half-width in time has been fed. Raises VAEMemoryError when no cut fits.
        """
        decoder = self._need("decoder", "decoding")
        frames = latent.shape[2]
        device = latent.device if device is None else torch.device(device)
        dtype = self.compute_dtype or latent.dtype
        widening = max(1, self.config.decoder_width // self.config.latent_channels)

        def pieces(chosen):
            step = chunk or (
                8
                if chosen.tiles > 1
                else max(1, chosen.split_bytes // (latent[:, :, :1].numel() * dtype.itemsize * widening))
            )
            for start in range(0, frames, step):
                part = self.per_channel_statistics.un_normalize(latent[:, :, start : start + step].float()).to(dtype)
                yield part, start + step >= frames

        run = self._run if self._trains(latent) else torch.no_grad()(self._run)
        yield from run("decoder", decoder.roll, pieces, latent.shape, dtype, device, plan, free_memory)

    def decode(self, latent, chunk=None, *, output_buffer=None, device=None, plan=None, free_memory=None):
        """Normalised latent (B, C, F', H', W') -> pixels (B, 3, 8(F'-1)+1, 32H', 32W') in [-1, 1].

        output_buffer: tensor of that shape to fill, on any device, in a float dtype or uint8 (0..255); frames go there as they are decided. None: a
        new tensor on the latent's device. The rest as in ``decode_stream``.
        """
        frames = self.decode_stream(latent, chunk, device=device, plan=plan, free_memory=free_memory)
        if output_buffer is None and self._trains(latent):
            return torch.cat(list(frames), dim=2)
        if output_buffer is None:
            output_buffer = latent.new_empty(
                self.decode_output_shape(latent.shape), dtype=self.compute_dtype or latent.dtype
            )
        sink = streaming.FrameSink(output_buffer)
        for pixels in frames:
            sink.put(pixels)
        return sink.close()

    def encode_stream(self, chunks, *, device=None, plan=None, free_memory=None):
        """Yield normalised latents (B, C, m, H', W') in float32, in order, from consecutive pixels.

        chunks: iterable of (B, 3, n, H, W) in [-1, 1], any n. Frames beyond 8k + 1 never complete a latent frame and so are left out. Memory is
        planned from the first chunk's size; a failed allocation cannot be retried here, since chunks are read once.
        """
        encoder = self._need("encoder", "encoding")
        chunks = iter(chunks)
        first = next(chunks, None)
        if first is None:
            return
        device = first.device if device is None else torch.device(device)
        dtype = self.compute_dtype or first.dtype
        if plan is None:
            plan = self.plan("encoder", self.latent_shape(first.shape, frames=2), dtype, device, free_memory)

        def pieces():
            yield first.to(dtype), False
            for pixels in chunks:
                yield pixels.to(dtype), False

        run = streaming.run if self._trains(first) else torch.no_grad()(streaming.run)
        for means in run(encoder.roll, pieces(), plan, device, self.config.spatial_scale, 1):
            yield self.per_channel_statistics.normalize(means.float())

    def encode(self, pixels, *, device=None, plan=None, free_memory=None):
        """Pixels (B, 3, F, H, W) in [-1, 1] -> normalised latent in float32, on the pixels' device or ``device``; F is cut to 8k + 1."""
        encoder = self._need("encoder", "encoding")
        device = pixels.device if device is None else torch.device(device)
        dtype = self.compute_dtype or pixels.dtype
        frames = self.config.pixel_frames(self.config.latent_frames(pixels.shape[2]))
        trains = self._trains(pixels)
        step = frames if trains else 2 * self.config.temporal_scale

        def pieces(_):
            yield pixels[:, :, :1].to(dtype), False
            for start in range(1, frames, step):
                yield pixels[:, :, start : min(frames, start + step)].to(dtype), False

        latent_shape = self.latent_shape(pixels.shape)
        run = self._run if trains else torch.no_grad()(self._run)
        outputs = run("encoder", encoder.roll, pieces, latent_shape, dtype, device, plan, free_memory)
        return torch.cat([self.per_channel_statistics.normalize(means.float()) for means in outputs], dim=2).to(device)

    def latent_shape(self, pixel_shape, frames=None):
        """Shape of the latent of pixels (B, 3, F, H, W). Raises ValueError for sides the VAE cannot take."""
        B, _, f, H, W = pixel_shape
        scale = self.config.spatial_scale
        if H % scale or W % scale:
            raise ValueError(
                f"Pixels are {W}x{H}; the VAE needs multiples of {scale} on both sides. Resize or crop the frames (media.resize_cover)."
            )
        return (
            B,
            self.config.latent_channels,
            self.config.latent_frames(f) if frames is None else frames,
            H // scale,
            W // scale,
        )
