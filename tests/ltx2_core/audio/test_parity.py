"""Audio VAE and vocoder against the host's modules, mel and resampling against torchaudio, on the same random weights."""

import pytest
import torch

import audio_references as references
from ltx2_gguf.ltx2_core.audio import mel
from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfigError, audio_vae_config, audio_vae_names
from ltx2_gguf.ltx2_core.audio.model import AudioError, audio_latent_frames


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def pair(request, host):
    vae = references.audio_vae(request.param)
    return vae, references.host_audio_vae(vae)


def test_decode_and_encode_equal_the_hosts(pair):
    vae, reference = pair
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 8, 7, 16, generator=generator)
    expected = reference.decode(latent)
    clipped = (expected.abs() > 0.999).float().mean()
    assert clipped < 0.2 and expected.std() > 1e-3
    ours = vae.decode(latent)
    assert ours.shape == expected.shape == (2, 2, 25 * vae.output_rate // 100)
    assert references.error(ours, expected) <= 1e-4
    waveform = torch.randn(1, 2, 22050, generator=generator) * 0.1
    ours, expected = vae.encode(waveform, 44100), reference.encode(waveform, 44100)
    assert ours.shape == expected.shape == (1, 8, 13, 16)
    assert references.error(ours, expected) <= 1e-4


def test_config_from_shapes(pair):
    vae, _ = pair
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    assert audio_vae_config(shapes) == vae.config
    bare = {name.removeprefix("audio_vae."): shape for name, shape in shapes.items() if name.startswith("audio_vae.")}
    names = audio_vae_names(bare, bare.__getitem__)
    assert set(names) == {name for name in shapes if name.startswith("audio_vae.")}
    assert audio_vae_config({name: bare[stored] for name, stored in names.items()}).version is None
    with pytest.raises(AudioVAEConfigError, match="no vocoder"):
        audio_vae_config({})
    with pytest.raises(AudioVAEConfigError, match="latent channels"):
        audio_vae_config(shapes | {"audio_vae.decoder.conv_in.conv.weight": (512, 20, 3, 3)})


@pytest.mark.parametrize("rate", [44100, 48000, 24000, 8000])
def test_resampling_equals_torchaudios(rate):
    functional = pytest.importorskip("torchaudio.functional")
    waveform = torch.randn(2, 2, 5003, generator=torch.Generator().manual_seed(rate))
    expected = functional.resample(waveform, rate, 16000)
    ours = mel.resample(waveform, rate, 16000)
    assert ours.shape == expected.shape
    assert references.error(ours, expected) <= 1e-5


def test_mono_is_doubled_and_bad_sound_is_refused(pair):
    vae, _ = pair
    mono = torch.randn(1, 1, 4000) * 0.1
    assert torch.equal(vae.encode(mono, 16000), vae.encode(mono.expand(-1, 2, -1), 16000))
    with pytest.raises(AudioError, match="stereo"):
        vae.encode(torch.zeros(1, 6, 100), 16000)
    with pytest.raises(AudioError, match="not numbers"):
        vae.encode(torch.full((1, 2, 100), float("nan")), 16000)
    with pytest.raises(AudioError, match="not numbers"):
        vae.decode(torch.full((1, 8, 2, 16), float("inf")))


def test_latent_length_is_rounded():
    assert [audio_latent_frames(*clip) for clip in ((121, 24), (121, 25), (97, 25), (241, 24))] == [126, 121, 97, 251]
