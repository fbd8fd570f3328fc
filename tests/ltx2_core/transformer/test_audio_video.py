"""The joint transformer computes what the host's and diffusers' joint networks compute, both streams, for 2.0 and 2.3."""

import pytest
import torch

import reference_av as ref
from ltx2_gguf.ltx2_core.transformer.audio_video import AVTransformerBlock
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

TIGHT = 3e-6
versions = pytest.mark.parametrize("version", ["2.0", "2.3"])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def errors(ours, expected):
    return [ref.relative_error(a, b) for a, b in zip(ours, expected)]


def checked(ours, expected):
    found = errors(ours, expected)
    assert max(found) <= TIGHT, found


@versions
@pytest.mark.parametrize("fps", [24.0, 25.0])
def test_velocities_equal_both_references(host, version, fps):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    sigma = torch.tensor([0.7, 0.7])
    ours = model.velocities(video, audio, sigma, context, fps)
    checked(ours, ref.host_velocities(version, video, audio, 0.7, context, fps))
    checked(ours, ref.diffusers_velocities(version, video, audio, sigma, context, fps))
    sigma = torch.tensor([0.7, 0.31])
    checked(
        model.velocities(video, audio, sigma, context, fps),
        ref.diffusers_velocities(version, video, audio, sigma, context, fps),
    )


def masks(video, audio):
    """Video and audio masks: first frame given, a region at half strength, a stretch of given and half-given audio."""
    video_mask = torch.ones(video.shape[0], 1, *video.shape[2:])
    video_mask[:, :, 0] = 0
    video_mask[:, :, 1, 1:] = 0.4
    audio_mask = torch.ones(audio.shape[0], 1, audio.shape[2], 1)
    audio_mask[:, :, :2], audio_mask[:, :, 3] = 0, 0.3
    return video_mask, audio_mask


@versions
@pytest.mark.parametrize("masked", [(True, False), (False, True), (True, True)], ids=["video", "audio", "both"])
def test_masks_per_token(host, version, masked):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    video_mask, audio_mask = (mask if wanted else None for mask, wanted in zip(masks(video, audio), masked))
    expected = ref.host_velocities(version, video, audio, 0.6, context, 24.0, video_mask, audio_mask)
    checked(model.velocities(video, audio, 0.6, context, 24.0, video_mask, audio_mask), expected)


@versions
@pytest.mark.parametrize("frozen", ["video", "audio"])
def test_a_given_stream_has_no_noise_level_anywhere(host, version, frozen):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    given = {f"{frozen}_mask": torch.zeros_like({"video": video, "audio": audio}[frozen][:, :1])}
    if frozen == "audio":
        given["audio_mask"] = given["audio_mask"][..., :1]
    checked(
        model.velocities(video, audio, 0.6, context, 24.0, **given),
        ref.host_velocities(version, video, audio, 0.6, context, 24.0, **given),
    )


@versions
def test_spatio_temporal_guidance_in_both_streams(version):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    sigma = torch.tensor([0.7, 0.31])
    ours = model.velocities(video, audio, sigma, context, 24.0, stg_blocks=(1,), audio_stg_blocks=(1,))
    checked(ours, ref.diffusers_velocities(version, video, audio, sigma, context, 24.0, stg_blocks=[1]))
    plain = model.velocities(video, audio, sigma, context, 24.0)
    for stream in range(2):  # one stream perturbed: the other changes through the attention between them alone
        blocks = {"stg_blocks" if stream == 0 else "audio_stg_blocks": (1,)}
        one = model.velocities(video, audio, sigma, context, 24.0, isolated=True, **blocks)
        isolated = model.velocities(video, audio, sigma, context, 24.0, isolated=True)
        assert (
            torch.equal(one[1 - stream], isolated[1 - stream])
            and ref.relative_error(one[stream], isolated[stream]) > 0.02
        )
    assert min(errors(ours, plain)) > 0.02


@versions
def test_isolated_streams(host, version):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    sigma = torch.tensor([0.7, 0.31])
    ours = model.velocities(video, audio, sigma, context, 24.0, isolated=True)
    checked(ours, ref.diffusers_velocities(version, video, audio, sigma, context, 24.0, isolated=True))
    alone = model.velocity(video, sigma, context, 24.0)
    assert ref.relative_error(ours[0], alone) <= 1e-6


@versions
@pytest.mark.parametrize(
    "off",
    [
        ("run_vx",),
        ("run_ax",),
        ("a2v_cross_attn",),
        ("v2a_cross_attn",),
        ("run_vx", "a2v_cross_attn", "v2a_cross_attn"),
    ],
    ids=str,
)
def test_the_hosts_switches(host, version, off):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    options, timesteps = dict.fromkeys(off, False), (torch.full((2,), 0.5),) * 2
    ours = model([video, audio], timesteps, context, frame_rate=25.0, transformer_options=options)
    checked(ours, ref.host_velocities(version, video, audio, 0.5, context, 25.0, options=options))


@versions
def test_keyframes_and_reference_audio(host, version):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config, frames=4)
    tokens = video.shape[3] * video.shape[4]
    start = torch.stack(
        torch.meshgrid(torch.tensor([16]), torch.arange(3) * 32, torch.arange(4) * 32, indexing="ij")
    ).flatten(1)
    keyframes = torch.stack((start, start + torch.tensor([1, 32, 32]).view(3, 1)), dim=-1).expand(2, -1, -1, -1)
    assert keyframes.shape[2] == tokens
    mask = torch.ones(2, 1, *video.shape[2:])
    mask[:, :, -1] = 0.2
    reference = {"tokens": torch.randn(1, 5, config.audio.in_channels, generator=torch.Generator().manual_seed(2))}
    kwargs = {"keyframe_idxs": keyframes, "ref_audio": reference}
    timesteps = (mask.flatten(1)[..., None] * 0.5, torch.full((2,), 0.5))
    ours = model([video, audio], timesteps, context, frame_rate=24.0, denoise_mask=mask, **kwargs)
    checked(ours, ref.host_velocities(version, video, audio, 0.5, context, 24.0, video_mask=mask, **kwargs))


@versions
def test_text_goes_through_both_connectors(host, version):
    config, model = ref.ours(version)
    width = config.context_dim + config.audio_context_dim if version == "2.3" else config.caption_channels
    features = torch.randn(1, 9, width, generator=torch.Generator().manual_seed(4))
    expected = ref.host_model(version).preprocess_text_embeds(features, unprocessed=True)
    ours = model.preprocess_text_embeds(features, unprocessed=True)
    assert ours.shape == expected.shape and ref.relative_error(ours, expected) <= TIGHT
    assert model.preprocess_text_embeds(ours) is ours
    with pytest.raises(ValueError, match="audio_aggregate_embed"):
        model.preprocess_text_embeds(features[..., :-1], unprocessed=True)


@versions
def test_the_tolerance_notices_the_usual_mistakes(host, version, monkeypatch):
    config, model = ref.ours(version)
    video, audio, context = ref.inputs(config)
    video_mask, audio_mask = masks(video, audio)
    ours = model.velocities(video, audio, 0.6, context, 24.0, video_mask, audio_mask)
    assert (
        max(
            errors(
                ours,
                ref.host_velocities(
                    version, video, audio, 0.6, context, 24.0, video_mask, audio_mask, cross_gate_scale=1.0
                ),
            )
        )
        > 100 * TIGHT
    )
    assert max(errors(model.velocities(video, audio, 0.6, context, 25.0, video_mask, audio_mask), ours)) > 100 * TIGHT
    look = AVTransformerBlock._look_at_each_other

    def swapped(self, vx, ax, a2v, v2a, v_rows, a_rows, *rest):
        return look(self, vx, ax, a2v, v2a, (v_rows[1], v_rows[0], *v_rows[2:]), a_rows, *rest)

    monkeypatch.setattr(AVTransformerBlock, "_look_at_each_other", swapped)
    assert max(errors(model.velocities(video, audio, 0.6, context, 24.0, video_mask, audio_mask), ours)) > 100 * TIGHT


@versions
def test_a_video_latent_alone_runs_the_video_stream(host, version):
    config, model = ref.ours(version)
    video, _, context = ref.inputs(config)
    expected = ref.host_model(version)(
        [video.clone()], (torch.full((2,), 0.5),) * 2, context, frame_rate=24.0, transformer_options={}
    )
    for x in (video, [video]):
        ours = model(x, torch.full((2,), 0.5), context, frame_rate=24.0)
        assert ref.relative_error(ours, expected) <= TIGHT


def test_blocks_can_be_replaced(host):
    """A replacement of the host's kind sees the host's arguments, and attention runs in the host's order."""
    config, model = ref.ours("2.3")
    video, audio, context = ref.inputs(config)
    seen, order = {}, []

    def replacement(arguments, extra):
        seen.update(arguments)
        return extra["original_block"](arguments)

    names = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    hooks = [
        getattr(model.transformer_blocks[1], name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name in names
    ]
    options = {"patches_replace": {"dit": {("double_block", 1): replacement}}}
    ours = model([video, audio], (torch.full((2,), 0.5),) * 2, context, frame_rate=24.0, transformer_options=options)
    for hook in hooks:
        hook.remove()
    assert tuple(order) == names
    assert all(
        seen[name] is not None
        for name in ("a_context", "a_timestep", "a_pe", "v_cross_pe", "a_cross_gate_timestep", "a_prompt_timestep")
    )
    checked(ours, model([video, audio], (torch.full((2,), 0.5),) * 2, context, frame_rate=24.0))
