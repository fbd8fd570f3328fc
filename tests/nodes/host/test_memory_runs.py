"""Run after run under the host: nothing is left behind when models and LoRAs take turns."""

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch

import host_models as hm
from host_models import lora, tiny, with_lora

pytestmark = pytest.mark.usefixtures("host")


def own_bytes():
    """Main memory of this process that no file stands behind."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["RssAnon"].split()[0]) * 1024


def living():
    """How many objects of the kinds that hold memory are alive."""
    gc.collect()
    kinds = (
        "Tensor",
        "Parameter",
        "QuantizedTensor",
        "GGUFModelPatcher",
        "LowVramPatch",
        "LoRAAdapter",
        "Linear",
        "LTX2Base",
    )
    counts = Counter(type(thing).__name__ for thing in gc.get_objects())
    return {kind: counts[kind] for kind in kinds}


def alternate(run, count, period):
    """Objects alive and memory after the second period and at the end."""
    snapshots = []
    for number in range(count):
        run(number)
        if number + 1 in (2 * period, count):
            snapshots.append((living(), own_bytes()))
    return snapshots


def test_twenty_runs_that_alternate_two_models_and_two_loras_leave_no_object_and_no_memory_behind():
    import comfy.model_management

    models = [tiny("Q4_0", seed=1), tiny("Q8_0", seed=2)]
    loras = [lora(seed=1, rank=16), lora(seed=2, rank=16)]

    def run(number):
        hm.ksample(with_lora(models[number % 2], loras[number // 2 % 2], 0.8), hm.latent(), steps=1, cfg=1.0)
        comfy.model_management.cleanup_models_gc()

    (second, second_bytes), (last, last_bytes) = alternate(run, 20, 4)
    assert last == second
    assert last_bytes < second_bytes + 8 * 2**20


def test_models_that_are_dropped_and_loaded_again_leave_no_object_behind(tmp_path):
    """As a server does that keeps no outputs: every run loads its file again."""
    import comfy.model_management

    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files import structure
    from ltx2_gguf.nodes.host import model

    paths = [
        synthetic.make(tmp_path / f"{kind}.gguf", structure.Geometry.small("2.3", num_layers=1), type=kind)
        for kind in ("q4_0", "q8_0")
    ]

    def run(number):
        patcher = model.load_model(str(paths[number % 2]))
        hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
        del patcher
        comfy.model_management.cleanup_models_gc()

    (second, _), (last, _) = alternate(run, 8, 2)
    assert last == second


def test_a_model_that_was_unloaded_and_loaded_again_gives_the_same_result_and_the_same_memory():
    import comfy.model_management

    patcher = with_lora(tiny("Q4_0"), lora())
    first = hm.ksample(patcher, hm.latent())
    before = living()
    for _ in range(2):
        with torch.inference_mode():
            comfy.model_management.unload_all_models()
        assert torch.equal(hm.ksample(patcher, hm.latent()), first)
    assert living() == before
