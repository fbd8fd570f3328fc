"""Guides as the host's LTXVAddGuide appends them: same velocity as the host's network, and as diffusers' where it can say the same."""

import pytest
import torch

import reference_dit as ref
from host_guides import CHANNELS, FPS, FRAMES, GUIDES, HEIGHT, SIGMA, WIDTH, add_guides
from ltx2_gguf.ltx2_core.transformer.guides import GuideAttentionMask, guide_mask, mask_to_latent, query_groups
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

TIGHT = 3e-6


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def pair(request, host):
    config = ref.tiny_config(request.param, channels=CHANNELS)
    model = ref.our_model(config, seed=3)
    return config, model, ref.host_model(config, model.state_dict())


@pytest.mark.parametrize("name", GUIDES)
def test_guides_of_the_host_give_the_hosts_velocity(pair, name):
    config, model, theirs = pair
    latent, mask, values = add_guides(GUIDES[name])
    context = ref.inputs(config, batch=1)[1]
    extra = {"keyframe_idxs": values["keyframe_idxs"], "guide_attention_entries": values["guide_attention_entries"]}
    timestep = (mask * SIGMA.view(1, 1, 1, 1, 1)).flatten(2).transpose(1, 2)
    with torch.no_grad():
        expected = ref.host_velocity(theirs, config, latent, timestep, context, FPS, denoise_mask=mask, **extra)
        headless = model.velocity(latent, SIGMA, context, FPS, denoise_mask=mask, **extra)
        hosted = model(
            [latent], (timestep, SIGMA), context, frame_rate=FPS, denoise_mask=mask, transformer_options={}, **extra
        )
    assert ref.relative_error(headless, expected) < TIGHT
    assert ref.relative_error(hosted, expected) < TIGHT


@pytest.mark.parametrize("name", ["a dilated reference", "an image and a dilated reference"])
def test_the_holes_of_a_dilated_reference_have_no_velocity(pair, name):
    config, model, _ = pair
    latent, mask, values = add_guides(GUIDES[name])
    context = ref.inputs(config, batch=1)[1]
    with torch.no_grad():
        v = model.velocity(latent, SIGMA, context, FPS, denoise_mask=mask, keyframe_idxs=values["keyframe_idxs"])
    holes = (mask < 0).expand_as(v)
    assert holes.any() and not v[holes].any() and v[~holes].all()


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("name", ["an image at the last frame", "a clip in the middle", "an image at strength 0.6"])
def test_unweakened_guides_give_diffusers_velocity(host, version, name):
    config = ref.tiny_config(version, channels=CHANNELS)
    model = ref.our_model(config, seed=3)
    theirs = ref.diffusers_model(config, model.state_dict())
    latent, mask, values = add_guides(GUIDES[name])
    context = ref.inputs(config, batch=1)[1]
    frames = latent.shape[2]
    coords = theirs.rope.prepare_video_coords(1, frames, HEIGHT, WIDTH, latent.device, fps=24.0)
    guides = values["keyframe_idxs"].float().clone()
    guides[:, 0] /= 24.0
    coords[:, :, -guides.shape[2] :] = guides
    with torch.no_grad():
        v = model.velocity(latent, SIGMA, context, 24.0, denoise_mask=mask, keyframe_idxs=values["keyframe_idxs"])
        expected = ref.diffusers_velocity(
            theirs, config, latent, mask.flatten(1) * SIGMA, SIGMA, context, 24.0, coords=coords
        )
    assert ref.relative_error(v, expected) < TIGHT


def test_cropping_the_guides_leaves_the_velocity_of_the_plain_clip(pair):
    from comfy_extras.nodes_lt import LTXVCropGuides

    config, model, _ = pair
    latent, mask, values = add_guides(GUIDES["three guides"])
    context = ref.inputs(config, batch=1)[1]
    conditioning = [[torch.zeros(1, 1, 1), values]]
    positive, _, cropped = LTXVCropGuides.execute(
        conditioning, conditioning, {"samples": latent, "noise_mask": mask}
    ).args
    assert positive[0][1]["keyframe_idxs"] is None and cropped["samples"].shape[2] == FRAMES
    with torch.no_grad():
        v = model.velocity(cropped["samples"], SIGMA, context, FPS, keyframe_idxs=positive[0][1]["keyframe_idxs"])
        plain = model.velocity(latent[:, :, :FRAMES], SIGMA, context, FPS)
    assert torch.equal(v, plain)


def test_guides_of_different_samples_keep_their_own_coordinates(pair):
    config, model, _ = pair
    context = ref.inputs(config, batch=2)[1]
    at_8, at_24 = (add_guides([(1, frame, 1.0, None, 1)]) for frame in (8, 24))
    latent, mask = torch.cat((at_8[0], at_24[0])), torch.cat((at_8[1], at_24[1]))
    idxs = [values["keyframe_idxs"] for _, _, values in (at_8, at_24)]
    with torch.no_grad():
        together = model.velocity(
            latent, SIGMA.repeat(2), context, FPS, denoise_mask=mask, keyframe_idxs=torch.cat(idxs)
        )
        alone = [
            model.velocity(
                latent[i : i + 1], SIGMA, context[i : i + 1], FPS, denoise_mask=mask[i : i + 1], keyframe_idxs=idxs[i]
            )
            for i in (0, 1)
        ]
    assert ref.relative_error(together, torch.cat(alone)) < TIGHT


def test_guide_mask_stores_rows_not_a_square():
    mask = GuideAttentionMask(1000, 900, 3, torch.tensor([[0.5, 0.0, 2.0]]))
    assert mask.noisy_mask.shape == (1, 1, 1, 1000) and mask.tracked_mask.shape == (1, 1, 3, 1000)
    assert mask.noisy_mask[0, 0, 0, 900:903].exp().tolist() == pytest.approx([0.5, 0.0, 2.0])
    assert mask.tracked_mask[0, 0, :, 0].exp().tolist() == pytest.approx([0.5, 0.0, 2.0])
    assert not mask.tracked_mask[..., 900:].any()
    assert [rows for rows, _ in query_groups(mask, 1000)] == [slice(0, 900), slice(900, 903), slice(903, 1000)]


def test_guide_mask_is_left_out_when_every_guide_is_at_full_strength():
    entry = {"pre_filter_count": 6, "strength": 1.0, "pixel_mask": None, "latent_shape": (1, 2, 3)}
    full = {**entry, "pixel_mask": torch.ones(1, 1, 1, 64, 96)}
    assert guide_mask([entry], 6, None, 30, "cpu", torch.float32) is None
    assert guide_mask([full], 6, None, 30, "cpu", torch.float32) is None
    assert guide_mask([], 6, None, 30, "cpu", torch.float32) is None


def test_guide_entries_that_do_not_add_up_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="cover 6 tokens, but keyframe_idxs lists 8"):
        guide_mask([{"pre_filter_count": 6, "strength": 0.5}], 8, None, 30, "cpu", torch.float32)


@pytest.mark.parametrize("mask_frames, frames", [(1, 1), (17, 3), (20, 3), (1, 3), (2, 4), (9, 1)])
def test_pixel_masks_shrink_like_the_hosts(host, mask_frames, frames):
    from comfy.ldm.lightricks.model import LTXVModel

    mask = torch.rand(1, 1, mask_frames, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = LTXVModel._downsample_mask_to_latent(mask, frames, 2, 3)[0]
    assert torch.allclose(mask_to_latent(mask, frames, 2, 3), expected, atol=1e-6)
