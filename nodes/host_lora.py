"""LoRA on a decoded weight: kept on the device while there is room, added in one product.

The host hands patches over as ``LowVramPatch``: a list of (strength, adapter, strength of the model, offset, function) per weight, on the CPU. Copying a
large LoRA to the device for every layer and step would cost more than the step, so its matrices stay there once copied.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``calculate_weight``), ``comfy/weight_adapter/lora.py``.
"""

import torch

import comfy.lora
import comfy.model_management
from comfy.weight_adapter.lora import LoRAAdapter


def is_patch(function):
    """Whether a weight function is a LoRA patch of the host (and not another node's wrapper)."""
    return getattr(function, "is_lowvram_patch", False)


def apply(patch, weight):
    """The patch on a dense weight that nobody else holds; ``weight`` is changed in place where possible. Returns the patched weight."""
    entries = patch.prepared_patches or _staged(patch, weight.device) or patch.patches[patch.key]
    for entry in entries:
        strength, adapter, strength_model, offset, function = entry
        matrices = _plain_lora(adapter, weight) if offset is None and function is None else None
        if matrices is None:
            weight = comfy.lora.calculate_weight([entry], weight, patch.key, intermediate_dtype=weight.dtype)
            continue
        up, down, scale = matrices
        weight.addmm_(up.to(weight), down.to(weight), beta=strength_model, alpha=strength * scale)
    return weight


def _plain_lora(adapter, weight):
    """(up [out, r], down [r, in], scale) of an ordinary LoRA that fits the weight; None for any other adapter."""
    if type(adapter) is not LoRAAdapter:
        return None
    up, down, alpha, middle, magnitude, reshape = adapter.weights
    if middle is not None or magnitude is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
        return None
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        return None  # the host reports the mismatch
    return up, down, 1.0 if alpha is None else alpha / down.shape[0]


def _staged(patch, device):
    """The patch's entries with their matrices on ``device``, kept with the patch; None on the CPU or when the device has no room for them."""
    if device.type == "cpu":
        return None
    kept = patch.__dict__.get("_ltx2_staged")
    if kept is not None:
        return kept or None
    size = patch.memory_required()
    room = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
    if size > room:
        patch._ltx2_staged = ()  # decided once per load: asking the device again for every layer costs more than it gains
        return None
    buffer = torch.empty((size,), dtype=torch.uint8, device=device)
    patch._ltx2_staged = patch.prepare(buffer, None, copy=True, commit=False)
    return patch._ltx2_staged
