"""Where a LoRA's matrices are when a layer needs them: brought there with its block, staged by the host, or kept on the device for a run.

``host.stream`` brings the matrices of the transformer blocks' layers. The host stages the patches of weights that it streams in (dynamic VRAM). For
layers that neither serves, the host's ``LowVramPatch`` would copy both matrices from ordinary memory at each call; here they are kept on the device
from their first use to the end of the sampling run where activations have room beside them.

``release`` gives device memory back when a run ends, so that what comes after it (the VAE's decode) has all of it.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``prefetch_prepared_value``).
"""

import torch

import comfy.model_management

from . import stream


def entries(patch, device):
    """The patch's entries (strength, adapter, strength of the model, offset, function), matrices on ``device`` wherever that was possible."""
    return stream.entries(patch, device) or patch.prepared_patches or _kept(patch, device) or patch.patches[patch.key]


def release(model, page_locked=False):
    """Drop what the patches of ``model``'s layers keep on the device; ``page_locked``: also their copies in page-locked memory."""
    for module in model.modules():
        if stream.KEY in module.__dict__ or stream.LOCKED in module.__dict__:
            (stream.release_locked if page_locked else stream.release)(module)
        for patch in (module.__dict__.get("weight_lowvram_function"), *getattr(module, "weight_function", ())):
            if getattr(patch, "is_lowvram_patch", False):
                patch.__dict__.pop("_ltx2_kept", None)


def _kept(patch, device):
    """Entries on the device that stay with the patch; None on the CPU or when the device has no room for them."""
    if device.type == "cpu":
        return None
    kept = patch.__dict__.get("_ltx2_kept")
    if kept is None:
        size = patch.memory_required()
        room = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
        # The answer holds until the run ends: asking the device again for every layer and step costs more than it gains.
        buffer = torch.empty(size, dtype=torch.uint8, device=device) if size <= room else None
        kept = patch._ltx2_kept = () if buffer is None else stream.Entries(patch.prepare(buffer, None, copy=True, commit=False))
    return kept or None
