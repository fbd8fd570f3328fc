"""Page-locked main memory, which a device fetches by itself at the speed of the bus."""

import contextlib
import mmap
import os
import threading
from collections.abc import Callable

import torch


def main_memory() -> int:
    """Bytes of main memory in this machine; where the system does not say, more than any machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 60


def _new_pages(nbytes: int) -> mmap.mmap:
    """Memory of this process, in large pages where the system has them: there are five hundred times fewer to touch and to lock."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class LockedMemory:
    """Page-locked memory of exactly the size asked for (torch's own allocator rounds up to a power of two and keeps what it has once had).

    ``bytes``: uint8 [nbytes]. ``fill`` is called with it before it is locked: pages that have been touched are locked faster, and while the driver
    locks pages nothing else can be asked of it. Raises RuntimeError when the system does not grant it, or when there would be more than ``limit`` bytes of it.
    ``unlock`` when no copy reads from it any more. ``locked_bytes``: of all objects of this class.
    """

    locked_bytes = 0
    _lock = threading.RLock()  # a collection inside it may run ``__del__``

    def __init__(self, nbytes: int, limit: int | None = None, fill: Callable[[torch.Tensor], None] = lambda _: None):
        self.locked = False
        with LockedMemory._lock:
            if limit is not None and LockedMemory.locked_bytes + nbytes > limit:
                raise RuntimeError(f"page-locked memory is limited to {limit / 2**30:.1f} GB")
            LockedMemory.locked_bytes += nbytes
        try:
            self._register(nbytes, fill)
        except BaseException:
            self._uncount(nbytes)
            raise
        self.locked = True

    def _register(self, nbytes, fill):
        try:
            self.bytes = torch.frombuffer(_new_pages(nbytes), dtype=torch.uint8)
        except OSError as error:
            raise RuntimeError(f"{nbytes / 2**20:.0f} MB of main memory are not to be had: {error}") from None
        fill(self.bytes)
        if int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)) != 0:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(1)  # the next launch of a kernel, whatever it is, reports this error again
                torch.cuda.synchronize()
            raise RuntimeError(f"{nbytes / 2**20:.0f} MB could not be page-locked")

    @staticmethod
    def _uncount(nbytes):
        with LockedMemory._lock:
            LockedMemory.locked_bytes -= nbytes

    def unlock(self) -> None:
        if self.locked:
            self.locked = False
            self._uncount(self.bytes.numel())
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())

    def __del__(self):
        # Memory that is freed while it is registered leaves the driver with pages that are not there any more.
        if self.__dict__.get("locked") and torch is not None:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
                self.unlock()
