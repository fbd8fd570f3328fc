"""A second stream of the device and the page-locked memory it copies from, for ``host.stream``."""

import logging
from concurrent.futures import ThreadPoolExecutor

import torch

import comfy.cli_args
import comfy.model_management

from ...ltx2_core.offload.copiers import LOCKERS
from ...ltx2_core.offload.pinned import LockedMemory

logger = logging.getLogger(__name__)

ROOM_FOR_RAM = 2 << 30  # bytes of main memory that page-locked copies leave free, as the host does


class CudaLane:
    """A second stream of a CUDA device."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.lockers, self.refused = None, False

    def mark(self):
        """An event behind all work that the caller's stream has been given."""
        return torch.cuda.current_stream(self.device).record_event()

    @torch.inference_mode()
    def copy(self, pairs, after):
        """Copy (target, source) pairs once ``after`` has passed; returns the event of their arrival."""
        if after is not None:
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, arrival):
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def finish(self):
        """Return when all copies are done: what they read from may then go."""
        if self.lockers is not None:
            self.lockers.shutdown()
        self.stream.synchronize()

    def lock(self, nbytes, fill):
        """A future of page-locked memory that ``fill`` has filled, or of None where there is none to have; None where there is none at all.

        Threads do that beside each other: one alone reads and touches pages at a fifth of the bus's speed.
        """
        if not may_lock(nbytes):
            return None
        if self.lockers is None:
            self.lockers = ThreadPoolExecutor(LOCKERS, "ltx2-lora")
        return self.lockers.submit(self._lock, nbytes, fill)

    @torch.inference_mode()
    def _lock(self, nbytes, fill):
        if self.refused or not may_lock(nbytes):
            return None
        host = comfy.model_management
        try:
            return LockedMemory(nbytes, limit=host.MAX_PINNED_MEMORY - host.TOTAL_PINNED_MEMORY, fill=fill)
        except RuntimeError as error:  # the system grants only so much
            self.refused = True
            logger.info("No page-locked memory for a LoRA (%s); its matrices are copied from ordinary memory at each call.", error)
            return None


def may_lock(nbytes):
    """Whether so many bytes more, beside what the host and this pack have page-locked, are within what the host allows itself."""
    host = comfy.model_management
    if comfy.cli_args.args.disable_pinned_memory or host.TOTAL_PINNED_MEMORY + LockedMemory.locked_bytes + nbytes > host.MAX_PINNED_MEMORY:
        return False
    return host.get_free_memory(torch.device("cpu")) >= nbytes + ROOM_FOR_RAM


def lane_of(device):
    """The device's second stream; None where there is none or the user does not want it."""
    if device.type != "cuda" or comfy.model_management.NUM_STREAMS == 0 or torch.compiler.is_compiling():
        return None
    return CudaLane(device)
