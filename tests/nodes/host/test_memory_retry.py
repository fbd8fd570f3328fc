"""Out of memory inside the model: one more try with a smaller footprint under any sampler, then a sentence; the model works afterwards."""

import pytest
import torch

import host_models as hm
from host_models import lora, tiny, with_lora

pytestmark = pytest.mark.usefixtures("host")


def failing(network, *calls):
    """Let these calls of the network's pass (counted from 1) run out of memory; returns the list of chunk sizes it was called with."""
    original, chunks = network._velocity, []

    def velocity(*args, **kwargs):
        chunks.append(network.transformer_blocks[0].ff.chunk_tokens)
        if len(chunks) in calls:
            raise torch.OutOfMemoryError("stand-in")
        return original(*args, **kwargs)

    network._velocity = velocity
    return chunks


def test_ksampler_goes_on_after_a_failed_pass_and_keeps_the_steps_that_are_done():
    patcher = with_lora(tiny("Q4_0"), lora())
    expected = hm.ksample(patcher, hm.latent(), steps=3, cfg=1.0)
    network = patcher.model.diffusion_model
    usual = network.transformer_blocks[0].ff.chunk_tokens
    chunks = failing(network, 2)
    assert torch.equal(hm.ksample(patcher, hm.latent(), steps=3, cfg=1.0), expected)
    assert chunks == [usual, usual, usual // 4, usual // 4], "three steps, the second one twice, and no full run again"
    assert network.transformer_blocks[0].ff.chunk_tokens == usual, "the next run begins as usual"


def test_the_second_try_has_less_of_the_model_on_the_device(monkeypatch):
    import comfy.model_patcher

    patcher = tiny("Q4_0")
    hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)
    freed = []
    unload = type(patcher).partially_unload
    monkeypatch.setattr(type(patcher), "partially_unload", lambda self, *a: freed.append(a[1]) or unload(self, *a))
    expected = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    failing(patcher.model.diffusion_model, 1)
    assert hm.error(hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0), expected) < 1e-6
    assert len(freed) == 1 and freed[0] > 0


def test_a_second_failure_is_an_out_of_memory_error_with_a_sentence_and_the_model_still_works():
    import comfy.model_management

    patcher = tiny("Q4_0")
    expected = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    network = patcher.model.diffusion_model
    original, usual = network._velocity, network.transformer_blocks[0].ff.chunk_tokens
    failing(network, 1, 2)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"twice while sampling 96x64 with 9 frames \(.* GB free\)"
    ) as caught:
        hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    assert comfy.model_management.is_oom(caught.value), "the host unloads its models on this"
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    network._velocity = original
    assert torch.equal(hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0), expected)
    assert network.transformer_blocks[0].ff.chunk_tokens == usual


def test_other_errors_are_not_tried_again():
    patcher = tiny("Q4_0")
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        raise ValueError("something else")

    patcher.model.diffusion_model._velocity = broken
    with pytest.raises(ValueError, match="something else"):
        hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    assert calls == [1]


def test_between_the_tries_what_was_prefetched_is_let_go_and_other_static_diffusion_models_stay(monkeypatch):
    import types

    import comfy.model_management as mm
    import comfy.model_prefetch

    patcher, other = tiny("Q4_0"), tiny("Q4_0")
    cleared, kept = [], []
    hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    failing(patcher.model.diffusion_model, 1)
    monkeypatch.setattr(comfy.model_prefetch, "cleanup_prefetch_queues", lambda: cleared.append(1))
    entries = [
        types.SimpleNamespace(model=m)
        for m in (patcher, other, types.SimpleNamespace(model=torch.nn.Module(), is_dynamic=lambda: False))
    ]
    from ltx2_gguf.nodes.host import retry

    monkeypatch.setattr(mm, "current_loaded_models", entries)
    monkeypatch.setattr(mm, "free_memory", lambda needed, device, keep_loaded=(): kept.extend(keep_loaded))
    with torch.inference_mode():
        retry.make_room(patcher.model, 1000)
    retry.usual_size(patcher.model)
    assert cleared == [1] and kept == entries[:2]
