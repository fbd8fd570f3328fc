"""Graphs that users build: nodes of the host and of other packs around our MODEL, on tiny models, in this process."""

import pytest
import torch

import host_models as hm

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"heads": 2, "head_dim": 64, "connector_heads": 2, "connector_head_dim": 64, "registers": 128}


def tiny(fmt="Q8_0", **options):
    return hm.model(fmt, **{**SMALL, **options})


@pytest.fixture(scope="module")
def patcher():
    return tiny()


@pytest.fixture(scope="module")
def plain(patcher):
    return hm.ksample(patcher, hm.latent(), steps=6)


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_the_hosts_caches_skip_steps(patcher, plain, name, caplog):
    import comfy_extras.nodes_easycache as caches

    caplog.set_level("INFO")
    node = getattr(caches, name)
    with torch.inference_mode():
        cached = node.execute(patcher, reuse_threshold=50.0, start_percent=0.0, end_percent=1.0, verbose=False).args[0]
        never = node.execute(patcher, reuse_threshold=0.0, start_percent=0.0, end_percent=1.0, verbose=False).args[0]
    result = hm.ksample(cached, hm.latent(), steps=6)
    assert " - skipped 3/6 steps" in caplog.text or " - skipped 4/6 steps" in caplog.text
    assert torch.isfinite(result).all() and hm.error(result, plain) > 1e-4
    assert torch.equal(hm.ksample(never, hm.latent(), steps=6), plain)


def test_the_hosts_stg_node_guides_by_the_blocks_it_names(patcher, plain):
    import comfy_extras.nodes_lt as lt

    if not hasattr(lt, "LTXVSpatioTemporalGuidance"):
        pytest.skip("this host has no STG node")
    with torch.inference_mode():
        guided = lt.LTXVSpatioTemporalGuidance.execute(
            patcher, scale=1.0, blocks="1", start_percent=0.0, end_percent=1.0
        ).args[0]
    assert hm.error(hm.ksample(guided, hm.latent(), steps=6), plain) > 1e-3
    from ltx2_gguf.ltx2_core.sampling import conditioning, guidance

    x = conditioning.gaussian_noise((1, 128, 2, 2, 3), 3)
    network = patcher.model.diffusion_model
    one = hm.ksample(guided, hm.latent(), steps=1)
    with torch.inference_mode():
        contexts = [
            network.preprocess_text_embeds(hm.conditioning(patcher, seed=seed)[0][0], unprocessed=True)
            for seed in (5, 6)
        ]
        x0 = [
            x - network.velocity(x, 1.0, c, hm.FPS, stg_blocks=stg)
            for c, stg in ((contexts[0], ()), (contexts[1], ()), (contexts[0], (1,)))
        ]
        expected = guidance.combine(*x0, cfg=2.0, stg=1.0)
    assert hm.error(one, expected) < 1e-4


@pytest.mark.parametrize("strength", [0.6, 1.5])
def test_guide_masks_are_of_the_hosts_class_and_reach_replaced_attention(patcher, strength):
    """KJNodes' attention patches ask for the host's class and read its fields."""
    from comfy.ldm.lightricks import model as lt
    from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier  # noqa: F401  (the host's module is there)

    from ltx2_gguf.ltx2_core.transformer.guides import query_groups

    tokens = 12
    seen = []
    block = patcher.model.diffusion_model.transformer_blocks[0]
    patched = patcher.clone()

    def forward(x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):
        seen.append(mask)
        return type(block.attn1).forward(block.attn1, x, context, mask, pe, k_pe, transformer_options)

    patched.add_object_patch("diffusion_model.transformer_blocks.0.attn1.forward", forward)
    keyframes = torch.zeros(1, 3, 6, 2)
    keyframes[..., 1] = 1
    values = {
        "keyframe_idxs": keyframes,
        "guide_attention_entries": [
            {"pre_filter_count": 6, "strength": strength, "pixel_mask": None, "latent_shape": [1, 2, 3]}
        ],
    }
    positive = hm.conditioning(patcher, **values)
    mask = torch.ones(1, 1, 2, 2, 3)
    ours = hm.ksample(patched, hm.latent(noise_mask=mask), positive, steps=1, cfg=1.0)
    assert torch.isfinite(ours).all() and all(isinstance(mask, lt.GuideAttentionMask) for mask in seen) and seen
    q, k, v = torch.randn(3, 1, tokens, 128, generator=torch.Generator().manual_seed(0)).unbind()
    expected = lt._attention_with_guide_mask(q, k, v, 2, seen[0], attn_precision=None, transformer_options={})
    assert hm.error(block.attn1._attend(q, k, v, seen[0], {}), expected) < 1e-5
    assert len(query_groups(seen[0], tokens)) == 2


def test_normalized_attention_guidance_of_kjnodes_finds_what_it_reads(patcher):
    """The reads of its LTX2_NAG and preview nodes, in their order, and a replaced ``attn2.forward`` without rotation."""
    network = patcher.clone().get_model_object("diffusion_model")
    assert network.audio_inner_dim * 2 == network.inner_dim
    features = hm.conditioning(patcher, seed=6)[0][0]
    assert features.shape[-1] != network.cross_attention_dim + network.audio_cross_attention_dim
    assert not (network.caption_proj_before_connector and network.caption_projection_first_linear)
    with torch.inference_mode():
        negative = network.video_embeddings_connector(features)[0].view(1, -1, network.inner_dim)
    assert network.audio_caption_projection is None
    patched, calls = patcher.clone(), []
    for index, block in enumerate(network.transformer_blocks):

        def forward(x, context, mask=None, transformer_options={}, attn=block.attn2, **kwargs):
            import comfy.ldm.modules.attention as attention

            calls.append(kwargs)
            q = attn.q_norm(attn.to_q(x))
            out = [
                attention.optimized_attention(
                    q,
                    attn.k_norm(attn.to_k(c)),
                    attn.to_v(c),
                    heads=attn.heads,
                    attn_precision=attn.attn_precision,
                    transformer_options=transformer_options,
                )
                for c in (context, negative.expand(context.shape[0], -1, -1))
            ]
            out = out[0] + 0.5 * (out[0] - out[1])
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(x))
            return attn.to_out((out.unflatten(-1, (attn.heads, attn.dim_head)) * gates.unsqueeze(-1)).flatten(2))

        patched.add_object_patch(f"diffusion_model.transformer_blocks.{index}.attn2.forward", forward)
    result = hm.ksample(patched, hm.latent(), steps=1, cfg=1.0)
    assert len(calls) == 2 and hm.error(result, hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)) > 1e-4


def test_a_node_that_swaps_the_networks_class_is_refused_before_it_changes_anything(patcher, plain):
    from comfy.ldm.lightricks.model import BasicTransformerBlock, LTXVModel

    class LTXVModelModified(LTXVModel):
        pass

    network = patcher.model.diffusion_model
    with pytest.raises(TypeError, match="LTXVModelModified.*remove the node"):
        network.__class__ = LTXVModelModified
        network.transformer_blocks[0].__class__ = BasicTransformerBlock
    assert torch.equal(hm.ksample(patcher, hm.latent(), steps=6), plain)


def test_attention_functions_the_user_chose_compute_every_attention_of_a_block(patcher, monkeypatch):
    """Sage, sparse and 8-bit attention come as another ``optimized_attention`` or as an override in the options."""
    import comfy.ldm.modules.attention as host_attention

    before = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    shapes = []

    def chosen(q, k, v, heads, *args, **kwargs):
        shapes.append((q.shape[1], k.shape[1]))
        return host_attention.attention_basic(q, k, v, heads, *args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", chosen)
    replaced = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    blocks = [(12, 12), (12, 1024)] * 2  # self-attention and text, in each block
    connector = [(1024, 1024)] * 4  # of the positive and of the negative prompt
    assert sorted(shapes) == sorted(blocks + connector) and hm.error(replaced, before) < 1e-4
    monkeypatch.undo()

    shapes.clear()
    overridden = patcher.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **kwargs: (
        chosen(*args, **{n: kwargs[n] for n in ("mask",) if n in kwargs})
    )
    assert hm.error(hm.ksample(overridden, hm.latent(), steps=1, cfg=1.0), before) < 1e-4
    assert shapes == blocks


def image_node(*args):
    from ltx2_gguf.nodes.conditioning import LTX2GGUFImageCondition

    with torch.inference_mode():
        return LTX2GGUFImageCondition.execute(*args).args


class StandInVAE:
    """Encodes images to noise: what a guide shows does not matter here."""

    downscale_index_formula = (8, 32, 32)

    def encode(self, pixels):
        frames, height, width, _ = pixels.shape
        return torch.randn(
            1, 128, (frames - 1) // 8 + 1, height // 32, width // 32, generator=torch.Generator().manual_seed(frames)
        )


@pytest.mark.parametrize("strength", [0.55, 1.0])
def test_guides_of_the_image_node_sample_as_the_official_loop_does(patcher, strength):
    """Two guides and a first frame through the node and the sampler node, against the headless conditioning and loop."""
    from ltx2_gguf.ltx2_core.sampling import conditioning, samplers, schedules
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    positive, negative, start = hm.conditioning(patcher), hm.conditioning(patcher, seed=6), hm.latent(frames=3)
    image, vae = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3)), StandInVAE()
    latent, p, n = start, positive, negative
    for frame, amount in ((0, strength), (5, strength), (-1, 0.8)):
        latent, p, n = image_node(vae, latent, image, frame, amount, 0, "auto", p, n)
    assert [entry["strength"] for entry in p[0][1]["guide_attention_entries"]] == [1.0, 1.0]
    with torch.inference_mode():
        ours = LTX2GGUFSampler.execute(
            patcher, p, n, latent, 3, 3, 1.0, "ltx2", "cfg only", "euler", 0.0, "", 0.0
        ).args[0]["samples"]

        network = patcher.model.diffusion_model
        state = conditioning.combined(
            conditioning.empty((3, 2, 3)),
            [(vae.encode(image), frame, amount) for frame, amount in ((0, strength), (5, strength), (-1, 0.8))],
        )
        context = network.preprocess_text_embeds(positive[0][0], unprocessed=True)
        x = conditioning.noised(state, conditioning.gaussian_noise(state.clean.shape, 3), 1.0)

        def denoise(x, sigma):
            v = network.velocity(x, sigma, context, hm.FPS, denoise_mask=state.mask, keyframe_idxs=state.keyframe_idxs)
            return samplers.x0_from_velocity(x, v, sigma, state.mask)

        *_, last = samplers.euler(denoise, x, schedules.ltx2_sigmas(3), mask=state.mask, clean=state.clean)
    assert hm.error(ours, last.latent) < 1e-6


def test_image_preparation_is_the_same_in_the_node_and_headless():
    import numpy as np

    from ltx2_gguf.ltx2_core import media

    seen = []

    class Recorder(StandInVAE):
        def encode(self, pixels):
            seen.append(pixels)
            return super().encode(pixels)

    picture = np.random.default_rng(0).integers(0, 256, (75, 90, 3), dtype=np.uint8)
    image_node(Recorder(), hm.latent(frames=3), torch.from_numpy(picture)[None].float() / 255, 0, 1.0, 33, "auto")
    headless = media.prepare_image(picture, 96, 64, crf=33)
    assert hm.error(seen[0].movedim(-1, 0)[None] * 2 - 1, headless) < 1e-6


def test_settings_that_are_no_numbers_are_refused_before_anything_runs(patcher):
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    common = (hm.latent(), 3, 2)
    for fps in (0.0, -1.0, float("nan"), float("inf")):
        wrong = hm.conditioning(patcher, frame_rate=fps)
        with pytest.raises(ValueError, match="frame rate"):
            LTX2GGUFSampler.execute(patcher, wrong, wrong, *common, 1.0, "ltx2", "cfg only", "euler", 0.0, "", 0.0)
        with pytest.raises(ValueError, match="frame rate"):
            hm.ksample(patcher, hm.latent(), wrong, steps=1)
    with pytest.raises(ValueError, match="cfg is nan"):
        LTX2GGUFSampler.execute(
            patcher,
            hm.conditioning(patcher),
            hm.conditioning(patcher),
            *common,
            float("nan"),
            "ltx2",
            "cfg only",
            "euler",
            0.0,
            "",
            0.0,
        )
    with pytest.raises(ValueError, match="strength is nan"):
        image_node(StandInVAE(), hm.latent(), torch.rand(1, 64, 96, 3), 0, float("nan"), 0, "auto")


@pytest.mark.parametrize("kind", ["weight", "lora"])
def test_a_number_that_is_none_stops_the_run_and_names_the_layer(kind):
    import comfy.sd

    from ltx2_gguf.ltx2_core.sampling.finite import NotFiniteError

    patcher = tiny()
    layer = "transformer_blocks.1.attn1.to_out.0"
    if kind == "weight":
        with torch.inference_mode():
            patcher.model.diffusion_model.get_submodule(layer).weight._qdata[0, :2] = (
                0x7E  # the scale of the first block: NaN
            )
        expected = f"after the first step: the weight '{layer}.weight' in the model's file"
    else:
        broken = {
            f"diffusion_model.{layer}.lora_A.weight": torch.full((2, 128), float("inf")),
            f"diffusion_model.{layer}.lora_B.weight": torch.ones(128, 2),
        }
        with torch.inference_mode():
            patcher = comfy.sd.load_lora_for_models(patcher, None, broken, 1.0, 0.0)[0]
        expected = f"after the first step: they begin in the output of '{layer}'"
    with pytest.raises(NotFiniteError, match=expected):
        hm.ksample(patcher, hm.latent(), steps=3)
    assert not any(module._forward_hooks for module in patcher.model.modules())


def test_a_guider_for_video_and_audio_is_told_that_the_latent_is_video_only(patcher):
    import comfy.sample
    import comfy.samplers
    import comfy.utils

    class MultimodalGuider(comfy.samplers.CFGGuider):
        """What matters of Lightricks' guider: it splits the packed latent in two."""

        def unpack_latents(self, x):
            video, audio = comfy.utils.unpack_latents(x, self.conds["positive"][0]["model_conds"]["latent_shapes"].cond)
            return video, audio

        def predict_noise(self, x, timestep, model_options={}, seed=None):
            return self.unpack_latents(x)[0]

    guider = MultimodalGuider(patcher)
    guider.set_conds(hm.conditioning(patcher), hm.conditioning(patcher, seed=6))
    start = hm.latent()["samples"]
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="MultimodalGuider takes a latent of video and audio.*LTX-2 Sampler"),
    ):
        guider.sample(
            comfy.sample.prepare_noise(start, 1),
            start,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([1.0, 0.0]),
        )


def test_saving_a_model_is_refused_in_one_sentence(patcher, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="cannot be saved by this node.*convert"):
        ModelSave().save(patcher, "m")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("guidance, passes", [("official", 3), ("cfg only", 2)])
def test_the_hosts_split_over_gpus_runs_every_pass_of_a_step_and_gives_the_same_latent(monkeypatch, guidance, passes):
    """The host's own node, scheduler and threads, with two names of the CPU as its devices."""
    import comfy.model_management
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    def run(patcher):
        return LTX2GGUFSampler.execute(
            patcher,
            hm.conditioning(patcher),
            hm.conditioning(patcher, seed=6),
            hm.latent(),
            3,
            2,
            3.0,
            "ltx2",
            guidance,
            "euler",
            0.0,
            "",
            0.0,
        ).args[0]["samples"]

    def fresh():
        patcher = tiny("Q4_0")
        patcher.cached_patcher_init = (fresh, ())
        return patcher

    patcher, batches = fresh(), []
    devices = [torch.device("cpu"), torch.device("cpu", 0)]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)
    with torch.inference_mode():
        expected = run(patcher)
        split = MultiGPUCFGSplitNode.execute(patcher, 2).args[0]
    clones = split.get_additional_models_with_key("multigpu")
    assert [clone.load_device for clone in clones] == devices[1:] and clones[0].model is not split.model
    networks = {id(patcher.model.diffusion_model): "first", id(clones[0].model.diffusion_model): "second"}
    forward = type(patcher.model.diffusion_model).forward

    def counted(self, x, *args, **kwargs):
        batches.append((networks[id(self)], x[0].shape[0], torch.is_inference_mode_enabled()))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(type(patcher.model.diffusion_model), "forward", counted)
    with torch.inference_mode():
        assert hm.error(run(split), expected) < 1e-5
    assert sum(size for _, size, _ in batches) == 2 * passes and {name for name, _, _ in batches} == {"first", "second"}
    assert all(inference for _, _, inference in batches)


def test_the_stg_pass_is_part_of_the_steps_one_batch(patcher, monkeypatch):
    import comfy.samplers

    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    calls, original = [], comfy.samplers.calc_cond_batch

    def counted(model, conds, *args):
        calls.append([None if cond is None else cond[0]["uuid"] for cond in conds])
        return original(model, conds, *args)

    monkeypatch.setattr(comfy.samplers, "calc_cond_batch", counted)
    with torch.inference_mode():
        LTX2GGUFSampler.execute(
            patcher,
            hm.conditioning(patcher),
            hm.conditioning(patcher, seed=6),
            hm.latent(),
            3,
            2,
            3.0,
            "ltx2",
            "official",
            "euler",
            0.0,
            "",
            0.0,
        )
    assert len(calls) == 2 and calls[0] == calls[1] and len(set(calls[0])) == 3


def test_caches_and_context_windows_of_the_host_take_the_stg_pass_too(patcher, caplog):
    from comfy_extras.nodes_context_windows import LTXVContextWindowsNode
    from comfy_extras.nodes_easycache import EasyCacheNode

    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    caplog.set_level("INFO")

    def run(model, frames):
        return LTX2GGUFSampler.execute(
            model,
            hm.conditioning(patcher),
            hm.conditioning(patcher, seed=6),
            hm.latent(frames=frames),
            3,
            6,
            3.0,
            "ltx2",
            "official",
            "euler",
            0.0,
            "",
            0.0,
        ).args[0]["samples"]

    with torch.inference_mode():
        plain = run(patcher, 2)
        never = EasyCacheNode.execute(
            patcher, reuse_threshold=0.0, start_percent=0.0, end_percent=1.0, verbose=False
        ).args[0]
        cached = EasyCacheNode.execute(
            patcher, reuse_threshold=50.0, start_percent=0.0, end_percent=1.0, verbose=False
        ).args[0]
        assert torch.equal(run(never, 2), plain)
        assert (
            torch.isfinite(run(cached, 2)).all()
            and " - skipped 0/6" in caplog.text
            and not caplog.text.rstrip().endswith("skipped 0/6 steps (1.00x speedup).")
        )
        settings = {item.id: item.default for item in LTXVContextWindowsNode.GET_SCHEMA().inputs if item.id != "model"}
        windowed = LTXVContextWindowsNode.execute(
            patcher, **{**settings, "context_length": 17, "context_overlap": 8}
        ).args[0]
        result = run(windowed, 5)
    assert torch.isfinite(result).all() and hm.error(result, run(patcher, 5)) > 1e-3
