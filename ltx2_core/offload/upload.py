"""Bytes from pageable memory (a memory map, mostly) to a CUDA device at the speed of the bus.

Copying from pageable memory goes through one small buffer of the driver, filled by one thread: 4 to 5 GB/s. Here
several threads copy pieces into page-locked slots, from which the device fetches them on a stream of its own while the
next pieces are being read.
"""

import contextlib
import ctypes
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

SLOT_BYTES = 8 << 20
SLOTS = 8  # each with a thread of its own, as far as there are processors


class Uploader:
    """Copies to one CUDA device that run beside the caller's work until ``wait``.

    Use as a context manager: leaving it waits for all copies, also after an error. Raises RuntimeError when no memory
    can be page-locked.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.stream = torch.cuda.Stream(self.device)
        self.slots = [torch.empty(SLOT_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self.free = list(range(SLOTS))
        self.sent = [None] * SLOTS  # events: the device has read the slot
        self.lock = threading.Lock()
        self.room = threading.Semaphore(SLOTS)
        self.threads = ThreadPoolExecutor(max(1, min(SLOTS, os.cpu_count() or 1)), "ltx2-upload")
        self.pending = []
        self.kept = []  # sources and targets on their way: memory freed before its bytes arrive would be given to somebody else
        # The caller's allocations may be memory that earlier work on its stream still uses.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Start copying ``source`` to ``target``: uint8 [n], contiguous, on the CPU and on the device."""
        if source.numel() != target.numel():
            raise ValueError(f"{source.numel()} bytes cannot be copied to a place of {target.numel()}.")
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.kept.append((source, target))
        for start in range(0, source.numel(), SLOT_BYTES):
            self.pending.append(
                self.threads.submit(self._piece, source[start : start + SLOT_BYTES], target[start : start + SLOT_BYTES])
            )

    @torch.inference_mode()
    def _piece(self, source, target):
        with self.room:
            with self.lock:
                slot = self.free.pop()
            try:
                if self.sent[slot] is not None:
                    self.sent[slot].synchronize()
                ctypes.memmove(
                    self.slots[slot].data_ptr(), source.data_ptr(), source.numel()
                )  # releases the interpreter's lock
                with torch.cuda.stream(self.stream):
                    target.copy_(self.slots[slot][: source.numel()], non_blocking=True)
                    self.sent[slot] = self.stream.record_event()
            finally:
                with self.lock:
                    self.free.append(slot)

    def wait(self) -> None:
        """Everything started has arrived for work that the caller's stream gets from now on."""
        pending, self.pending = self.pending, []
        for piece in pending:
            piece.result()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self.kept.clear()

    def __enter__(self) -> "Uploader":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            self.threads.shutdown(cancel_futures=True)  # after an error the rest is not wanted
            self.stream.synchronize()  # before the slots are given back
            self.kept.clear()


def uploader(device: torch.device | str, nbytes: int | None = None) -> contextlib.AbstractContextManager:
    """An ``Uploader``, or None within the context where there is nothing to gain (other devices, few bytes) or no
    page-locked memory.

    nbytes: how much will be copied, where that is known.
    """
    if torch.device(device).type != "cuda" or (nbytes is not None and nbytes < 2 * SLOTS * SLOT_BYTES):
        return contextlib.nullcontext()
    try:
        return Uploader(device)
    except RuntimeError:
        return contextlib.nullcontext()
