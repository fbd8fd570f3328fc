"""Encoder and decoder against the host's VAE and diffusers' on the same random weights."""

import pytest
import torch

import vae_references as references
from vae_references import one_thread  # noqa: F401  (applies to every test here)

VERSIONS = ["2.3", "2.0"]
CLIPS = [(1, 64, 96), (9, 96, 64), (17, 64, 64), (33, 64, 128)]


def _errors(vae, encode, decode, clip):
    pixels = references.random_clip(*clip)
    latent = encode(pixels)
    return references.error(vae.encode(pixels), latent), references.error(vae.decode(latent), decode(latent))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("version", VERSIONS)
def test_encode_and_decode_equal_the_hosts(host, version, clip):
    vae = references.tiny_vae(version)
    reference = references.host_vae(vae)
    encode_error, decode_error = _errors(vae, reference.encode, reference.decode, clip)
    assert encode_error <= 2e-5
    assert decode_error <= 2e-5


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("version", VERSIONS)
def test_encode_and_decode_equal_diffusers(version, clip):
    vae = references.tiny_vae(version)
    reference = references.diffusers_vae(vae)
    encode_error, decode_error = _errors(
        vae,
        lambda x: references.diffusers_encode(reference, x),
        lambda z: references.diffusers_decode(reference, z),
        clip,
    )
    assert encode_error <= 2e-5
    assert decode_error <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_121_frames_equal_diffusers(version):
    vae = references.tiny_vae(version)
    reference = references.diffusers_vae(vae)
    encode_error, decode_error = _errors(
        vae,
        lambda x: references.diffusers_encode(reference, x),
        lambda z: references.diffusers_decode(reference, z),
        (121, 64, 96),
    )
    assert encode_error <= 2e-5
    assert decode_error <= 2e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_bfloat16_is_as_exact_as_the_references_own(host, version):
    vae = references.tiny_vae(version)
    pixels = references.random_clip(17, 64, 96)
    latent, exact = vae.encode(pixels), None
    exact = vae.decode(latent)
    reference = references.host_vae(vae).bfloat16()
    reference_errors = (
        references.error(reference.encode(pixels.bfloat16()), latent),
        references.error(reference.decode(latent.bfloat16()), exact),
    )
    vae.bfloat16()
    errors = (
        references.error(vae.encode(pixels.bfloat16()), latent),
        references.error(vae.decode(latent.bfloat16()), exact),
    )
    assert errors[0] <= 2 * reference_errors[0]
    assert errors[1] <= 2 * reference_errors[1]
