"""The VAE's geometry from names, shapes and metadata, and loading it from every kind of file."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import vae_references as references
from ltx2_gguf.ltx2_core.files.weights import WeightFileError
from ltx2_gguf.ltx2_core.loading.vae import load_vae
from ltx2_gguf.ltx2_core.vae.config import (
    LTX2_0_VAE,
    LTX2_3_VAE,
    VAEConfigError,
    reduced,
    vae_config_from_shapes,
    vae_names,
)
from ltx2_gguf.ltx2_core.vae.model import VideoVAE
from vae_references import one_thread  # noqa: F401  (applies to every test here)

CONFIGS = {"2.3": LTX2_3_VAE, "2.0": LTX2_0_VAE}
both = pytest.mark.parametrize("version", CONFIGS)


def shapes_of(config):
    return {name: tuple(p.shape) for name, p in VideoVAE(config, device="meta").state_dict().items()}


def metadata_of(config):
    return {"config": json.dumps({"vae": config.to_metadata()})}


@both
def test_real_sizes_have_the_parameters_of_the_released_files(version):
    shapes = shapes_of(CONFIGS[version])
    assert len(shapes) == {"2.3": 170, "2.0": 184}[version]
    count = {
        side: sum(np.prod(shape) for name, shape in shapes.items() if name.startswith(side))
        for side in ("encoder", "decoder")
    }
    expected = {"2.3": (0.319e9, 0.407e9), "2.0": (0.694e9, 0.528e9)}[version]
    assert count["encoder"] == pytest.approx(expected[0], rel=2e-3) and count["decoder"] == pytest.approx(
        expected[1], rel=2e-3
    )


@both
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("with_metadata", [True, False])
def test_geometry_is_found_from_shapes_with_and_without_metadata(version, prefix, with_metadata):
    for config in (CONFIGS[version], reduced(CONFIGS[version], 16, latent_channels=24)):
        shapes = {prefix + name: shape for name, shape in shapes_of(config).items()}
        shapes["audio_vae.decoder.conv_in.conv.weight"] = (8, 8, 3, 3)
        assert vae_config_from_shapes(shapes, metadata_of(config) if with_metadata else None) == config


@both
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_file_with_one_half_is_known_as_such(version, side):
    config = reduced(CONFIGS[version], 16)
    shapes = {
        name: shape
        for name, shape in shapes_of(config).items()
        if not name.startswith({"encoder": "decoder", "decoder": "encoder"}[side])
    }
    found = vae_config_from_shapes(shapes, metadata_of(config))
    assert (found.has_encoder, found.has_decoder) == (side == "encoder", side == "decoder")
    assert found.spatial_scale == 32 and found.temporal_scale == 8
    assert vae_config_from_shapes(shapes).decoder_blocks == (config.decoder_blocks if side == "decoder" else ())


def test_metadata_decides_what_shapes_cannot_tell():
    config = replace(reduced(LTX2_0_VAE, 8), decoder_padding="zeros", encoder_padding="zeros")
    assert vae_config_from_shapes(shapes_of(config), metadata_of(config)).decoder_padding == "zeros"
    assert vae_config_from_shapes(shapes_of(config)).decoder_padding == "reflect"


@pytest.mark.parametrize(
    "padding", [("zeros", "zeros"), ("zeros", "reflect"), ("reflect", "reflect"), ("reflect", "zeros")]
)
def test_padding_survives_the_metadata(padding):
    config = replace(reduced(LTX2_0_VAE, 8), encoder_padding=padding[0], decoder_padding=padding[1])
    assert vae_config_from_shapes(shapes_of(config), metadata_of(config)) == config


def test_shapes_and_metadata_that_disagree_are_refused_with_both():
    shapes = shapes_of(reduced(LTX2_3_VAE, 16))
    with pytest.raises(
        VAEConfigError,
        match="encoder's tensors make up the blocks 'res4 space2 res6 time2 res4 all2 res2 all1 res2' but the metadata describes 'res4 space2 res6 time2 res6 all2",
    ):
        vae_config_from_shapes(shapes, metadata_of(reduced(LTX2_0_VAE, 16)))
    with pytest.raises(VAEConfigError, match="base_channels = 16 but the metadata says 128"):
        vae_config_from_shapes(shapes, metadata_of(LTX2_3_VAE))


FOREIGN = {
    "LTX-Video 0.9": {
        "decoder.last_time_embedder.timestep_embedder.linear_1.weight": (8, 8),
        "decoder.conv_in.conv.weight": (8, 8, 3, 3, 3),
    },
    "diffusers": {"decoder.mid_block.resnets.0.conv1.conv.weight": (8, 8, 3, 3, 3)},
    "TAE": {"decoder.22.bias": (3,)},
    "audio VAE": {"audio_vae.decoder.conv_in.conv.weight": (8, 8, 3, 3), "vocoder.conv_pre.weight": (8, 8, 7)},
    "no LTX-2 video VAE": {"decoder.middle.0.residual.0.gamma": (8, 1, 1, 1)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_vaes_are_refused_by_name(what):
    with pytest.raises(VAEConfigError, match=re.escape(what)):
        vae_config_from_shapes(FOREIGN[what])


@pytest.mark.parametrize(
    "key, value",
    [("_class_name", "DiffusionVideoAutoencoder"), ("timestep_conditioning", True), ("norm_layer", "group_norm")],
)
def test_metadata_of_another_class_is_refused(key, value):
    described = LTX2_3_VAE.to_metadata() | {key: value}
    with pytest.raises(VAEConfigError, match=str(value)):
        vae_config_from_shapes(shapes_of(LTX2_3_VAE), {"config": json.dumps({"vae": described})})


@pytest.mark.parametrize("name, version", [("ltx-2-19b-dev", "2.0"), ("ltx-2.3-22b-dev", "2.3")])
def test_the_released_headers_give_the_known_geometry(name, version):
    header = json.loads(gzip.decompress((Path(__file__).parents[2] / "data" / f"{name}.header.json.gz").read_bytes()))
    metadata = header.pop("__metadata__")
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    assert vae_config_from_shapes(shapes, metadata) == CONFIGS[version]
    assert vae_config_from_shapes(shapes) == CONFIGS[version]
    expected = shapes_of(CONFIGS[version])
    assert {bare: shapes[stored] for bare, stored in vae_names(shapes).items()} == expected


def write_safetensors(path, vae, prefix="", metadata=True, **extra):
    tensors = {prefix + name: tensor.contiguous() for name, tensor in vae.state_dict().items()} | extra
    save_file(tensors, path, metadata=metadata_of(vae.config) if metadata else None)
    return path


def write_gguf(path, vae, how):
    """how: "flattened F16" as the converter writes, or "quantised" with convolutions as Q8_0 rows of [O, I*27]."""
    writer = gguf.GGUFWriter(path, "ltxv")
    writer.add_string("config", metadata_of(vae.config)["config"])
    for name, tensor in vae.state_dict().items():
        name, data = "vae." + name, tensor.numpy()
        if data.ndim == 5:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
            if how == "quantised" and data[0].size % 32 == 0:
                rows = gguf.quants.quantize(data.reshape(data.shape[0], -1), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                continue
            data = data.reshape(*data.shape[:2], 27).astype(np.float16)
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@both
@pytest.mark.parametrize("prefix", ["", "vae."])
@pytest.mark.parametrize("metadata", [True, False])
def test_safetensors_load_to_the_same_network(tmp_path, version, prefix, metadata):
    vae = references.tiny_vae(version)
    path = write_safetensors(
        tmp_path / "vae.safetensors",
        vae,
        prefix,
        metadata,
        **{f"{prefix}per_channel_statistics.channel": torch.arange(8.0)},
    )
    loaded = load_vae(path)
    assert loaded.config == vae.config and not loaded.training
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("how", ["flattened F16", "quantised"])
def test_gguf_loads_to_the_same_network(tmp_path, how):
    vae = references.tiny_vae("2.3", channels=16)
    loaded = load_vae(write_gguf(tmp_path / "vae.gguf", vae, how), dtype=torch.float32).state_dict()
    for name, tensor in vae.state_dict().items():
        expected = tensor
        if tensor.ndim == 5:
            rows = tensor.reshape(tensor.shape[0], -1).numpy()
            if how == "quantised" and rows.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q8_0
                expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)).reshape(
                    tensor.shape
                )
            else:
                expected = tensor.half().float()
        assert torch.equal(loaded[name], expected), name


def test_flattened_convolutions_need_no_recorded_shape(tmp_path):
    vae = references.tiny_vae("2.3")
    tensors = {name: t.flatten(2) if t.ndim == 5 else t for name, t in vae.state_dict().items()}
    save_file(tensors, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors")
    assert torch.equal(loaded.decoder.conv_in.conv.weight, vae.decoder.conv_in.conv.weight)


def test_the_vae_is_found_among_several_files(tmp_path):
    vae = references.tiny_vae("2.3")
    save_file({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4)}, tmp_path / "dit.safetensors")
    path = write_safetensors(tmp_path / "vae.safetensors", vae)
    assert load_vae([tmp_path / "dit.safetensors", path]).config == vae.config
    with pytest.raises(VAEConfigError, match=r"dit.safetensors \(.*\): no video VAE in here"):
        load_vae(tmp_path / "dit.safetensors")


def test_a_bfloat16_vae_takes_float32_latents_and_pixels(tmp_path):
    vae = references.tiny_vae("2.3").bfloat16()
    vae.per_channel_statistics.float()
    loaded = load_vae(write_safetensors(tmp_path / "vae.safetensors", vae))
    with torch.inference_mode():
        pixels = loaded.decode(torch.randn(1, 8, 1, 2, 2))
        assert pixels.dtype == torch.bfloat16
        latent = loaded.encode(references.random_clip(1, 64, 64))
        assert latent.dtype == torch.float32 and latent.shape == (1, 8, 1, 2, 2)


def test_half_a_vae_says_so_when_the_other_half_is_used(tmp_path):
    vae = references.tiny_vae("2.3")
    tensors = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith("encoder.")}
    save_file(tensors, tmp_path / "decoder.safetensors")
    loaded = load_vae(tmp_path / "decoder.safetensors")
    with torch.inference_mode():
        assert loaded.decode(torch.randn(1, 8, 1, 1, 1)).shape == (1, 3, 1, 32, 32)
        with pytest.raises(VAEConfigError, match="holds no encoder, which encoding needs"):
            loaded.encode(torch.zeros(1, 3, 1, 32, 32))


def test_an_incomplete_file_is_refused_by_name(tmp_path):
    vae = references.tiny_vae("2.3")
    tensors = vae.state_dict()
    del tensors["decoder.up_blocks.0.res_blocks.1.conv2.conv.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(
        WeightFileError,
        match=r"vae.safetensors: .*1 tensor is missing \(first: decoder.up_blocks.0.res_blocks.1.conv2.conv.bias\)",
    ):
        load_vae(tmp_path / "vae.safetensors")


def test_the_hosts_operations_run_the_same_network(host, tmp_path):
    import comfy.ops

    vae = references.tiny_vae("2.0")
    path = write_safetensors(tmp_path / "vae.safetensors", vae)
    loaded = load_vae(path, operations=comfy.ops.manual_cast)
    assert isinstance(loaded.decoder.conv_in.conv, comfy.ops.manual_cast.Conv3d)
    latent = torch.randn(1, 8, 2, 2, 2)
    with torch.inference_mode():
        assert references.error(loaded.decode(latent), vae.decode(latent)) <= 1e-6
        assert loaded.bfloat16().decode(latent).dtype == torch.float32  # weights are cast to the activations' dtype


@both
def test_the_synthetic_checkpoints_vae_loads(version):
    from ltx2_gguf.ltx2_core.files import structure

    geometry = structure.Geometry.small(version, vae_channels=16)
    shapes = {
        name: shape
        for name, shape in structure.checkpoint_shapes(geometry).items()
        if name.startswith(structure.VAE_PREFIX)
    }
    config = vae_config_from_shapes(shapes, {"config": json.dumps(structure.config(geometry))})
    assert config == reduced(CONFIGS[version], 16)
    assert {"vae." + name: shape for name, shape in shapes_of(config).items()} == shapes
