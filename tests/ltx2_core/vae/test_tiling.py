"""Plans: whole frames where they fit, tiles where they do not, one retry, and an error that names a size."""

import pytest
import torch

import vae_references as references
from counting_allocator import CountingAllocator
from ltx2_gguf.ltx2_core.vae import streaming, tiling
from ltx2_gguf.ltx2_core.vae.config import LTX2_0_VAE, LTX2_3_VAE, VAEBlock, VAEConfig, res
from ltx2_gguf.ltx2_core.vae.model import VideoVAE
from vae_references import one_thread  # noqa: F401  (applies to every test here)

GIB = 2**30
NEAR = VAEConfig(  # a network that sees six latents far
    encoder_blocks=(res(1), VAEBlock("all", multiplier=2), res(1)),
    decoder_blocks=(res(1), VAEBlock("all", multiplier=2), res(1)),
    encoder_base_channels=8,
    decoder_base_channels=8,
    latent_channels=8,
)


def near_vae():
    torch.manual_seed(0)
    return VideoVAE(NEAR).eval().requires_grad_(False)


@pytest.mark.parametrize("size, count, overlap", [(30, 1, 4), (30, 2, 4), (31, 3, 5), (100, 7, 8), (24, 2, 12)])
def test_spans_cover_the_axis_and_share_at_least_the_overlap(size, count, overlap):
    axis = tiling.spans(size, count, overlap)
    assert axis[0][0] == 0 and axis[-1][1] == size and len(axis) == count
    assert len({stop - start for start, stop in axis}) == 1
    assert all(before[1] - after[0] >= overlap for before, after in zip(axis, axis[1:]))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [1, 32])
def test_weights_of_all_tiles_add_up_to_one(scale, exact):
    for size, count, overlap in [(30, 1, 4), (30, 2, 4), (31, 3, 5), (100, 7, 8)]:
        axis = tiling.spans(size, count, overlap)
        total = torch.zeros(size * scale)
        for (start, stop), weight in zip(axis, tiling.weights(axis, scale, exact)):
            assert weight.shape == ((stop - start) * scale,)
            total[start * scale : stop * scale] += weight
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_the_outer_edge_of_a_blended_tile_counts_for_nothing():
    axis = tiling.spans(40, 2, 8)
    left, right = tiling.weights(axis, 32, exact=False)
    shared = (axis[0][1] - axis[1][0]) * 32
    assert (left[-shared // 4 :] == 0).all() and (right[: shared // 4] == 0).all()


@pytest.mark.parametrize("config, reach", [(LTX2_3_VAE, 16), (LTX2_0_VAE, 22), (NEAR, 6)])
def test_spatial_reach_is_that_of_the_block_list(config, reach):
    assert tiling.spatial_reach(config) == reach


def test_a_pixel_depends_on_no_latent_beyond_the_reach():
    vae = near_vae()
    latent = torch.randn(1, 8, 1, 20, 3)
    changed = latent.clone()
    changed[..., 0, :] += 1
    with torch.inference_mode():
        difference = (vae.decode(latent) - vae.decode(changed)).abs().amax(dim=(0, 1, 2, 4))
    reach = tiling.spatial_reach(NEAR) * NEAR.spatial_scale
    assert difference[reach + NEAR.spatial_scale :].max() == 0
    assert difference[reach - 2 * NEAR.spatial_scale] > 0  # and the reach is no rough guess


@pytest.mark.parametrize("park", [False, True])
def test_tiles_with_an_exact_halo_give_the_frames_of_whole_frames(park):
    vae = near_vae()
    latent = torch.randn(1, 8, 5, 13, 26)
    rows, columns = tiling.spans(13, 1, 12), tiling.spans(26, 2, 12)
    plan = tiling.VAEPlan(1 << 20, rows, columns, exact=True, park=park)
    with torch.inference_mode():
        whole = vae.decode(latent)
        assert references.error(vae.decode(latent, 2, plan=plan), whole) <= 1e-6
        too_near = tiling.VAEPlan(1 << 20, rows, tiling.spans(26, 2, 4), exact=True)
        assert references.error(vae.decode(latent, 2, plan=too_near), whole) > 1e-6


def test_blended_tiles_come_close_to_whole_frames():
    vae = near_vae()
    latent = torch.randn(1, 8, 3, 24, 24)
    plan = tiling.VAEPlan(1 << 20, tiling.spans(24, 2, 8), tiling.spans(24, 2, 8), exact=False)
    with torch.inference_mode():
        whole = vae.decode(latent)
        tiled = vae.decode(latent, plan=plan)
        assert references.error(tiled, whole) <= 0.04
        encoded = vae.encode(whole)
        assert references.error(vae.encode(whole, plan=plan), encoded) <= 0.04


def test_frames_that_fit_are_never_tiled():
    plan = tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 16, 24), 2, free=8 * GIB)
    assert plan.tiles == 1 and plan.bytes <= 8 * GIB
    unlimited = tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 68, 120), 2)
    assert unlimited.tiles == 1


def test_a_long_clip_gets_the_plan_of_a_short_one():
    short, long = (
        tiling.plan(LTX2_3_VAE, "decoder", (1, 128, frames, 22, 40), 2, free=6 * GIB) for frames in (31, 3000)
    )
    assert short == long


def test_steps_shrink_before_tiles_are_cut():
    shape = (1, 128, 31, 22, 40)
    plans = [tiling.plan(LTX2_3_VAE, "decoder", shape, 2, free=free) for free in (8 * GIB, 3 * GIB, 3 * GIB // 2)]
    assert [plan.tiles for plan in plans] == [1, 1, 1]
    assert plans[0].split_bytes > plans[1].split_bytes > plans[2].split_bytes
    assert tiling.plan(LTX2_3_VAE, "decoder", shape, 2, free=GIB).tiles > 1


@pytest.mark.parametrize("side", ["decoder", "encoder"])
@pytest.mark.parametrize("config", [LTX2_3_VAE, LTX2_0_VAE], ids=["2.3", "2.0"])
@pytest.mark.parametrize("free", [GIB, 2 * GIB, 4 * GIB, 8 * GIB])
@pytest.mark.parametrize("size", [(1920, 1088), (3840, 2176)])
def test_plans_for_large_frames_fit_and_cover_the_frame(config, side, size, free):
    H, W = size[1] // 32, size[0] // 32
    plan = tiling.plan(config, side, (1, 128, 16, H, W), 2, free=free)
    assert plan.bytes <= free - tiling.RESERVE_BYTES
    assert plan.rows[0][0] == plan.columns[0][0] == 0 and (plan.rows[-1][1], plan.columns[-1][1]) == (H, W)
    if plan.exact and plan.tiles > 1:
        reach = tiling.spatial_reach(config)
        for axis in (plan.rows, plan.columns):
            assert all(before[1] - after[0] >= 2 * reach for before, after in zip(axis, axis[1:]))


def test_an_exact_halo_is_taken_where_it_is_affordable():
    plan = tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 68, 240), 2, free=9 * GIB)
    assert plan.tiles > 1 and plan.exact
    assert tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 34, 60), 2, free=3 * GIB // 2).exact is False


def test_a_tile_size_can_be_forced():
    plan = tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 34, 60), 2, tile=768)
    assert plan.tiles > 1
    assert max(b - a for a, b in (*plan.rows, *plan.columns)) <= 24
    assert tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 16, 24), 2, tile=768).tiles == 1


@pytest.mark.parametrize("tile", [1, 64, 100, 128])
def test_the_smallest_tile_sizes_still_give_a_plan(tile):
    plan = tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 2, 4, 5), 2, tile=tile)
    assert plan.tiles > 1
    assert max(b - a for a, b in (*plan.rows, *plan.columns)) <= max(64, tile) // 32


def test_what_cannot_fit_is_refused_with_what_it_would_need():
    with pytest.raises(
        tiling.VAEMemoryError, match=r"Decoding 1280x704 needs at least \d\.\d GiB .* 0\.1 GiB are free"
    ):
        tiling.plan(LTX2_3_VAE, "decoder", (1, 128, 16, 22, 40), 2, free=GIB // 10)


def test_the_estimate_for_a_host_covers_the_plan_it_will_get():
    for shape in [(1, 128, 16, 16, 24), (1, 128, 31, 22, 40), (1, 128, 1, 34, 60)]:
        estimate = tiling.estimate_bytes(LTX2_3_VAE, "decoder", shape, 2)
        assert estimate > 0
        best = tiling.plan(LTX2_3_VAE, "decoder", shape, 2)
        given = tiling.plan(LTX2_3_VAE, "decoder", shape, 2, free=estimate)
        assert given.tiles == best.tiles == 1 and given.bytes == estimate - tiling.RESERVE_BYTES
        assert given.split_bytes >= 0.4 * best.split_bytes, "where more is free, fewer and longer steps"


def test_encoding_at_real_size_stays_within_its_estimate():
    vae = VideoVAE(LTX2_3_VAE, dtype=torch.bfloat16, device="meta")
    pixels = torch.empty(1, 3, 65, 512, 768, dtype=torch.bfloat16, device="meta")
    plan = tiling.plan(LTX2_3_VAE, "encoder", (1, 128, 9, 16, 24), 2)
    with torch.inference_mode(), CountingAllocator() as counter:
        vae.encode(pixels, plan=plan)
    assert counter.peak <= plan.bytes


def _failing(times, after, total=10):
    """start(plan) for with_retry: ``total`` one-frame outputs, failing ``times`` times after ``after`` frames."""
    calls = []

    def start(plan):
        calls.append(plan)
        for i in range(total):
            if i == after and len(calls) <= times:
                raise torch.OutOfMemoryError("no memory")
            yield torch.full((1, 1, 1, 1, 1), float(i))

    return start, calls


BIG, SMALL = (tiling.VAEPlan(n * tiling.MIB, ((0, 4),), ((0, 4),)) for n in (256, 64))


@pytest.mark.parametrize("after", [0, 3, 9])
def test_a_failed_allocation_is_retried_once_and_no_frame_comes_twice(after, caplog):
    start, calls = _failing(1, after)
    frames = list(streaming.with_retry(start, BIG, lambda plan: SMALL, None))
    assert [int(f) for f in frames] == list(range(10))
    assert calls == [BIG, SMALL]
    assert "steps of 64 MiB" in caplog.text


def test_a_second_failed_allocation_is_an_error():
    start, calls = _failing(2, 4)
    with pytest.raises(tiling.VAEMemoryError, match="asked for less"):
        list(streaming.with_retry(start, BIG, lambda plan: SMALL, lambda plan: tiling.VAEMemoryError("asked for less")))
    assert calls == [BIG, SMALL]


def test_running_out_of_memory_twice_names_a_size_that_fits():
    vae = near_vae()
    latent = torch.randn(1, 8, 4, 30, 40)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    vae.decoder.conv_in.forward = fail
    with (
        torch.inference_mode(),
        pytest.raises(tiling.VAEMemoryError, match=r"out of memory twice at 320x240, .*about \d+x\d+ would fit"),
    ):
        vae.decode(latent, free_memory=tiling.RESERVE_BYTES + 200 * tiling.MIB)


def test_a_decode_that_fits_only_in_smaller_steps_finishes_with_the_same_frames():
    vae = near_vae()
    latent = torch.randn(1, 8, 12, 16, 16)
    with torch.inference_mode():
        plan = tiling.VAEPlan(1 << 30, ((0, 16),), ((0, 16),), bytes=200 * tiling.MIB)
        whole = vae.decode(latent, plan=plan)
        with CountingAllocator() as unlimited:
            vae.decode(latent, plan=plan)
        with CountingAllocator(limit=unlimited.peak * 3 // 4) as limited:
            frames = vae.decode(latent, plan=plan, free_memory=GIB)
        assert limited.peak <= unlimited.peak * 3 // 4
    assert references.error(frames, whole) <= 1e-5
