"""Whole joint runs against the reference networks in a plain loop written from the formulas."""

import pytest
import torch

import reference_av as ref
from ltx2_gguf.ltx2_core.sampling import conditioning, joint, samplers
from ltx2_gguf.ltx2_core.sampling.guidance import PRESETS, Guidance, JointGuidance, combine
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

SIGMAS = torch.tensor([1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def run(version, video, audio, guidance, contexts, sampler="euler", sigmas=SIGMAS):
    _, model = ref.ours(version)
    *_, (_, latents) = joint.sample(
        model,
        contexts,
        video,
        audio,
        guidance,
        sigmas=sigmas,
        sampler=sampler,
        seed=3,
        frame_rate=24.0,
        device=torch.device("cpu"),
    )
    return latents


def start(config):
    video = conditioning.empty((3, 3, 4), channels=config.in_channels)
    return video, joint.empty_audio((1, ref.AUDIO_CHANNELS, 7, ref.BINS))


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_eight_steps_with_all_guidance_equal_diffusers(version):
    config, _ = ref.ours(version)
    video, audio = start(config)
    contexts = [ref.inputs(config, 1, seed=seed)[2] for seed in (1, 2)]
    guidance = JointGuidance(Guidance(3.0, 1.0, 0.7, (1,), 3.0), Guidance(7.0, 1.0, 0.7, (1,), 3.0))
    ours = run(version, video, audio, guidance, contexts)

    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(t.shape, generator=generator) for t in (video.clean, audio.clean)]
    for sigma, following in zip(SIGMAS.tolist(), SIGMAS[1:].tolist()):

        def x0(context, **special):
            found = ref.diffusers_velocities(version, *x, torch.tensor([sigma]), context, 24.0, **special)
            return [a - sigma * v for a, v in zip(x, found)]

        passes = x0(contexts[0]), x0(contexts[1]), x0(contexts[0], stg_blocks=[1]), x0(contexts[0], isolated=True)
        for n, g in enumerate((guidance.video, guidance.audio)):
            c, u, p, m = (found[n] for found in passes)
            clean = c + (g.cfg - 1) * (c - u) + g.stg * (c - p) + (g.modality - 1) * (c - m)
            clean = clean * (g.rescale * c.std() / clean.std() + 1 - g.rescale)
            x[n] = x[n] + (x[n] - clean) / sigma * (following - sigma)
    assert max(ref.relative_error(a, b) for a, b in zip(ours, x)) <= 1e-4


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_masked_streams_equal_the_hosts_network_in_the_official_loop(host, version):
    config, _ = ref.ours(version)
    video, audio = start(config)
    given = torch.randn(1, config.in_channels, 1, 3, 4, generator=torch.Generator().manual_seed(7))
    video = conditioning.replace_frames(video, given, 0, 0.7)
    known = torch.randn(audio.clean.shape, generator=torch.Generator().manual_seed(8))
    audio = joint.AudioConditioned(known, audio.mask.clone().index_fill_(2, torch.tensor([0, 1, 2]), 0.0))
    contexts = [ref.inputs(config, 1, seed=1)[2]]
    ours = run(version, video, audio, JointGuidance(), contexts)
    generator = torch.Generator().manual_seed(3)
    states, x = (video, audio), []
    for state in states:
        x.append(
            torch.lerp(
                state.clean, torch.randn(state.clean.shape, generator=generator), state.mask.expand_as(state.clean)
            )
        )
    for sigma, following in zip(SIGMAS.tolist(), SIGMAS[1:].tolist()):
        found = ref.host_velocities(version, *x, sigma, contexts[0], 24.0, video.mask, audio.mask)
        for n, (v, state) in enumerate(zip(found, states)):
            clean = state.mask * (x[n] - sigma * state.mask * v) + (1 - state.mask) * state.clean
            x[n] = x[n] + (x[n] - clean) / sigma * (following - sigma)
    assert max(ref.relative_error(a, b) for a, b in zip(ours, x)) <= 1e-4
    assert torch.equal(ours[1][:, :, :3], known[:, :, :3])


def test_a_given_soundtrack_stays_and_is_not_guided():
    config, model = ref.ours("2.3")
    video, audio = start(config)
    sound = torch.randn(1, ref.AUDIO_CHANNELS, 5, ref.BINS, generator=torch.Generator().manual_seed(8))
    audio = joint.given_audio(sound, audio.clean.shape)
    assert audio.is_given and torch.equal(audio.clean[:, :, :5], sound) and not audio.clean[:, :, 5:].any()
    contexts = [ref.inputs(config, 1, seed=seed)[2] for seed in (1, 2)]
    calls = []
    guidance = JointGuidance(Guidance(), Guidance(7.0, 1.0, 0.7, (1,), 3.0))
    *_, (_, latents) = joint.sample(
        model,
        contexts,
        video,
        audio,
        guidance,
        sigmas=SIGMAS,
        sampler="euler",
        seed=3,
        frame_rate=24.0,
        device=torch.device("cpu"),
        passes=lambda found: [calls.append(1) or call() for call in found],
    )
    assert torch.equal(latents[1], audio.clean) and len(calls) == len(SIGMAS) - 1


def test_res_2s_draws_noise_per_stream_and_the_video_first():
    """One step of isolated streams: the video is that of a video-only run."""
    config, model = ref.ours("2.3")
    video, audio = start(config)
    context = ref.inputs(config, 1, seed=1)[2]
    isolated = JointGuidance(Guidance(modality=0.0), Guidance(modality=0.0))  # x0 of the isolated pass
    latents = run("2.3", video, audio, isolated, [context], "res_2s", SIGMAS[[0, -1]])

    def denoise(x, sigma):
        return samplers.x0_from_velocity(x, model.velocity(x, sigma, context, 24.0), sigma)

    noise = conditioning.gaussian_noise(tuple(video.clean.shape), 3)
    *_, alone = samplers.res_2s(denoise, conditioning.noised(video, noise, 1.0), SIGMAS[[0, -1]], seed=3)
    assert ref.relative_error(latents[0], alone.latent) <= 1e-5


def test_official_presets():
    for name, video, audio in (
        ("2.0", Guidance(3.0, 1.0, 0.7, (29,), 3.0), Guidance(7.0, 1.0, 0.7, (29,), 3.0)),
        ("2.3", Guidance(3.0, 1.0, 0.7, (28,), 3.0), Guidance(7.0, 1.0, 0.7, (28,), 3.0)),
        ("2.3 HQ", Guidance(3.0, 0.0, 0.45, (), 3.0), Guidance(7.0, 0.0, 1.0, (), 3.0)),
        ("distilled", Guidance(), Guidance()),
    ):
        assert PRESETS[name].joint_guidance(48) == JointGuidance(video, audio)
    with pytest.raises(ValueError, match="isolated"):
        combine(torch.ones(2), modality=3.0)
