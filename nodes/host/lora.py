"""The host's LoRA patches on packed weights, exact and without a dequantised copy of the model.

``quant/low_rank.py`` has the two ways to the same product, on the weight and beside it, and chooses by the sizes of the
product alone, so that a picture does not depend on the memory mode. What is no plain LoRA (other adapters, differences,
other nodes' wrappers) is applied by the host's code, on the weight. ``host.stream`` brings the matrices of the
transformer's blocks to the device; others are copied at each call.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``calculate_weight``),
``comfy/weight_adapter/lora.py``.
"""

import comfy.lora
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.lora import LoRAAdapter

from ...quant import low_rank, matmul


def is_patch(function):
    """Whether a weight function is a LoRA patch of the host (and not another node's wrapper)."""
    return getattr(function, "is_lowvram_patch", False)


class Staged(list):
    """A patch's entries with their matrices at a place on ``device`` that stays the same until a run ends."""

    __slots__ = ("changes", "device")

    def __init__(self, entries, device):
        super().__init__(entries)
        self.device = device
        self.changes = None  # what ``Lora.changes`` made of them: (shape, changes)


class Lora:
    """A host patch on one of this pack's layers, and what this pack knows of it.

    ``patch``: the host's ``LowVramPatch``; ``staged``: its entries on the device, while they are there.
    """

    __slots__ = ("_rank", "patch", "staged")

    def __init__(self, patch):
        self.patch, self.staged, self._rank = patch, None, None

    @property
    def own(self):
        """Entries (strength, adapter, strength of the model, offset, function) as the host has them."""
        return self.patch.patches[self.patch.key]

    def entries(self, device):
        """The entries, with their matrices on ``device`` if they were brought there."""
        staged = self.staged
        return (
            staged if staged is not None and staged.device == device and not torch.compiler.is_compiling() else self.own
        )

    def changes(self, entries, shape):
        """The change that each entry makes to a weight of ``shape`` (None: no plain LoRA). Made once for matrices that
        stay where they are."""
        if type(entries) is not Staged or torch.compiler.is_compiling():
            return [_plain_lora(entry, shape) for entry in entries]
        if entries.changes is None or entries.changes[0] != shape:
            changes = [_plain_lora(entry, shape) for entry in entries]
            entries.changes = (
                tuple(shape),
                [None if change is None else low_rank.Staying(*change) for change in changes],
            )
        return entries.changes[1]

    def rank(self, shape):
        """The sum of the ranks of ordinary LoRAs on a weight of ``shape``; None for any other patch. Looked up once per
        list of entries."""
        own, traced = self.own, torch.compiler.is_compiling()
        known = None if traced else self._rank
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
            self._rank = tuple(own), tuple(shape), rank
        return rank

    def apply(self, weight):
        """The patch on a dense weight that nobody else holds; ``weight`` is changed in place where possible. Returns
        the patched weight."""
        entries = self.entries(weight.device)
        for entry, change in zip(entries, self.changes(entries, weight.shape)):
            if change is None:
                weight = comfy.lora.calculate_weight([entry], weight, self.patch.key, intermediate_dtype=weight.dtype)
            else:
                low_rank.add_to_weight_(weight, change, keep=entry[2])
        return weight


def linear(x, weight, bias, lora=None, functions=(), gelu=False):
    """``x`` [..., in] times ``weight`` [out, in] changed by ``lora`` and then by other nodes' ``functions``, plus
    ``bias``.

    Then GELU (tanh form) if asked. The weight is packed, or dense where the host has decoded it for this call alone.
    """
    if lora is None and not functions:
        return matmul.linear(x, weight, bias, gelu)
    if isinstance(weight, QuantizedTensor):
        if weight._params.orig_dtype != x.dtype:
            weight = weight.to(dtype=x.dtype)  # the same bytes, decoding to another dtype
        shape = weight._params.orig_shape
        rank = None if functions else lora.rank(shape)
        if rank is not None and low_rank.belongs_beside(x, weight, rank):
            y = low_rank.add_beside_(matmul.linear(x, weight, bias), x, lora.changes(lora.entries(x.device), shape))
            return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
        # Other nodes' functions may keep the weight that they see.
        weight = weight.dequantize() if functions else matmul.dense_for_one_product(weight, x.dtype)
    elif weight.dtype != x.dtype:
        weight = weight.to(dtype=x.dtype)
    if lora is not None:
        weight = lora.apply(weight)
    for function in functions:
        weight = function(weight)
    return matmul.linear(x, weight, bias, gelu)


def _are_the_same(entries, others):
    """Whether two lists hold the same objects. (They cannot be compared: entries hold tensors.)"""
    return len(entries) == len(others) and all(entry is other for entry, other in zip(entries, others))


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
