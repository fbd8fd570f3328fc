"""Video with audio under the host: its latents, samplers, masks and nodes, and our own nodes on joint latents."""

import json

import pytest
import torch
from safetensors.torch import save_file

import host_models
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.sampling import conditioning, joint
from ltx2_gguf.ltx2_core.sampling.guidance import Guidance, JointGuidance

pytestmark = pytest.mark.usefixtures("host")
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.0])


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def patcher(request, host):
    return host_models.tiny(version=request.param, audio=True, gemma_width=128)


def text(patcher, seed=5):
    return host_models.conditioning(patcher, seed=seed)


def headless(patcher, video, audio, guidance, sampler="euler", seed=3):
    """The same run without the host's machinery."""
    network = patcher.model.diffusion_model
    with torch.inference_mode():
        contexts = [network.preprocess_text_embeds(text(patcher, s)[0][0], unprocessed=True) for s in (5, 6)]
        *_, (_, latents) = joint.sample(
            network,
            contexts,
            video,
            audio,
            guidance,
            sigmas=SIGMAS,
            sampler=sampler,
            seed=seed,
            frame_rate=host_models.FPS,
            device=torch.device("cpu"),
        )
    return latents


def ours(patcher, latent, guidance, sampler="euler", seed=3):
    from ltx2_gguf.nodes.host import sampling

    with torch.inference_mode():
        out = sampling.sample(
            patcher,
            text(patcher),
            text(patcher, 6),
            latent,
            sigmas=SIGMAS,
            guidance=guidance,
            sampler_name=sampler,
            seed=seed,
        )
    return out["samples"].unbind()


def empty(length=5):
    return conditioning.empty((2, 2, 3)), joint.empty_audio((1, 8, length, 16))


def checked(found, expected, limit=1e-5):
    errors = [host_models.error(a, b) for a, b in zip(found, expected)]
    assert max(errors) <= limit, errors


@pytest.mark.parametrize("sampler", ["euler", "res_2s"])
def test_the_sampler_with_all_guidance_equals_the_headless_run(patcher, sampler):
    guidance = JointGuidance(Guidance(3.0, 1.0, 0.7, (1,), 3.0), Guidance(7.0, 0.5, 0.7, (0,), 2.0))
    found = ours(patcher, host_models.joint_latent(), guidance, sampler)
    checked(found, headless(patcher, *empty(), guidance, sampler))
    assert all(torch.isfinite(part).all() and part.std() > 0.1 for part in found)


def test_guidance_of_one_stream_alone(patcher):
    for guidance in (
        JointGuidance(audio=Guidance(7.0)),
        JointGuidance(Guidance(modality=3.0)),
        JointGuidance(Guidance(rescale=0.5), Guidance(2.0)),
    ):
        checked(ours(patcher, host_models.joint_latent(), guidance), headless(patcher, *empty(), guidance))


def test_masks_of_both_streams_are_exact_per_token(patcher):
    video, audio = empty()
    video_mask = torch.ones(1, 1, 2, 2, 3)
    video_mask[:, :, 0] = 0.3
    audio_mask = torch.ones(1, 8, 5, 16)
    audio_mask[:, :, :2], audio_mask[:, :, 2] = 0, 0.6
    known = torch.randn(1, 8, 5, 16, generator=torch.Generator().manual_seed(1))
    video = conditioning.Conditioned(video.clean, video_mask)
    audio = joint.AudioConditioned(known, audio_mask[:, :1, :, :1])
    found = ours(
        patcher, host_models.joint_latent(video_mask=video_mask, audio_mask=audio_mask, audio=known), JointGuidance()
    )
    checked(found, headless(patcher, video, audio, JointGuidance()))
    assert torch.equal(found[1][:, :, :2], known[:, :, :2])


def test_ksampler_and_a_video_latent_alone(patcher):
    with torch.inference_mode():
        pair = host_models.ksample(patcher, host_models.joint_latent()).unbind()
        alone = host_models.ksample(patcher, host_models.latent())
    assert pair[0].shape == alone.shape == (1, 128, 2, 2, 3) and pair[1].shape == (1, 8, 5, 16)
    assert not torch.equal(pair[0], alone)


def test_a_packed_latent_needs_memory_for_its_tokens(patcher):
    model = patcher.model
    tokens = 2 * 2 * 3 + 5
    packed = model.memory_required([1, 1, 128 * tokens])
    assert packed - model.memory_required([1, 128, tokens, 1, 1]) == 0


def test_bad_joint_latents_are_refused_before_sampling(patcher):
    from ltx2_gguf.nodes.host import internals, sampling
    from ltx2_gguf.nodes.sampling import check_latent

    with pytest.raises(ValueError, match="8, frames, 16"):
        ours(patcher, host_models.joint_latent(audio=torch.zeros(1, 8, 5, 8)), JointGuidance())
    with pytest.raises(ValueError, match="1 videos and 2 sounds"):
        check_latent(host_models.joint_latent(audio=torch.zeros(2, 8, 5, 16)))
    video = host_models.tiny(version=patcher.model.diffusion_model.config.version, gemma_width=128)
    with pytest.raises(ValueError, match="'sound' of 'LTX-2 GGUF Loader'"):
        host_models.ksample(video, host_models.joint_latent())
    with pytest.raises(ValueError, match="loaded for sound|audio_aggregate_embed"), torch.inference_mode():
        features = host_models.conditioning(video)
        features[0][0] = features[0][0][..., :-2]
        sampling.sample(
            patcher,
            features,
            features,
            host_models.joint_latent(),
            sigmas=SIGMAS,
            guidance=JointGuidance(),
            sampler_name="euler",
            seed=0,
        )
    assert internals.JOINT_LATENT.count(".") <= 3


def test_our_nodes_take_joint_latents(patcher):
    from ltx2_gguf.nodes.conditioning import LTX2GGUFImageCondition
    from ltx2_gguf.nodes.sampling import LTX2GGUFSampler

    class VAE:
        def encode(self, pixels):
            return torch.full((1, 128, 1, 2, 3), 0.5)

    latent = host_models.joint_latent()
    out = LTX2GGUFImageCondition.execute(VAE(), latent, torch.rand(1, 64, 96, 3), 0, 1.0, 0, "replace").args[0]
    video, audio = out["samples"].unbind()
    masks = out["noise_mask"].unbind()
    assert (
        (video[:, :, 0] == 0.5).all()
        and audio.shape == (1, 8, 5, 16)
        and (masks[1] == 1).all()
        and (masks[0][:, :, 0] == 0).all()
    )
    with torch.inference_mode():
        sampled = (
            LTX2GGUFSampler.execute(
                patcher, text(patcher), text(patcher, 6), out, 3, 2, 3.0, "ltx2", "official", "euler", 1.0, "", 0.7
            )
            .args[0]["samples"]
            .unbind()
        )
    assert host_models.error(sampled[0][:, :, 0], video[:, :, 0]) < 1e-6 and sampled[1].std() > 0.1


def test_the_nodes_guidance_is_the_official_one():
    from ltx2_gguf.nodes import sampling as node

    config = host_models.tiny(audio=True).model.diffusion_model.config
    video = node.preset_guidance("official", 3.0, "ltx2", config)
    found = node.joint_guidance(video, "official", "ltx2", config, 7.0)
    assert (found.video.cfg, found.video.stg, found.video.rescale, found.video.modality) == (3.0, 1.0, 0.7, 3.0)
    assert (found.audio.cfg, found.audio.stg, found.audio.rescale, found.audio.modality) == (7.0, 1.0, 0.7, 3.0)
    hq = node.joint_guidance(
        node.preset_guidance("official HQ", 3.0, "ltx2", config), "official HQ", "ltx2", config, 7.0
    )
    assert (hq.video.rescale, hq.audio.rescale, hq.needs_perturbed) == (0.45, 1.0, False)
    assert node.joint_guidance(Guidance(), "official", "distilled", config, 7.0) == JointGuidance()
    custom = node.joint_guidance(Guidance(2.0, 1.0, 0.1, (1,)), "custom", "ltx2", config, 4.0, (4.0, 0.0, 0.2, 1.5))
    assert custom == JointGuidance(Guidance(2.0, 1.0, 0.1, (1,), 1.5), Guidance(4.0, 0.0, 0.2, (1,), 1.5))


def test_a_lora_changes_audio_layers_too(patcher):
    layers = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_attn1.to_k")
    width, audio = (patcher.model.diffusion_model.inner_dim, patcher.model.diffusion_model.audio_inner_dim)
    tensors = host_models.lora(layers=layers[:1], width=width) | host_models.lora(layers=layers[1:], width=audio)
    patched = host_models.with_lora(patcher, tensors)
    assert {key.removeprefix("diffusion_model.") for key in patched.patches} == {f"{layer}.weight" for layer in layers}
    plain, changed = (host_models.ksample(p, host_models.joint_latent()).unbind() for p in (patcher, patched))
    assert min(host_models.error(a, b) for a, b in zip(changed, plain)) > 1e-3


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_audio_vae_is_the_hosts_own_from_any_file(version, tmp_path):
    from ltx2_gguf.nodes.host.audio import load_audio_vae

    geometry = structure.Geometry.small(
        version,
        gemma_width=128,
        gemma_layers=1,
        audio_vae_channels=128,
        audio_vae_multipliers=(1, 1, 1),
        vocoder_widths=(64, 32) if version == "2.3" else (32,),
    )
    tensors = synthetic.state_dict(structure.sound_shapes(geometry), dtype=torch.bfloat16)
    whole, vae, vocoder = (tmp_path / f"{name}.safetensors" for name in ("whole", "vae", "vocoder"))
    save_file(tensors, whole, metadata={"config": json.dumps(structure.config(geometry))})
    save_file({name: value for name, value in tensors.items() if name.startswith("audio_vae.")}, vae)
    save_file({name: value for name, value in tensors.items() if name.startswith("vocoder.")}, vocoder)
    gguf = synthetic.make(tmp_path / "all.gguf", geometry, type="f16", audio=True)
    import comfy.sd
    import comfy.utils

    sd, metadata = comfy.utils.load_torch_file(str(whole), return_metadata=True)
    latent = torch.randn(1, 8, 4, 16, generator=torch.Generator().manual_seed(1))
    waveform = torch.randn(1, 8192, 2, generator=torch.Generator().manual_seed(2)) * 0.1
    with torch.inference_mode():
        stock = comfy.sd.VAE(sd=sd, metadata=metadata)
        expected, encoded = stock.decode(latent), stock.encode(waveform)
        for sources in ([whole], [vae, vocoder]):
            loaded = load_audio_vae(sources)
            assert loaded.audio_sample_rate_output == stock.audio_sample_rate_output
            assert torch.equal(loaded.decode(latent), expected) and torch.equal(loaded.encode(waveform), encoded)
        from_gguf = load_audio_vae([gguf]).decode(latent)
        assert from_gguf.shape == expected.shape and torch.isfinite(from_gguf).all()
