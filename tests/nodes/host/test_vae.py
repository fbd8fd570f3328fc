"""The VAE object under the host's VAE nodes."""

import pytest
import torch

import host_models as hm
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.vae import load_vae as load_core_vae

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("vae") / "tiny.gguf", structure.Geometry.small("2.3"), type="q8_0")


@pytest.fixture(scope="module")
def vae(host, checkpoint):
    from ltx2_gguf.nodes.host import vae as host_vae

    return host_vae.load_vae(str(checkpoint))


@pytest.fixture(scope="module")
def core(checkpoint):
    return load_core_vae(checkpoint, dtype=torch.float32)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_decoding_through_the_host_equals_the_core_and_is_in_0_to_1(vae, core):
    latent = random(2, 128, 3, 2, 3)
    with torch.inference_mode():
        images = vae.decode(latent)
        expected = ((core.decode(latent) + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert images.shape == (2, 17, 64, 96, 3) and images.device.type == "cpu"
    assert (images - expected).abs().max() < 1e-5
    assert images.min() >= 0 and images.max() <= 1


def test_encoding_crops_to_whole_latents_and_equals_the_core(vae, core):
    images = torch.rand(18, 70, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        latent = vae.encode(images)
        pixels = images[:17, 3:67].movedim(-1, 0)[None] * 2 - 1
        expected = core.encode(pixels)
    assert latent.shape == (1, 128, 3, 2, 3)
    assert hm.error(latent, expected) < 1e-5


def test_an_image_becomes_one_latent_frame(vae):
    with torch.inference_mode():
        assert vae.encode(torch.rand(1, 64, 64, 3)).shape == (1, 128, 1, 2, 2)


def test_the_hosts_tiled_decode_equals_the_plain_one_when_one_tile_is_enough_and_runs_with_many(vae):
    import nodes

    latent = {"samples": random(1, 128, 4, 3, 3)}
    with torch.inference_mode():
        plain = nodes.VAEDecode().decode(vae, latent)[0]
        one = nodes.VAEDecodeTiled().decode(vae, latent, 512, 64, 4096, 8)[0]
        many = nodes.VAEDecodeTiled().decode(vae, latent, 64, 16, 16, 8)[0]
    assert plain.shape == one.shape == many.shape == (25, 96, 96, 3)
    assert (one - plain).abs().max() < 1e-5
    assert torch.isfinite(many).all() and many.std() > 0.05


def test_the_decode_node_leaves_out_guides_and_can_cut_tiles(vae):
    from ltx2_gguf.nodes.decode import LTX2GGUFDecode
    from ltx2_gguf.nodes.host.guides import GUIDE_FRAMES

    latent = random(1, 128, 3, 4, 4)
    with torch.inference_mode():
        whole = LTX2GGUFDecode.execute({"samples": latent[:, :, :2]}, vae, 0).args[0]
        guided = LTX2GGUFDecode.execute({"samples": latent, GUIDE_FRAMES: 1}, vae, 0).args[0]
        tiled = LTX2GGUFDecode.execute({"samples": latent[:, :, :2]}, vae, 64).args[0]
    assert torch.equal(whole, guided) and whole.shape == (9, 128, 128, 3)
    assert tiled.shape == whole.shape


def test_the_memory_asked_for_does_not_grow_with_the_length_of_a_video(vae):
    short, long = ((1, 128, frames, 16, 24) for frames in (16, 64))
    assert vae.memory_used_decode(long, torch.bfloat16) == vae.memory_used_decode(short, torch.bfloat16) > 0
    assert (
        vae.memory_used_encode((1, 3, 481, 512, 768), torch.bfloat16)
        == vae.memory_used_encode((1, 3, 121, 512, 768), torch.bfloat16)
        > 0
    )


def test_factors_between_pixels_and_latents_are_those_of_ltx2(vae):
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode(), vae.temporal_compression_decode()) == (
        32,
        32,
        8,
    )
    assert [vae.upscale_ratio[0](n) for n in (1, 2, 16)] == [1, 9, 121]
    assert [vae.downscale_ratio[0](n) for n in (1, 9, 121)] == [1, 2, 16]


@pytest.mark.parametrize("frame_index", [8, -1])
def test_the_hosts_guide_nodes_work_around_sampling(vae, frame_index):
    from comfy_extras.nodes_lt import LTXVAddGuide, LTXVCropGuides

    patcher = hm.model("Q8_0")
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    start = hm.latent(frames=3)
    with torch.inference_mode():
        positive, negative, guided = LTXVAddGuide.execute(
            hm.conditioning(patcher), hm.conditioning(patcher, seed=6), vae, start, image, frame_index, 0.8
        ).args
        assert guided["samples"].shape[2] == 4
        sampled = {**guided, "samples": hm.ksample(patcher, guided, positive, negative)}
        cropped = LTXVCropGuides.execute(positive, negative, sampled).args
    assert cropped[2]["samples"].shape == (1, 128, 3, 2, 3)
    plain = hm.ksample(patcher, start)
    assert hm.error(cropped[2]["samples"], plain) > 1e-3, "the guide must change the video"


def test_our_image_node_replaces_the_first_frame_and_guides_the_others(vae, monkeypatch):
    from comfy_extras.nodes_lt import LTXVAddGuide

    from ltx2_gguf.nodes.conditioning import LTX2GGUFImageCondition as Node
    from ltx2_gguf.nodes.host.guides import GUIDE_FRAMES

    patcher = hm.model("Q8_0")
    positive, negative = hm.conditioning(patcher), hm.conditioning(patcher, seed=6)
    image = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(3))
    start = hm.latent(frames=3)
    with torch.inference_mode():
        latent, same, _ = Node.execute(vae, start, image, 0, 0.75, 0, "auto", positive, negative).args
        assert same is positive
        assert torch.allclose(latent["noise_mask"].flatten(), torch.tensor([0.25, 1.0, 1.0]))
        assert hm.error(latent["samples"][:, :, :1], vae.encode(image)) < 1e-6 and not latent["samples"][:, :, 1:].any()
        assert not start["samples"].any(), "the input latent must stay as it is"

        guided, new_positive, _ = Node.execute(vae, latent, image, -1, 1.0, 0, "auto", positive, negative).args
        expected = LTXVAddGuide.execute(positive, negative, vae, latent, image, 16, 1.0).args
        assert guided[GUIDE_FRAMES] == 1
        assert torch.equal(guided["samples"], expected[2]["samples"]) and torch.equal(
            guided["noise_mask"], expected[2]["noise_mask"]
        )
        assert torch.equal(new_positive[0][1]["keyframe_idxs"], expected[0][0][1]["keyframe_idxs"])

        replaced = Node.execute(vae, start, image, 9, 1.0, 0, "replace").args[0]
        assert torch.equal(replaced["noise_mask"].flatten(), torch.tensor([1.0, 1.0, 0.0]))
        assert Node.execute(vae, start, image, 0, 0.0, 33, "auto").args[0] is start
        with pytest.raises(ValueError, match="both 'positive' and 'negative'"):
            Node.execute(vae, start, image, 8, 1.0, 0, "guide")
        with pytest.raises(ValueError, match="use a shorter clip"):
            Node.execute(vae, start, torch.rand(17, 64, 96, 3), 8, 1.0, 0, "replace")


def test_the_hosts_latent_upsampler_uses_our_statistics(vae):
    import comfy.ops
    from comfy.ldm.lightricks.latent_upsampler import LatentUpsampler
    from comfy.model_patcher import ModelPatcher
    from comfy_extras.nodes_lt_upsampler import LTXVLatentUpsampler

    model = LatentUpsampler(
        in_channels=128,
        mid_channels=32,
        num_blocks_per_stage=1,
        dims=3,
        spatial_upsample=True,
        temporal_upsample=False,
        operations=comfy.ops.disable_weight_init,
    )
    for number, parameter in enumerate(model.requires_grad_(False).parameters()):
        parameter.copy_(random(*parameter.shape, seed=number) * 0.05)
    model.get_dtype = lambda: torch.float32
    upscaler = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    with torch.inference_mode():
        out = LTXVLatentUpsampler.execute({"samples": random(1, 128, 2, 2, 3)}, upscaler, vae).args[0]
    assert out["samples"].shape == (1, 128, 2, 4, 6) and torch.isfinite(out["samples"]).all()


def test_a_vae_that_was_not_found_says_so_when_it_is_used(host):
    from comfy.model_patcher import is_model_patcher_output

    import nodes
    from ltx2_gguf.nodes.host.vae import MissingVAE

    missing = MissingVAE("model.gguf")
    assert not is_model_patcher_output(missing) and not missing.is_dynamic()
    for use in (
        lambda: nodes.VAEDecode().decode(missing, {"samples": torch.zeros(1, 128, 1, 2, 2)}),
        lambda: missing.encode(torch.zeros(1, 64, 64, 3)),
        lambda: missing.first_stage_model.per_channel_statistics,
    ):
        with pytest.raises(RuntimeError, match="model.gguf contains no video VAE.*LTX-2 Video VAE Loader"):
            use()


def test_the_video_vae_in_place_of_the_audio_vae_is_answered_with_the_node_that_loads_that(vae):
    from comfy_extras.nodes_lt_audio import LTXVAudioVAEDecode, LTXVAudioVAEEncode, LTXVEmptyLatentAudio

    audio = {"waveform": torch.zeros(1, 2, 44100), "sample_rate": 44100}
    with torch.inference_mode():
        with pytest.raises(AttributeError, match="video VAE.*'LTXV Audio VAE Loader'"):
            LTXVEmptyLatentAudio.execute(17, 24.0, 1, vae)
        with pytest.raises(ValueError, match="audio latent needs the audio VAE"):
            LTXVAudioVAEDecode.execute({"samples": torch.zeros(1, 8, 10, 16)}, vae)
        with pytest.raises(ValueError, match="'LTXV Audio VAE Loader'"):
            LTXVAudioVAEEncode.execute(audio, vae)
    assert not hasattr(vae.first_stage_model, "output_sample_rate"), "other nodes ask by hasattr"


def test_the_diffusion_vae_decodes_under_the_host_as_headless(host, tmp_path):
    import json

    from safetensors.torch import save_file

    import reference_diffusion_vae
    from ltx2_gguf.nodes.host import vae as host_vae

    ours, path = reference_diffusion_vae.vae(), tmp_path / "diffusion.safetensors"
    save_file(ours.state_dict(), path, {"config": json.dumps({"vae": reference_diffusion_vae.METADATA})})
    vae = host_vae.load_vae(str(path))
    vae.latent_channels = 8
    latent = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        frames = vae.decode(latent)
        want = (ours.decode(latent).movedim(1, -1) + 1) / 2
    assert frames.shape == (1, 17, 64, 96, 3) and (frames - want.clamp(0, 1)).abs().max() < 1e-4
