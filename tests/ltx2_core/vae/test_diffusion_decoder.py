"""The diffusion decoder against the host's own with the same noise; pieces of any size give the same pixels."""

import pytest
import torch

import reference_diffusion_vae as references
from ltx2_gguf.ltx2_core.vae import neighborhood
from ltx2_gguf.ltx2_core.vae.blocks import Rolling
from ltx2_gguf.ltx2_core.vae.diffusion_config import DiffusionDecoderConfig, DiffusionDecoderError
from ltx2_gguf.ltx2_core.vae.diffusion_decoder import hashed_noise

WHOLE = 1 << 60


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def decode(net, latent, step=None, split_bytes=WHOLE, origin=(0, 0)):
    rolling, frames = Rolling(origin=origin), []
    with torch.no_grad():
        for start in range(0, latent.shape[2], step or latent.shape[2]):
            part = latent[:, :, start : start + (step or latent.shape[2])]
            frames += net.roll(part, rolling, start + part.shape[2] >= latent.shape[2], split_bytes)
    return torch.cat(frames, dim=2)


def latent_of(frames, height=7, width=6):
    return torch.randn(1, 8, frames, height, width, generator=torch.Generator().manual_seed(frames))


@pytest.mark.parametrize("frames, height, width", [(4, 7, 6), (1, 3, 2), (2, 1, 9)])
def test_pixels_equal_the_hosts_with_the_same_noise(host, frames, height, width):
    """Also where the clip is smaller than the windows."""
    pytest.importorskip("comfy.ldm.lightricks.vae.na_diffusion_decoder")
    ours = references.decoder()
    latent = latent_of(frames, height, width)
    want = references.host_decoder(ours)(latent, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))[0]
    ours.noise = lambda numbers, *place: noise[:, numbers.start : numbers.stop]
    got = decode(ours, latent)
    assert got.shape == want.shape == (1, 3, 8 * (frames - 1) + 1, 32 * height, 32 * width)
    assert rel(got, want) < 1e-5
    ours.noise = hashed_noise
    assert rel(decode(ours, latent), want) > 1e-3, "the noise must matter"


@pytest.mark.parametrize("frames, step, split", [(5, 1, WHOLE), (5, 2, 1), (4, 3, 40_000), (1, 1, 1)])
def test_rolling_through_time_equals_the_whole_clip(frames, step, split):
    net, latent = references.decoder(), latent_of(frames, 3, 2)
    want = decode(net, latent)
    got = decode(net, latent, step, split)
    assert got.shape == want.shape == (1, 3, 8 * (frames - 1) + 1, 96, 64)
    assert rel(got, want) < 1e-5


def test_what_is_kept_does_not_grow_with_the_clip():
    net, sizes = references.decoder(), []
    for frames in (14, 22):
        rolling, kept = Rolling(), 0
        with torch.no_grad():
            latent = latent_of(frames, 2, 2)
            for number in range(frames - 1):
                for _ in net.roll(latent[:, :, number : number + 1], rolling, False, 1):
                    kept = max(kept, rolling.nbytes())
        sizes.append(kept)
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("size, window", [((9, 10, 11), (5, 3, 7)), ((2, 20, 3), (3, 7, 7)), ((5, 8, 8), (5, 1, 3))])
def test_attention_in_blocks_sees_exactly_the_neighbours(size, window):
    """Against one softmax over all positions with everything but the window masked."""
    q, k, v = (torch.randn(2, *size, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sees = torch.ones(1, 1, dtype=torch.bool)
    for length, width in zip(size, window):
        width = min(width, length)
        left = (torch.arange(length) - width // 2).clamp(0, length - width)[:, None]
        axis = (torch.arange(length) >= left) & (torch.arange(length) < left + width)
        sees = torch.kron(sees.int(), axis.int()).bool()
    flat = [x.flatten(1, 3).transpose(1, 2) for x in (q, k, v)]
    want = (
        torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=sees, scale=1.0).transpose(1, 2).view(q.shape)
    )
    assert rel(neighborhood.in_blocks(q, k, v, window, slice(0, size[0])), want) < 1e-6
    assert rel(neighborhood.neighborhood_attention(q, k, v, window, slice(1, 2)), want[:, 1:2]) < 1e-6


def test_noise_depends_on_the_place_alone_and_is_normal():
    whole = hashed_noise(range(6), 0, 0, 64, 96, 3, "cpu")
    assert torch.equal(hashed_noise(range(2, 5), 16, 32, 20, 30, 3, "cpu"), whole[:, 2:5, 16:36, 32:62])
    assert (
        abs(whole.mean()) < 0.01
        and abs(whole.std() - 1) < 0.01
        and abs((whole**4).mean() - 3) < 0.1
        and whole.isfinite().all()
    )
    neighbours = [
        (whole[..., 1:], whole[..., :-1]),
        (whole[..., 1:, :], whole[..., :-1, :]),
        (whole[:, 1:], whole[:, :-1]),
        (whole[1:], whole[:-1]),
    ]
    assert all(abs((a * b).mean()) < 0.02 for a, b in neighbours)


def test_the_released_geometry_has_the_released_tensors():
    from ltx2_gguf.ltx2_core.vae.diffusion_decoder import DiffusionDecoder

    net = DiffusionDecoder(DiffusionDecoderConfig.from_metadata(None), device="meta")
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert len(shapes) == 309 and shapes["det_stages.1.5.attn.qkv.weight"] == (3072, 1024)
    assert shapes["upsamples.0.proj.weight"] == (4096, 2048) and shapes["diff_blocks.7.scale_shift_table"] == (7, 256)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 417


def test_other_kinds_of_steps_are_refused():
    with pytest.raises(DiffusionDecoderError, match="2 steps of kind 'v'"):
        DiffusionDecoderConfig.from_metadata({"model_output_type": "v", "decoder": {"default_num_inference_steps": 2}})


def test_the_whole_vae_equals_the_hosts_both_ways(host):
    pytest.importorskip("comfy.ldm.lightricks.vae.na_diffusion_decoder")
    ours = references.vae()
    theirs = references.host_vae(ours)
    latent, pixels = latent_of(3, 3, 2), torch.rand(1, 3, 17, 64, 96) * 2 - 1
    assert rel(ours.encode(pixels), theirs.encode(pixels)) < 1e-5
    noise = torch.randn((1, 3, 17, 96, 64), generator=torch.Generator().manual_seed(0))[0]  # as the host draws it
    ours.decoder.noise = lambda numbers, *place: noise[:, numbers.start : numbers.stop]
    assert rel(ours.decode(latent), theirs.decode(latent)) < 1e-5


def test_a_file_of_it_is_recognised_loaded_and_decoded_in_tiles(tmp_path):
    """Tiles see the noise of their place, and blended overlaps hide that they see less of their surroundings."""
    import json

    from safetensors.torch import save_file

    from ltx2_gguf.ltx2_core.loading.identify import identify
    from ltx2_gguf.ltx2_core.loading.vae import load_vae

    ours, path = references.vae(), tmp_path / "ltx-2.5-video-vae.safetensors"
    save_file(
        {**ours.state_dict(), "decoder.type_emb": torch.zeros(4)},
        path,
        {"config": json.dumps({"vae": references.METADATA}), "model_version": "2.5.0"},
    )
    report = identify(path)
    assert report.kind == "vae" and not report.refusal and any("diffusion decoder" in note for note in report.notes)
    loaded, latent = load_vae(path), latent_of(2, 12, 16)
    want = ours.decode(latent)
    assert torch.equal(loaded.decode(latent), want)
    assert rel(loaded.decode(latent, output_buffer=torch.empty_like(want), chunk=1), want) < 1e-5
    plan = loaded.plan("decoder", latent.shape, torch.float32, torch.device("cpu"), tile=320)
    assert plan.tiles > 1
    assert rel(loaded.decode(latent, plan=plan), want) < 0.2


def test_less_memory_makes_smaller_steps_and_what_a_decode_takes_is_counted():
    from ltx2_gguf.ltx2_core.vae import tiling
    from ltx2_gguf.ltx2_core.vae.config import VAEConfig

    config = VAEConfig((), (), has_encoder=False, diffusion=DiffusionDecoderConfig())
    shape = (1, 128, 16, 16, 24)  # 768 x 512 x 121
    roomy = tiling.plan(config, "decoder", shape, 2, 40 << 30)
    tight = tiling.plan(config, "decoder", shape, 2, 4 << 30)
    assert roomy.tiles == tight.tiles == 1 and tight.split_bytes < roomy.split_bytes and tight.bytes <= 4 << 30
    assert tiling.spatial_reach(config) == 31
