"""Configs come from names and shapes; metadata fills the gaps and may not contradict."""

import gzip
import json

import pytest

from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.names import CONNECTOR, classify, is_audio
from ltx2_gguf.ltx2_core.transformer.config import ConfigError, config_from_shapes, connector_config_from_shapes

versions = pytest.mark.parametrize("version", ["2.0", "2.3"])


def shapes_of(version, **sizes):
    g = structure.Geometry.small(version, **sizes)
    return {**structure.dit_shapes(g), **structure.connector_shapes(g)}, structure.config(g)


def metadata(config):
    return {"config": json.dumps(config)}


@versions
def test_the_released_geometry_is_read_from_shapes_alone(version):
    g = structure.Geometry.real(version)
    config = config_from_shapes({**structure.dit_shapes(g), **structure.connector_shapes(g)})
    assert (config.version, config.num_layers, config.num_attention_heads, config.attention_head_dim) == (
        version,
        48,
        32,
        128,
    )
    assert (config.in_channels, config.out_channels, config.inner_dim, config.cross_attention_dim, config.ff_dim) == (
        128,
        128,
        4096,
        4096,
        16384,
    )
    assert config.caption_channels == 3840 and config.caption_proj_before_connector == (version == "2.3")
    assert config.cross_attention_adaln == config.apply_gated_attention == (version == "2.3")
    connector = config.connector
    assert (connector.num_layers, connector.num_attention_heads, connector.attention_head_dim) == (
        (2, 30, 128) if version == "2.0" else (8, 32, 128)
    )
    assert (connector.num_learnable_registers, connector.rope_max_pos) == (128, 4096)


@pytest.mark.parametrize("file, version", [("ltx-2-19b-dev", "2.0"), ("ltx-2.3-22b-dev", "2.3")])
def test_metadata_of_the_released_files_agrees_with_their_shapes(file, version):
    from pathlib import Path

    path = Path(__file__).parents[2] / "data" / f"{file}.header.json.gz"
    header = json.loads(gzip.decompress(path.read_bytes()))
    meta = header.pop("__metadata__")
    names = classify(header)
    shapes = {
        canonical: tuple(header[name]["shape"])
        for part in ("dit", "connector")
        for canonical, name in names[part].items()
    }
    assert config_from_shapes(shapes, meta) == config_from_shapes(shapes)
    assert config_from_shapes(shapes).version == version


def test_gates_tell_the_head_count_of_2_3():
    shapes, _ = shapes_of("2.3", heads=6, head_dim=32)
    assert config_from_shapes(shapes).num_attention_heads == 6


def test_without_gates_the_metadata_tells_the_head_count():
    shapes, config = shapes_of("2.0", heads=4, head_dim=64)
    assert config_from_shapes(shapes, metadata(config)).num_attention_heads == 4
    assert config_from_shapes(shapes).num_attention_heads == 2  # the released head width of 128


def test_without_gates_or_metadata_an_odd_width_is_refused():
    shapes, _ = shapes_of("2.0", heads=3, head_dim=32)
    with pytest.raises(ConfigError, match="width 96 does not split into heads of 128.*num_attention_heads"):
        config_from_shapes(shapes)


@pytest.mark.parametrize(
    "key, wrong, message",
    [
        ("num_layers", 48, "layers: the tensors say 2, the file's config metadata says 48"),
        ("num_attention_heads", 32, "DiT heads: the tensors say 4, the file's config metadata says 32"),
        ("attention_head_dim", 128, "DiT head width: the tensors say 64, the file's config metadata says 128"),
        ("cross_attention_dim", 2048, "cross-attention width: the tensors say 256"),
        ("in_channels", 16, "input channels"),
        (
            "cross_attention_adaln",
            False,
            "cross-attention modulation: the tensors say True, the file's config metadata says False",
        ),
        ("apply_gated_attention", False, "attention gates"),
        ("connector_num_layers", 8, "connector layers: the tensors say 2"),
        ("connector_num_learnable_registers", 64, "connector registers"),
        ("rope_type", "interleaved", "RoPE 'interleaved'"),
        ("frequencies_precision", "float32", "with float32 frequencies"),
    ],
)
def test_metadata_that_contradicts_the_shapes_is_an_error_with_both_values(key, wrong, message):
    shapes, config = shapes_of("2.3")
    config["transformer"][key] = wrong
    with pytest.raises(ConfigError, match=message):
        config_from_shapes(shapes, metadata(config))


def test_metadata_wins_where_shapes_are_silent():
    shapes, config = shapes_of("2.3")
    config["transformer"].update(
        positional_embedding_max_pos=[40, 1024, 1024], positional_embedding_theta=5000.0, timestep_scale_multiplier=500
    )
    read = config_from_shapes(shapes, metadata(config))
    assert (
        read.rope_max_pos == (40, 1024, 1024) and read.rope_theta == 5000.0 and read.timestep_scale_multiplier == 500.0
    )


def test_metadata_without_a_transformer_block_is_as_good_as_none():
    shapes, _ = shapes_of("2.3")
    assert config_from_shapes(shapes, {"config": json.dumps({"vae": {}})}) == config_from_shapes(shapes)


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("spelling", ["block alone", "encoded twice", "numbers as strings", "nulls", "llama.cpp's key"])
def test_other_spellings_of_the_metadata_are_read(version, spelling):
    shapes, config = shapes_of(version)
    block = config["transformer"]
    header = {
        "block alone": {"config": json.dumps(block)},
        "encoded twice": {"config": json.dumps(json.dumps(config))},
        "numbers as strings": {"config": json.dumps({"transformer": {k: str(v) if type(v) is int else v for k, v in block.items()}})},
        "nulls": {"config": json.dumps({"transformer": block | {"rope_type": None, "norm_eps": None, "caption_channels": None}})},
        "llama.cpp's key": {
            "general.architecture": "ltxv", "ltxv.attention.head_count": block["num_attention_heads"],
            "config": json.dumps({"transformer": {k: v for k, v in block.items() if not k.endswith("attention_head_dim") and k != "num_attention_heads"}}),
        },
    }[spelling]  # fmt: skip
    expected, read = config_from_shapes(shapes, metadata(config)), config_from_shapes(shapes, header)
    assert (
        read.num_attention_heads == expected.num_attention_heads
        and read.connector.num_attention_heads == expected.connector.num_attention_heads
    )
    if spelling != "nulls":
        assert read == expected


def test_a_guessed_head_count_is_said(caplog):
    shapes, _ = shapes_of("2.0", heads=2, head_dim=128)
    config_from_shapes(shapes)
    assert "does not tell the head count of a model 256 wide; taken are 2 heads of 128" in caplog.text


def test_metadata_that_is_not_json_is_refused():
    shapes, _ = shapes_of("2.3")
    with pytest.raises(ConfigError, match="not JSON"):
        config_from_shapes(shapes, {"config": "{"})


@pytest.mark.parametrize(
    "change",
    [
        lambda shapes: shapes.update({"transformer_blocks.0.scale_shift_table": (7, 256)}),
        lambda shapes: [shapes.pop(name) for name in list(shapes) if "to_gate_logits" in name],
        lambda shapes: shapes.update({"caption_projection.linear_1.weight": (256, 640)}),
    ],
)
def test_a_mixture_of_versions_is_refused_and_described(change):
    shapes, _ = shapes_of("2.3")
    change(shapes)
    with pytest.raises(ConfigError, match="Unknown LTX variant.*this pack runs 2.0.*and 2.3"):
        config_from_shapes(shapes)


def test_a_hole_in_the_layers_is_named():
    shapes, _ = shapes_of("2.3", num_layers=4)
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("transformer_blocks.2.")}
    with pytest.raises(ConfigError, match=r"layers up to 3 but lacks \[2\]"):
        config_from_shapes(shapes)


def test_a_model_without_its_connector_has_none():
    shapes, _ = shapes_of("2.3")
    bare = {name: shape for name, shape in shapes.items() if not name.startswith(CONNECTOR)}
    assert config_from_shapes(bare).connector is None
    assert connector_config_from_shapes(shapes).num_layers == 2


@versions
def test_the_drop_rule_keeps_exactly_the_video_model(version):
    g = structure.Geometry.small(version)
    names = structure.checkpoint_shapes(g, audio=True)
    parts = classify(names)
    expected = {**structure.dit_shapes(g), **structure.connector_shapes(g)}
    assert {**parts["dit"], **parts["connector"]}.keys() == expected.keys()
    assert set(parts["vae"]) == set(structure.vae_shapes(g))
    assert {name.removeprefix("text_embedding_projection.") for name in parts["projection"]} == set(
        structure.projection_shapes(g)
    )
    assert not parts["other"] and len(parts["audio"]) == len(names) - len(expected) - len(parts["vae"]) - len(
        parts["projection"]
    )


@pytest.mark.parametrize("file, kept, total", [("ltx-2-19b-dev", 1429, 4049), ("ltx-2.3-22b-dev", 1758, 5947)])
def test_the_released_inventories_sort_into_the_known_numbers(file, kept, total):
    from pathlib import Path

    header = json.loads(gzip.decompress((Path(__file__).parents[2] / "data" / f"{file}.header.json.gz").read_bytes()))
    header.pop("__metadata__")
    parts = classify(header)
    assert len(header) == total and sum(len(parts[part]) for part in ("dit", "connector", "projection", "vae")) == kept
    assert not parts["other"] and not any("audio" in name or "av_ca" in name or "a2v" in name for name in parts["dit"])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model.", "net.inner."])
def test_any_prefix_of_the_transformer_is_found(prefix):
    g = structure.Geometry.small("2.3")
    names = [
        prefix + name
        for name in {**structure.dit_shapes(g), **structure.audio_dit_shapes(g), **structure.connector_shapes(g)}
    ]
    parts = classify(names)
    assert (
        parts.dit_prefix == prefix
        and set(parts["dit"]) == set(structure.dit_shapes(g))
        and set(parts["connector"]) == set(structure.connector_shapes(g))
    )


@pytest.mark.parametrize(
    "name, part, canonical",
    [
        (
            "model.diffusion_model.video_embeddings_connector.learnable_registers",
            "connector",
            CONNECTOR + "learnable_registers",
        ),
        ("embeddings_connector.learnable_registers", "connector", CONNECTOR + "learnable_registers"),
        (
            "model.diffusion_model.embeddings_connector.learnable_registers",
            "connector",
            CONNECTOR + "learnable_registers",
        ),
        ("audio_embeddings_connector.learnable_registers", "audio", None),
        (
            "connectors.video_connector.transformer_blocks.0.attn1.norm_q.weight",
            "connector",
            CONNECTOR + "transformer_1d_blocks.0.attn1.q_norm.weight",
        ),
        (
            "text_embedding_projection.aggregate_embed.weight",
            "projection",
            "text_embedding_projection.aggregate_embed.weight",
        ),
        (
            "model.text_embedding_projection.video_aggregate_embed.bias",
            "projection",
            "text_embedding_projection.video_aggregate_embed.bias",
        ),
        ("video_aggregate_embed.weight", "projection", "text_embedding_projection.video_aggregate_embed.weight"),
        ("text_embedding_projection.audio_aggregate_embed.bias", "audio", None),
        (
            "vae.decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
            "vae",
            "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
        ),
        ("decoder.conv_in.conv.weight", "vae", "decoder.conv_in.conv.weight"),
        ("per_channel_statistics.mean-of-means", "vae", "per_channel_statistics.mean-of-means"),
        ("audio_vae.decoder.conv_out.conv.weight", "audio", None),
        ("vocoder.conv_pre.weight", "audio", None),
    ],
)
def test_spellings_seen_in_the_wild_are_sorted(name, part, canonical):
    parts = classify([name])
    assert parts.has(part) and (canonical is None or parts[part] == {canonical: name})


def test_diffusers_spelling_is_renamed():
    import reference_dit as ref

    config, model = ref.ours("2.3")
    theirs = ref.theirs("diffusers", "2.3").state_dict()
    parts = classify(theirs)
    assert (
        set(parts["dit"]) == {name for name in model.state_dict() if not name.startswith(CONNECTOR)}
        and not parts["other"]
    )


@pytest.mark.parametrize(
    "name",
    [
        "scale_shift_table_a2v_ca_video",
        "scale_shift_table_a2v_ca_audio",
        "audio_to_video_attn.to_q.weight",
        "video_to_audio_attn.to_q.weight",
        "audio_ff.net.2.bias",
    ],
)
def test_names_that_couple_sound_and_picture_are_sound(name):
    assert is_audio("transformer_blocks.3." + name) and not is_audio("transformer_blocks.3.attn1.to_q.weight")
