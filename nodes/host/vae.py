"""The VAE object: this pack's video VAE behind the host's VAE interface, streaming in both directions.

Source: ComfyUI 0.30.0 ``comfy/sd.py`` (class ``VAE``: the attributes its nodes read), ``comfy/ldm/lightricks/vae`` (chunked in- and output).
"""

import logging
import math

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...ltx2_core.files.opened import path_of
from ...ltx2_core.loading import vae as loading
from ...ltx2_core.sampling.conditioning import SPACE_FACTOR, TIME_FACTOR
from ...ltx2_core.vae import model, tiling
from . import files
from .patcher import make_patcher, uses_dynamic_vram

logger = logging.getLogger(__name__)

WORKING_DTYPES = [torch.bfloat16, torch.float32]


OF_AN_AUDIO_VAE = (
    "latent_frequency_bins",
    "num_of_latents_from_frames",
    "output_sample_rate",
    "sampling_rate",
    "mel_hop_length",
)
WRONG_VAE = (
    "This is the video VAE, and the node needs the audio VAE; connect the output of 'LTXV Audio VAE Loader' instead."
)


class HostVideoVAE(model.VideoVAE):
    """The network with the host's chunked entry points: pixels stay in main memory and travel in chunks, with progress between them.

    ``free_memory``: set by ``LTX2VAE``; bytes the host could give beside the weights, from which frames are cut into tiles only when they must be.
    """

    comfy_has_chunked_io = True
    free_memory = None

    def __getattr__(self, name):
        if name in OF_AN_AUDIO_VAE:
            raise AttributeError(WRONG_VAE)
        return super().__getattr__(name)

    def decode(self, latent, chunk=None, *, tile=None, **options):
        """As the core's; ``tile``: side of a tile in pixels, None: as free memory asks for."""
        if tile is not None:
            device = options.get("device") or latent.device
            free = self.free_memory(device) if self.free_memory is not None else None
            options["plan"] = self.plan("decoder", latent.shape, self.compute_dtype or latent.dtype, device, free, tile)
        return super().decode(latent, chunk, **options)

    def decode_stream(self, latent, chunk=None, **options):
        if self.free_memory is not None:
            options.setdefault("free_memory", self.free_memory(options.get("device") or latent.device))
        frames = self.config.pixel_frames(latent.shape[2])
        bar, done = comfy.utils.ProgressBar(frames), 0
        for pixels in super().decode_stream(latent, chunk, **options):
            done += pixels.shape[2]
            bar.update_absolute(min(done, frames), frames)
            yield pixels

    def encode(self, pixels, device=None, **options):
        if self.free_memory is not None:
            options.setdefault("free_memory", self.free_memory(device or pixels.device))
        return super().encode(pixels, device=device, **options)


class LTX2VAE(comfy.sd.VAE):
    """The host's VAE object around a ``HostVideoVAE``. Its own ``__init__`` sets what the host's would find out from a state dict."""

    def __init__(self, network, dtype, disable_dynamic=False):
        self.first_stage_model = network
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.vae_dtype, self.working_dtypes = dtype, list(WORKING_DTYPES)
        _describe(self)
        self.memory_used_decode = lambda shape, dtype: tiling.estimate_bytes(
            network.config, "decoder", shape, dtype.itemsize
        )
        self.memory_used_encode = lambda shape, dtype: tiling.estimate_bytes(
            network.config, "encoder", network.latent_shape(shape), dtype.itemsize
        )
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        comfy.model_management.archive_model_dtypes(network)
        self.patcher = make_patcher(network, self.device, comfy.model_management.vae_offload_device(), disable_dynamic)
        network.free_memory = self.patcher.get_free_memory

    def decode(self, samples_in, vae_options={}):
        """As the host's. Raises ValueError for a latent that is no video's."""
        if samples_in.ndim != 5 or samples_in.shape[1] != self.latent_channels:
            raise ValueError(
                f"A latent of the shape {tuple(samples_in.shape)} reached the video VAE, which decodes (batch, {self.latent_channels}, frames, "
                "height, width); an audio latent needs the audio VAE, and a latent of video and audio 'LTXVSeparateAVLatent' first."
            )
        return super().decode(samples_in, vae_options)

    def encode(self, pixel_samples):
        """As the host's. Raises ValueError for a waveform [B, samples, channels]."""
        if pixel_samples.ndim == 3:
            raise ValueError(WRONG_VAE)
        return super().encode(pixel_samples)


class MissingVAE(comfy.sd.VAE):
    """Stands where a loader found no VAE: says so when somebody uses it, not before."""

    def __init__(self, file_name):
        self.sentence = f"{file_name} contains no video VAE and none in your folders fits it; choose one in 'vae_file' of 'LTX-2 GGUF Loader' or use 'LTX-2 Video VAE Loader'."
        self.first_stage_model = _Absent(self.sentence)
        self.patcher = None
        _describe(self)

    def throw_exception_if_invalid(self):
        raise RuntimeError(self.sentence)


class _Absent:
    def __init__(self, sentence):
        self.__dict__["_sentence"] = sentence

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError(self._sentence)


def _describe(vae):
    """What the host's nodes ask a VAE of this kind: factors between pixels and latents, and switches for other kinds."""
    vae.latent_channels, vae.latent_dim, vae.output_channels = 128, 3, 3
    vae.upscale_ratio = (lambda frames: max(0, frames * TIME_FACTOR - TIME_FACTOR + 1), SPACE_FACTOR, SPACE_FACTOR)
    vae.upscale_index_formula = (TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR)
    vae.downscale_ratio = (
        lambda frames: max(0, math.floor((frames + TIME_FACTOR - 1) / TIME_FACTOR)),
        SPACE_FACTOR,
        SPACE_FACTOR,
    )
    vae.downscale_index_formula = (TIME_FACTOR, SPACE_FACTOR, SPACE_FACTOR)
    vae.disable_offload = vae.not_video = vae.handles_tiling = False
    vae.crop_input = True
    vae.size = vae.extra_1d_channel = vae.format_encoded = vae.pad_channel_value = None
    vae.audio_sample_rate = 44100


def load_vae(source, disable_dynamic=False):
    """The VAE in a file (path or open), whatever else it contains. Raises the core's errors, which name the file."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), WORKING_DTYPES)
    with torch.inference_mode():
        network = loading.load_vae(source, operations=comfy.ops.manual_cast, dtype=dtype, model_class=HostVideoVAE)
        if uses_dynamic_vram(comfy.model_management.vae_device(), disable_dynamic):
            files.read_as_needed(network, network.weight_sources)
    vae = LTX2VAE(network.requires_grad_(False), dtype, disable_dynamic)
    vae.patcher.cached_patcher_init = (_load_patcher, (path_of(source),))
    return vae


def _load_patcher(path, disable_dynamic=False):
    return load_vae(path, disable_dynamic).patcher


def decode_images(vae, samples, tile_size=0):
    """Latent [B, C, F', H', W'] -> images [B*F, H, W, 3] in [0, 1]; ``tile_size``: side of a tile in pixels, 0: whole frames if they fit."""
    if not tile_size:
        images = vae.decode(samples)
    elif isinstance(vae.first_stage_model, HostVideoVAE):
        images = vae.decode(samples, {"tile": tile_size})
    else:  # a VAE loaded by another node
        side = max(2, tile_size // SPACE_FACTOR)
        images = vae.decode_tiled(samples, tile_x=side, tile_y=side, overlap=max(1, side // 4))
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
