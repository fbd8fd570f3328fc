"""The audio VAE from full checkpoints, splits and GGUFs."""

import audio_references as references
import pytest
import torch
from safetensors.torch import save_file

from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfigError
from ltx2_gguf.ltx2_core.files.weights import WeightFileError
from ltx2_gguf.ltx2_core.loading.audio import load_audio_vae
from ltx2_gguf.quant.gguf.writer import GGUFWriter


@pytest.fixture(scope="module")
def vae():
    return references.audio_vae("2.3")


@pytest.fixture(scope="module")
def latent(vae):
    latent = torch.randn(1, 8, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return latent, vae.decode(latent)


def test_one_file_or_two_or_gguf(vae, latent, tmp_path):
    latent, expected = latent
    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    both, split, vocoder, gguf = (tmp_path / name for name in ("both.safetensors", "split.safetensors", "vocoder.safetensors", "all.gguf"))
    save_file(state | {"vocoder.mel_stft.stft_fn.inverse_basis": torch.zeros(2), "patchify_proj.weight": torch.zeros(2, 2)}, both)
    save_file({name.removeprefix("audio_vae."): tensor for name, tensor in state.items() if name.startswith("audio_vae.")}, split)
    save_file({name: tensor for name, tensor in state.items() if name.startswith("vocoder.")}, vocoder)
    with GGUFWriter(gguf, {"general.architecture": "ltxv"}, [(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()]) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    for sources in (both, [split, vocoder], gguf):
        with torch.no_grad():
            assert torch.equal(load_audio_vae(sources).decode(latent), expected)
    decoder = load_audio_vae(both, encode=False)
    assert decoder.audio_vae.encoder is None and decoder.vocoder is not None
    with pytest.raises(AudioVAEConfigError, match="vocoder .* is missing"):
        load_audio_vae(split)
    assert load_audio_vae(split, decode=False).vocoder is None


def test_incomplete_and_foreign_files(vae, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}
    del state["vocoder.vocoder.conv_post.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(WeightFileError, match="short.safetensors.*1 tensor is missing.*conv_post"):
        load_audio_vae(tmp_path / "short.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(AudioVAEConfigError, match="foreign.safetensors: No audio VAE"):
        load_audio_vae(tmp_path / "foreign.safetensors")
