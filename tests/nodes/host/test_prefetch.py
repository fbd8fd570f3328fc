"""The host's weights under dynamic VRAM, given out a block early: the same bits, buffers filled neither too early nor too late, pages unpinned.

The host's own casting code on a CPU (``fake_vram``) with stand-ins for its two streams. A copy there happens either at once, the earliest moment a device
could do it, or when the compute stream begins to wait for it, the latest: a wrong order of calls shows as wrong bytes in one of the two.
"""

import pytest
import torch

import fake_vram
from test_dynamic import HALF_FITS, NOTHING_FITS, dynamic, load
from test_model import lora, with_lora
from test_memory_stream import Lane

pytestmark = pytest.mark.usefixtures("host")

LAYERS = 4
ALL = [f"transformer_blocks.{b}.{n}" for b in range(LAYERS) for n in ("attn1.to_q", "attn1.to_k", "attn2.to_out.0", "ff.net.2")]


class CopyStream:
    """One of the host's streams for copies."""

    def __init__(self, late):
        self.late, self.pending = late, []
        self.seen, self.used = 0, 0  # work it has waited for, and the last work that read its buffer
        self.buffer = torch.zeros(1 << 20, dtype=torch.uint8)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def wait_stream(self, other):
        self.seen = other.now

    def synchronize(self):
        assert not self.pending

    def get(self, size, offset):
        return self.buffer[offset : offset + size]

    def size(self):
        return self.buffer.numel()

    def do(self, copy):
        assert self.seen >= self.used, "the buffer is filled while the device may still read it"
        self.pending.append(copy) if self.late else copy()


class ComputeStream:
    now = 0  # blocks whose work it has been given

    def wait_stream(self, other):
        while other.pending:
            other.pending.pop(0)()


class Machine:
    """Streams, buffers and what was done, in order."""

    def __init__(self, monkeypatch, late, streams):
        import comfy.cli_args
        import comfy.memory_management
        import comfy.model_management as management
        import comfy.model_prefetch
        import comfy.ops
        import comfy_aimdo.torch

        self.log, self.most_pinned = [], 0
        self.streams, self.compute, self.copies_of = [CopyStream(late) for _ in range(streams)], ComputeStream(), {}
        original, cast_modules = management.cast_to_gathered, comfy.ops.cast_modules_with_vbar

        def copy(tensors, r, non_blocking=False, stream=None, r2=None):
            stream.do(lambda: original(tensors, r, r2=r2)) if stream is not None else original(tensors, r, r2=r2)

        def cast(modules, *args):
            if len(modules) == 1:
                return cast_modules(modules, *args)
            number = int(modules[0].seed_key.split(".")[2])
            self.log.append(("copies", str(number)))
            self.copies_of[number] = cast_modules(modules, *args)
            return self.copies_of[number]

        for device in (fake_vram.DEVICE, fake_vram.MEMORY):
            monkeypatch.setitem(management.STREAMS, device, self.streams)
            monkeypatch.setitem(management.stream_counters, device, 0)
        monkeypatch.setattr(management, "NUM_STREAMS", streams)
        monkeypatch.setattr(management, "current_stream", lambda device: self.compute)
        monkeypatch.setattr(management, "cast_to_gathered", copy)
        monkeypatch.setattr(management, "get_aimdo_cast_buffer", lambda stream, device: stream)
        monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
        monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", cast)
        monkeypatch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda pages, device: getattr(pages, "data") if isinstance(pages, fake_vram.Pages) else pages)
        monkeypatch.setattr(comfy.cli_args.args, "fast_disk", True)  # no page-locked memory to account for

    def watch(self, patcher):
        for number, block in enumerate(patcher.model.diffusion_model.transformer_blocks):
            block.register_forward_pre_hook(lambda *_, n=number: self.work(n))

    def work(self, number):
        self.log.append(("work", str(number)))
        self.compute.now += 1
        stream = self.copies_of.get(number)
        if stream is not None:
            assert not stream.pending, "the block's work does not wait for its weights"
            stream.used = self.compute.now


def one_pass(patcher, **options):
    generator = torch.Generator().manual_seed(2)
    network = patcher.model.diffusion_model
    x, features = torch.randn(1, 128, 2, 2, 3, generator=generator), torch.randn(1, 5, network.config.connector.inner_dim, generator=generator)
    with torch.inference_mode():
        context = network.preprocess_text_embeds(features, unprocessed=True)
        return network([x], (torch.tensor([0.7]),) * 2, context, frame_rate=24.0, transformer_options={"prefetch_dynamic_vbars": True, **options})


def pins(patcher):
    return [m._v.pins for m in patcher.model.modules() if hasattr(m, "_v")]


def made(monkeypatch, fits, patched=False):
    patcher = dynamic(monkeypatch, fits, fmt="Q4_0", num_layers=LAYERS)
    if patched:
        patcher = with_lora(patcher, lora(layers=ALL))
    load(patcher)
    return patcher


@pytest.fixture(params=[False, True], ids=["copies at once", "copies at the last moment"])
def late(request):
    return request.param


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "LoRA"])
@pytest.mark.parametrize("fits", [HALF_FITS, NOTHING_FITS], ids=["half resident", "none resident"])
def test_a_block_early_gives_the_bits_of_the_hosts_order_and_unpins_what_it_pinned(monkeypatch, late, fits, patched):
    from ltx2_gguf.nodes.host import prefetch, stream as host_stream

    patcher = made(monkeypatch, fits, patched)
    machine = Machine(monkeypatch, late, streams=2)
    lane = Lane()
    monkeypatch.setattr(host_stream, "lane_of", lambda device: lane if patched else None)
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 0)
    machine.watch(patcher)
    early = [one_pass(patcher) for _ in range(3)]
    assert set(pins(patcher)) == {0}
    assert (lane.copied > 0) is patched
    monkeypatch.setattr(prefetch, "_may_be_early", lambda options: False)
    in_order = one_pass(patcher)
    assert all(torch.equal(result, in_order) for result in early)
    assert in_order.abs().sum() > 0 and not any(stream.pending for stream in machine.streams)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "LoRA"])
def test_copies_are_given_out_before_the_work_that_they_run_beside(monkeypatch, patched):
    from ltx2_gguf.nodes.host import stream as host_stream

    patcher = made(monkeypatch, NOTHING_FITS, patched)
    machine = Machine(monkeypatch, True, streams=2)
    lane = Lane()
    monkeypatch.setattr(host_stream, "lane_of", lambda device: lane if patched else None)
    monkeypatch.setattr(host_stream, "room_on", lambda device, needed: 0)
    machine.watch(patcher)
    one_pass(patcher)
    kinds = [("copies", "0")] + [entry for n in range(LAYERS) for entry in (("copies", str(n + 1)), ("work", str(n)))][: 2 * LAYERS]
    assert machine.log == [entry for entry in kinds if entry != ("copies", str(LAYERS))]


@pytest.mark.parametrize("options, streams", [({}, 1), ({"patches_replace": {"dit": {("double_block", 99): lambda *a: a}}}, 2)], ids=["one stream", "patched between layers"])
def test_the_hosts_own_order_where_buffers_could_be_taken_by_others(monkeypatch, late, options, streams):
    patcher = made(monkeypatch, NOTHING_FITS)
    machine = Machine(monkeypatch, late, streams=streams)
    machine.watch(patcher)
    one_pass(patcher, **options)
    assert machine.log == [(kind, str(n)) for n in range(LAYERS) for kind in ("copies", "work")]


def test_with_one_stream_a_block_early_would_overwrite_what_is_in_use(monkeypatch):
    """The stand-ins see it: the reason for the host's order there."""
    from ltx2_gguf.nodes.host import prefetch

    patcher = made(monkeypatch, NOTHING_FITS)
    Machine(monkeypatch, False, streams=1)
    right = one_pass(patcher)
    monkeypatch.setattr(prefetch, "_may_be_early", lambda options: True)
    assert not torch.equal(one_pass(patcher), right)


def test_what_a_pass_that_fails_leaves_pinned_is_cleared_away_by_the_host(monkeypatch, late):
    import comfy.model_prefetch

    patcher = made(monkeypatch, HALF_FITS)
    machine = Machine(monkeypatch, late, streams=2)
    expected = one_pass(patcher)
    block = patcher.model.diffusion_model.transformer_blocks[1]
    handle = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(torch.OutOfMemoryError):
        one_pass(patcher)
    handle.remove()
    assert max(pins(patcher)) > 0
    comfy.model_prefetch.cleanup_prefetch_queues()
    assert set(pins(patcher)) == {0} and not any(hasattr(m, "_prefetch") for m in patcher.model.modules())
    for stream in machine.streams:
        stream.pending.clear()
    assert torch.equal(one_pass(patcher), expected)


def test_a_blocks_modules_and_their_bytes_are_those_that_the_host_counts(monkeypatch):
    import comfy.memory_management
    from ltx2_gguf.nodes.host import prefetch

    patcher = made(monkeypatch, HALF_FITS, patched=True)
    block = patcher.model.diffusion_model.transformer_blocks[0]
    block.attn2.shared, block.attn2.nothing = block.attn1.to_q, None
    block.attn2.register_module("none", None)
    assert list(prefetch._modules(block)) == list(block.modules())
    del block.attn2.shared, block.attn2.none
    counted = 0
    for module in (m for m in block.modules() if hasattr(m, "_v")):
        patches = [getattr(module, name + "_lowvram_function", None) for name in ("weight", "bias")]
        counted += sum(p is not None for p in patches)
        expected = comfy.memory_management.vram_aligned_size([module.weight, module.bias]) + sum(p.memory_required() for p in patches if p is not None)
        assert prefetch._pinned_bytes(module) == expected > 0
    assert counted
