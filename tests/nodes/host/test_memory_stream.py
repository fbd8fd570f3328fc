"""LoRA matrices of blocks on their way to the device: the same numbers, every byte once, everything given back.

The host's own patchers on tiny models; a copier whose copies arrive late stands in for the copy stream.
"""

import contextlib
import types

import pytest
import torch

import host_models as hm
from dynamic_models import HALF_FITS, NOTHING_FITS, dynamic
from dynamic_models import load as load_dynamic
from dynamic_models import velocity as on_the_device
from host_models import load, lora, tiny, velocity, with_lora
from late_copies import LateCopier, Memory

pytestmark = pytest.mark.usefixtures("host")

CPU = torch.device("cpu")
LAYERS = 3  # two would stay in the two buffers
ALL = [
    f"transformer_blocks.{b}.{n}"
    for b in range(LAYERS)
    for n in ("attn1.to_q", "attn1.to_k", "attn2.to_out.0", "ff.net.2")
]


@pytest.fixture
def late(monkeypatch, host):
    """The class of the copiers in use; nothing stays on the device."""
    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(LateCopier, "made", [])
    monkeypatch.setattr(stream, "copier_kind", lambda device: LateCopier)
    monkeypatch.setattr(stream, "room_on", lambda device, needed=0: 0)
    return LateCopier


def small(fmt, **options):
    return tiny(fmt, num_layers=LAYERS, **options)


def copied():
    return sum(copier.copied for copier in LateCopier.made)


@contextlib.contextmanager
def loaded(patcher, megabytes=None):
    load(patcher, megabytes)
    yield patcher.model.diffusion_model
    with torch.inference_mode():
        patcher.detach()


def staged(network):
    return [m for m in network.modules() if getattr(m, "lora", None) is not None and m.lora.staged is not None]


def patched(base, chain):
    for seed, strength in chain:
        base = with_lora(base, lora(seed=seed, layers=ALL), strength)
    return base


@pytest.mark.parametrize("megabytes", [None, 0.2, 0], ids=["fully loaded", "partly loaded", "offloaded"])
def test_streamed_matrices_give_the_bits_of_layers_that_fetch_for_themselves_and_cross_once_a_pass(
    late, monkeypatch, megabytes
):
    from ltx2_gguf.nodes.host import stream

    with loaded(patched(small("Q4_0"), ((1, 0.7), (2, -0.4))), megabytes) as network:
        results = [velocity_of(network) for _ in range(2)]
        matrices = sum(
            m.lora.patch.memory_required() for m in network.modules() if getattr(m, "lora", None) is not None
        )
        assert copied() == 2 * matrices > 0
        assert len(LateCopier.made) == 1 and not staged(network)
        monkeypatch.setattr(stream, "copier_kind", lambda device: None)
        network.loras.release()
        alone = velocity_of(network)
    assert all(torch.equal(result, alone) for result in results)


def velocity_of(network):
    return velocity(types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=network)))


def test_without_a_lora_nothing_is_made(late):
    with loaded(small("Q4_0"), 0) as network:
        velocity_of(network)
        assert not LateCopier.made and network.loras.streamer is None


def test_the_next_block_is_on_its_way_before_a_block_runs(late):
    with loaded(patched(small("Q4_0"), ((1, 1.0),))) as network:
        under_way = []
        for block in network.transformer_blocks:
            block.register_forward_pre_hook(lambda *_: under_way.append(len(LateCopier.made[0].open)))
        velocity_of(network)
    assert under_way == [1, 1, 1], "beside the last block the next pass's first"


def test_loras_stay_on_the_device_where_there_is_room_and_cross_once(late, monkeypatch):
    from ltx2_gguf.nodes.host import stream

    with loaded(patched(small("Q4_0"), ((1, 1.0),))) as network:
        expected = velocity_of(network)
        before = copied()
        network.loras.release()
        monkeypatch.setattr(stream, "room_on", lambda device, needed=0: 10**12)
        assert all(torch.equal(velocity_of(network), expected) for _ in range(2))
        assert copied() == before and not network.loras.streamer.streamed
        kept = network.loras.streamer
        network.loras.release()
        assert kept.memory.used == 0 and not staged(network)


def test_after_running_out_of_memory_nothing_stays_and_the_result_is_the_same(late, monkeypatch):
    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(stream, "room_on", lambda device, needed=0: 10**12)
    with loaded(patched(small("Q4_0"), ((1, 1.0),))) as network:
        expected = velocity_of(network)
        network.loras.release()
        network.set_low_memory(True)
        assert torch.equal(velocity_of(network), expected) and network.loras.streamer.streamed == [0, 1, 2]
        network.set_low_memory(False)


def test_without_room_for_two_buffers_layers_fetch_for_themselves(late, monkeypatch):
    from ltx2_gguf.nodes.host import stream
    from ltx2_gguf.nodes.host.internals import LORA_STREAMING

    with loaded(patched(small("Q4_0"), ((1, 1.0),))) as network:
        expected = velocity_of(network)
        network.loras.release()
        before = copied()
        monkeypatch.setattr(
            stream.DeviceMemory, "allocate", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
        )
        assert torch.equal(velocity_of(network), expected) and copied() == before
    assert LORA_STREAMING, "that is no error of streaming"


def test_another_lora_or_none_takes_the_place_of_the_first_and_nothing_is_left(late, monkeypatch):
    from ltx2_gguf.ltx2_core.offload import pinned
    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(stream, "StreamCopier", LateCopier)  # with pinned memory
    monkeypatch.setattr(stream, "pin_limit", lambda: 1 << 40)
    monkeypatch.setattr(pinned, "PinnedMemory", Memory)
    monkeypatch.setattr(Memory, "alive", 0)
    base = small("Q4_0")
    network = base.model.diffusion_model
    plain, results, held = hm.ksample(base, hm.latent(), steps=1, cfg=1.0), [], []
    for seed in (1, 1, 2, 1):
        results.append(hm.ksample(with_lora(base, lora(seed=seed, layers=ALL)), hm.latent(), steps=1, cfg=1.0))
        assert network.loras.streamer is None and not staged(network), "device memory goes when a run ends"
        held.append([copy.result() for copy in network.loras.pinned.copies.values()])
    assert torch.equal(results[0], results[3]) and not torch.equal(results[0], results[2])
    assert 0 < Memory.alive == sum(copy.bytes.numel() for copy in held[-1])
    assert torch.equal(hm.ksample(base, hm.latent(), steps=1, cfg=1.0), plain)
    assert Memory.alive == 0 and network.loras.pinned is None


RUNS = (
    [(1, 1.0)],
    [(1, 0.3)],
    [(2, 1.0)],
    [(1, 1.0), (2, -0.5)],
    [],
    [(1, 1.0)],
)  # (seed, strength) of the LoRAs of each run


@pytest.mark.parametrize("room", [0, 10**12], ids=["passing", "staying"])
def test_every_run_has_the_strengths_and_matrices_of_its_own_loras(late, monkeypatch, room):
    """Clones of one model, whose layers they share, one after the other: as on a model that never had another LoRA."""
    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(stream, "room_on", lambda device, needed=0: room)
    base, results = small("Q4_0"), []
    for chain in RUNS:
        results.append(hm.ksample(patched(base, chain), hm.latent(), steps=1, cfg=1.0))
    assert (copied() > 0) is (room == 0)
    for chain, result in zip(RUNS, results):
        assert torch.equal(hm.ksample(patched(small("Q4_0"), chain), hm.latent(), steps=1, cfg=1.0), result)
    assert len({float(result.double().sum()) for result in results[:5]}) == 5


@pytest.mark.parametrize("fits", [HALF_FITS, NOTHING_FITS], ids=["half resident", "none resident"])
def test_under_dynamic_vram_every_run_has_its_own_loras(late, monkeypatch, fits):
    expected = []
    for chain in RUNS:
        dense = patched(small("Q4_0", dense=True), chain)
        load(dense)
        expected.append(velocity(dense))
    base = dynamic(monkeypatch, fits, fmt="Q4_0", num_layers=LAYERS)
    for chain, wanted in zip(RUNS, expected):
        patcher = patched(base, chain)
        load_dynamic(patcher)
        for _ in range(2):
            assert hm.error(on_the_device(patcher), wanted) < 1e-5
    assert copied() > 0


def test_the_host_sees_no_lora_on_a_packed_weight_and_the_one_on_a_dense_weight(monkeypatch, host):
    packed, dense = (
        with_lora(dynamic(monkeypatch, HALF_FITS, fmt="Q4_0", num_layers=LAYERS, dense=d), lora(layers=ALL))
        for d in (False, True)
    )
    for patcher, seen in ((packed, False), (dense, True)):
        load_dynamic(patcher)
        layer = patcher.model.diffusion_model.transformer_blocks[0].ff.net[2]
        assert (layer.weight_lowvram_function is not None) is seen and (layer.lora is None) is seen
        layer.weight_lowvram_function = None
        assert layer.lora is None and layer.weight_lowvram_function is None


def test_a_block_that_fails_leaves_no_staged_matrices_behind(late):
    with loaded(patched(small("Q4_0"), ((1, 1.0),)), 0) as network:
        expected = velocity_of(network)
        handle = network.transformer_blocks[1].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
        )
        with pytest.raises(torch.OutOfMemoryError):
            velocity_of(network)
        handle.remove()
        assert not staged(network)
        assert torch.equal(velocity_of(network), expected)


def test_a_clone_that_goes_away_in_the_middle_of_a_pass_leaves_it_right(late):
    with loaded(patched(small("Q4_0"), ((1, 1.0),)), 0) as network:
        expected = velocity_of(network)
        handle = network.transformer_blocks[0].register_forward_pre_hook(lambda *_: network.loras.release())
        assert torch.equal(velocity_of(network), expected)
        handle.remove()
        assert torch.equal(velocity_of(network), expected)


def test_compiled_blocks_fetch_for_themselves(late):
    with loaded(patched(small("Q4_0"), ((1, 1.0),)), 0) as network:
        expected = velocity_of(network)
        before = copied()
        for block in network.transformer_blocks:
            block._compiled_call_impl = block._call_impl
        assert hm.error(velocity_of(network), expected) < 1e-6
        assert copied() == before
        for block in network.transformer_blocks:
            block._compiled_call_impl = None


def test_the_way_of_copying_follows_the_device_and_the_hosts_flags(monkeypatch, host):
    import comfy.cli_args
    import comfy.model_management

    from ltx2_gguf.ltx2_core.offload.copiers import DirectCopier, StreamCopier
    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    kinds = [stream.copier_kind(torch.device(name)) for name in ("cuda", "mps", "cpu")]
    assert kinds == [StreamCopier, DirectCopier, None]
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", True)
    assert stream.copier_kind(torch.device("cuda")) is DirectCopier
    monkeypatch.setattr(comfy.cli_args.args, "disable_pinned_memory", False)
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 0)
    assert stream.copier_kind(torch.device("cuda")) is DirectCopier


def test_room_for_a_lora_is_what_activations_and_coming_weights_leave(monkeypatch, host):
    import comfy.model_management as mm

    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(mm, "get_free_memory", lambda device: 10 << 30)
    assert stream.room_on(CPU) == (10 << 30) - mm.minimum_inference_memory()
    assert stream.room_on(CPU, 6 << 30) == (4 << 30) - mm.extra_reserved_memory()
    patcher = dynamic(monkeypatch, HALF_FITS, fmt="Q4_0", num_layers=LAYERS)
    monkeypatch.setattr(
        mm, "current_loaded_models", [types.SimpleNamespace(model=None), types.SimpleNamespace(model=patcher)]
    )
    monkeypatch.setattr(type(patcher), "loaded_size", lambda self: 1000)
    assert stream.weights_to_come(patcher.model.diffusion_model) == patcher.model_size() - 1000 > 0
    assert stream.weights_to_come(torch.nn.Module()) == 0


def test_pinned_memory_stays_within_what_the_host_allows_itself_and_the_machine_has(monkeypatch, host):
    import comfy.model_management as mm

    from ltx2_gguf.nodes.host import stream

    monkeypatch.setattr(mm, "MAX_PINNED_MEMORY", 1000)
    monkeypatch.setattr(mm, "TOTAL_PINNED_MEMORY", 300)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 1 << 40)
    assert stream.pin_limit() == 700
    monkeypatch.setattr(stream.PinnedMemory, "total", 200)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: stream.ROOM_FOR_RAM + 100)
    assert stream.pin_limit() == 300, "main memory is short"
