import pytest
import torch

from ltx2_gguf.ltx2_core.sampling import conditioning as c


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def state():
    return c.empty((4, 2, 3), channels=6)


@pytest.mark.parametrize(
    "size, shape",
    [
        ((768, 512, 121), (16, 16, 24)),
        ((32, 32, 1), (1, 1, 1)),
        ((96, 64, 9), (2, 2, 3)),
        ((1920, 1088, 241), (31, 34, 60)),
    ],
)
def test_latent_shape_of_a_video(size, shape):
    assert c.latent_shape(*size) == shape


@pytest.mark.parametrize(
    "size, words",
    [
        ((770, 512, 121), "width 770 .nearest 768."),
        ((768, 500, 121), "height 500 .nearest 512."),
        ((768, 512, 120), "120 frames .nearest 121."),
        ((0, 512, 0), "width 0"),
    ],
)
def test_a_size_the_vae_does_not_have_is_refused_with_the_nearest_one(size, words):
    with pytest.raises(ValueError, match=words):
        c.latent_shape(*size)


def test_an_empty_latent_is_plain_and_fully_generated(state):
    assert state.is_plain and state.frames == 4 and state.tokens == 24 and state.guide_frames == 0
    assert (state.mask == 1).all() and state.clean.shape == (1, 6, 4, 2, 3)


@pytest.mark.parametrize("frame, index", [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (24, 3)])
def test_the_latent_frame_of_a_pixel_frame_is_the_hosts(host, frame, index):
    from comfy_extras.nodes_lt import LTXVAddGuide

    assert c.latent_index(frame) == index == LTXVAddGuide.get_latent_index([], 4, 1, frame, (8, 32, 32))[1]


def test_negative_frames_count_from_the_end():
    assert [c.resolve_frame(f, 4) for f in (0, -1, -25, 24)] == [0, 24, 0, 24]
    with pytest.raises(ValueError, match="has 25 frames: use 0 to 24, or -1"):
        c.resolve_frame(25, 4)


def test_a_replaced_first_frame_equals_the_hosts_image_to_video_node(host, state):
    from comfy_extras.nodes_lt import LTXVAddGuide

    latent = random(1, 1, 6, 1, 2, 3)
    theirs, their_mask = LTXVAddGuide.replace_latent_frames(
        state.clean.clone(), torch.ones(1, 1, 4, 1, 1), latent, 0, 0.7
    )
    ours = c.replace_frames(state, latent, 0, 0.7)
    assert torch.equal(ours.clean, theirs)
    assert torch.equal(ours.mask, their_mask.expand_as(ours.mask))


@pytest.mark.parametrize("frame, latent_frames", [(0, 1), (24, 1), (11, 1), (0, 2), (9, 2), (17, 1)])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_guides_equal_what_the_hosts_add_guide_appends(host, frame, latent_frames, strength):
    from comfy_extras.nodes_lt import LTXVAddGuide

    state = c.empty((4, 2, 3), channels=128)
    latent = random(2, 1, 128, latent_frames, 2, 3)
    positive, _, theirs, their_mask = LTXVAddGuide.append_keyframe(
        [[torch.zeros(1), {}]], [[torch.zeros(1), {}]], frame, state.clean.clone(), torch.ones(1, 1, 4, 1, 1), latent, strength, (8, 32, 32),
        causal_fix=frame == 0 or latent_frames == 1,
    )  # fmt: skip
    ours = c.append_guide(state, latent, frame, strength)
    assert torch.equal(ours.clean, theirs)
    assert torch.equal(ours.mask, their_mask.expand_as(ours.mask))
    assert torch.equal(ours.keyframe_idxs, positive[0][1]["keyframe_idxs"].to(torch.int32))
    assert not ours.keyframe_idxs.is_floating_point()
    assert ours.frames == 4 and ours.guide_frames == latent_frames and ours.tokens == 24


def test_several_guides_are_appended_in_order_and_cropped_again(host):
    from comfy_extras.nodes_lt import LTXVAddGuide

    state = c.empty((4, 2, 3), channels=128)
    first, second = random(3, 1, 128, 1, 2, 3), random(4, 1, 128, 1, 2, 3)
    ours = c.append_guide(c.append_guide(state, first, 8), second, 24, 0.5)
    conds = [[torch.zeros(1), {}]], [[torch.zeros(1), {}]]
    p, n, x, m = LTXVAddGuide.append_keyframe(
        *conds, 8, state.clean, torch.ones(1, 1, 4, 1, 1), first, 1.0, (8, 32, 32)
    )
    p, n, x, m = LTXVAddGuide.append_keyframe(p, n, 24, x, m, second, 0.5, (8, 32, 32))
    assert torch.equal(ours.clean, x) and torch.equal(ours.keyframe_idxs, p[0][1]["keyframe_idxs"].to(torch.int32))
    assert torch.equal(c.crop_guides(ours, ours.clean), state.clean)


def test_combined_replaces_frame_zero_and_appends_the_others(state):
    a, b, z = random(1, 1, 6, 1, 2, 3), random(2, 1, 6, 1, 2, 3), random(3, 1, 6, 1, 2, 3)
    result = c.combined(state, [(a, 0, 1.0), (b, 12, 0.5), (z, -1, 1.0)])
    assert result.guide_frames == 2 and not result.is_plain
    assert torch.equal(result.clean[:, :, 0], a[:, :, 0]) and torch.equal(result.clean[:, :, 4], b[:, :, 0])
    assert result.mask[0, 0, :, 0, 0].tolist() == [0, 1, 1, 1, 0.5, 0]
    assert result.keyframe_idxs[0, 0, :, 0].unique().tolist() == [12, 24]


def test_noise_depends_on_the_seed_alone_and_is_drawn_on_the_cpu_in_float32():
    a, b, other = (
        c.gaussian_noise((1, 4, 2, 3, 3), 5),
        c.gaussian_noise((1, 4, 2, 3, 3), 5),
        c.gaussian_noise((1, 4, 2, 3, 3), 6),
    )
    assert torch.equal(a, b) and not torch.equal(a, other) and a.dtype == torch.float32 and a.device.type == "cpu"
    torch.manual_seed(5)
    assert torch.equal(a, torch.randn(1, 4, 2, 3, 3))


def test_the_start_lies_at_noise_level_mask_times_sigma():
    clean, noise, initial = random(1, 1, 6, 3, 2, 2), random(2, 1, 6, 3, 2, 2), random(3, 1, 6, 3, 2, 2)
    mask = torch.tensor([0.0, 0.3, 1.0]).view(1, 1, 3, 1, 1).expand(1, 1, 3, 2, 2)
    state = c.Conditioned(clean, mask)
    x = c.noised(state, noise, 0.9)
    assert torch.allclose(x, (1 - 0.9 * mask) * clean + 0.9 * mask * noise, atol=1e-6)
    assert torch.equal(x[:, :, 0], clean[:, :, 0])
    second_stage = c.noised(state, noise, 0.9, initial)
    assert torch.allclose(second_stage[:, :, 2], 0.1 * initial[:, :, 2] + 0.9 * noise[:, :, 2], atol=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda s: c.replace_frames(s, random(1, 1, 6, 1, 2, 2)), "Encode the image at the video's own width"),
        (lambda s: c.append_guide(s, random(1, 1, 5, 1, 2, 3), 8), "1 or 1, 6, frames, 2, 3"),
        (lambda s: c.replace_frames(s, random(1, 1, 6, 5, 2, 3)), "covers frames 0 to 32 of a video of 25"),
        (lambda s: c.replace_frames(s, random(1, 1, 6, 1, 2, 3), 0, 1.5), "strength is 1.5"),
        (lambda s: c.append_guide(s, random(1, 1, 6, 2, 2, 3), 10), "8k.1; got 10"),
    ],
)
def test_what_does_not_fit_is_named(state, call, words):
    with pytest.raises(ValueError, match=words):
        call(state)
