"""Rolling decode and encode: the same frames for every chunking, memory that does not grow with the clip, gradients for training."""

import pytest
import torch

import vae_references as references
from counting_allocator import CountingAllocator
from ltx2_gguf.ltx2_core.vae import tiling
from ltx2_gguf.ltx2_core.vae.blocks import Rolling
from ltx2_gguf.ltx2_core.vae.config import LTX2_0_VAE, LTX2_3_VAE
from ltx2_gguf.ltx2_core.vae.model import VideoVAE
from ltx2_gguf.ltx2_core.vae.streaming import FrameSink
from vae_references import one_thread  # noqa: F401  (applies to every test here)

VERSIONS = ["2.3", "2.0"]
GIB = 2**30


def whole(latent_shape, split_bytes):
    return tiling.VAEPlan(split_bytes, ((0, latent_shape[3]),), ((0, latent_shape[4]),))


def random_latent(vae, frames, height=2, width=2):
    return torch.randn(1, vae.config.latent_channels, frames, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_decoding_in_chunks_gives_the_frames_of_a_full_decode(version, chunk):
    vae = references.tiny_vae(version)
    latent = random_latent(vae, 8)
    full = vae.decode(latent, plan=whole(latent.shape, 1 << 60))
    assert full.shape[2] == 57
    for split_bytes in (1, 40_000):  # one frame at a time, a few
        assert references.error(vae.decode(latent, chunk, plan=whole(latent.shape, split_bytes)), full) <= 1e-5
    vae.bfloat16()
    latent = latent[:, :, :4].bfloat16()
    full = vae.decode(latent, plan=whole(latent.shape, 1 << 60))
    assert references.error(vae.decode(latent, chunk, plan=whole(latent.shape, 20_000)), full) <= 1e-3


@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_encoding_in_chunks_gives_the_latents_of_a_full_encode(version, chunk):
    vae = references.tiny_vae(version)
    pixels = references.random_clip(33, 64, 96)
    latent = vae.encode(pixels, plan=whole((1, 8, 5, 2, 3), 1 << 60))
    assert latent.shape[2] == 5
    streamed = torch.cat(list(vae.encode_stream(pixels.split(chunk, dim=2), plan=whole((1, 8, 5, 2, 3), 1))), dim=2)
    assert references.error(streamed, latent) <= 1e-5


@torch.inference_mode()
def test_a_network_narrower_than_its_latent_decodes():
    config = references.reduced(LTX2_3_VAE, 8)
    vae = VideoVAE(config).eval()
    assert vae.decode(torch.randn(1, 128, 2, 1, 1)).shape == (1, 3, 9, 32, 32)


@torch.inference_mode()
def test_surplus_frames_are_dropped_when_encoding():
    vae = references.tiny_vae("2.3")
    pixels = references.random_clip(14, 64, 64)
    assert torch.equal(vae.encode(pixels), vae.encode(pixels[:, :, :9]))


@torch.inference_mode()
def test_two_clips_of_a_batch_decode_as_each_alone():
    vae = references.tiny_vae("2.0")
    latent = torch.cat([random_latent(vae, 4), -random_latent(vae, 4)])
    both = vae.decode(latent, 3, plan=whole(latent.shape, 1))
    for i in range(2):
        assert references.error(both[i : i + 1], vae.decode(latent[i : i + 1])) <= 1e-5


@torch.inference_mode()
def test_frames_are_handed_over_before_the_clip_has_been_read():
    vae = references.tiny_vae("2.3")
    latent = random_latent(vae, 24, 1, 1)
    fed = []
    roll = vae.decoder.roll
    vae.decoder.roll = lambda part, *rest: (fed.append(part.shape[2]), roll(part, *rest))[1]
    first = next(vae.decode_stream(latent, chunk=1))
    assert first.shape[2] >= 1
    assert sum(fed) == 15  # the decoder looks 14 latent frames ahead
    assert sum(y.shape[2] for y in vae.decode_stream(latent, chunk=1)) == 8 * 23 + 1


@torch.inference_mode()
def test_channels_last_gives_the_same_frames():
    vae = references.tiny_vae("2.0")
    latent = random_latent(vae, 4)
    rolling = Rolling(torch.channels_last_3d)
    z = vae.per_channel_statistics.un_normalize(latent)
    frames = torch.cat(list(vae.decoder.roll(z, rolling, True, 1)), dim=2)
    assert references.error(frames, vae.decode(latent)) <= 1e-5
    pixels = references.random_clip(9, 64, 64)
    means = torch.cat(list(vae.encoder.roll(pixels, Rolling(torch.channels_last_3d), False, 1)), dim=2)
    assert references.error(vae.per_channel_statistics.normalize(means), vae.encode(pixels)) <= 1e-5


@torch.inference_mode()
def test_decode_fills_the_output_it_is_given():
    vae = references.tiny_vae("2.3")
    latent = random_latent(vae, 3)
    pixels = vae.decode(latent, 1)
    assert vae.decode_output_shape(latent.shape) == pixels.shape
    out = torch.empty(pixels.shape, dtype=torch.uint8)
    assert vae.decode(latent, 1, output_buffer=out) is out
    assert torch.equal(out, ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_an_output_of_the_wrong_length_is_refused():
    sink = FrameSink(torch.empty(1, 3, 9, 4, 4))
    sink.put(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match="4 frames were decoded into an output for 9"):
        sink.close()


def _counted_decode(config, pixels, split_bytes=None):
    """(bytes of weights, peak bytes beside them, most bytes of rolling state, plan) of a bfloat16 decode at real size, on the meta device."""
    width, height, frames = pixels
    vae = VideoVAE(config, dtype=torch.bfloat16, device="meta")
    shape = (1, 128, (frames - 1) // 8 + 1, height // 32, width // 32)
    latent = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    plan = tiling.plan(config, "decoder", shape, 2) if split_bytes is None else whole(shape, split_bytes)
    rolling, state = Rolling(torch.channels_last_3d), 0
    with torch.inference_mode(), CountingAllocator() as counter:
        for y in vae.decoder.roll(latent, rolling, True, plan.split_bytes):
            state = max(state, rolling.nbytes())
            del y
    return sum(p.nbytes for p in vae.decoder.parameters()), counter.peak, state, plan


@pytest.mark.parametrize("pixels, budget", [((768, 512, 121), 3 * GIB), ((1280, 704, 241), 5 * GIB)])
@pytest.mark.parametrize("config", [LTX2_3_VAE, LTX2_0_VAE], ids=VERSIONS)
def test_the_real_decoder_stays_within_its_memory_budget(config, pixels, budget):
    weights, peak, _, plan = _counted_decode(config, pixels)
    assert weights + peak <= 0.9 * budget  # libraries' scratch is not counted here
    assert peak <= plan.bytes


@pytest.mark.slow
@pytest.mark.parametrize("config", [LTX2_3_VAE, LTX2_0_VAE], ids=VERSIONS)
def test_memory_does_not_grow_with_the_clip(config):
    step = 3 * 2**19
    _, short, _, _ = _counted_decode(config, (128, 128, 241), step)
    _, long, _, _ = _counted_decode(config, (128, 128, 721), step)
    assert long <= 1.12 * short  # three times as long; how evenly steps divide varies
    assert long <= tiling.peak_bytes(config, "decoder", 1, 91, 4, 4, 2, step)


@pytest.mark.parametrize("config", [LTX2_3_VAE, LTX2_0_VAE], ids=VERSIONS)
def test_the_predicted_rolling_state_is_what_is_held(config):
    _, _, held, _ = _counted_decode(config, (128, 128, 145), 2**20)
    predicted = tiling.state_bytes(config, "decoder", 1, 4, 4, 2)
    assert 0.9 * predicted <= held <= predicted


def test_without_anything_to_train_nothing_is_recorded_for_autograd():
    vae = references.tiny_vae("2.3")
    with torch.enable_grad(), CountingAllocator() as recorded:
        latent = vae.encode(references.random_clip(9, 64, 64))
        pixels = vae.decode(latent)
        assert torch.is_grad_enabled()
    with torch.inference_mode(), CountingAllocator() as plain:
        assert references.error(pixels, vae.decode(vae.encode(references.random_clip(9, 64, 64)))) <= 1e-6
    assert recorded.peak <= 1.01 * plain.peak


@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_equal_those_of_diffusers(version):
    vae = references.tiny_vae(version)
    reference = references.diffusers_vae(vae)
    pixels = references.random_clip(9, 64, 64)
    for module in (vae, reference):
        module.requires_grad_(True)
    reconstruction = vae.decode(vae.encode(pixels))
    (reconstruction - pixels).square().mean().backward()
    expected = references.diffusers_decode(reference, references.diffusers_encode(reference, pixels))
    (expected - pixels).square().mean().backward()
    assert references.error(reconstruction, expected) <= 1e-4
    unused = {"encoder.conv_out.conv.weight", "encoder.conv_out.conv.bias"}  # their log-variance row gets no gradient
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and (name in unused or parameter.grad.abs().sum() > 0), name
    for end in ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.conv_out.conv.weight"):
        assert references.error(vae.get_parameter(end).grad, reference.get_parameter(end).grad) <= 1e-3
