"""How a block's bytes get to the device in time: the copies behind ``offload.streamer.BlockStreamer``.

Where the bytes wait in main memory (CUDA): pinned, in one piece per block, as far as the system grants it
(``offload.pinned.PinnedParts``); the others are read from where they lie (mostly a memory map) through two small pinned
buffers by a thread. The map itself is never pinned.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .pinned import PinnedParts


class DirectCopier:
    """Copies at once, from the parts' own tensors: for devices without streams."""

    def __init__(self, parts: Sequence):
        self.parts = parts

    def start(self, number: int, target: torch.Tensor, idle_after) -> None:
        self.parts[number].gather(target)

    def wait(self, arrival) -> None:
        pass

    def mark(self) -> None:
        return None

    def close(self) -> None:
        pass


class StreamCopier:
    """Copies run on a copy stream, from pinned memory of each part's own or, where there is none, through two pinned
    buffers."""

    def __init__(self, device: torch.device, parts: Sequence, pinned: PinnedParts | None):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.parts, self.pinned = parts, {} if pinned is None else pinned.copies
        self.sender = ThreadPoolExecutor(1, "ltx2-stream")
        self.staging: list[torch.Tensor] = []
        self.sent: list = [None, None]
        self.turn = 0

    def start(self, number: int, target: torch.Tensor, idle_after):
        """Bring part ``number`` into ``target`` once the device is past ``idle_after``; returns what ``wait`` takes."""
        copy = self.pinned.get(number)
        if copy is not None and copy.done() and copy.result() is not None:
            return self._copy(copy.result().bytes, target, idle_after)
        return self.sender.submit(self._read_and_send, number, copy, target, idle_after)

    @torch.inference_mode()
    def _read_and_send(self, number: int, copy: Future | None, target: torch.Tensor, idle_after):
        pinned = None if copy is None else copy.result()
        if pinned is not None:
            return self._copy(pinned.bytes, target, idle_after)
        if not self.staging:
            self.staging = [torch.empty(target.numel(), dtype=torch.uint8, pin_memory=True) for _ in self.sent]
        turn, self.turn = self.turn, 1 - self.turn
        if self.sent[turn] is not None:
            self.sent[turn].synchronize()
        part = self.parts[number]
        part.gather(self.staging[turn])
        self.sent[turn] = self._copy(self.staging[turn][: part.nbytes], target, idle_after)
        return self.sent[turn]

    def _copy(self, source: torch.Tensor, target: torch.Tensor, idle_after):
        if idle_after is not None:
            self.stream.wait_event(idle_after)
        with torch.cuda.stream(self.stream):
            target[: source.numel()].copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, arrival) -> None:
        """Work that the caller's stream gets from now on finds the bytes in place."""
        event = arrival.result() if isinstance(arrival, Future) else arrival
        torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self):
        """An event behind everything that the caller's stream has been given so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def close(self) -> None:
        """Returns when nothing is read from main memory any more."""
        self.sender.shutdown()
        self.stream.synchronize()
        self.staging = []


class OwningCopier(StreamCopier):
    """A ``StreamCopier`` with pinned memory that goes when it closes."""

    def __init__(self, device: torch.device, parts: Sequence, streamed: Sequence[int]):
        self.owned = PinnedParts(parts)
        self.owned.want(streamed)
        super().__init__(device, parts, self.owned)

    def close(self) -> None:
        self.owned.pause()  # what has not begun need not be pinned
        super().close()
        self.owned.close()


def copier_of(device: torch.device, parts: Sequence, streamed: Sequence[int], pin: bool = True):
    """What brings parts to ``device``. pin: on CUDA, the ``streamed`` ones wait in pinned memory of their own."""
    if device.type != "cuda":
        return DirectCopier(parts)
    return OwningCopier(device, parts, streamed) if pin else StreamCopier(device, parts, None)
