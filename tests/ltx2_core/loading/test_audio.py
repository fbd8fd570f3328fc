"""The audio VAE and the joint model from full checkpoints, splits and GGUFs."""

import pytest
import torch
from safetensors.torch import save_file

import audio_references as references
from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfigError
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.errors import CheckpointError, WeightFileError
from ltx2_gguf.ltx2_core.files.structure import Geometry
from ltx2_gguf.ltx2_core.loading.audio import load_audio_vae
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.ltx2_core.transformer.config import ConfigError
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
    both, split, vocoder, gguf = (
        tmp_path / name for name in ("both.safetensors", "split.safetensors", "vocoder.safetensors", "all.gguf")
    )
    save_file(
        state | {"vocoder.mel_stft.stft_fn.inverse_basis": torch.zeros(2), "patchify_proj.weight": torch.zeros(2, 2)},
        both,
    )
    save_file(
        {name.removeprefix("audio_vae."): tensor for name, tensor in state.items() if name.startswith("audio_vae.")},
        split,
    )
    save_file({name: tensor for name, tensor in state.items() if name.startswith("vocoder.")}, vocoder)
    with GGUFWriter(
        gguf, {"general.architecture": "ltxv"}, [(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()]
    ) as writer:
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


@pytest.mark.parametrize("version", ["2.0", "2.3"])
def test_the_joint_model_from_one_file_or_with_its_connectors_apart(version, tmp_path):
    geometry = Geometry.small(version, gemma_width=128, gemma_layers=1, heads=2, head_dim=64, num_layers=1)
    full = synthetic.make(tmp_path / "full.safetensors", geometry, audio=True, type="f32")
    gguf = synthetic.make(
        tmp_path / "full.gguf", geometry, audio=True, type="q8_0", with_config=version == "2.0"
    )  # 2.0's shapes do not tell its heads
    bare = synthetic.make(tmp_path / "bare.gguf", geometry, audio=True, type="q8_0", connector=False)
    shapes = structure.checkpoint_shapes(geometry, audio=True)
    connectors = {
        name: synthetic.tensor(name, shape) for name, shape in shapes.items() if "embeddings_connector" in name
    }
    save_file(connectors, tmp_path / "connectors.safetensors")
    with torch.inference_mode():
        models = [
            load_dit(sources, audio=True) for sources in (full, gguf, [bare, tmp_path / "connectors.safetensors"])
        ]
        x, audio = torch.randn(1, 128, 2, 2, 2), torch.randn(1, 8, 3, 16)
        width = geometry.connector_width + (geometry.audio_width if version == "2.3" else 0)
        features = torch.randn(1, 4, width)
        results = [
            m.velocities(x, audio, 0.5, m.preprocess_text_embeds(features, unprocessed=True), 24.0) for m in models
        ]
        video = load_dit(gguf)
    for result in results[1:]:
        assert all((a - b).norm() / b.norm() < 0.1 for a, b in zip(result, results[0]))
    assert models[1].av_ca_timestep_scale_multiplier == 1000.0  # a file without metadata says nothing of it
    assert models[0].transformer_blocks[0].scale_shift_table_a2v_ca_video.dtype == torch.float32
    assert not any("audio" in name or "av_ca" in name for name in video.state_dict()) and not any(
        "audio" in name for name in video.weight_sources
    )
    with torch.inference_mode(), pytest.raises(CheckpointError, match="No audio connector|no embeddings connector"):
        load_dit(bare, audio=True)


def test_audio_is_as_strict_as_video_and_absent_audio_is_named(tmp_path):
    geometry = Geometry.small(gemma_width=128, gemma_layers=1, heads=2, head_dim=64, num_layers=1)
    video = synthetic.make(tmp_path / "video.safetensors", geometry)
    with (
        torch.inference_mode(),
        pytest.raises(ConfigError, match="video.safetensors: .*holds the video model alone; sound needs"),
    ):
        load_dit(video, audio=True)
    shapes = structure.checkpoint_shapes(geometry, audio=True, vae=False, projection=False)
    tensors = synthetic.state_dict(
        {name: shape for name, shape in shapes.items() if not name.startswith(("vocoder.", "audio_vae."))}
    )
    del tensors["model.diffusion_model.transformer_blocks.0.video_to_audio_attn.to_k.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with torch.inference_mode(), pytest.raises(WeightFileError, match="1 tensor is missing.*video_to_audio_attn.to_k"):
        load_dit(tmp_path / "short.safetensors", audio=True)


def test_what_the_parts_of_the_audio_are(tmp_path):
    geometry = Geometry.small(gemma_width=128, gemma_layers=1)
    sound = synthetic.state_dict(structure.sound_shapes(geometry))
    halves = {
        half: {name: value for name, value in sound.items() if name.startswith(half)}
        for half in ("audio_vae.", "vocoder.")
    }
    connector = {
        n: s for n, s in structure.audio_dit_shapes(geometry).items() if n.startswith("audio_embeddings_connector.")
    }
    for tensors, title, parts in (
        (sound, "LTX-2.3 audio VAE and vocoder", {"vae", "vocoder"}), (halves["vocoder."], "LTX-2.3 vocoder", {"vocoder"}),
        (halves["audio_vae."], "LTX-2 audio VAE", {"vae"}), ({n.removeprefix("audio_vae."): v for n, v in halves["audio_vae."].items()}, "LTX-2 audio VAE", {"vae"}),
        (synthetic.state_dict(connector), "LTX-2.3 audio connector", {"connector"}),
    ):  # fmt: skip
        save_file(tensors, tmp_path / "part.safetensors")
        report = identify(tmp_path / "part.safetensors")
        assert (
            report
            and report.kind == "audio"
            and report.title == title
            and set(report.audio_parts) == parts
            and len(report.inputs) == 1
        )
