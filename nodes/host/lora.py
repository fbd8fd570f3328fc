"""The host's LoRA patches on packed weights, exact and without a dequantised copy of the model.

``quant/low_rank.py`` has the two ways to the same product, on the weight and beside it, and chooses by the sizes of the product alone, so that a picture
does not depend on the memory mode. What is no plain LoRA (other adapters, differences, other nodes' wrappers) is applied by the host's code, on the weight.

The host hands patches over as ``LowVramPatch``; ``host.lora_memory`` tells where their matrices are.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``calculate_weight``), ``comfy/weight_adapter/lora.py``.
"""

import torch

import comfy.lora
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter

from ...quant import low_rank, matmul
from .lora_memory import entries
from .stream import Entries

RANK = "_ltx2_rank"  # of a patch: (its entries, the weight's shape, what ``_rank`` says)


def is_patch(function):
    """Whether a weight function is a LoRA patch of the host (and not another node's wrapper)."""
    return getattr(function, "is_lowvram_patch", False)


def linear(x, weight, bias, functions, gelu=False):
    """``x`` [..., in] times ``weight`` [out, in] changed by ``functions`` (host patches and other nodes' wrappers), plus ``bias``.

    Then GELU (tanh form) if asked. The weight is packed, or dense where the host has decoded it for this call alone.
    """
    if isinstance(weight, QuantizedTensor):
        if weight._params.orig_dtype != x.dtype:
            weight = weight.to(dtype=x.dtype)  # the same bytes, decoding to another dtype
        if _beside(x, weight, functions):
            return _beside_the_weight(x, weight, bias, functions, gelu)
        only_ours = all(map(is_patch, functions))  # others may keep the weight that they see
        weight = matmul.dense_for_one_product(weight, x.dtype) if only_ours else weight.dequantize()
    elif weight.dtype != x.dtype:
        weight = weight.to(dtype=x.dtype)
    for function in functions:
        weight = apply(function, weight) if is_patch(function) else function(weight)
    return matmul.linear(x, weight, bias, gelu)


def apply(patch, weight):
    """The patch on a dense weight that nobody else holds; ``weight`` is changed in place where possible. Returns the patched weight."""
    found = entries(patch, weight.device)
    for entry, change in zip(found, _changes(found, weight.shape)):
        if change is None:
            weight = comfy.lora.calculate_weight([entry], weight, patch.key, intermediate_dtype=weight.dtype)
        else:
            low_rank.add_to_weight_(weight, change, keep=entry[2])
    return weight


def _beside(x, weight, functions):
    """Whether these patches can and should be computed beside the weight."""
    rank, shape = 0, weight._params.orig_shape
    for function in functions:
        more = _rank(function, shape) if is_patch(function) else None
        if more is None:
            return False
        rank += more
    return low_rank.belongs_beside(x, weight, rank)


def _rank(patch, shape):
    """The sum of the ranks of a patch of ordinary LoRAs on a weight of ``shape``; None for any other patch. Looked up once per list of entries."""
    own, traced = patch.patches[patch.key], torch.compiler.is_compiling()
    known = None if traced else patch.__dict__.get(RANK)
    if known is not None and known[1] == shape and _are_the_same(known[0], own):
        return known[2]
    rank = 0
    for entry in own:
        change = _plain_lora(entry, shape)
        if change is None or entry[2] != 1.0:
            rank = None
            break
        rank += change.down.shape[0]
    if not traced:
        patch.__dict__[RANK] = tuple(own), tuple(shape), rank
    return rank


def _are_the_same(entries, others):
    """Whether two lists hold the same objects. (They cannot be compared: entries hold tensors.)"""
    if len(entries) != len(others):
        return False
    for entry, other in zip(entries, others):
        if entry is not other:
            return False
    return True


def _beside_the_weight(x, weight, bias, functions, gelu):
    y = matmul.linear(x, weight, bias)
    for function in functions:
        low_rank.add_beside_(y, x, _changes(entries(function, x.device), weight._params.orig_shape))
    return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y


def _changes(found, shape):
    """The change that each of these entries makes to a weight of ``shape`` (None: no plain LoRA). Made once for matrices that stay where they are."""
    if type(found) is not Entries or torch.compiler.is_compiling():
        return [_plain_lora(entry, shape) for entry in found]
    if found.changes is None or found.changes[0] != shape:
        changes = [_plain_lora(entry, shape) for entry in found]
        found.changes = tuple(shape), [None if change is None else low_rank.Staying(*change) for change in changes]
    return found.changes[1]


def _plain_lora(entry, shape):
    """The ``LowRank`` change of an ordinary LoRA that fits a weight of ``shape``; None for any other patch."""
    strength, adapter, _, offset, function = entry
    if type(adapter) is not LoRAAdapter or offset is not None or function is not None:
        return None
    up, down, alpha, middle, magnitude, reshape = adapter.weights
    if middle is not None or magnitude is not None or reshape is not None or up.ndim != 2 or down.ndim != 2:
        return None
    if (up.shape[0], down.shape[1]) != tuple(shape) or up.shape[1] != down.shape[0]:
        return None  # the host reports the mismatch
    return low_rank.LowRank(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]))
