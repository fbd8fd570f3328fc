"""The MODEL object under the host's own samplers, patchers and LoRA loader, in this process, on tiny models."""

import pytest
import torch

import host_models as hm
from host_models import load, lora, stored_bytes, tiny, velocity, with_lora

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("version", ["2.3", "2.0"])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q5_1", "Q8_0"])
def test_ksampler_on_packed_weights_equals_ksampler_on_the_dequantised_ones(fmt, version):
    packed, dense = tiny(fmt, version=version), tiny(fmt, version=version, dense=True)
    result = hm.ksample(packed, hm.latent())
    assert hm.error(result, hm.ksample(dense, hm.latent())) < 1e-5
    assert result.std() > 0.1


def test_the_size_the_host_sees_is_the_packed_size():
    packed, dense = tiny("Q4_0"), tiny("Q4_0", dense=True)
    expected = sum(v._qdata.nbytes if hasattr(v, "_qdata") else v.nbytes for v in packed.model.state_dict().values())
    assert packed.model_size() == expected
    assert packed.model_size() < 0.35 * dense.model_size()


@pytest.mark.parametrize("style", ["diffusion_model", "bare", "kohya"])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_a_lora_on_packed_weights_equals_the_lora_on_the_dequantised_ones(fmt, style):
    tensors = lora(style)
    packed, dense = with_lora(tiny(fmt), tensors, 0.8), with_lora(tiny(fmt, dense=True), tensors, 0.8)
    assert len(packed.patches) == 3
    result = hm.ksample(packed, hm.latent())
    assert hm.error(result, hm.ksample(dense, hm.latent())) < 1e-3
    assert hm.error(result, hm.ksample(tiny(fmt), hm.latent())) > 0.01, "the LoRA must change the result"


@pytest.mark.parametrize("megabytes", [None, 0.2, 0], ids=["fully loaded", "partly loaded", "offloaded"])
def test_two_stacked_loras_are_exact_in_every_memory_mode(megabytes):
    first, second = lora(seed=1), lora(seed=2)
    dense = with_lora(with_lora(tiny("Q4_0", dense=True), first, 0.7), second, -0.4)
    load(dense)
    packed = with_lora(with_lora(tiny("Q4_0"), first, 0.7), second, -0.4)
    load(packed, megabytes)
    assert packed.model.model_lowvram is (megabytes is not None)
    assert hm.error(velocity(packed), velocity(dense)) < 1e-5


def test_unloading_part_of_a_model_with_a_lora_does_not_apply_it_twice():
    dense = with_lora(tiny("Q8_0", dense=True), lora())
    load(dense)
    packed = with_lora(tiny("Q8_0"), lora())
    load(packed)
    with torch.inference_mode():
        freed = packed.partially_unload(packed.offload_device, 200_000)
    assert freed >= 200_000
    assert hm.error(velocity(packed), velocity(dense)) < 1e-5
    with torch.inference_mode():
        packed.partially_load(packed.load_device, 10**9)
    assert hm.error(velocity(packed), velocity(dense)) < 1e-5


def test_changing_and_removing_a_lora_leaves_the_stored_weights_bit_identical():
    base = tiny("Q4_0")
    before, result = stored_bytes(base), hm.ksample(base, hm.latent())
    strong = hm.ksample(with_lora(base, lora(), 1.0), hm.latent())
    weak = hm.ksample(with_lora(base, lora(), 0.25), hm.latent())
    assert hm.error(weak, result) < hm.error(strong, result)
    assert torch.equal(hm.ksample(base, hm.latent()), result)
    with torch.inference_mode():
        base.detach()
    after = stored_bytes(base)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_conditioning_strength_between_0_and_1_is_exact_under_the_hosts_euler_loop():
    """On a linear path (v = noise - clean everywhere) every token must end at the clean latent, whatever its mask."""
    import comfy.sample

    patcher = tiny()
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(1, 128, 3, 2, 2, generator=generator)
    noise = comfy.sample.prepare_noise(clean, 3)
    mask = torch.tensor([0.3, 0.7, 1.0]).view(1, 1, 3, 1, 1)
    patcher.model.diffusion_model._velocity = lambda latent, *args, **kwargs: noise - clean
    result = hm.ksample(patcher, {"samples": clean, "noise_mask": mask}, steps=5, cfg=1.0, seed=3)
    assert (result - clean).abs().max() < 1e-4


@pytest.mark.parametrize("sampler_name", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_given_frames_stay_as_they_are_beside_fractional_ones(sampler_name):
    import nodes

    patcher = tiny()
    clean = torch.randn(1, 128, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0.0, 0.4, 1.0]).view(1, 1, 3, 1, 1)
    with torch.inference_mode():
        out = nodes.common_ksampler(
            patcher,
            3,
            3,
            1.0,
            sampler_name,
            "simple",
            hm.conditioning(patcher),
            hm.conditioning(patcher),
            {"samples": clean, "noise_mask": mask},
        )
    result = out[0]["samples"]
    assert (result[:, :, 0] - clean[:, :, 0]).abs().max() < 1e-5
    assert hm.error(result[:, :, 1], clean[:, :, 1]) > 0.01 and torch.isfinite(result).all()


def test_the_hosts_loop_with_a_fractional_mask_equals_the_official_loop():
    """Euler written out: tokens at noise level m sigma, x0 = x - m sigma v, mixed with the clean latent after each pass."""
    from ltx2_gguf.ltx2_core.sampling import conditioning, schedules

    patcher = tiny()
    network = patcher.model.diffusion_model
    clean = torch.randn(1, 128, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([0.25, 1.0]).view(1, 1, 2, 1, 1)
    result = sample_node(patcher, {"samples": clean, "noise_mask": mask}, cfg=1.0, guidance="cfg only", steps=3)
    sigmas, full = schedules.ltx2_sigmas(3), mask.expand(1, 1, 2, 2, 3)
    with torch.inference_mode():
        context = network.preprocess_text_embeds(hm.conditioning(patcher)[0][0], unprocessed=True)
        x = torch.lerp(clean, conditioning.gaussian_noise(clean.shape, 3), mask)
        for sigma, following in zip(sigmas, sigmas[1:]):
            x0 = torch.lerp(
                clean, x - mask * sigma * network.velocity(x, sigma, context, hm.FPS, denoise_mask=full), mask
            )
            x = x0 if following == 0 else x + (x - x0) / sigma * (following - sigma)
    assert hm.error(result, x) < 1e-5


def test_a_mask_gives_the_network_one_timestep_per_token():
    seen = {}
    patcher = tiny()
    network = patcher.model.diffusion_model
    original = network._velocity

    def spy(latent, timestep, *args, **kwargs):
        seen.setdefault("timestep", timestep.clone())
        return original(latent, timestep, *args, **kwargs)

    network._velocity = spy
    mask = torch.tensor([0.0, 0.5]).view(1, 1, 2, 1, 1)
    hm.ksample(patcher, hm.latent(noise_mask=mask), steps=1, cfg=1.0)
    assert seen["timestep"].shape == (1, 12, 1)
    assert torch.allclose(seen["timestep"].view(2, 6), torch.tensor([[0.0] * 6, [0.5] * 6]))


def test_samplercustomadvanced_with_the_hosts_ltxv_scheduler_and_conditioning_runs():
    from comfy_extras.nodes_custom_sampler import CFGGuider, KSamplerSelect, RandomNoise, SamplerCustomAdvanced
    from comfy_extras.nodes_lt import LTXVConditioning, LTXVScheduler

    patcher, start = tiny(), hm.latent()
    with torch.inference_mode():
        positive, negative = LTXVConditioning.execute(
            hm.conditioning(patcher), hm.conditioning(patcher, seed=6), 30.0
        ).args
        assert positive[0][1]["frame_rate"] == 30.0
        guider = CFGGuider.execute(patcher, positive, negative, 2.0).args[0]
        sigmas = LTXVScheduler.execute(3, 2.05, 0.95, True, 0.1, start).args[0]
        out = SamplerCustomAdvanced.execute(
            RandomNoise.execute(4).args[0], guider, KSamplerSelect.execute("euler").args[0], sigmas, start
        ).args
    assert out[0]["samples"].shape == (1, 128, 2, 2, 3) and torch.isfinite(out[0]["samples"]).all()


def test_replacing_forward_of_a_blocks_attention_takes_effect_and_is_undone():
    """What KJNodes and others do: an object patch on a module's forward."""
    patcher = tiny()
    plain = hm.ksample(patcher, hm.latent())
    calls = []
    patched = patcher.clone()
    for path in ("attn1", "attn2", "ff"):
        module = patcher.model.diffusion_model.transformer_blocks[0].get_submodule(path)
        patched.add_object_patch(
            f"diffusion_model.transformer_blocks.0.{path}.forward",
            lambda *a, m=module, p=path, **k: calls.append(p) or type(m).forward(m, *a, **k) * 0.5,
        )
    halved = hm.ksample(patched, hm.latent())
    assert {"attn1", "attn2", "ff"} == set(calls)
    assert hm.error(halved, plain) > 1e-3
    assert torch.equal(hm.ksample(patcher, hm.latent()), plain)


def test_block_replacements_and_attention_overrides_of_other_nodes_are_honoured():
    patcher = tiny()
    plain = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    seen = []
    replaced = patcher.clone()
    replaced.set_model_patch_replace(
        lambda args, extra: seen.append("block") or extra["original_block"](args), "dit", "double_block", 1
    )
    assert torch.equal(hm.ksample(replaced, hm.latent(), steps=1, cfg=1.0), plain)

    overridden = patcher.clone()

    def override(function, *args, **kwargs):
        seen.append("attention")
        return function(*args, **kwargs) * 0.5

    overridden.model_options["transformer_options"]["optimized_attention_override"] = override
    assert hm.error(hm.ksample(overridden, hm.latent(), steps=1, cfg=1.0), plain) > 1e-3
    assert seen.count("block") == 1 and "attention" in seen


def test_the_hosts_attention_is_used_whenever_somebody_chose_one(monkeypatch):
    """Torch's own order of backends by default; masks, overrides and a replaced ``optimized_attention`` go to the host's function."""
    import comfy.ldm.modules.attention as host_attention

    from ltx2_gguf.nodes.host import model as host_model

    q, k, v = (torch.randn(1, count, 64) for count in (7, 5, 5))
    expected = host_attention.attention_basic(q, k, v, 2)
    assert hm.error(host_model.attention(q, k, v, 2), expected) < 1e-6
    called = []

    def spy(*args, **kwargs):
        called.append(kwargs.get("mask"))
        return host_attention.attention_basic(*args, **kwargs)

    monkeypatch.setattr(
        host_attention, "attention_pytorch", host_attention.optimized_attention
    )  # the default of a CUDA machine
    assert hm.error(host_model.attention(q, k, v, 2), expected) < 1e-6
    monkeypatch.setattr(host_attention, "optimized_attention", spy)
    assert hm.error(host_model.attention(q, k, v, 2), expected) < 1e-6 and len(called) == 1
    monkeypatch.setattr(host_attention, "attention_pytorch", spy)
    host_model.attention(q, k, v, 2)
    assert len(called) == 1  # the default again, by the direct way
    host_model.attention(q, k, v, 2, mask=torch.zeros(7, 5))
    options = {
        "optimized_attention_override": lambda function, *a, **kw: function(
            *a, **{key: value for key, value in kw.items() if key == "mask"}
        )
    }
    host_model.attention(q, k, v, 2, transformer_options=options)
    assert len(called) == 3


def test_diffusion_model_wrappers_of_other_nodes_wrap_the_forward_pass():
    import comfy.patcher_extension

    patcher = tiny().clone()
    seen = []

    def wrapper(executor, x, timestep, context, *args, **kwargs):
        seen.append(context.shape)
        return executor(x, timestep, context, *args, **kwargs)

    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrapper)
    hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    assert seen == [(1, 1024, 128)]


def test_saving_a_gguf_model_is_refused_instead_of_writing_garbage():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be saved"):
        tiny().state_dict_for_saving()


def test_lora_hooks_are_refused_with_a_sentence():
    import comfy.hooks

    patcher = tiny()
    with torch.inference_mode():
        key = "diffusion_model.transformer_blocks.0.attn1.to_q.weight"
        group = comfy.hooks.create_hook_lora({"unused": torch.zeros(1)}, 1.0, 0.0)
        patcher.add_hook_patches(group.hooks[0], {key: ("diff", (torch.zeros(128, 128),))}, 1.0)
        with pytest.raises(RuntimeError, match="Load LoRA"):
            patcher.patch_hooks(group)


def test_conditioning_of_another_model_is_refused_with_both_widths():
    patcher = tiny()
    narrow = [[torch.zeros(1, 5, 64), {"unprocessed_ltxav_embeds": True}]]
    with pytest.raises(ValueError, match="64 wide.*takes 128"):
        hm.ksample(patcher, hm.latent(), positive=narrow, cfg=1.0)


def test_a_latent_with_sound_is_refused_with_the_node_that_splits_it():
    import comfy.nested_tensor

    both = {"samples": comfy.nested_tensor.NestedTensor((torch.zeros(1, 128, 2, 2, 3), torch.zeros(1, 8, 4, 16)))}
    with pytest.raises(ValueError, match="LTXVSeparateAVLatent"):
        hm.ksample(tiny(), both)


def test_model_merging_of_two_packed_models_uses_dense_weights():
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    a, b = tiny("Q8_0", seed=1), tiny("Q8_0", seed=2)
    dense_a, dense_b = tiny("Q8_0", seed=1, dense=True), tiny("Q8_0", seed=2, dense=True)
    with torch.inference_mode():
        merged, expected = ModelMergeSimple().merge(a, b, 0.25)[0], ModelMergeSimple().merge(dense_a, dense_b, 0.25)[0]
    load(merged)
    load(expected)
    assert hm.error(velocity(merged), velocity(expected)) < 1e-5


def sample_node(patcher, latent_dict, **options):
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    settings = {
        "seed": 3,
        "steps": 2,
        "cfg": 3.0,
        "schedule": "ltx2",
        "guidance": "official",
        "sampler_name": "euler",
        "stg_scale": 1.0,
        "stg_blocks": "",
        "rescale": 0.7,
    }
    with torch.inference_mode():
        positive = options.pop("positive", None) or hm.conditioning(patcher)
        return LTX2GGUFSampler.execute(
            patcher, positive, hm.conditioning(patcher, seed=6), latent_dict, **{**settings, **options}
        ).args[0]["samples"]


def test_official_guidance_in_the_node_equals_the_headless_guidance_on_the_same_velocities():
    """CFG, STG and rescale through the host's guider against the same sum written out with the core's functions."""
    from ltx2_gguf.ltx2_core.sampling import conditioning, guidance, schedules

    patcher = tiny()
    network = patcher.model.diffusion_model
    result = sample_node(patcher, hm.latent())
    sigmas = schedules.ltx2_sigmas(2)
    x = conditioning.gaussian_noise((1, 128, 2, 2, 3), 3)
    with torch.inference_mode():
        positive, negative = (
            network.preprocess_text_embeds(hm.conditioning(patcher, seed=seed)[0][0], unprocessed=True)
            for seed in (5, 6)
        )
        blocks = guidance.stg_blocks_for(guidance.PRESETS["2.3"].stg_block, 2)
        for sigma, following in zip(sigmas, sigmas[1:]):
            x0 = [
                x - sigma * network.velocity(x, sigma, context, hm.FPS, stg_blocks=stg)
                for context, stg in ((positive, ()), (negative, ()), (positive, blocks))
            ]
            guided = guidance.combine(*x0, cfg=3.0, stg=1.0, rescale=0.7)
            x = guided if following == 0 else x + (x - guided) / sigma * (following - sigma)
    assert hm.error(result, x) < 1e-4
    assert hm.error(sample_node(patcher, hm.latent(), guidance="cfg only"), x) > 1e-3


def test_the_sampler_node_without_guidance_equals_samplercustom_on_the_same_sigmas():
    import comfy.sample
    import comfy.samplers

    from ltx2_gguf.ltx2_core.sampling import schedules

    patcher = tiny()
    result = sample_node(patcher, hm.latent(), cfg=2.0, guidance="cfg only")
    with torch.inference_mode():
        start = hm.latent()["samples"]
        expected = comfy.sample.sample_custom(
            patcher, comfy.sample.prepare_noise(start, 3), 2.0, comfy.samplers.sampler_object("euler"), schedules.ltx2_sigmas(2),
            hm.conditioning(patcher), hm.conditioning(patcher, seed=6), start, seed=3,
        )  # fmt: skip
    assert torch.equal(result, expected)


@pytest.mark.parametrize("tokens, noticed", [(1, True), (2, False)])
def test_an_empty_prompt_is_taken_and_noticed(tokens, noticed, caplog):
    from ltx2_gguf.nodes.sampling import is_empty_prompt

    patcher = tiny()
    (entry,) = hm.conditioning(patcher, tokens=tokens)
    assert is_empty_prompt(entry) is noticed
    sample_node(patcher, hm.latent(), positive=[entry])
    assert ("The positive prompt is empty" in caplog.text) is noticed


def test_running_out_of_memory_is_retried_once_with_smaller_pieces_and_gives_the_same_result():
    patcher = tiny()
    expected = sample_node(patcher, hm.latent(), guidance="cfg only")
    network, failures, chunks = patcher.model.diffusion_model, [1], []
    original, feed_forward = network._velocity, network.transformer_blocks[0].ff
    usual = feed_forward.chunk_tokens

    def short_of_memory(*args, **kwargs):
        chunks.append(feed_forward.chunk_tokens)
        if failures.pop() if failures else 0:
            raise torch.OutOfMemoryError("stand-in")
        return original(*args, **kwargs)

    network._velocity = short_of_memory
    assert torch.equal(sample_node(patcher, hm.latent(), guidance="cfg only"), expected)
    assert chunks[0] == usual and set(chunks[1:]) == {usual // 4} and feed_forward.chunk_tokens == usual


def test_running_out_of_memory_twice_is_reported_with_what_was_asked_for():
    patcher = tiny()
    feed_forward = patcher.model.diffusion_model.transformer_blocks[0].ff
    usual, required = feed_forward.chunk_tokens, patcher.model.memory_required(hm.latent()["samples"].shape)

    def always_short(*args, **kwargs):
        raise torch.OutOfMemoryError("stand-in")

    patcher.model.diffusion_model._velocity = always_short
    with pytest.raises(RuntimeError, match=r"twice while sampling 96x64 with 9 frames \(.* GB free\)"):
        sample_node(patcher, hm.latent())
    assert (
        feed_forward.chunk_tokens == usual and patcher.model.memory_required(hm.latent()["samples"].shape) == required
    )


def test_running_out_of_memory_outside_of_the_model_repeats_the_run_with_a_smaller_footprint(monkeypatch):
    from ltx2_gguf.nodes.host import sampling as host_sampling

    patcher = tiny()
    expected = sample_node(patcher, hm.latent())
    feed_forward = patcher.model.diffusion_model.transformer_blocks[0].ff
    usual, shape = feed_forward.chunk_tokens, hm.latent()["samples"].shape
    required, seen, original = patcher.model.memory_required(shape), [], host_sampling._sample

    def short_of_memory(*args):
        seen.append((feed_forward.chunk_tokens, patcher.model.memory_required(shape) > required))
        if len(seen) == 1:
            raise torch.OutOfMemoryError("stand-in")
        return original(*args)

    monkeypatch.setattr(host_sampling, "_sample", short_of_memory)
    assert torch.equal(sample_node(patcher, hm.latent()), expected)
    assert seen == [(usual, False), (usual // 4, True)]
    assert feed_forward.chunk_tokens == usual and patcher.model.memory_required(shape) == required


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "with a guide"])
def test_context_windows_of_the_host_run_also_with_guides(guided):
    from comfy_extras.nodes_context_windows import LTXVContextWindowsNode
    from comfy_extras.nodes_lt import LTXVAddGuide

    class StandInVAE:
        downscale_index_formula = (8, 32, 32)

        def encode(self, pixels):
            return torch.randn(1, 128, 1, 2, 3, generator=torch.Generator().manual_seed(1))

    patcher = tiny()
    settings = {item.id: item.default for item in LTXVContextWindowsNode.GET_SCHEMA().inputs if item.id != "model"}
    positive, negative, start = hm.conditioning(patcher), hm.conditioning(patcher, seed=6), hm.latent(frames=5)
    with torch.inference_mode():
        windowed = LTXVContextWindowsNode.execute(
            patcher, **{**settings, "context_length": 17, "context_overlap": 8}
        ).args[0]
        if guided:
            positive, negative, start = LTXVAddGuide.execute(
                positive, negative, StandInVAE(), start, torch.rand(1, 64, 96, 3), 16, 1.0
            ).args
    result = hm.ksample(windowed, start, positive, negative, steps=1)
    assert result.shape == start["samples"].shape and torch.isfinite(result).all()
    assert hm.error(result, hm.ksample(patcher, start, positive, negative, steps=1)) > 1e-3, (
        "windows must change the result"
    )


def test_the_official_second_order_sampler_runs_in_the_node_as_it_does_headless():
    from ltx2_gguf.ltx2_core.sampling import conditioning, guidance, schedules
    from ltx2_gguf.ltx2_core.sampling import samplers as sampling

    patcher = tiny()
    network = patcher.model.diffusion_model
    result = sample_node(patcher, hm.latent(), sampler_name="res_2s", guidance="official HQ", steps=2)
    with torch.inference_mode():
        contexts = [
            network.preprocess_text_embeds(hm.conditioning(patcher, seed=seed)[0][0], unprocessed=True)
            for seed in (5, 6)
        ]

        def denoise(x, sigma):
            x0 = [x - sigma * network.velocity(x, sigma, context, hm.FPS) for context in contexts]
            return guidance.combine(*x0, cfg=3.0, rescale=0.45)

        *_, last = sampling.res_2s(
            denoise, conditioning.gaussian_noise((1, 128, 2, 2, 3), 3), schedules.ltx2_sigmas(2), seed=3
        )
    assert hm.error(result, last.latent) < 1e-4
