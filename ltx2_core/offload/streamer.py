"""Run a network whose weights do not fit the device: a memory budget, and blocks that pass through a double buffer.

What a block needs lies back to back in one run of bytes, quantised weights as they are in the file, so bringing it in
is a single copy of packed bytes. ``BlockStreamer`` keeps as many blocks' bytes on the device as the budget allows,
spread evenly, and sends the others through a double buffer: while one block computes, the next one that is not resident
is copied on a copy stream. On a device without streams the same code copies at the same places, one thing after the
other.

Used with the weights of whole blocks (``Bundle``) without a host, and with the matrices of LoRAs under it
(``nodes/host/stream.py``). ``DeviceMemory`` is the budget's bookkeeper: nothing here is allocated on the device but
through it.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...quant import tensor as packed
from .copiers import copier_of
from .upload import Uploader, uploader

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes between tensors of a block; what device kernels like their operands to start at
RING = 2  # a double buffer: one computing, one being filled


class MemoryBudgetError(RuntimeError):
    """The budget cannot hold what must be on the device at once; the message gives the size that would."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


class DeviceMemory:
    """Counts what is placed on a device. ``budget`` in bytes, None for no limit; ``used`` and ``peak`` in bytes."""

    def __init__(self, device: torch.device | str, budget: int | None = None):
        self.device = torch.device(device)
        self.budget = budget
        self.used = self.peak = 0

    @property
    def available(self) -> int | None:
        """Bytes left in the budget, None when there is no limit."""
        return None if self.budget is None else self.budget - self.used

    def allocate(self, nbytes: int, what: str) -> torch.Tensor:
        """uint8 [nbytes] on the device. Raises MemoryBudgetError when the budget has no room for it."""
        self._take(nbytes, what)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free(self, buffer: torch.Tensor) -> None:
        """Give a buffer's bytes back to the budget. The caller drops its last reference to it."""
        self.used -= buffer.numel()

    @contextlib.contextmanager
    def reserved(self, nbytes: int, what: str) -> Iterator[None]:
        """Keep room for something that torch allocates by itself (activations, scratch)."""
        self._take(nbytes, what)
        try:
            yield
        finally:
            self.used -= nbytes

    def _take(self, nbytes: int, what: str) -> None:
        if self.budget is not None and self.used + nbytes > self.budget:
            raise MemoryBudgetError(
                f"{what} needs {_mb(nbytes)} on {self.device} beside {_mb(self.used)} in use, but the memory budget is {_mb(self.budget)}; "
                f"raise it to at least {_mb(self.used + nbytes)}."
            )
        self.used += nbytes
        self.peak = max(self.peak, self.used)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GB" if nbytes >= 2**29 else f"{nbytes / 2**20:.1f} MB"


@dataclass
class _Place:
    """One parameter or buffer of a module, and where its bytes start in the bundle."""

    module: nn.Module
    name: str
    host: torch.Tensor
    offset: int
    nbytes: int


class Bundle:
    """All parameters and buffers of a module as one run of bytes. ``skip``: submodules that are not part of it."""

    def __init__(self, module: nn.Module, skip: Sequence[nn.Module] = ()):
        self.places: list[_Place] = []
        self.nbytes = 0
        skipped = {id(m) for root in skip for m in root.modules()}
        for child in module.modules():
            if id(child) in skipped:
                continue
            for name, value in (*child._parameters.items(), *child._buffers.items()):
                if value is not None:
                    nbytes = _bytes_of(value).numel()
                    self.places.append(_Place(child, name, value, self.nbytes, nbytes))
                    self.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT

    def gather(self, buffer: torch.Tensor, upload: Uploader | None = None) -> None:
        """Copy the module's own bytes into ``buffer`` (uint8, on any device); with ``upload`` they have arrived after
        its ``wait``."""
        for place in self.places:
            source, target = _bytes_of(place.host), buffer[place.offset : place.offset + place.nbytes]
            if upload is not None and source.device.type == "cpu":
                upload.copy(source, target)
            else:
                target.copy_(source)

    def bind(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors as views of ``buffer``, in the order of ``places``; parameters where the module has
        parameters."""
        views = [_view(place.host, buffer[place.offset : place.offset + place.nbytes]) for place in self.places]
        return [
            nn.Parameter(view, requires_grad=False) if place.name in place.module._parameters else view
            for place, view in zip(self.places, views)
        ]

    def attach(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make these the module's parameters and buffers."""
        for place, value in zip(self.places, tensors, strict=True):
            (place.module._parameters if place.name in place.module._parameters else place.module._buffers)[
                place.name
            ] = value

    def detach(self) -> None:
        """Give the module its own tensors back."""
        self.attach([place.host for place in self.places])


def _bytes_of(value: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, uint8 [n]; packed weights as they are stored."""
    raw = value._qdata if packed.is_packed(value) else value.detach()
    return raw.contiguous().reshape(-1).view(torch.uint8)


def _view(like: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """A tensor like ``like`` over the bytes ``flat``."""
    if packed.is_packed(like):
        return packed.pack(flat.view(like._qdata.shape), packed.format_of(like), tuple(like.shape), like.dtype)
    return flat.view(like.dtype).view(like.shape)


class Resident:
    """A module moved to the device as one buffer, until ``release``. Submodules in ``skip`` stay where they are."""

    def __init__(self, module: nn.Module, memory: DeviceMemory, what: str, skip: Sequence[nn.Module] = ()):
        self.memory = memory
        self.bundle = Bundle(module, skip)
        self.buffer = memory.allocate(self.bundle.nbytes, what)
        with uploader(memory.device, self.bundle.nbytes) as upload:
            self.bundle.gather(self.buffer, upload)
        self.bundle.attach(self.bundle.bind(self.buffer))

    def release(self) -> None:
        self.bundle.detach()
        self.memory.free(self.buffer)
        self.buffer = None

    def __enter__(self) -> "Resident":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def choose_resident(sizes: Sequence[int], available: int | None, ring: int = RING) -> tuple[list[int], int]:
    """(blocks that stay on the device, buffers for the others) within ``available`` bytes.

    Resident blocks are spread evenly, so that each gives time to copy the next streamed one. Raises MemoryBudgetError
    when not even the ring fits.
    """
    count, largest = len(sizes), max(sizes, default=0)
    if available is None or sum(sizes) <= available:
        return list(range(count)), 0
    buffers = min(ring, count)
    room = available - buffers * largest
    if room < 0:
        raise MemoryBudgetError(
            f"Streaming needs {buffers} buffers of {_mb(largest)}, {_mb(-room)} more than the memory budget leaves; raise it by that much."
        )
    for stay in range(min(count - 1, room // max(1, min(sizes))), 0, -1):
        chosen = [i * count // stay for i in range(stay)]
        if sum(sizes[i] for i in chosen) <= room:
            return chosen, buffers
    return [], buffers


class BlockStreamer:
    """Brings parts (``Bundle``, or anything with its methods) to the device in the order in which they are used, again
    and again.

    parts:     one per block; a part of no bytes needs nothing
    memory:    where they go; ``available`` bytes of its budget may be used (default: all that is left)
    copier:    made for other ways of copying: a function of (device, parts, numbers of the streamed parts)
    Use ``run`` or ``scope`` around each block. ``release`` gives everything back.
    """

    def __init__(
        self,
        parts: Sequence,
        memory: DeviceMemory,
        available: int | None = None,
        *,
        ring: int = RING,
        copier: Callable | None = None,
    ):
        self.parts, self.memory = list(parts), memory
        needed = [number for number, part in enumerate(self.parts) if part.nbytes]
        sizes = [self.parts[number].nbytes for number in needed]
        resident, buffers = choose_resident(sizes, memory.available if available is None else available, ring)
        resident = [needed[i] for i in resident]
        self.streamed = [number for number in needed if number not in set(resident)]
        self._index = {number: index for index, number in enumerate(self.streamed)}
        self._buffers: list[torch.Tensor] = []
        self._ring: list[torch.Tensor] = []
        self._bound: dict[tuple[int, int], object] = {}
        self._coming: deque[tuple[int, int, object]] = deque()  # (part, buffer, arrival), in order
        self._free: deque[int] = deque()
        self._next = 0  # position in ``streamed`` of the next part to bring in
        self._copier, self.closed = None, False
        try:
            self._make(resident, buffers, copier or copier_of)
        except BaseException:
            self.release()
            raise
        log.info(
            "%d of %d blocks stay on %s (%s); the others pass through %d buffers of %s", len(resident), len(needed), memory.device,
            _mb(sum(self.parts[i].nbytes for i in resident)), len(self._ring), _mb(max((b.numel() for b in self._ring), default=0)),
        )  # fmt: skip

    def _make(self, resident, buffers, copier):
        with uploader(self.memory.device, sum(self.parts[i].nbytes for i in resident)) as upload:
            for number in resident:
                part = self.parts[number]
                self._buffers.append(self.memory.allocate(part.nbytes, f"block {number}"))
                part.gather(self._buffers[-1], upload)
                part.attach(part.bind(self._buffers[-1]))
        if not self.streamed:
            return
        size = max(self.parts[number].nbytes for number in self.streamed)
        for _ in range(buffers):
            self._ring.append(self.memory.allocate(size, "a streaming buffer"))
        self._copier = copier(self.memory.device, self.parts, self.streamed)
        self._free.extend(range(buffers))
        # What must have run before a buffer may be overwritten: the allocator hands out memory that earlier work may
        # still use.
        self._idle_after = [self._copier.mark()] * buffers

    def run(self, number: int | None, call: Callable | None):
        """``call()`` with part ``number`` on the device. (None, None) says that a pass is over; nothing is to be done
        then."""
        if call is not None:
            with self.scope(number):
                return call()

    @contextlib.contextmanager
    def scope(self, number: int, *_) -> Iterator[None]:
        """Part ``number`` is on the device inside this context."""
        if number not in self._index or self.closed:
            if not self.closed:
                self._fill()
            yield
            return
        part, slot = self.parts[number], self._arrive(number)
        key = (number, slot)
        if key not in self._bound:
            self._bound[key] = part.bind(self._ring[slot])
        part.attach(self._bound[key])
        self._fill()  # the copy of the next part runs while this one is used
        try:
            yield
        finally:
            part.detach()
            if not self.closed:
                self._idle_after[slot] = self._copier.mark()
                self._free.append(slot)
                self._fill()

    def _fill(self) -> None:
        """Start a copy into every free buffer."""
        while self._free:
            slot, number = self._free.popleft(), self.streamed[self._next]
            arrival = self._copier.start(number, self._ring[slot], self._idle_after[slot])
            self._coming.append((number, slot, arrival))
            self._next = (self._next + 1) % len(self.streamed)

    def _arrive(self, number: int) -> int:
        """Wait for a part; returns its buffer."""
        if not self._coming or self._coming[0][0] != number:  # the first run, or the last one was broken off
            self._drop()
            self._next = self._index[number]
            self._fill()
        _, slot, arrival = self._coming.popleft()
        self._copier.wait(arrival)
        return slot

    def _drop(self) -> None:
        while self._coming:
            _, slot, arrival = self._coming.popleft()
            self._copier.wait(arrival)
            self._free.append(slot)

    def release(self) -> None:
        """Put the parts' own tensors back and free the device buffers. Also inside a ``scope``, which then ends without
        its part."""
        self.closed = True
        if self._copier is not None:
            self._copier.close()  # first: a buffer that a copy is still written to must not be given to somebody else
            self._copier = None
        for part in self.parts:
            part.detach()
        for buffer in (*self._buffers, *self._ring):
            self.memory.free(buffer)
        self._buffers, self._ring, self._bound = [], [], {}
        self._coming.clear()
        self._free.clear()

    def __enter__(self) -> "BlockStreamer":
        return self

    def __exit__(self, *_) -> None:
        self.release()


TEXT_ROWS = 1024  # context tokens, whose modulated copies each block makes


def activation_bytes(tokens: int, width: int, dtype: torch.dtype, largest_weight: int) -> int:
    """Room a forward pass needs beside the weights: about twelve tensors [T, D] in the compute dtype (the stream, its
    normed copy, and the feed-forward's four-fold inner activation before and after GELU are most of them), the text's
    rows, float32 rotary tables, and two decoded copies of the largest matrix (``largest_weight`` elements)."""
    return (
        (12 * tokens + 3 * TEXT_ROWS) * width * dtype.itemsize
        + 4 * tokens * width
        + 2 * largest_weight * dtype.itemsize
    )
