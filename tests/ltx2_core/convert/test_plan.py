import gzip
import json
import struct
from collections import Counter
from pathlib import Path

import pytest

from ltx2_gguf.ltx2_core.convert import plan
from ltx2_gguf.ltx2_core.convert.plan import Entry, Inventory, PlanError
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.errors import WeightFileError
from ltx2_gguf.ltx2_core.files.structure import Geometry
from ltx2_gguf.quant.formats import FORMATS

DATA = Path(__file__).parents[2] / "data"
REAL = {"2.0": DATA / "ltx-2-19b-dev.header.json.gz", "2.3": DATA / "ltx-2.3-22b-dev.header.json.gz"}
TOTAL = {"2.0": (4049, 1429), "2.3": (5947, 1758)}


def header(version):
    return json.loads(gzip.decompress(REAL[version].read_bytes()))


@pytest.fixture(scope="module", params=REAL)
def real(request):
    return request.param, plan.read_inventory(REAL[request.param])


# -- the structure that synthetic checkpoints and the self-test are made from -----------------------------------------------------------


def test_the_structure_at_real_geometry_equals_the_released_file_name_for_name_and_shape_for_shape(real):
    version, inventory = real
    released = {name: entry.shape for name, entry in inventory.entries.items()}
    assert structure.checkpoint_shapes(Geometry.real(version), audio=True) == released


def test_the_config_at_real_geometry_agrees_with_the_released_metadata(real):
    version, inventory = real
    released, ours = json.loads(inventory.metadata["config"]), structure.config(Geometry.real(version))
    for part in ours:
        assert {key: released[part].get(key) for key in ours[part]} == json.loads(json.dumps(ours[part]))


def test_a_small_geometry_keeps_every_name_but_those_of_further_layers(real):
    version, inventory = real
    small = structure.checkpoint_shapes(Geometry.small(version), audio=True)
    assert [name for name in small if name not in inventory.entries] == []


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"version": "2.5"}, "Unknown LTX-2 version"),
        ({"connector_heads": 3}, "connector is as wide"),
        ({"vae_channels": 12}, "multiple of 8"),
    ],
)
def test_an_impossible_geometry_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Geometry.small(**kwargs)


# -- keep and drop --------------------------------------------------------------------------------------------------------------------


def test_the_real_inventory_keeps_exactly_the_video_tensors(real):
    version, inventory = real
    result = plan.make_plan(inventory, "q4_0")
    assert (len(result.rows), len(result.kept)) == TOTAL[version]
    assert result.version == version
    kept = {row.source for row in result.kept}
    assert kept == set(structure.checkpoint_shapes(Geometry.real(version)))


def test_audio_is_kept_on_request_without_its_vae(real):
    version, inventory = real
    result = plan.make_plan(inventory, "q4_k", keep=plan.AUDIO_MODEL)
    kept = {row.source for row in result.kept}
    everything = structure.checkpoint_shapes(Geometry.real(version), audio=True)
    assert kept == {name for name in everything if not name.startswith(("audio_vae.", "vocoder."))}
    formats = {row.output: row.format for row in result.kept}
    block = "transformer_blocks.7."
    for name in ("audio_attn2.to_k", "audio_to_video_attn.to_out.0", "video_to_audio_attn.to_q", "audio_ff.net.2"):
        assert formats[f"{block}{name}.weight"] == "Q4_K"
    for name in (
        block + "scale_shift_table_a2v_ca_audio",
        "audio_patchify_proj.weight",
        block + "audio_attn1.to_q.bias",
    ):
        assert formats[name] == "F32"
    assert "audio_embeddings_connector.learnable_registers" in formats
    video = structure.checkpoint_shapes(Geometry.small(version))
    entries = {name: Entry("BF16", shape, 1) for name, shape in video.items()}
    with pytest.raises(PlanError, match="holds no audio transformer"):
        plan.make_plan(Inventory("video.safetensors", entries), "q8_0", keep=plan.AUDIO_MODEL)


def test_no_audio_tensor_leaks(real):
    _, inventory = real
    kept = [row.output for row in plan.make_plan(inventory, "q8_0").kept]
    markers = ("audio", "av_ca", "a2v", "v2a", "vocoder")
    assert [name for name in kept if any(marker in name for marker in markers)] == []
    assert any("scale_shift_table_a2v_ca_video" in row.source for row in plan.make_plan(inventory, "q8_0").dropped)


def test_dropped_tensors_are_named_by_part(real):
    version, inventory = real
    parts = Counter(row.part for row in plan.make_plan(inventory, "q8_0").dropped)
    assert parts["vocoder"] == {"2.0": 194, "2.3": 1227}[version] and parts["audio VAE"] == 102
    assert set(parts) <= set(plan.AUDIO_PARTS)


def test_output_names_are_bare_for_the_transformer_and_prefixed_for_the_rest(real):
    _, inventory = real
    outputs = {row.output for row in plan.make_plan(inventory, "q8_0").kept}
    assert {
        "patchify_proj.weight",
        "transformer_blocks.0.attn1.to_q.weight",
        "video_embeddings_connector.learnable_registers",
    } <= outputs
    assert (
        any(name.startswith("vae.decoder.") for name in outputs)
        and "vae.per_channel_statistics.std-of-means" in outputs
    )
    assert not any(name.startswith("model.") for name in outputs)


def test_statistics_that_nobody_uses_and_unknown_tensors_are_dropped():
    shapes = structure.checkpoint_shapes(Geometry.small())
    entries = {name: Entry("BF16", shape, 0) for name, shape in shapes.items()}
    entries["vae.per_channel_statistics.mean-of-stds"] = Entry("BF16", (128,), 256)
    entries["something.else"] = Entry("BF16", (1,), 2)
    rows = {row.source: row for row in plan.make_plan(Inventory("x", entries), "q8_0").dropped}
    assert {name: row.part for name, row in rows.items()} == {
        "vae.per_channel_statistics.mean-of-stds": "not used",
        "something.else": "not used",
    }


# -- formats --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", plan.TARGETS)
def test_every_kept_tensor_falls_under_a_rule_and_gets_a_format_that_fits_it(real, target):
    _, inventory = real
    for row in plan.make_plan(inventory, target).kept:
        assert row.rule is not None, row.output
        assert row.nbytes == FORMATS[row.format].nbytes(row.entry.shape)


def test_formats_by_kind_of_tensor(real):
    version, inventory = real
    formats = {row.output: row.format for row in plan.make_plan(inventory, "q4_0").kept}
    expected = {
        "transformer_blocks.7.attn1.to_q.weight": "Q4_0",
        "transformer_blocks.7.attn2.to_out.0.weight": "Q4_0",
        "transformer_blocks.7.ff.net.2.weight": "Q4_0",
        "video_embeddings_connector.transformer_1d_blocks.1.ff.net.0.proj.weight": "Q4_0",
        "adaln_single.linear.weight": "Q4_0",
        "adaln_single.emb.timestep_embedder.linear_2.weight": "F32",
        "patchify_proj.weight": "F32",
        "proj_out.weight": "F32",
        "transformer_blocks.7.attn1.to_q.bias": "F32",
        "transformer_blocks.7.attn1.q_norm.weight": "F32",
        "transformer_blocks.7.scale_shift_table": "F32",
        "video_embeddings_connector.learnable_registers": "F32",
        "vae.decoder.conv_in.conv.weight": "F16",
        "vae.decoder.conv_in.conv.bias": "F32",
        "vae.per_channel_statistics.mean-of-means": "F32",
    }
    expected |= (
        {"caption_projection.linear_1.weight": "Q4_0", "text_embedding_projection.aggregate_embed.weight": "Q8_0"}
        if version == "2.0"
        else {
            "transformer_blocks.7.attn1.to_gate_logits.weight": "F32",
            "text_embedding_projection.video_aggregate_embed.weight": "Q8_0",
        }
    )
    assert {name: formats[name] for name in expected} == expected


def test_quantised_weights_are_nearly_all_of_the_output(real):
    _, inventory = real
    result = plan.make_plan(inventory, "q4_0")
    dense = sum(row.nbytes for row in result.kept if row.format == "F32")
    assert dense < 0.03 * result.output_bytes


@pytest.mark.parametrize(
    "target, columns, expected",
    [
        ("q4_k", 256, "Q4_K"),
        ("q4_k", 96, "Q5_0"),
        ("q6_k", 96, "Q8_0"),
        ("q4_0", 48, "F16"),
        ("q5_k", 320, "Q5_1"),
        ("bf16", 48, "BF16"),
    ],
)
def test_rows_that_do_not_divide_into_blocks_get_the_next_best_format(target, columns, expected):
    assert plan.format_for("transformer_blocks.0.attn1.to_q.weight", (64, columns), target)[0] == expected


MIXED = {  # in a model of 48 blocks
    "transformer_blocks.0.attn1.to_v.weight": "Q5_K", "transformer_blocks.15.attn1.to_out.0.weight": "Q5_K", "transformer_blocks.16.attn1.to_v.weight": "Q6_K",
    "transformer_blocks.47.attn1.to_out.0.weight": "Q6_K", "transformer_blocks.23.ff.net.2.weight": "Q4_K", "transformer_blocks.24.ff.net.0.proj.weight": "Q5_K",
    "transformer_blocks.47.attn2.to_v.weight": "Q4_K", "transformer_blocks.47.attn1.to_q.weight": "Q4_K", "transformer_blocks.9.audio_attn1.to_q.weight": "Q5_K",
    "transformer_blocks.9.video_to_audio_attn.to_out.0.weight": "Q5_K", "adaln_single.linear.weight": "Q4_K", "patchify_proj.weight": "F32",
    "video_embeddings_connector.transformer_1d_blocks.7.attn1.to_v.weight": "Q4_K", "text_embedding_projection.video_aggregate_embed.weight": "Q8_0",
}  # fmt: skip


def test_mixed_types_store_the_layers_that_count_more_in_more_bits():
    assert {name: plan.format_for(name, (4096, 4096), "q4_k_m")[0] for name in MIXED} == MIXED
    assert plan.format_for("transformer_blocks.47.attn1.to_v.weight", (4096, 96), "q4_k_m")[0] == "Q8_0"
    for target, steps in plan.MIXES.items():
        bits = [plan.FORMATS[plan.TARGETS[step][0]].bits_per_weight for step in steps]
        assert bits == sorted(bits) and plan.TARGETS[target] == plan.TARGETS[steps[0]]


def test_the_depth_of_a_mixed_type_is_that_of_the_model(real):
    version, inventory = real
    formats = {row.output: row.format for row in plan.make_plan(inventory, "q4_k_m").kept}
    count = 1 + max(int(name.split(".")[1]) for name in formats if name.startswith("transformer_blocks."))
    finest = [name for name, fmt in formats.items() if fmt == "Q6_K"]
    assert len(finest) == 2 * (count - count // 3) and all(".attn1.to_" in name for name in finest)
    sizes = [plan.make_plan(inventory, target).output_bytes for target in ("q4_k", "q4_k_m", "q5_k")]
    assert sizes[0] < sizes[1] < sizes[0] + 0.5 * (sizes[2] - sizes[0])


def test_a_bf16_conversion_keeps_the_vae_exactly():
    assert plan.format_for("vae.encoder.conv_in.conv.weight", (8, 48, 3, 3, 3), "bf16")[0] == "BF16"


def test_a_tensor_that_is_small_enough_already_keeps_its_bytes_and_a_second_loss_is_announced():
    entries = {
        name: Entry("Q4_0" if name.endswith("to_q.weight") else "F32", shape, 1)
        for name, shape in structure.checkpoint_shapes(Geometry.small()).items()
    }
    up = plan.make_plan(Inventory("x", entries), "q8_0")
    assert {row.format for row in up.kept if row.output.endswith("to_q.weight")} == {"Q4_0"} and not any(
        "lose again" in w for w in up.warnings
    )
    entries = {name: Entry("Q8_0" if e.dtype == "Q4_0" else e.dtype, e.shape, 1) for name, e in entries.items()}
    assert any("lose again" in warning for warning in plan.make_plan(Inventory("x", entries), "q4_0").warnings)


def test_every_rule_is_used_by_a_released_file_and_says_why():
    used = Counter()
    for path in REAL.values():
        rows = plan.make_plan(plan.read_inventory(path), "q8_0", keep=plan.AUDIO_MODEL).kept
        assert all(row.rule for row in rows)
        used.update(row.rule.what for row in rows)
    assert {rule.what for rule in plan.FORMAT_RULES} == set(used)
    assert all(rule.why for rule in plan.FORMAT_RULES)


def test_the_document_lists_every_rule():
    text = (Path(__file__).parents[3] / "docs" / "convert.md").read_text("utf-8")
    assert [rule.what for rule in plan.FORMAT_RULES if rule.what not in text] == []


# -- sources --------------------------------------------------------------------------------------------------------------------------


def write_safetensors(path, tensors, metadata=None):
    """A header with correct offsets and zero data: only headers are read here."""
    table, offset = {}, 0
    for name, shape in tensors.items():
        nbytes = 2
        for n in shape:
            nbytes *= n
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    if metadata:
        table["__metadata__"] = metadata
    raw = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + offset)
    return path


def test_single_and_sharded_files_give_the_same_plan(tmp_path):
    shapes = structure.checkpoint_shapes(Geometry.small(), audio=True)
    one = write_safetensors(tmp_path / "one.safetensors", shapes, {"config": "{}"})
    folder = tmp_path / "sharded"
    folder.mkdir()
    names = list(shapes)
    write_safetensors(folder / "a.safetensors", {n: shapes[n] for n in names[::2]}, {"config": "{}"})
    write_safetensors(folder / "b.safetensors", {n: shapes[n] for n in names[1::2]})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(names)}}))
    plans = [plan.make_plan(plan.read_inventory(path), "q5_1") for path in (one, folder, index)]
    tables = [sorted((row.source, row.output, row.format) for row in p.kept) for p in plans]
    assert tables[0] == tables[1] == tables[2] and len(tables[0]) > 100


def test_companion_files_complete_a_checkpoint(tmp_path):
    g = Geometry.small()
    dit = write_safetensors(tmp_path / "dit.safetensors", structure.dit_shapes(g))
    rest = {
        "text_embedding_projection." + n: s for n, s in structure.projection_shapes(g, audio=True).items()
    } | structure.connector_shapes(g)
    text = write_safetensors(tmp_path / "text.safetensors", rest)
    vae = write_safetensors(
        tmp_path / "vae.safetensors", structure.vae_shapes(g)
    )  # no prefix, as in stand-alone VAE files
    first, *others = map(plan.read_inventory, (dit, text, vae))
    alone = plan.make_plan(first, "q8_0")
    assert [w.split(";")[0] for w in alone.warnings[:3]] == [
        "no connector inside",
        "no text projection inside",
        "no VAE inside",
    ]
    complete = plan.make_plan(first, "q8_0", companions=others)
    assert {row.output for row in complete.kept} == {
        name.removeprefix(structure.DIT_PREFIX) for name in structure.checkpoint_shapes(g)
    }
    assert {row.file for row in complete.kept} == {0, 1, 2}
    with pytest.raises(PlanError, match="there twice .*text.safetensors"):
        plan.make_plan(first, "q8_0", companions=[*others, others[0]])


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty or cut short"),
        (b"GGUF" + bytes(40), "GGUF version 0"),
        (struct.pack("<Q", 10**12) + b"{}", "cut short or no safetensors file"),
        (struct.pack("<Q", 9) + b"{broken}}", "not a table of tensors"),
        (struct.pack("<Q", 2) + b"[]", "empty or cut short"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=words) as error:
        plan.read_inventory(path)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path):
    path = write_safetensors(tmp_path / "x.safetensors", {"a": (8, 8)})
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(WeightFileError, match=f"should end at byte {size}, but the file has {size - 1}"):
        plan.read_inventory(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(WeightFileError, match="does not exist"):
        plan.read_inventory(tmp_path / "no.safetensors")
    with pytest.raises(WeightFileError, match="0 sets of weights"):
        plan.read_inventory(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(WeightFileError, match="1 are missing beside it .*gone.safetensors"):
        plan.read_inventory(tmp_path)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda s: s.pop(structure.DIT_PREFIX + "transformer_blocks.0.scale_shift_table") and None,
            "no LTX-2 transformer",
        ),
        (
            lambda s: s.pop(structure.DIT_PREFIX + "transformer_blocks.0.attn1.to_q.weight") and None,
            "incomplete: 1 tensors are missing, first .*attn1.to_q",
        ),
        (lambda s: s.update({structure.DIT_PREFIX + "keyframes_abs_pos_embedding": (1, 256)}), "LTX-2.5"),
        (lambda s: s.pop(structure.DIT_PREFIX + "transformer_blocks.0.ff.net.0.proj.bias") and None, "LTX-2.5"),
        (lambda s: s.update({structure.DIT_PREFIX + "transformer_blocks.0.scale_shift_table": (6, 256)}), "6 rows"),
    ],
)
def test_a_damaged_checkpoint_or_one_of_another_generation_is_refused_by_name(change, words):
    shapes = structure.checkpoint_shapes(Geometry.small())
    change(shapes)
    with pytest.raises(PlanError, match=words):
        plan.make_plan(Inventory("x", {name: Entry("BF16", shape, 0) for name, shape in shapes.items()}), "q8_0")


@pytest.mark.parametrize(
    "entries, words",
    [
        (
            {"double_blocks.0.img_attn.qkv.weight": (8, 8), "single_blocks.0.linear1.weight": (8, 8)},
            "x is a Flux image model and holds no LTX-2 transformer",
        ),
        (
            {
                **structure.checkpoint_shapes(Geometry.small("2.0")),
                structure.DIT_PREFIX + "caption_projection.linear_1.weight": (256, 4096),
            },
            "x is LTX-Video 0.9",
        ),
    ],
)
def test_other_models_are_refused_by_name(entries, words):
    with pytest.raises(PlanError, match=words):
        plan.make_plan(Inventory("x", {name: Entry("BF16", shape, 0) for name, shape in entries.items()}), "q8_0")


def test_an_unknown_format_is_refused_with_the_known_ones():
    with pytest.raises(PlanError, match="Unknown format 'q9_k'; choose one of f32, bf16"):
        plan.make_plan(plan.read_inventory(REAL["2.3"]), "q9_k")


def test_scales_of_fp8_weights_are_folded_into_them():
    shapes = structure.checkpoint_shapes(Geometry.small())
    entries = {
        name: Entry("F8_E4M3" if name.endswith("to_q.weight") else "BF16", shape, 1) for name, shape in shapes.items()
    }
    layer = structure.DIT_PREFIX + "transformer_blocks.0.attn1.to_q"
    entries |= {
        f"{layer}.weight_scale": Entry("F32", (), 4),
        f"{layer}.comfy_quant": Entry("U8", (30,), 30),
        "scaled_fp8": Entry("F8_E4M3", (2,), 2),
    }
    result = plan.make_plan(Inventory("x", entries), "q8_0")
    assert {row.part for row in result.dropped} == {"scales (folded into their weights)"} and len(result.dropped) == 3


# -- output ---------------------------------------------------------------------------------------------------------------------------


def test_the_summary_adds_up(real):
    version, inventory = real
    data = plan.summary(plan.make_plan(inventory, "q4_0"))
    assert (data["total_tensors"], data["kept_tensors"]) == TOTAL[version]
    assert sum(g["tensors"] for g in data["groups"]) == data["total_tensors"]
    assert sum(g["output_bytes"] for g in data["groups"]) == data["output_bytes"]
    assert json.loads(json.dumps(data)) == data


def test_the_table_names_counts_and_sizes():
    text = plan.render(plan.make_plan(plan.read_inventory(REAL["2.3"]), "q4_0"))
    assert "LTX-2.3 checkpoint, 5947 tensors, 46.15 GB" in text
    assert "Keep 1758 tensors" in text and "Drop 4189 tensors" in text
    assert text.splitlines()[-1].startswith("Output: 1758 of 5947 tensors")


def test_the_self_test_passes_and_would_notice_a_leak(monkeypatch):
    assert plan.self_test() == [
        "LTX-2.0: keeps 1429 of 4049 tensors, no audio tensor among them",
        "LTX-2.3: keeps 1758 of 5947 tensors, no audio tensor among them",
    ]
    monkeypatch.setattr(plan, "DROPPED_PARTS", ("not used", "vocoder", "audio VAE"))
    with pytest.raises(PlanError, match="Self-test failed for 2.0: .* leaked"):
        plan.self_test()
