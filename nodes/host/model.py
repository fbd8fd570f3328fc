"""The MODEL object: this pack's network inside the host's model class, and how it is loaded.

``LTX2Host`` (video) and ``LTX2AVHost`` (video and audio) are the network with the three things only the host has: diffusion-model wrappers, its attention function, and prefetching of the next
block's weights. ``LTX2Base`` is the host's LTX audio-video model class around it, from which samplers, LoRA loaders, context windows and
guides take everything else.

Sources: ComfyUI 0.30.0 ``comfy/model_base.py`` (``BaseModel``, ``LTXAV``), ``comfy/supported_models.py``, ``comfy/ldm/lightricks/model.py``.
"""

import contextlib
import functools
import logging
import math

import comfy.ldm.lightricks.model
import comfy.ldm.modules.attention
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.supported_models
import torch

from ...ltx2_core.files.opened import open_models, path_of
from ...ltx2_core.loading import transformer
from ...ltx2_core.sampling.finite import check_frame_rate
from ...ltx2_core.transformer import compute_mode
from ...ltx2_core.transformer.audio_video import LTX2AVModel
from ...ltx2_core.transformer.layers import sdpa
from ...ltx2_core.transformer.model import LTX2Model
from . import files, internals, retry, stream, watch
from . import mask as host_mask
from . import prefetch as host_prefetch
from .graphs import BlockGraphs
from .internals import GRAPHS
from .ops import GGUFOps, is_packed
from .patcher import make_patcher, uses_dynamic_vram

logger = logging.getLogger(__name__)

PASS_OPTIONS = (
    "ltx2_pass_options"  # of a conditioning whose pass is a special one (guidance): transformer_options of its own
)

# Tensors of T x D that live at once at the peak of a block (stream, normed input, q, k, v, attention's output, the feed-forward's four-fold inner
# activation and what GELU makes of it), from which the host's need for free memory is estimated.
LIVE_ACTIVATIONS = 14


def attention(q, k, v, heads, mask=None, transformer_options=None):
    """The host's attention, looked up at each call so that what the user or another node has put there is used.

    Where nobody chose anything, the host's function is torch's attention with an order of backends that prefers FlashAttention-2. Torch's own
    order takes cuDNN where that is the faster one (Hopper and later: 0.94 instead of 1.75 ms for 6144 tokens on an H100), so it is called directly.
    """
    chosen, options = comfy.ldm.modules.attention.optimized_attention, transformer_options or {}
    if (
        mask is None
        and chosen is comfy.ldm.modules.attention.attention_pytorch
        and "optimized_attention_override" not in options
    ):
        return sdpa(q, k, v, heads)
    return chosen(q, k, v, heads, mask=mask, transformer_options=options)


class HostNetwork:
    """What the network has under the host: wrappers around the forward pass, the next block's weights on their way while a block runs.

    ``loras``: a ``stream.LoraStream``; ``graphs``: a ``graphs.BlockGraphs``; ``needed_bytes``: what the pass under way takes beside the weights.
    """

    guide_mask_class = comfy.ldm.lightricks.model.GuideAttentionMask

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loras, self.graphs, self.needed_bytes = stream.LoraStream(self), BlockGraphs(self), 0

    def __setattr__(self, name, value):
        if name == "__class__":
            raise TypeError(
                f"This node turns the network into {value.__name__}, made for the first LTX-Video models, and LTX-2 GGUF's network stays what it is; "
                "remove the node from the graph, or use it with an LTX-Video model loaded by ComfyUI."
            )
        super().__setattr__(name, value)

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        frame_rate=25,
        transformer_options={},
        keyframe_idxs=None,
        denoise_mask=None,
        **other,
    ):
        """As the core's. Wrappers see what they see around the host's audio-video model: [video, audio], the audio without length where there is none."""
        video, audio = self.separate_audio_and_video_latents(x)
        transformer_options = {**transformer_options, **other.pop(PASS_OPTIONS, {})}
        numbers = video[0].numel() + audio[0].numel()  # as the host packs them
        self.needed_bytes = self.activation_bytes((video.shape[0], 1, numbers), self.dtype.itemsize)
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, transformer_options
        )
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(super().forward, self, wrappers)
        out = executor.execute(
            [video, audio],
            timestep,
            context,
            attention_mask,
            frame_rate,
            transformer_options,
            keyframe_idxs,
            denoise_mask=denoise_mask,
            **other,
        )
        return self.recombine_audio_and_video_latents(*out) if isinstance(out, (list, tuple)) else out

    def activation_bytes(self, shape, itemsize):
        """Bytes that a pass takes beside the weights, over a latent of this shape [B, C, F, H, W], or packed by the host: [B, 1, N]."""
        tokens = shape[0] * math.prod(shape[2:])
        if len(shape) == 3:  # video and audio in one row: both have as many numbers to a token
            tokens = -(-tokens // self.in_channels)
        return tokens * self.inner_dim * itemsize * LIVE_ACTIVATIONS

    def block_runner(self, device, transformer_options):
        if torch.compiler.is_compiling():
            return None
        prefetch = host_prefetch.Prefetch(self.transformer_blocks, device, transformer_options)
        run_with_loras = self.loras.runner(device)
        if not prefetch:
            return run_with_loras

        def run(number, call):
            prefetch.enter(number)
            return call if call is None else call() if run_with_loras is None else run_with_loras(number, call)

        def run_recorded(number, call):
            return run(number, call) if call is None else self.graphs.run(prefetch, number, call)

        return run_recorded if self.graphs.active else run

    def _run_blocks(self, pair, options, **shared):
        pair, shared = self.graphs.arguments(pair, options, shared)
        return super()._run_blocks(pair, options, **shared)

    def release(self):
        """Give back the device memory that a run used."""
        self.loras.release()
        self.graphs.release()

    @functools.cached_property
    def largest_layer(self):
        """Elements of the largest packed weight, 0 when none is packed."""
        return max((p.shape.numel() for p in self.parameters() if is_packed(p)), default=0)


class LTX2Host(HostNetwork, LTX2Model):
    """The video model under the host."""


class LTX2AVHost(HostNetwork, LTX2AVModel):
    """The joint model of video and audio under the host."""


class LTX2Base(comfy.model_base.LTXAV):
    """The host's model class with this pack's network.

    ``LTXAV.__init__`` is left out: it would build the host's own network. Conditioning strengths between 0 and 1 are exact: see ``host.mask``.
    """

    def __init__(self, model_config, network, device=None):
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLUX, device=device, unet_model=lambda **_: network
        )
        network.scale_velocity_by_mask = True
        self._may_record = (
            None  # whether the blocks' weights lie side by side; asked once, since weights keep their places
        )

    def get_dynamic_vram__units(self):
        """(modules whose weights the host lays side by side, so that it can record them; those it lays last).

        Blocks, where all of the model fits the device. Else the host's own order, which spreads what does not fit over all blocks.
        """
        blocks = self.diffusion_model.transformer_blocks
        if self._may_record is None:
            device = comfy.model_management.get_torch_device()
            room = (
                comfy.model_management.get_free_memory(device) - 2 * comfy.model_management.minimum_inference_memory()
            )
            self._may_record = bool(GRAPHS) and room > sum(parameter.nbytes for parameter in self.parameters())
        return (list(blocks) if self._may_record else [], [])

    def _apply_model(self, x, *args, **kwargs):
        def advice():
            patcher = retry.patcher_of(self)
            if patcher is None or x.ndim != 5:
                return "The GPU ran out of memory twice while sampling; choose a smaller size or fewer frames."
            return retry.what_would_fit(self, patcher, x.shape)

        def run():
            # The threads of the host's multi-GPU nodes leave inference mode, in which packed weights have their products.
            with contextlib.nullcontext() if torch.is_grad_enabled() else torch.inference_mode():
                return super(LTX2Base, self)._apply_model(x, *args, **kwargs)

        return retry.twice(self, run, "sampling", lambda: self.memory_required(x.shape), advice)

    def extra_conds(self, **kwargs):
        shapes = kwargs.get("latent_shapes")
        if shapes is not None and len(shapes) > 1:
            check_joint_latent(self.diffusion_model, shapes)
        check_frame_rate(kwargs.get("frame_rate", 25))
        return super().extra_conds(**kwargs)

    def memory_required(self, input_shape, cond_shapes={}):
        """Bytes of free memory one pass needs: activations of its tokens, and the largest layer decoded twice (the products' scratch memory, and
        the weight that a LoRA is added to; whether there is one is not known yet when the host asks)."""
        network = self.diffusion_model
        itemsize = self.get_dtype_inference().itemsize
        margin = 2 if network.low_memory else 1  # after running out of memory
        return network.activation_bytes(input_shape, itemsize) * margin + 2 * network.largest_layer * itemsize

    def state_dict_for_saving(self, *args, **kwargs):
        raise RuntimeError(
            "A GGUF model cannot be saved by this node: the file would hold packed bytes under the wrong type. "
            "Convert the original checkpoint with the pack's 'convert' command instead."
        )


def check_joint_latent(network, shapes):
    """Raise ValueError with one sentence for a latent of video and audio, (shape, shape), that this model cannot take."""
    if getattr(network.config, "audio", None) is None:
        raise ValueError(internals.JOINT_LATENT)
    channels = network.audio_in_channels
    audio = tuple(shapes[1])
    if len(shapes) != 2 or len(audio) != 4 or audio[1] * audio[3] != channels:
        raise ValueError(
            f"The audio latent has the shape {audio}; LTX-2 needs [batch, 8, frames, 16]: use 'LTXV Empty Latent Audio' or 'LTXV Audio VAE Encode' "
            "with the audio VAE of the same model."
        )


def load_model(model_file, connector_files=None, compute="exact", audio=False, disable_dynamic=False):
    """A model patcher for the DiT in ``model_file``; the connectors come from there or from ``connector_files`` (paths or open files, one or several).

    ``compute``: ``exact`` or ``fast`` (8-bit matrix products where the hardware has them). audio: the joint model of video and audio. Raises the core's errors, which name the file.
    """
    load_device = comfy.model_management.get_torch_device()
    dtype = compute_dtype(load_device, comfy.supported_models.LTXAV.supported_inference_dtypes)
    sources = open_models([model_file, connector_files])
    with torch.inference_mode():
        network = transformer.load_dit(
            sources,
            operations=GGUFOps,
            dtype=dtype,
            attention=attention,
            model_class=LTX2AVHost if audio else LTX2Host,
            audio=audio,
        )
        if uses_dynamic_vram(load_device, disable_dynamic):
            files.read_as_needed(network, network.weight_sources)
    network.requires_grad_(False)
    compute_mode.set_compute(network, compute)
    patcher = wrap(network, dtype, disable_dynamic)
    paths = [
        path_of(source)
        for source in (connector_files if isinstance(connector_files, (list, tuple)) else [connector_files])
    ]
    patcher.cached_patcher_init = (load_model, (path_of(model_file), paths, compute, audio))
    return patcher


def wrap(network, dtype, disable_dynamic=False):
    """A patcher around a loaded ``LTX2Host``."""
    config = comfy.supported_models.LTXAV({"image_model": "ltxav", "cross_attention_dim": network.cross_attention_dim})
    config.set_inference_dtype(
        dtype, dtype
    )  # a compute dtype given as cast dtype makes the host count the dequantised temporary when it offloads
    config.custom_operations = GGUFOps
    base = LTX2Base(config, network, device=comfy.model_management.unet_offload_device())
    patcher = make_patcher(
        base, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device(), disable_dynamic
    )
    host_mask.attach(patcher)
    watch.attach(patcher)
    return patcher


def compute_dtype(device, supported):
    """The dtype matrix products run in: what the host would choose for a 16-bit checkpoint, its command-line flags included."""
    dtype = comfy.model_management.unet_dtype(device=device, supported_dtypes=supported, weight_dtype=torch.bfloat16)
    if dtype in supported or dtype == torch.float16:
        return comfy.model_management.unet_manual_cast(dtype, device, supported) or dtype
    return (
        comfy.model_management.unet_manual_cast(torch.bfloat16, device, supported) or torch.bfloat16
    )  # fp8 flags are about weights, ours stay packed
