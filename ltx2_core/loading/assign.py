"""Tensors of a file become the parameters of a module built on meta: checked as a whole first, read one by one, never copied."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..files.errors import WeightsMismatch
from ..files.text import first_names
from ..files.weights import WeightFile


class Tensors(Mapping):
    """name -> tensor, read from its file on access, so that ``assign`` can check all names and shapes before anything is loaded.

    where: name -> (WeightFile, name there). load(weights, name, stored name) -> tensor. shapes: name -> shape where it is not the file's.
    device: where the tensors go, None: they stay where ``load`` leaves them.
    """

    def __init__(
        self, where: Mapping[str, tuple[WeightFile, str]], load: Callable, device=None, shapes: Mapping | None = None
    ):
        self._where, self._load, self._device, self._shapes = where, load, device, shapes or {}

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)

    def __contains__(self, name):
        return name in self._where

    def shape(self, name: str) -> torch.Size:
        """Logical shape, from the header."""
        weights, stored = self._where[name]
        return torch.Size(self._shapes[name] if name in self._shapes else weights.shape(stored))

    def __getitem__(self, name: str) -> torch.Tensor:
        weights, stored = self._where[name]
        tensor = self._load(weights, name, stored)
        return tensor if self._device is None else tensor.to(self._device)


def assign(
    module: nn.Module, tensors: Mapping, reason: Callable | None = None, allow_unexpected: bool = False
) -> list[str]:
    """Make ``tensors`` the parameters and buffers of ``module`` by name; returns the names that the module does not have.

    tensors: mapping name -> tensor (dense or packed); a lazy one may have a method ``shape(name)``. Parameters do not require gradients
    afterwards. reason: function (missing names, unexpected names) -> likely cause as a sentence, for the error. Raises WeightsMismatch when names
    or shapes do not fit (``allow_unexpected``: when any is missing or misshapen); then nothing was assigned.
    """
    slots = {}
    for prefix, child in module.named_modules():
        stem = prefix + "." if prefix else ""
        slots.update({stem + name: (child, name) for name, value in child._parameters.items() if value is not None})
        kept = (
            name
            for name, value in child._buffers.items()
            if value is not None and name not in child._non_persistent_buffers_set
        )
        slots.update({stem + name: (child, name) for name in kept})
    shape = (
        tensors.shape if hasattr(tensors, "shape") else lambda name: tensors[name].shape
    )  # a lazy mapping knows shapes without loading
    missing = [name for name in slots if name not in tensors]
    unexpected = [name for name in tensors if name not in slots]
    misshapen = {name: shape(name) for name in slots if name in tensors and getattr(*slots[name]).shape != shape(name)}
    if missing or misshapen or (unexpected and not allow_unexpected):
        raise WeightsMismatch(
            _mismatch(module, slots, missing, unexpected, misshapen, reason), missing, unexpected, misshapen
        )
    for name, (child, attribute) in slots.items():
        if attribute in child._parameters:
            child._parameters[attribute] = nn.Parameter(tensors[name], requires_grad=False)
        else:
            child._buffers[attribute] = tensors[name]
    return unexpected


def _mismatch(module, slots, missing, unexpected, misshapen, reason):
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            parts.append(f"{_count(names)} {what} (first: {first_names(names)})")
    if misshapen:
        first = list(misshapen.items())[:5]
        shown = ", ".join(
            f"{name} is {tuple(found)}, expected {tuple(getattr(*slots[name]).shape)}" for name, found in first
        )
        parts.append(f"{_count(misshapen)} of another shape (first: {shown})")
    cause = reason(missing, unexpected) if reason else ""
    return f"{type(module).__name__}: " + "; ".join(parts) + "." + (f" {cause}" if cause else "")


def _count(names):
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
