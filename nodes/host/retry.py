"""Running out of GPU memory: once more with a smaller footprint, else a sentence that says what would fit.

The second try happens where the allocation failed, inside the model's own forward pass, so it works under every sampler
and keeps the steps that are done. What comes out after a second failure still is an out-of-memory error to the host,
which then unloads all models: the server stays usable.
"""

import logging

import comfy.model_base
import comfy.model_management
import comfy.model_prefetch
import torch

from ...ltx2_core.sampling.conditioning import SPACE_FACTOR, TIME_FACTOR
from ...quant import scratch
from .internals import PREFETCH

logger = logging.getLogger(__name__)


class OutOfMemoryTwice(torch.OutOfMemoryError):
    """The second try failed as well; the message says what would fit."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def twice(model, run, what, required, advice):
    """``run()``; when memory runs out, make room for ``model`` (the host's model object) and run again.

    what: for the log. required() -> bytes of free memory a run needs. advice() -> the sentence for a second failure.
    Raises OutOfMemoryTwice with it.
    """
    try:
        return run()
    except Exception as error:
        if isinstance(error, OutOfMemoryTwice):
            raise
        comfy.model_management.raise_non_oom(error)
    # Outside of the handler, so that the tensors of the failed run are gone.
    logger.warning("Out of GPU memory while %s; trying once more with less on the GPU and in smaller pieces.", what)
    make_room(model, required())
    try:
        return run()
    except Exception as error:
        comfy.model_management.raise_non_oom(error)
    raise OutOfMemoryTwice(advice())


def make_room(model, required):
    """Free what can be: other models, what this pack keeps for speed, and as much of ``model``'s weights as leave twice
    ``required`` bytes free.

    The feed-forward runs in quarters until ``usual_size``. Other diffusion models stay where they are outside of
    dynamic VRAM: this run may use them too, and the host would not bring them back before it ends.
    """
    with PREFETCH.guard():
        comfy.model_prefetch.cleanup_prefetch_queues()  # the failed pass has left weights pinned for blocks that it did not reach
    network = getattr(model, "diffusion_model", None)
    if network is not None:
        network.release()
        network.forget_tables()
        network.set_low_memory(True)
    scratch.release()
    patcher = patcher_of(model)
    if patcher is not None:
        device, loaded = patcher.load_device, comfy.model_management.current_loaded_models
        comfy.model_management.free_memory(
            2 * required,
            device,
            keep_loaded=[entry for entry in loaded if entry.model is patcher or _may_be_needed(entry.model)],
        )
        short = 2 * required - patcher.get_free_memory(device)
        if short > 0 and not (patcher.is_dynamic() and comfy.model_management.is_device_cpu(device)):
            patcher.partially_unload(patcher.offload_device, min(short, patcher.loaded_size()))
    comfy.model_management.soft_empty_cache()


def _may_be_needed(patcher):
    return patcher is not None and not patcher.is_dynamic() and isinstance(patcher.model, comfy.model_base.BaseModel)


def usual_size(model):
    """Undo what :func:`make_room` did to the model's way of working."""
    network = getattr(model, "diffusion_model", None)
    if network is not None:
        network.set_low_memory(False)


def patcher_of(model):
    """The patcher through which the host has loaded this model object; None when it has not."""
    return next(
        (
            entry.model
            for entry in comfy.model_management.current_loaded_models
            if entry.model is not None and entry.model.model is model
        ),
        None,
    )


def what_would_fit(model, patcher, shape):
    """One sentence: how many frames of this size the free memory would hold. ``shape``: of the latent [B, C, F, H,
    W]."""
    _, _, frames, height, width = shape
    comfy.model_management.soft_empty_cache()
    free = patcher.get_free_memory(patcher.load_device)
    fitting = int(frames * free / max(model.memory_required([1, *shape[1:]]), 1) * 0.8)
    size = f"{width * SPACE_FACTOR}x{height * SPACE_FACTOR}"
    asked = (frames - 1) * TIME_FACTOR + 1
    if fitting >= frames:
        advice = "close other programs that use the GPU, or start ComfyUI with --lowvram"
    elif fitting >= 1:
        advice = f"about {(fitting - 1) * TIME_FACTOR + 1} frames would fit"
    else:
        advice = "choose a smaller width and height"
    return f"The GPU ran out of memory twice while sampling {size} with {asked} frames ({free / 2**30:.1f} GB free); {advice}."
