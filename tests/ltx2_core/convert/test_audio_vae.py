"""The audio VAE's own file: complete, and readable by the host's loader."""

import json

import pytest
import torch
from safetensors import safe_open

from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfigError
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.convert.convert import extract_audio_vae
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.audio import load_audio_vae


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_audio_vae_is_written_to_a_file_of_its_own(version, tmp_path):
    geometry = structure.Geometry.small(version, gemma_width=128, gemma_layers=1)
    full = synthetic.make(tmp_path / "full.safetensors", geometry, audio=True, with_config=False)
    output = tmp_path / "audio_vae.safetensors"
    result = extract_audio_vae([full], output)
    used = set(structure.sound_shapes(geometry))
    with safe_open(output, "pt") as file:
        assert set(file.keys()) == used and result["tensors"] == len(used) and result["version"] == version
        config = json.loads(file.metadata()["config"])
    assert config == {part: structure.config(geometry)[part] for part in ("audio_vae", "vocoder")}
    latent = torch.randn(1, 8, 2, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (load_audio_vae(path).decode(latent) for path in (full, output))
    assert torch.equal(a, b) and 0.001 < b.std() < 0.5


def test_a_file_without_one_is_refused(tmp_path):
    video = synthetic.make(tmp_path / "video.safetensors", structure.Geometry.small(gemma_width=128, gemma_layers=1))
    with pytest.raises(AudioVAEConfigError, match="No audio VAE"):
        extract_audio_vae([video], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
