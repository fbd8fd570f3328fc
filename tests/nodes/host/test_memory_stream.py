"""Blocks' LoRA matrices and offloaded weights on their way to the device: the same numbers, every byte once, everything given back.

The host's own patchers on tiny models; a lane that copies at once stands in for the second stream.
"""

import contextlib

import pytest
import torch

import host_models as hm
from dynamic_models import HALF_FITS, NOTHING_FITS, dynamic
from dynamic_models import load as load_dynamic
from dynamic_models import velocity as on_the_device
from host_models import load, lora, tiny, velocity, with_lora
from late_copies import Lane, Locking, Memory

pytestmark = pytest.mark.usefixtures("host")


ALL = [f"transformer_blocks.{b}.{n}" for b in (0, 1) for n in ("attn1.to_q", "attn1.to_k", "attn2.to_out.0", "ff.net.2")]


@pytest.fixture
def lane(monkeypatch, host):
    from ltx2_gguf.nodes.host import stream as host_stream

    made = Lane()
    Memory.alive = 0
    monkeypatch.setattr(host_stream, "lane_of", lambda device: made)
    monkeypatch.setattr(host_stream, "_lies_elsewhere", lambda layer, weight, device: hasattr(layer, "prev_comfy_cast_weights"))
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 0)
    return made


@contextlib.contextmanager
def loaded(patcher, megabytes):
    load(patcher, megabytes)
    yield patcher
    with torch.inference_mode():
        patcher.detach()


@pytest.mark.parametrize("megabytes", [None, 0.2, 0], ids=["fully loaded", "partly loaded", "offloaded"])
@pytest.mark.parametrize("chain", [(), ((1, 0.7),), ((1, 0.7), (2, -0.4))], ids=["plain", "one LoRA", "two LoRAs"])
def test_staged_blocks_give_the_bits_of_layers_that_fetch_for_themselves(lane, monkeypatch, megabytes, chain):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = tiny("Q4_0")
    for seed, strength in chain:
        patcher = with_lora(patcher, lora(seed=seed, layers=ALL), strength)
    with loaded(patcher, megabytes):
        results = [velocity(patcher) for _ in range(2)]
        copied = lane.copied
        monkeypatch.setattr(host_stream, "lane_of", lambda device: None)
        host_stream.release(patcher.model.diffusion_model)
        alone = velocity(patcher)
    assert torch.equal(results[0], alone) and torch.equal(results[1], alone)
    assert (copied > 0) is (bool(chain) or megabytes is not None)


def test_each_step_copies_every_byte_that_is_not_there_once(lane):
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, 0):
        velocity(patcher)
        network = patcher.model.diffusion_model
        blocks = network.transformer_blocks
        packed = [m for block in blocks for m in block.modules() if hasattr(getattr(m, "weight", None), "_qdata")]
        weights = sum(m.weight._qdata.nbytes + m.bias.nbytes for m in packed)
        matrices = sum(p.memory_required() for m in packed for p in m.weight_function)
        offloaded = [m for block in blocks for m in block.modules() if hasattr(m, "prev_comfy_cast_weights") and hasattr(m, "in_features")]
        dense = sum(m.weight.nbytes + m.bias.nbytes for m in offloaded if m not in packed)
        assert lane.copied == weights + matrices + dense
        first = lane.copied
        velocity(patcher)
        assert lane.copied == 2 * first


def test_the_next_block_is_on_its_way_before_a_block_runs(lane):
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None):
        network = patcher.model.diffusion_model
        under_way = []
        for block in network.transformer_blocks:
            block.register_forward_pre_hook(lambda *_: under_way.append(len(lane.open)))
        velocity(patcher)
    assert under_way == [1, 1], "beside the last block the next pass's first"


def test_the_first_block_of_the_next_pass_comes_beside_the_last_of_this_one_and_only_once(lane):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None):
        expected = velocity(patcher)
        first, network = lane.copied, patcher.model.diffusion_model
        assert list(network.__dict__[host_stream.KEY].coming) == [0]
        assert torch.equal(velocity(patcher), expected)
        parts = network.__dict__[host_stream.KEY].parts
        assert first == sum(part.lora_bytes for part in parts) and lane.copied == 2 * first
        broken = host_stream.blocks(network, torch.device("cpu"))
        with torch.inference_mode():
            next(broken)  # the first block has arrived and the second is coming: all of it is brought again
        assert torch.equal(velocity(patcher), expected)
        host_stream.release(network)
        assert not lane.open


@pytest.mark.parametrize("megabytes, layers", [(0, 2), (None, 3)], ids=["weights that the host may move", "the last block uses the same buffer"])
def test_nothing_comes_between_two_passes_where_it_could_be_wrong(lane, megabytes, layers):
    patcher = with_lora(tiny("Q4_0", num_layers=layers), lora(layers=ALL))
    with loaded(patcher, megabytes):
        expected = velocity(patcher)
        assert not lane.open
        assert torch.equal(velocity(patcher), expected)


def test_loras_stay_on_the_device_where_there_is_room_and_cross_once(lane, monkeypatch):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 10**12)
    with loaded(patcher, None):
        with_room = velocity(patcher)
        assert lane.copied == 0 and Memory.alive == 0
        assert all(part.kept is not None for part in patcher.model.diffusion_model.__dict__[host_stream.KEY].parts)
        monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 0)
        host_stream.release(patcher.model.diffusion_model)
        assert torch.equal(velocity(patcher), with_room)
        assert lane.copied > 0


def test_a_lora_without_page_locked_memory_is_fetched_by_its_layers(lane):
    lane.locked_memory = False
    dense = with_lora(tiny("Q4_0", dense=True), lora(layers=ALL))
    load(dense)
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None):
        assert hm.error(velocity(patcher), velocity(dense)) < 1e-5
    assert lane.copied == 0


def test_a_lora_that_the_system_refuses_to_page_lock_is_fetched_by_its_layers(lane, monkeypatch):
    """Known only when threads have tried, block by block."""
    dense = with_lora(tiny("Q4_0", dense=True), lora(layers=ALL))
    load(dense)
    tried, result = [], Locking.result
    monkeypatch.setattr(Locking, "result", lambda self: tried.append(1) or (result(self) if len(tried) == 1 else None))
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None):
        for _ in range(2):
            assert hm.error(velocity(patcher), velocity(dense)) < 1e-5
        blocks = len(patcher.model.diffusion_model.transformer_blocks)
    assert len(tried) == blocks > 1, "nobody asks again in the same run"
    assert lane.copied > 0


def test_what_threads_could_not_read_is_said_to_the_pass_that_needs_it(lane, monkeypatch):
    def unreadable(self):
        raise OSError("the file is gone")

    monkeypatch.setattr(Locking, "result", unreadable)
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None), pytest.raises(OSError, match="the file is gone"):
        velocity(patcher)


def test_a_run_that_ends_early_leaves_no_block_to_page_lock(lane):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, None):
        network = patcher.model.diffusion_model
        stream = host_stream._stream_of(network, torch.device("cpu"))
        stream._start(0)
        assert [part.locking is None for part in stream.parts] == [True, False]
        host_stream.release(network)
        assert all(part.locking is None for part in stream.parts) and Memory.alive == stream.parts[0].lora_bytes > 0
        host_stream.release_locked(network)
        assert Memory.alive == 0


def test_threads_page_lock_as_much_as_is_allowed_and_stop_at_a_refusal(host, monkeypatch):
    from ltx2_gguf.nodes.host import lane as host_lane

    class Granted:
        def __init__(self, nbytes, limit, fill):
            if nbytes > limit:
                raise RuntimeError("no more")
            self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
            fill(self.bytes)

    monkeypatch.setattr(host_lane, "LockedMemory", Granted)
    monkeypatch.setattr(host_lane, "may_lock", lambda nbytes: nbytes < 1000)
    monkeypatch.setattr("comfy.model_management.MAX_PINNED_MEMORY", 500)
    monkeypatch.setattr("comfy.model_management.TOTAL_PINNED_MEMORY", 100)
    lane = object.__new__(host_lane.CudaLane)
    lane.lockers, lane.refused, lane.stream = None, False, type("Stream", (), {"synchronize": lambda self: None})()
    assert lane.lock(1000, None) is None and lane.lockers is None
    assert int(lane.lock(400, lambda buffer: buffer.fill_(7)).result().bytes.sum()) == 2800
    assert lane.lock(500, None).result() is None
    assert lane.lock(400, None).result() is None, "after a refusal nothing else is tried"
    lane.finish()
    with pytest.raises(RuntimeError):
        lane.lock(1, None)


def test_another_lora_or_none_takes_the_place_of_the_first_and_nothing_is_left(lane):
    from ltx2_gguf.nodes.host import stream as host_stream

    base = tiny("Q4_0")
    plain, results, held = hm.ksample(base, hm.latent(), steps=1, cfg=1.0), [], []
    for seed in (1, 2, 1, 2):
        results.append(hm.ksample(with_lora(base, lora(seed=seed, layers=ALL)), hm.latent(), steps=1, cfg=1.0))
        held.append(Memory.alive)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]) and not torch.equal(results[0], results[1])
    assert held[0] > 0 and len(set(held)) == 1
    assert host_stream.KEY not in base.model.diffusion_model.__dict__, "device memory goes when a run ends"
    assert torch.equal(hm.ksample(base, hm.latent(), steps=1, cfg=1.0), plain)
    assert Memory.alive == 0


RUNS = ([(1, 1.0)], [(1, 0.3)], [(2, 1.0)], [(1, 1.0), (2, -0.5)], [], [(1, 1.0)])  # (seed, strength) of the LoRAs of each run


def patched(base, chain):
    for seed, strength in chain:
        base = with_lora(base, lora(seed=seed, layers=ALL), strength)
    return base


@pytest.mark.parametrize("room", [0, 10**12], ids=["passing", "staying"])
def test_every_run_has_the_strengths_and_matrices_of_its_own_loras(lane, monkeypatch, room):
    """Clones of one model, whose layers they share, one after the other: as on a model that never had another LoRA."""
    from ltx2_gguf.nodes.host import stream as host_stream

    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: room)
    base, results = tiny("Q4_0"), []
    clones = [patched(base, chain) for chain in RUNS]
    for clone in clones:
        results.append(hm.ksample(clone, hm.latent(), steps=2, cfg=1.0))
    assert (lane.copied > 0) is (room == 0)
    for chain, result in zip(RUNS, results):
        assert torch.equal(hm.ksample(patched(tiny("Q4_0"), chain), hm.latent(), steps=2, cfg=1.0), result)
    assert len({float(result.double().sum()) for result in results[:5]}) == 5


@pytest.mark.parametrize("room", [0, 10**12], ids=["passing", "staying"])
def test_under_dynamic_vram_every_run_has_its_own_loras(monkeypatch, host, room):
    from ltx2_gguf.nodes.host import stream as host_stream

    expected, lane = [], Lane()
    for chain in RUNS:
        dense = patched(tiny("Q4_0", dense=True), chain)
        load(dense)
        expected.append(velocity(dense))
    monkeypatch.setattr(host_stream, "lane_of", lambda device: lane)
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: room)
    base = dynamic(monkeypatch, HALF_FITS, fmt="Q4_0")
    for chain, wanted in zip(RUNS, expected):
        patcher = patched(base, chain)
        load_dynamic(patcher)
        for _ in range(2):
            assert hm.error(on_the_device(patcher), wanted) < 1e-5
    assert (lane.copied > 0) is (room == 0)


@pytest.mark.parametrize("fits", [HALF_FITS, NOTHING_FITS], ids=["half resident", "none resident"])
def test_under_dynamic_vram_a_lora_is_staged_here_and_not_by_the_host_as_well(monkeypatch, fits, host):
    import comfy.model_prefetch

    from ltx2_gguf.nodes.host import stream as host_stream

    dense = with_lora(tiny("Q4_0", dense=True), lora(layers=ALL))
    load(dense)
    wanted = velocity(dense)
    patcher = with_lora(dynamic(monkeypatch, fits, fmt="Q4_0"), lora(layers=ALL))
    load_dynamic(patcher)
    lane = Lane()
    monkeypatch.setattr(host_stream, "lane_of", lambda device: lane)
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 0)
    shown = []
    monkeypatch.setattr(comfy.model_prefetch, "make_prefetch_queue", lambda blocks, device, options: list(blocks))

    def pop(queue, device, block):
        shown.extend(m for m in (block.modules() if block is not None else ()) if m.__dict__.get("weight_lowvram_function") is not None)

    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", pop)
    assert hm.error(on_the_device(patcher), wanted) < 1e-5
    assert lane.copied > 0 and shown == []
    carrying = [m for m in patcher.model.modules() if m.__dict__.get("weight_lowvram_function") is not None]
    assert len(carrying) == 2, "the host bakes it into layers of up to 16 KiB"


def test_a_block_that_fails_leaves_no_staged_weights_behind(lane):
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, 0):
        network = patcher.model.diffusion_model
        handle = network.transformer_blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(torch.OutOfMemoryError):
            velocity(patcher)
        assert not any("_ltx2_staged" in m.__dict__ for m in network.modules())
        handle.remove()
        after = velocity(patcher)
        assert torch.equal(velocity(patcher), after)


def test_a_pass_that_is_broken_off_does_not_disturb_the_next_one_when_it_is_cleared_away_late(lane):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, 0), torch.inference_mode():
        expected = velocity(patcher)
        network = patcher.model.diffusion_model
        device = torch.device("cpu")
        broken = host_stream.blocks(network, device)  # as an exception's traceback would hold it
        next(broken)
        following = host_stream.blocks(network, device)
        _, block = next(following)
        staged = [m for m in block.modules() if host_stream.WEIGHT in m.__dict__]
        broken.close()
        assert staged and all(host_stream.WEIGHT in m.__dict__ for m in staged)
        following.close()
        assert not any(host_stream.WEIGHT in m.__dict__ for m in network.modules())
        assert torch.equal(velocity(patcher), expected)


def test_a_clone_that_goes_away_in_the_middle_of_a_pass_leaves_it_right(lane):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, 0):
        expected = velocity(patcher)
        network = patcher.model.diffusion_model
        handle = network.transformer_blocks[0].register_forward_pre_hook(lambda *_: host_stream.release(network))
        assert torch.equal(velocity(patcher), expected)
        handle.remove()
        assert torch.equal(velocity(patcher), expected)


def test_compiled_blocks_fetch_for_themselves(lane):
    patcher = with_lora(tiny("Q4_0"), lora(layers=ALL))
    with loaded(patcher, 0):
        expected = velocity(patcher)
        before = lane.copied
        blocks = patcher.model.diffusion_model.transformer_blocks
        for block in blocks:
            block._compiled_call_impl = block._call_impl
        assert hm.error(velocity(patcher), expected) < 1e-6
        assert lane.copied == before
        for block in blocks:
            block._compiled_call_impl = None


def test_room_for_a_lora_is_what_activations_and_coming_weights_leave(monkeypatch, host):
    import comfy.model_management as mm

    from ltx2_gguf.nodes.host import stream as host_stream

    monkeypatch.setattr(mm, "get_free_memory", lambda device: 10 << 30)
    device = torch.device("cpu")
    assert host_stream.room_on(device) == (10 << 30) - mm.minimum_inference_memory()
    assert host_stream.room_on(device, 6 << 30) == (4 << 30) - mm.extra_reserved_memory()


def test_weights_that_dynamic_vram_would_still_bring_come_before_a_lora(monkeypatch, host):
    import types

    import comfy.model_management as mm

    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = dynamic(monkeypatch, HALF_FITS, fmt="Q4_0")
    network = patcher.model.diffusion_model
    monkeypatch.setattr(mm, "current_loaded_models", [types.SimpleNamespace(model=None), types.SimpleNamespace(model=patcher)])
    monkeypatch.setattr(type(patcher), "loaded_size", lambda self: 1000)
    assert host_stream.weights_to_come(network) == patcher.model_size() - 1000 > 0
    assert host_stream.weights_to_come(torch.nn.Module()) == 0


def test_page_locked_memory_stays_within_what_the_host_allows_itself(monkeypatch, host):
    import comfy.cli_args
    import comfy.model_management as mm

    from ltx2_gguf.nodes.host import lane as host_lane

    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 1000)
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", 300)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(host_lane.LockedMemory, "locked_bytes", 200)
    assert host_lane.may_lock(500) and not host_lane.may_lock(501)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: host_lane.ROOM_FOR_RAM)
    assert not host_lane.may_lock(500), "main memory is short"
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", -1)
    assert not host_lane.may_lock(1)
    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 1000)
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    assert not host_lane.may_lock(1)
