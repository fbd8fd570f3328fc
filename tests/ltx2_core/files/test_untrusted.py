"""Headers written by strangers: bounded, never run, and shown as data."""

import gzip
import json
import logging
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltx2_gguf.ltx2_core.convert import plan, synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.errors import WeightFileError
from ltx2_gguf.ltx2_core.files.opened import open_model
from ltx2_gguf.ltx2_core.files.text import html, table, visible
from ltx2_gguf.ltx2_core.files.values import count_layers
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.lora import open_lora
from ltx2_gguf.quant.gguf.metadata import GGUFValue
from ltx2_gguf.quant.gguf.writer import GGUFWriter

SMALL = structure.Geometry.small("2.3", num_layers=1, heads=2, head_dim=32, connector_layers=1)


def write_header(path, header: bytes, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def write_gguf(path, metadata, tensors=(("a", (4,)),)):
    with GGUFWriter(path, metadata, [(name, "F32", shape) for name, shape in tensors]) as writer:
        for name, shape in tensors:
            writer.write(name, torch.zeros(shape))
    return path


def test_text_from_a_file_is_shown_on_one_line_without_what_a_terminal_obeys():
    assert visible("a\x1b[2Jb\nc‮d\ud800") == "a\\x1b[2Jb\\nc\\u202ed\\ud800"
    assert visible("layer 3 \N{SNOWMAN} ok") == "layer 3 \N{SNOWMAN} ok"
    long = visible("x" * 10**6 + " do this", 100)
    assert len(long) <= 100 and long.endswith(" do this") and " … " in long
    assert html("<img src=x onerror='a&b'>\x07") == "&lt;img src=x onerror=&#39;a&amp;b&#39;&gt;\\x07"
    assert str(WeightFileError("bad\x1b]0;title\x07 " + "y" * 10**6)).isprintable()


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1]", "is a list"),
        ('"x"', "not JSON"),
        ("{" * 5000, "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("1", "is a number"),
        ("x" * 3_000_000, "at most 2000000"),
    ],
)
def test_a_table_is_a_table(text, words):
    with pytest.raises(ValueError, match=words):
        table(text, "the entry")


def test_an_unreadable_name_reaches_no_message_as_it_is(tmp_path):
    save_file(
        {"evil\x1b[2J<b>.lora_A.weight": torch.zeros(2, 2), "evil\x1b[2J<b>.lora_B.weight": torch.zeros(2, 2)},
        tmp_path / "lora.safetensors",
    )
    report = identify(tmp_path / "lora.safetensors")
    assert report.refusal.isprintable() and "\\x1b[2J" in report.refusal


@pytest.mark.parametrize(
    "header, words",
    [
        (b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', "describes no tensor"),
        (b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "describes no tensor"),
        (b'{"a":{"dtype":"F32","shape":[[1]],"data_offsets":[0,4]}}', "describes no tensor"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', "not a table of tensors"),
        (b'{"a":' + b"[" * 100_000, "describes no tensor"),
        (b'{"__metadata__":{"config":{}}}', "not a table of tensors"),
        (b'{"__metadata__":' + b'{"a":' * 50_000, "not a table of tensors"),
        (b'{"":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "name has 0 characters"),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "surrogates"),
        (b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "no numbers"),
        (b'{"a":1,' + b" " * (9 << 20) + b"}", "larger than any model needs"),
    ],
)
def test_a_safetensors_header_that_is_none_is_refused(tmp_path, header, words):
    with pytest.raises(WeightFileError, match=words):
        open_weights(write_header(tmp_path / "a.safetensors", header, bytes(4)))


def hostile_headers():
    """(name, bytes) of headers that take far more room as objects than as text."""
    entry = b'"%d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    yield "entries", b"{" + b"".join(entry % n for n in range(60_000))[:-1] + b"}"
    yield "lists", b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"
    yield "strings", b'{"__metadata__":{' + b"".join(b'"%d":"ab",' % n for n in range(60_000)) + b'"x":"y"}}'
    yield "wide text", b'{"__metadata__":{"a":"' + "\N{GRINNING FACE}".encode() + b"x" * 7_000_000 + b'"}}'
    yield "numbers", b'{"a":{"dtype":"F32","shape":[' + b"1," * 3_000_000 + b'1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize("name, header", hostile_headers(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_header_takes_more_memory_than_twice_its_size_and_fifty_megabytes(tmp_path, name, header):
    path = write_header(tmp_path / "a.safetensors", header, bytes(4))
    tracemalloc.start()
    try:
        identify(path)
    except WeightFileError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + (50 << 20), (
        f"{peak / 2**20:.0f} MB for a header of {len(header) / 2**20:.1f}"
    )


def test_no_gguf_header_takes_more_memory_than_twice_its_size_and_fifty_megabytes(tmp_path):
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    count, path = 32_768, tmp_path / "a.gguf"
    entries = b"".join(text(f"{n:x}") + struct.pack("<IB", 0, 1) for n in range(count))
    infos = b"".join(text(f"{n:x}.lora_A.weight") + struct.pack("<IQIQ", 1, 1, 0, 32 * n) for n in range(count))
    head = b"GGUF" + struct.pack("<IQQ", 3, count, count) + entries + infos
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(32 * count))
    tracemalloc.start()
    report = identify(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.refusal and peak < 2 * len(head) + (50 << 20), (
        f"{peak / 2**20:.0f} MB for a header of {len(head) / 2**20:.1f}"
    )


def test_a_saved_header_that_unpacks_without_end_is_refused(tmp_path):
    with gzip.open(tmp_path / "bomb.json.gz", "wb", compresslevel=1) as file:
        file.write(bytes(64 << 20))
    with pytest.raises(plan.PlanError, match="no header is so large"):
        plan.read_inventory(tmp_path / "bomb.json.gz")


def test_gguf_counts_and_lengths_are_bounded(tmp_path):
    start = b"GGUF" + struct.pack("<I", 3)
    for counts, words in (((1 << 40, 0), "models have at most"), ((0, 1 << 40), "models have at most")):
        path = tmp_path / "a.gguf"
        path.write_bytes(start + struct.pack("<QQ", *counts) + bytes(64))
        with pytest.raises(WeightFileError, match=words):
            open_weights(path)
    array = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 3_000_000) + bytes(24_000_000)
    path.write_bytes(start + struct.pack("<QQ", 0, 1) + array)
    with pytest.raises(WeightFileError, match="vocabularies have at most"):
        open_weights(path)
    file = open_weights(write_gguf(path, {"general.alignment": GGUFValue("uint32", 32), "config": "x" * (9 << 20)}))
    with pytest.raises(ValueError, match="larger than any model needs"):
        file.metadata["config"]


@pytest.mark.parametrize(
    "said",
    [GGUFValue("array", [5, 5], "int32"), GGUFValue("uint64", 4), "x", GGUFValue("array", [1.5, 2.0], "float32")],
)
def test_a_recorded_shape_that_is_none_is_refused(tmp_path, said):
    with pytest.raises(WeightFileError, match="no other shape of"):
        open_weights(write_gguf(tmp_path / "a.gguf", {"comfy.gguf.orig_shape.a": said}))


@pytest.mark.parametrize(
    "form, tensors, words",
    [
        ("float8_e4m3fn", {"weight_scale": torch.ones(3)}, "3 scales; expected one, or one per row"),
        (
            "nvfp4",
            {"weight_scale": torch.ones(4, 1), "weight_scale_2": torch.ones(())},
            "is stored as torch.float32; the file is damaged",
        ),
        (
            "int8_tensorwise",
            {"weight_scale": torch.ones(()), "weight": torch.zeros(4, 16)},
            "which is not int8_tensorwise",
        ),
        ("int8_tensorwise", {}, "'weight_scale' is missing"),
        ([1], {}, "names no format"),
    ],
)
def test_a_marker_that_does_not_fit_its_weight_is_refused(tmp_path, form, tensors, words):
    weight = {
        "weight": torch.zeros(4, 16).to(torch.float8_e4m3fn)
        if form == "float8_e4m3fn"
        else torch.zeros(4, 16, dtype=torch.uint8)
    }
    marker = {"comfy_quant": torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)}
    save_file({f"l.{name}": value for name, value in (weight | marker | tensors).items()}, tmp_path / "a.safetensors")
    with pytest.raises(WeightFileError, match=words), torch.inference_mode():
        open_weights(tmp_path / "a.safetensors").load("l.weight")


def test_layers_are_counted_against_the_tensors_that_are_there():
    names = [f"transformer_blocks.{n}.{name}" for n in range(3) for name in ("a", "b")]
    assert count_layers(names, "transformer_blocks") == 3 and count_layers(names, "other") == 0
    with pytest.raises(WeightFileError, match="layers up to 3 but lacks"):
        count_layers([*names[:2], *names[4:], "transformer_blocks.3.a"], "transformer_blocks")
    with pytest.raises(WeightFileError, match="a layer numbered 99999999999"):
        count_layers([*names, "transformer_blocks.99999999999.a"], "transformer_blocks")
    with pytest.raises(WeightFileError, match="most tensors of the 1000 layers"):
        count_layers([f"x.0.{n}" for n in range(20)] + [f"x.{n}.a" for n in range(1, 1000)], "x")


def test_a_checkpoint_with_an_endless_layer_number_is_refused_and_nothing_is_built(tmp_path):
    shapes = structure.dit_shapes(SMALL) | {"transformer_blocks.99999999999.attn1.to_q.weight": (4, 4)}
    path = tmp_path / "a.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path, synthetic.metadata(SMALL))
    assert "99999999999" in identify(path).refusal
    with pytest.raises(plan.PlanError, match="99999999999"):
        plan.make_plan(plan.read_inventory(path), "q8_0")


def test_an_alpha_pattern_is_text_and_nothing_is_run(tmp_path, caplog):
    layer = "transformer_blocks.0.attn1.to_q"
    tensors = {
        f"transformer.{layer}.lora_A.weight": torch.zeros(4, 64),
        f"transformer.{layer}.lora_B.weight": torch.zeros(64, 4),
    }

    def alphas(patterns):
        settings = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.alpha_pattern": patterns}
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
        return open_lora(tmp_path / "a.safetensors").alphas()

    assert alphas({"attn1.to_q": 2, layer: 3}) == {layer: 2.0}  # the first that fits
    assert alphas({"ttn1.to_q": 2}) == {}
    with caplog.at_level(logging.WARNING):
        assert (
            alphas({"(.*.*)*" * 200 + "x": 2, ".*": 3}) == {}
        )  # as an expression, the first would not end and the second would fit
    assert "names layers that the file does not have" in caplog.text
    assert alphas({layer: float("inf")}) == {} and alphas([1]) == {}


def test_an_architecture_that_contradicts_the_tensors_is_a_warning(tmp_path):
    shapes = dict(structure.dit_shapes(SMALL))
    for architecture, warned in (("wan", True), ("ltxv", False), ("pig", False)):
        path = write_gguf(
            tmp_path / "a.gguf",
            {"general.architecture": architecture, **synthetic.metadata(SMALL)},
            tuple(shapes.items()),
        )
        report = identify(path)
        assert report.refusal is None and report.version == "2.3"
        assert bool(report.warnings) == warned and all("calls itself 'wan'" in text for text in report.warnings)


@pytest.mark.parametrize("config, words", [("[1]", "is a list"), ("5", "is a number"), ('{"transformer": 3}', "is a number"), ("{", "not JSON"),
                                           ('{"transformer": {"num_layers": [1]}}', "'num_layers'"), ('{"transformer": {"norm_eps": 1e999}}', "'norm_eps'")])  # fmt: skip
def test_a_config_that_is_no_table_or_holds_no_numbers_is_refused(tmp_path, config, words):
    path = tmp_path / "a.safetensors"
    save_file(
        {name: torch.zeros(shape) for name, shape in structure.dit_shapes(SMALL).items()}, path, {"config": config}
    )
    assert words in identify(path).refusal


def test_a_file_replaced_between_two_runs_is_read_anew(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(4)}, path)
    first = open_model(path)
    held = first.weights.load("w")
    replacement = tmp_path / "b.safetensors"
    save_file({"w": torch.zeros(8)}, replacement)
    replacement.replace(path)
    assert open_model(path).weights.shape("w") == (8,)
    assert held.sum() == 4  # what is loaded keeps the old file's bytes


def test_files_and_verdicts_need_no_torch(tmp_path):
    path = synthetic.make(tmp_path / "m.gguf", SMALL, type="q8_0")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2] / "support")!r})
import packloader
from ltx2_gguf.ltx2_core.loading.identify import identify
report = identify({str(path)!r})
assert report.version == "2.3" and report.gemma_size == "270M", report
print("torch" in sys.modules or "numpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
