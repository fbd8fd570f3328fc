"""Counts the bytes of tensors that are alive, also of tensors on the meta device, so that real sizes cost nothing to measure."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class CountingAllocator(TorchDispatchMode):
    """``live`` and ``peak`` bytes of storages that operations under this mode created. limit: raise OutOfMemoryError beyond it."""

    def __init__(self, limit=None):
        super().__init__()
        self.live = self.peak = 0
        self.limit = limit
        self._sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(
                tensor
            ):  # a wrapper has no bytes of its own
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        if self.limit is not None and self.live + size > self.limit:
            raise torch.OutOfMemoryError(f"{size} bytes asked for with {self.live} of {self.limit} in use")
        self._sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key):
        self.live -= self._sizes.pop(key)
