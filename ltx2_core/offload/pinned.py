"""Pinned (page-locked) main memory, which a device fetches by itself at the speed of the bus."""

import contextlib
import logging
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

log = logging.getLogger(__name__)

THREADS = 4  # that fill pinned memory: one alone reads and touches pages at a fifth of the bus's speed


def main_memory() -> int:
    """Bytes of main memory in this machine; where the system does not say, more than any machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 60


def half_of_main_memory() -> int:
    """The most bytes that may be pinned at once where nobody else keeps account of it."""
    return main_memory() // 2


def _new_pages(nbytes: int) -> mmap.mmap:
    """Memory of this process, in large pages where the system has them: there are five hundred times fewer to touch and
    to pin."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, nbytes)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class PinnedMemory:
    """Pinned memory of exactly the size asked for (torch's own allocator rounds up to a power of two and keeps what it
    has once had).

    ``bytes``: uint8 [nbytes]. ``fill`` is called with it before it is pinned: pages that have been touched are pinned
    faster, and while the driver pins pages nothing else can be asked of it. Raises RuntimeError when the system does
    not grant it, or when there would be more than ``limit`` bytes of it. ``unpin`` when no copy reads from it any more.
    ``total``: bytes of all objects of this class.
    """

    total = 0
    _lock = threading.RLock()  # a collection inside it may run ``__del__``

    def __init__(self, nbytes: int, limit: int | None = None, fill: Callable[[torch.Tensor], None] = lambda _: None):
        self.pinned = False
        with PinnedMemory._lock:
            if limit is not None and PinnedMemory.total + nbytes > limit:
                raise RuntimeError(f"pinned memory is limited to {limit / 2**30:.1f} GB")
            PinnedMemory.total += nbytes
        try:
            self._register(nbytes, fill)
        except BaseException:
            self._uncount(nbytes)
            raise
        self.pinned = True

    def _register(self, nbytes, fill):
        try:
            self.bytes = torch.frombuffer(_new_pages(nbytes), dtype=torch.uint8)
        except OSError as error:
            raise RuntimeError(f"{nbytes / 2**20:.0f} MB of main memory are not to be had: {error}") from None
        fill(self.bytes)
        if int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)) != 0:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda").add_(
                    1
                )  # the next launch of a kernel, whatever it is, reports this error again
                torch.cuda.synchronize()
            raise RuntimeError(f"{nbytes / 2**20:.0f} MB could not be pinned")

    @staticmethod
    def _uncount(nbytes):
        with PinnedMemory._lock:
            PinnedMemory.total -= nbytes

    def unpin(self) -> None:
        if self.pinned:
            self.pinned = False
            self._uncount(self.bytes.numel())
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())

    def __del__(self):
        # Memory that is freed while it is registered leaves the driver with pages that are not there any more.
        if self.__dict__.get("pinned") and torch is not None:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
                self.unpin()


class PinnedParts:
    """Pinned copies of parts (``nbytes`` and ``gather(buffer)``), filled by threads in the order in which they are
    asked for.

    limit() -> bytes that may be pinned altogether, asked before each part. After the first refusal nothing more is
    tried.
    """

    def __init__(self, parts: Sequence, limit: Callable[[], int] = half_of_main_memory):
        self.parts, self.limit, self.granted = list(parts), limit, True
        self.copies: dict[int, Future] = {}  # part number -> PinnedMemory, or None where it was refused
        self.threads = ThreadPoolExecutor(THREADS, "ltx2-pin")

    def want(self, numbers: Sequence[int]) -> None:
        """Have pinned copies of these parts and of no others. Returns before they are there."""
        for number in set(self.copies).difference(numbers):
            self._drop(number)
        for number in numbers:
            if number not in self.copies:
                self.copies[number] = self.threads.submit(self._pin, self.parts[number])

    @torch.inference_mode()
    def _pin(self, part) -> PinnedMemory | None:
        if not self.granted:
            return None
        try:
            return PinnedMemory(part.nbytes, limit=self.limit(), fill=part.gather)
        except RuntimeError as error:
            self.granted = False
            log.info("No more pinned memory (%s); the other blocks are read from ordinary memory each time.", error)
            return None

    def pause(self) -> None:
        """Leave what no thread has begun undone; ``want`` asks for it again."""
        for number, copy in list(self.copies.items()):
            if copy.cancel():
                del self.copies[number]

    def _drop(self, number):
        copy = self.copies.pop(number)
        if not copy.cancel() and copy.exception() is None and copy.result() is not None:
            copy.result().unpin()

    def close(self) -> None:
        """Give all of it back; nothing may read from it any more."""
        self.granted = False  # what has not begun need not be
        self.threads.shutdown(cancel_futures=True)
        for number in list(self.copies):
            self._drop(number)
