"""Recorded blocks: a stand-in for the host's recording calls a block again as it was first called, as a graph does, with what lies in its arguments now."""

import pytest
import torch

import host_models as hm
from dynamic_models import EVERYTHING_FITS, dynamic, load
from host_models import lora, with_lora

pytestmark = pytest.mark.usefixtures("host")


class Recorder:
    """``prefetch_queue_pop`` of a host that records each block at its second pass and replays it from then on."""

    def __init__(self):
        self.seen, self.recorded, self.replayed, self.plain = {}, {}, 0, 0

    def pop(self, queue, device, block, dtype=None, core=None, enable_graph=False, generator=None):
        if core is None:
            self.plain += block is not None
        elif enable_graph and block in self.recorded:
            self.replayed += 1
            self.recorded[block]()
        else:
            self.seen[block] = self.seen.get(block, 0) + 1
            core()
            if self.seen[block] == 2:
                self.recorded[block] = core

    def clear(self):
        self.seen, self.recorded = {}, {}


@pytest.fixture
def recorder(monkeypatch, host):
    import comfy.model_prefetch

    from ltx2_gguf.nodes.host import internals

    made = Recorder()
    monkeypatch.setattr("ltx2_gguf.nodes.host.graphs.can_record", lambda device: True)
    monkeypatch.setattr(internals.GRAPHS, "_usable", True)
    monkeypatch.setattr(internals.PREFETCH, "_usable", True)
    monkeypatch.setattr(
        comfy.model_prefetch, "make_prefetch_queue", lambda blocks, device, options: [None, *blocks, None]
    )
    monkeypatch.setattr(comfy.model_prefetch, "prefetch_queue_pop", made.pop)
    monkeypatch.setattr(comfy.model_prefetch, "cleanup_prefetch_queues", made.clear)
    return made


def network_of(monkeypatch, patcher=None):
    patcher = patcher or dynamic(monkeypatch, EVERYTHING_FITS, fmt="Q4_0")
    load(patcher)
    network = patcher.model.diffusion_model
    for block in network.transformer_blocks:
        block._v_block = object()
    return patcher, network


def passes(network, count=5, height=2, **options):
    """Velocities of passes that differ in everything that a sampler changes."""
    results = []
    with torch.inference_mode():
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(1, 128, 2, height, 3, generator=generator)
            features = torch.randn(1, 5, network.config.connector.inner_dim, generator=generator)
            context = network.preprocess_text_embeds(features, unprocessed=True)
            sigma = torch.tensor([1 - number / 10])
            options = {"sigmas": sigma, "prefetch_dynamic_vbars": True, "patches_replace": {}, **options}
            results.append(network([x], (sigma,) * 2, context, frame_rate=24.0, transformer_options=options))
    return results


def test_replayed_blocks_compute_with_each_passs_own_values(recorder, monkeypatch):
    _, network = network_of(monkeypatch)
    blocks = len(network.transformer_blocks)
    with monkeypatch.context() as off:
        off.setattr("ltx2_gguf.nodes.host.graphs.GRAPHS", False)
        expected = passes(network)
    assert recorder.plain == 5 * blocks and not recorder.seen
    results = passes(network)
    assert recorder.replayed == 3 * blocks
    assert all(map(torch.equal, results, expected)) and not torch.equal(results[3], results[4])
    network.release()
    assert not recorder.recorded and not network.graphs.buffers
    assert all(map(torch.equal, passes(network), expected)), "and again in the next run"


@pytest.mark.parametrize(
    "options",
    [
        {"ltx2_stg_blocks": (0,)},
        {"stg_self_attn_blocks": [1]},
        {"optimized_attention_override": lambda function, *args, **kwargs: function(*args, **kwargs)},
        {"patches_replace": {"dit": {("double_block", 1): lambda args, extra: extra["original_block"](args)}}},
        {"something_of_another_node": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_pass_with_options_of_others_is_computed_and_not_replayed(recorder, monkeypatch, options):
    _, network = network_of(monkeypatch)
    passes(network, 3)
    with monkeypatch.context() as off:
        off.setattr("ltx2_gguf.nodes.host.graphs.GRAPHS", False)
        expected = passes(network, 3, **options)
    recorder.replayed = 0
    assert all(map(torch.equal, passes(network, 3, **options), expected))
    assert recorder.replayed == 0


def test_another_size_in_the_same_run_large_clips_loras_and_hooks_are_not_recorded(recorder, monkeypatch):
    from ltx2_gguf.nodes.host import graphs

    patcher, network = network_of(monkeypatch)
    passes(network, 3)
    recorder.replayed = 0
    passes(network, 3, height=4)
    assert recorder.replayed == 0
    network.release()
    with monkeypatch.context() as small:
        small.setattr(graphs, "MOST_TOKENS", 11)
        passes(network, 3)
    handle = network.transformer_blocks[1].attn2.register_forward_hook(lambda *_: None)
    passes(network, 3)
    handle.remove()
    with_lora_too, _ = network_of(monkeypatch, with_lora(patcher, lora()))
    passes(network, 3)
    assert not recorder.seen and recorder.replayed == 0
    monkeypatch.setattr(graphs.stream, "room_on", lambda device, needed=0: 0)
    load(patcher)
    passes(network, 3)
    assert not recorder.seen, "no room for every block's memory"


def test_an_error_of_recording_switches_it_off_and_the_step_is_right(recorder, monkeypatch, caplog):
    from ltx2_gguf.nodes.host import internals

    _, network = network_of(monkeypatch)
    with monkeypatch.context() as off:
        off.setattr("ltx2_gguf.nodes.host.graphs.GRAPHS", False)
        expected = passes(network)
    pop = recorder.pop

    def broken(queue, device, block, dtype=None, core=None, enable_graph=False, generator=None):
        if core is not None and recorder.seen.get(block) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        pop(queue, device, block, dtype, core, enable_graph)

    monkeypatch.setattr("comfy.model_prefetch.prefetch_queue_pop", broken)
    assert all(map(torch.equal, passes(network), expected))
    assert not internals.GRAPHS and recorder.replayed == 0 and "recording of small clips' blocks" in caplog.text


def test_a_blocks_own_error_is_its_own(recorder, monkeypatch):
    from ltx2_gguf.nodes.host import internals

    _, network = network_of(monkeypatch)
    monkeypatch.setattr(
        network.transformer_blocks[1].ff, "_chunk", lambda x: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
    )
    with pytest.raises(torch.OutOfMemoryError):
        passes(network, 1)
    assert internals.GRAPHS


def test_blocks_lie_side_by_side_only_where_the_whole_model_fits(monkeypatch, host):
    import comfy.model_management

    from ltx2_gguf.nodes.host import internals

    monkeypatch.setattr(internals.GRAPHS, "_usable", True)
    for free, units in ((1 << 40, 2), (1 << 20, 0)):
        model = hm.tiny("Q4_0").model
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device=None, free=free: free)
        for _ in range(2):
            assert [len(part) for part in model.get_dynamic_vram__units()] == [units, 0]
            monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device=None: 0)  # asked once
