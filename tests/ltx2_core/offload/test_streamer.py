from functools import partial

import pytest
import torch
from torch import nn

from ltx2_gguf.ltx2_core.offload import copiers
from ltx2_gguf.ltx2_core.offload import streamer as offload
from ltx2_gguf.ltx2_core.offload.streamer import Bundle, DeviceMemory, MemoryBudgetError, Resident, choose_resident
from packed_blocks import Block, blocks


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def run(parts, x, streamer=None):
    for number, block in enumerate(parts):
        x = streamer.run(number, partial(block, x)) if streamer else block(x)
    return x


def BlockStreamer(blocks, *args, **options):
    return offload.BlockStreamer([Bundle(block) for block in blocks], *args, **options)


def sizes(parts):
    return [offload.Bundle(block).nbytes for block in parts]


X = torch.linspace(-1, 1, 2 * 256).view(2, 256)


@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("room", ["ring", "some", "all"])
def test_streamed_blocks_compute_the_same_within_the_budget(ring, room):
    parts = blocks(12)
    expected = run(parts, X)
    total, largest = sum(sizes(parts)), max(sizes(parts))
    budget = {"ring": ring * largest, "some": ring * largest + total // 2, "all": total}[room]
    memory = DeviceMemory("cpu", budget)
    with BlockStreamer(parts, memory, ring=ring) as streamer:
        assert (streamer.streamed == []) == (room == "all")
        for _ in range(3):
            assert torch.equal(run(parts, X, streamer), expected)
    assert 0 < memory.peak <= budget
    assert memory.used == 0
    assert torch.equal(run(parts, X), expected)  # the blocks have their own tensors back


def test_what_crosses_to_the_device_is_the_packed_bytes():
    parts = blocks(4)
    dense = sum(4 * p.numel() for p in parts.parameters())
    assert sum(sizes(parts)) < 0.2 * dense
    assert offload.Bundle(parts[0]).nbytes == pytest.approx(
        256 * 256 * 18 // 32, rel=0.07
    )  # Q4_0 blocks, and the vectors


def test_each_block_is_copied_once_per_run_and_the_next_one_before_it_is_needed(monkeypatch):
    parts = blocks(5)
    copies, log = [], []
    original = copiers.DirectCopier.start

    def start(self, index, target, idle_after):
        copies.append(index)
        log.append(("copy", index))
        return original(self, index, target, idle_after)

    monkeypatch.setattr(copiers.DirectCopier, "start", start)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    with BlockStreamer(parts, memory) as streamer:
        for number, block in enumerate(parts):
            streamer.run(number, lambda number=number, block=block: (log.append(("run", number)), block(X)))
        for number in range(4):
            assert log.index(("copy", number + 1)) < log.index(("run", number))
        copies.clear()
        run(parts, X, streamer)
    assert copies == [2, 3, 4, 0, 1]  # two were already on their way


def test_a_run_that_was_broken_off_does_not_spoil_the_next():
    parts = blocks(6)
    expected = run(parts, X)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    with BlockStreamer(parts, memory) as streamer:
        for stop in (0, 1, 3, 5):
            run(parts[: stop + 1], X, streamer)
            assert torch.equal(run(parts, X, streamer), expected)


def test_an_error_inside_a_block_gives_its_buffer_back():
    parts = blocks(3)
    expected = run(parts, X)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    with BlockStreamer(parts, memory) as streamer:
        for _ in range(3):
            with pytest.raises(RuntimeError):
                run(parts, torch.zeros(1, 3), streamer)
        assert torch.equal(run(parts, X, streamer), expected)


def test_scope_serves_a_network_that_runs_its_own_loop():
    parts = blocks(4)
    expected = run(parts, X)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    with BlockStreamer(parts, memory) as streamer:
        x = X
        for i, block in enumerate(parts):
            with streamer.scope(i, block):
                x = block(x)
    assert torch.equal(x, expected)


def test_a_part_of_no_bytes_needs_nothing_and_the_others_are_streamed():
    class Nothing(Bundle):
        def __init__(self):
            super().__init__(nn.Identity())

    parts = blocks(5)
    expected = run(parts, X)
    bundles = [Bundle(block) for block in parts]
    bundles[1], bundles[4] = Nothing(), Nothing()
    with offload.BlockStreamer(bundles, DeviceMemory("cpu", 2 * max(sizes(parts)))) as streamer:
        assert streamer.streamed == [0, 2, 3]
        for _ in range(2):
            assert torch.equal(run(parts, X, streamer), expected)


def test_released_inside_a_block_the_rest_of_the_pass_goes_on_with_its_own_tensors():
    parts = blocks(5)
    expected = run(parts, X)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    streamer = BlockStreamer(parts, memory)
    handle = parts[2].register_forward_pre_hook(lambda *_: streamer.release())
    assert torch.equal(run(parts, X, streamer), expected)
    handle.remove()
    assert memory.used == 0 and torch.equal(run(parts, X, streamer), expected)


def test_memory_that_runs_out_while_it_is_made_is_given_back():
    parts = blocks(5)
    memory = DeviceMemory("cpu", 2 * max(sizes(parts)))
    memory.used = 1  # less than the streamer is told
    with pytest.raises(MemoryBudgetError):
        BlockStreamer(parts, memory, 2 * max(sizes(parts)))
    assert memory.used == 1


@pytest.mark.parametrize(
    "available, ring, expected",
    [(None, 2, (8, 0)), (80, 2, (8, 0)), (79, 2, (5, 2)), (50, 2, (3, 2)), (20, 2, (0, 2)), (10, 1, (0, 1))],
)
def test_as_many_blocks_stay_as_fit_beside_the_ring(available, ring, expected):
    stay, buffers = choose_resident([10] * 8, available, ring)
    assert (len(stay), buffers) == expected


def test_resident_blocks_are_spread_evenly():
    stay, _ = choose_resident([10] * 12, 20 + 40)
    assert stay == [0, 3, 6, 9]


def test_a_budget_below_the_ring_says_how_much_is_missing():
    with pytest.raises(MemoryBudgetError, match="2 buffers of .* more than the memory budget leaves"):
        choose_resident([10 << 20] * 8, 19 << 20)


def test_device_memory_counts_refuses_and_names_the_size_that_fits():
    memory = DeviceMemory("cpu", 1 << 20)
    buffer = memory.allocate(600_000, "weights")
    with (
        pytest.raises(MemoryBudgetError, match="activations needs .* raise it to at least"),
        memory.reserved(600_000, "activations"),
    ):
        pass
    with memory.reserved(400_000, "activations"):
        assert memory.used == 1_000_000
    memory.free(buffer)
    assert memory.used == 0 and memory.peak == 1_000_000


def test_a_resident_module_leaves_skipped_parts_alone_and_comes_back():
    parent = nn.Module()
    parent.blocks, parent.head = blocks(2), Block(9)
    before = parent.head.linear.weight
    inner = parent.blocks[0].linear.weight
    expected = parent.head(X)
    memory = DeviceMemory("cpu")
    with Resident(parent, memory, "the rest", skip=[parent.blocks]):
        assert parent.head.linear.weight is not before and parent.blocks[0].linear.weight is inner
        assert torch.equal(parent.head(X), expected)
        assert memory.used == offload.Bundle(parent.head).nbytes
    assert parent.head.linear.weight is before and memory.used == 0


@pytest.mark.cuda
@pytest.mark.parametrize("pin", [True, False])
def test_streaming_to_a_gpu_computes_the_same(pin):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    parts = blocks(9)
    x = X.cuda()
    with Resident(parts, DeviceMemory("cuda"), "all blocks"):
        expected = run(parts, x)
    memory = DeviceMemory("cuda", 2 * max(sizes(parts)) + sum(sizes(parts)) // 3)
    with BlockStreamer(parts, memory, copier=partial(copiers.copier_of, pin=pin)) as streamer:
        for _ in range(20):
            assert torch.equal(run(parts, x, streamer), expected)


def test_pinned_memory_is_given_back_once_also_when_nobody_says_so(monkeypatch):
    import types

    from ltx2_gguf.ltx2_core.offload.pinned import PinnedMemory

    registered, answer = [], [0]
    cudart = types.SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: registered.append(address) or answer[0],
        cudaHostUnregister=lambda address: registered.remove(address),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    before = PinnedMemory.total
    first, second = PinnedMemory(1000), PinnedMemory(500)
    assert len(registered) == 2 and PinnedMemory.total == before + 1500
    first.unpin()
    first.unpin()
    del second
    assert registered == [] and PinnedMemory.total == before
    answer[0] = 2
    with pytest.raises(RuntimeError, match="could not be pinned"):
        PinnedMemory(100)
    assert PinnedMemory.total == before
