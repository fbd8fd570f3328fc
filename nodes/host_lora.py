"""LoRA on packed weights, exact and without a dequantised copy of the model: two ways to the same product.

On the weight: ``x (W + s B A)^T`` with the decoded weight of the call changed in place, 2 in out r operations and one more pass over it, whatever the
number of tokens. Beside it: ``x W^T + s (x A^T) B^T``, 2 M r (in + out) operations for M tokens, with W's product on the packed bytes as without a LoRA.
``beside_is_cheaper`` chooses by the sizes of the product alone, so that a picture does not depend on the memory mode.

The host hands patches over as ``LowVramPatch``; ``host_lora_memory`` brings their matrices to the device.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``calculate_weight``), ``comfy/weight_adapter/lora.py``.
"""

import torch

import comfy.lora
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter

from ..quant import linear_gpu
from .host_lora_memory import entries

# Operations a GPU does in the time it moves one byte of its memory, in half precision: about 220 on an H100, 165 on an RTX 4090.
OPERATIONS_PER_BYTE = 200


def is_patch(function):
    """Whether a weight function is a LoRA patch of the host (and not another node's wrapper)."""
    return getattr(function, "is_lowvram_patch", False)


def linear(x, weight, bias, functions):
    """``x`` [..., in] times ``weight`` [out, in] changed by ``functions`` (host patches and other nodes' wrappers), plus ``bias``.

    The weight is packed, or dense where the host has decoded it for this call alone.
    """
    weight = weight.to(dtype=x.dtype)  # packed: the same bytes, decoding to another dtype
    if isinstance(weight, QuantizedTensor):
        if _beside(x, weight, functions):
            return _beside_the_weight(x, weight, bias, functions)
        weight = weight.dequantize()
    for function in functions:
        weight = apply(function, weight) if is_patch(function) else function(weight)
    if linear_gpu.can_fuse_gelu(x, bias) and linear_gpu.take_gelu():
        return linear_gpu.linear_gelu(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def apply(patch, weight):
    """The patch on a dense weight that nobody else holds; ``weight`` is changed in place where possible. Returns the patched weight."""
    with entries(patch, weight.device) as staged:
        for entry in staged:
            matrices = _plain_lora(entry, weight.shape)
            if matrices is None:
                weight = comfy.lora.calculate_weight([entry], weight, patch.key, intermediate_dtype=weight.dtype)
                continue
            up, down, scale = matrices
            weight.addmm_(up.to(weight), down.to(weight), beta=entry[2], alpha=scale)
    return weight


def beside_is_cheaper(rows, out_features, in_features, rank, itemsize=2):
    """Whether the low-rank product beside the weight takes less time than the one on it, for ``rows`` tokens.

    Both counted in bytes moved: operations over ``OPERATIONS_PER_BYTE``, and one tensor read and written (the weight, or the output).
    """
    on_weight = out_features * in_features * (2 * rank / OPERATIONS_PER_BYTE + 2 * itemsize)
    beside = rows * (2 * rank * (in_features + out_features) / OPERATIONS_PER_BYTE + 2 * itemsize * out_features)
    return beside < on_weight


def _beside(x, weight, functions):
    """Whether these patches can and should be computed beside the weight."""
    rank = 0
    for function in functions:
        if not is_patch(function):
            return False
        for entry in function.patches[function.key]:
            matrices = _plain_lora(entry, weight.shape)
            if matrices is None or entry[2] != 1.0:
                return False
            rank += matrices[1].shape[0]
    if getattr(weight._params, "compute", "exact") == "fast":
        return True  # 8-bit products need the packed weight
    return beside_is_cheaper(x.numel() // x.shape[-1], *weight.shape, rank, x.dtype.itemsize)


def _beside_the_weight(x, weight, bias, functions):
    with linear_gpu.no_gelu():  # what is asked to follow must follow the sum
        y = torch.nn.functional.linear(x, weight, bias)
    rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for function in functions:
        with entries(function, x.device) as staged:
            for entry in staged:
                up, down, scale = _plain_lora(entry, weight.shape)
                sums.addmm_(rows @ down.to(x).t(), up.to(x).t(), alpha=scale)  # (M, r) x (r, out) onto (M, out)
    return y


def _plain_lora(entry, shape):
    """(up [out, r], down [r, in], scale) of an ordinary LoRA that fits a weight of ``shape``; None for any other patch."""
    strength, adapter, _, offset, function = entry
    if type(adapter) is not LoRAAdapter or offset is not None or function is not None:
        return None
    up, down, alpha, middle, magnitude, reshape = adapter.weights
    if middle is not None or magnitude is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
        return None
    if (up.shape[0], down.shape[1]) != tuple(shape) or up.shape[1] != down.shape[0]:
        return None  # the host reports the mismatch
    return up, down, strength * (1.0 if alpha is None else alpha / down.shape[0])
