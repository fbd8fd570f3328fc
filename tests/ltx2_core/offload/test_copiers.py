"""Blocks on their way to a CUDA device, with stand-ins for streams and for the driver's page-locking (no GPU needed)."""

import contextlib
import threading
import time

import pytest
import torch

from ltx2_gguf.ltx2_core.offload import copiers, pinned
from ltx2_gguf.ltx2_core.offload.pinned import PinnedMemory, main_memory
from ltx2_gguf.ltx2_core.offload.streamer import Bundle
from packed_blocks import blocks

CUDA = torch.device("cuda")


class Event:
    waited_for = 0

    def synchronize(self):
        Event.waited_for += 1


class Stream:
    waited = []

    def __init__(self, device):
        pass

    def wait_event(self, event):
        Stream.waited.append(event)

    def record_event(self):
        return Event()

    def synchronize(self):
        pass


class Driver:
    """cudaHostRegister that grants ``count`` times."""

    def __init__(self, count):
        self.count, self.registered, self.lock, self.gate, self.asked = (
            count,
            set(),
            threading.Lock(),
            threading.Event(),
            0,
        )
        self.gate.set()

    def cudaHostRegister(self, address, nbytes, flags):
        self.gate.wait(10)
        with self.lock:
            self.asked += 1
            if len(self.registered) == self.count:
                return 2
            self.registered.add(address)
            return 0

    def cudaHostUnregister(self, address):
        self.registered.remove(address)


@pytest.fixture
def driver(monkeypatch):
    driver, empty = Driver(100), torch.empty
    Stream.waited.clear()
    Event.waited_for = 0
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream(device))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    return driver


def bundles(count=7):
    return [Bundle(block) for block in blocks(count)]


def brought(copier, parts, runs=2):
    """What arrives in a run of all blocks, through one buffer of the ring."""
    target, out = torch.zeros(max(part.nbytes for part in parts), dtype=torch.uint8), []
    for _ in range(runs):
        for index, part in enumerate(parts):
            target.zero_()
            copier.wait(copier.start(index, target, copier.mark()))
            out.append(tensors(part, target))
    return out


def tensors(part, buffer):
    """The bytes of every tensor (what lies between two tensors is nobody's)."""
    return torch.cat([buffer[place.offset : place.offset + place.nbytes] for place in part.places])


def expected(parts):
    out = [torch.zeros(part.nbytes, dtype=torch.uint8) for part in parts]
    for part, buffer in zip(parts, out):
        part.gather(buffer)
    return [tensors(part, buffer) for part, buffer in zip(parts, out)]


@pytest.mark.parametrize("granted", [100, 3, 0])
def test_every_block_arrives_whatever_the_system_grants(driver, granted):
    driver.count = granted
    parts, before = bundles(), PinnedMemory.total
    copier = copiers.copier_of(CUDA, parts, range(len(parts)))
    assert all(map(torch.equal, brought(copier, parts), expected(parts) * 2))
    assert len(driver.registered) == min(granted, len(parts))
    assert len(copier.staging) == (0 if granted == 100 else 2)
    copier.close()
    assert driver.registered == set() and PinnedMemory.total == before


def test_nothing_is_page_locked_per_block_without_pin(driver):
    parts = bundles()
    copier = copiers.copier_of(CUDA, parts, range(len(parts)), pin=False)
    assert all(map(torch.equal, brought(copier, parts), expected(parts) * 2))
    assert driver.registered == set()
    assert Event.waited_for == 2 * len(parts) - 2, (
        "a page-locked buffer is filled again only when the device has read it"
    )
    copier.close()


def test_no_more_than_half_of_the_machines_memory_is_page_locked(driver, monkeypatch):
    parts = bundles()
    enough = sum(part.nbytes for part in parts[:4])
    monkeypatch.setattr(pinned, "THREADS", 1)
    limit = PinnedMemory.total + enough
    monkeypatch.setattr(pinned, "main_memory", lambda: 2 * limit)
    copier = copiers.copier_of(CUDA, parts, range(len(parts)))
    assert all(map(torch.equal, brought(copier, parts), expected(parts) * 2))
    assert 0 < PinnedMemory.total <= limit and len(driver.registered) == 4
    copier.close()


def test_making_it_does_not_wait_for_the_locking_and_closing_early_gives_all_back(driver):
    driver.gate.clear()
    parts, before = bundles(), PinnedMemory.total
    copier = copiers.copier_of(CUDA, parts, range(len(parts)))  # would hang if it waited
    assert not any(waiting.done() for waiting in copier.owned.copies.values())
    closing = threading.Thread(target=copier.close)
    closing.start()
    until = time.monotonic() + 2
    while copier.owned.copies and len(copier.owned.copies) == len(parts) and time.monotonic() < until:
        time.sleep(0.001)
    driver.gate.set()
    closing.join()
    assert driver.asked <= pinned.THREADS < len(parts), "what had not begun is not locked any more"
    assert driver.registered == set() and PinnedMemory.total == before


def test_a_copy_waits_until_the_device_is_past_the_buffers_last_use(driver):
    parts = bundles(2)
    copier = copiers.copier_of(CUDA, parts, range(len(parts)))
    target = torch.zeros(max(part.nbytes for part in parts), dtype=torch.uint8)
    idle, arrival = object(), None
    arrival = copier.start(0, target, idle)
    copier.wait(arrival)
    assert Stream.waited[0] is idle and len(Stream.waited) == 2
    copier.close()


def test_the_machines_memory_is_known():
    assert 1 << 28 < main_memory() <= 1 << 60
