"""How a block's bytes get to the device in time: the copies behind ``offload.streamer.BlockStreamer``.

Where the bytes wait in main memory (CUDA): page-locked in one piece per block as far as the system grants it, the others are read from the
memory map through two small page-locked buffers by a thread. The map itself is never page-locked.
"""

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .pinned import LockedMemory, main_memory

log = logging.getLogger(__name__)

LOCKERS = 4  # threads that fill page-locked memory: one alone reads and touches pages at a fifth of the bus's speed


def copier(device: torch.device, bundles: list, pin: bool):
    """For ``bundles`` (``offload.streamer.Bundle``, in the order they run): what brings them to ``device``."""
    return StreamCopier(device, bundles, pin) if device.type == "cuda" else DirectCopier(bundles)


class DirectCopier:
    """Copies at once, from the module's own tensors: for devices without streams."""

    def __init__(self, bundles: list):
        self.bundles = bundles

    def start(self, index: int, target: torch.Tensor, idle_after) -> None:
        self.bundles[index].gather(target)

    def wait(self, arrival) -> None:
        pass

    def mark(self) -> None:
        return None

    def close(self) -> None:
        pass


class StreamCopier:
    """Copies run on a second stream, from page-locked memory of each block's own or, where there is none, through two page-locked buffers.

    ``pin``: give the blocks page-locked memory, as much as the system grants (never more than half of the machine's). It is filled by threads while
    the first run is under way, in the order the blocks run: nothing waits for more than the block it needs.
    """

    def __init__(self, device: torch.device, bundles: list, pin: bool):
        self.device, self.stream, self.bundles = device, torch.cuda.Stream(device), bundles
        self.granted = pin  # until the system refuses
        self.lockers = ThreadPoolExecutor(LOCKERS, "ltx2-lock")
        self.host = [self.lockers.submit(self._lock, bundle) for bundle in bundles] if pin else []
        self.sender = ThreadPoolExecutor(1, "ltx2-stream")
        self.staging: list[torch.Tensor] = []
        self.sent: list = [None, None]
        self.turn = 0

    @torch.inference_mode()
    def _lock(self, bundle) -> "LockedMemory | None":
        if not self.granted:
            return None
        try:
            return LockedMemory(bundle.nbytes, limit=main_memory() // 2, fill=bundle.gather)
        except RuntimeError as error:
            self.granted = False
            log.info("no more page-locked memory for blocks (%s); the others are read from the map each time", error)
            return None

    def start(self, index: int, target: torch.Tensor, idle_after):
        """Bring block ``index`` into ``target`` once the device is past ``idle_after``; returns what ``wait`` takes."""
        if self.host and self.host[index].done() and (locked := self.host[index].result()) is not None:
            return self._copy(locked.bytes, target, idle_after)
        return self.sender.submit(self._read_and_send, index, target, idle_after)

    @torch.inference_mode()
    def _read_and_send(self, index: int, target: torch.Tensor, idle_after):
        locked = self.host[index].result() if self.host else None
        if locked is not None:
            return self._copy(locked.bytes, target, idle_after)
        if not self.staging:
            size = max(bundle.nbytes for bundle in self.bundles)
            self.staging = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in self.sent]
        turn, self.turn = self.turn, 1 - self.turn
        if self.sent[turn] is not None:
            self.sent[turn].synchronize()
        bundle = self.bundles[index]
        bundle.gather(self.staging[turn])
        self.sent[turn] = self._copy(self.staging[turn][: bundle.nbytes], target, idle_after)
        return self.sent[turn]

    def _copy(self, source: torch.Tensor, target: torch.Tensor, idle_after):
        if idle_after is not None:
            self.stream.wait_event(idle_after)
        with torch.cuda.stream(self.stream):
            target[: source.numel()].copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, arrival) -> None:
        event = arrival.result() if isinstance(arrival, Future) else arrival
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self):
        """An event behind everything the device has been given so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        self.granted = False  # what has not begun to be locked need not be
        self.sender.shutdown()
        self.lockers.shutdown()
        self.stream.synchronize()
        for waiting in self.host:
            if (locked := waiting.result()) is not None:
                locked.unlock()
        self.host, self.staging = [], []
