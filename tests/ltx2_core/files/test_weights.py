"""Weight files of every kind behind one interface: what is read, what is refused, and that nothing else is touched."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from ltx2_gguf.ltx2_core.files.errors import WeightFileError, WeightsMismatch
from ltx2_gguf.ltx2_core.files.weights import open_weights
from ltx2_gguf.ltx2_core.loading.assign import assign
from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS, QUANTIZED
from ltx2_gguf.quant.gguf.writer import GGUFWriter


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_gguf(path, tensors, metadata=None):
    """tensors: name -> (format name, float tensor, stored shape or None)."""
    infos = [(name, fmt, tuple(stored or value.shape)) for name, (fmt, value, stored) in tensors.items()]
    with GGUFWriter(path, metadata or {}, infos) as writer:
        for name, (fmt, value, stored) in tensors.items():
            writer.write(
                name,
                decode.quantize(
                    value.reshape(stored or value.shape).reshape(-1, (stored or value.shape)[-1]), FORMATS[fmt]
                ),
            )
    return path


def test_safetensors_and_gguf_give_the_same_tensors(tmp_path):
    value = values(6, 64)
    save_file({"w": value.bfloat16(), "b": value[0]}, tmp_path / "a.safetensors", {"config": "{}"})
    write_gguf(tmp_path / "a.gguf", {"w": ("BF16", value, None), "b": ("F32", value[0], None)}, {"config": "{}"})
    for name in ("a.safetensors", "a.gguf"):
        file = open_weights(tmp_path / name)
        assert (
            file.kind == name.split(".")[1] and sorted(file.names()) == ["b", "w"] and file.metadata["config"] == "{}"
        )
        assert (
            file.shape("w") == (6, 64)
            and file.format("w") == "BF16"
            and file.nbytes("w") == 768
            and "w" in file
            and "x" not in file
        )
        assert torch.equal(file.load("w"), value.bfloat16()) and torch.equal(file.load("b"), value[0])
        assert file.load("w", torch.float32).dtype == torch.float32


def test_the_content_decides_not_the_name(tmp_path):
    save_file({"w": values(2, 2)}, tmp_path / "really_safetensors.gguf")
    assert open_weights(tmp_path / "really_safetensors.gguf").kind == "safetensors"


def test_dense_tensors_are_views_of_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": values(4, 8)}, path)
    file = open_weights(path)
    assert file.load("w").untyped_storage().data_ptr() == file.load("w", torch.float32).untyped_storage().data_ptr()
    file.load("w").zero_()  # changes this process' private view only
    assert torch.equal(open_weights(path).load("w"), values(4, 8))


@pytest.mark.parametrize("fmt", [name for name in QUANTIZED if name in decode.ENCODABLE])
def test_quantised_matrices_stay_packed_and_everything_else_becomes_dense(tmp_path, fmt):
    matrix, table, vector = values(4, 512), values(9, 256, seed=1), values(256, seed=2)
    path = write_gguf(
        tmp_path / "a.gguf",
        {"to_q.weight": (fmt, matrix, None), "table": (fmt, table, None), "bias": (fmt, vector, None)},
    )
    file = open_weights(path)
    with torch.inference_mode():
        packed = file.load_packed("to_q.weight", torch.float32)
        assert tensor.is_packed(packed) and packed.shape == (4, 512)
        decoded = decode.dequantize(decode.quantize(matrix, FORMATS[fmt]), FORMATS[fmt])
        assert torch.equal(tensor.unpack(packed), decoded) and torch.equal(file.load("to_q.weight"), decoded)
        assert file.load_packed("bias", torch.bfloat16).dtype == torch.bfloat16 and not tensor.is_packed(
            file.load_packed("bias", torch.bfloat16)
        )
    assert file.load("table").shape == (9, 256) and file.load("bias").shape == (256,)


def test_a_recorded_original_shape_is_honoured(tmp_path):
    value = values(4, 2, 3, 3, 3)
    path = write_gguf(
        tmp_path / "a.gguf",
        {"conv.weight": ("F16", value, (4, 2, 27))},
        {"comfy.gguf.orig_shape.conv.weight": [4, 2, 3, 3, 3]},
    )
    file = open_weights(path)
    assert file.shape("conv.weight") == (4, 2, 3, 3, 3) and torch.equal(file.load("conv.weight"), value.half())


def write_shards(folder, parts, count=None):
    for i, part in enumerate(parts):
        save_file(part, folder / f"m-{i + 1:05d}-of-{count or len(parts):05d}.safetensors")


def test_shards_are_one_file_however_they_are_named_to_us(tmp_path):
    write_shards(tmp_path, [{"a": values(2, 2)}, {"b": values(3, 3)}])
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    for given in ("m.safetensors.index.json", "m-00002-of-00002.safetensors", "m-00001-of-00002.safetensors", "."):
        file = open_weights(tmp_path / given)
        assert (
            sorted(file.names()) == ["a", "b"]
            and file.shape("b") == (3, 3)
            and torch.equal(file.load("a"), values(2, 2))
        )


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, [{"a": values(2, 2)}], count=3)
    with pytest.raises(
        WeightFileError, match="one of 3 parts, and 2 are missing beside it.*m-00002-of-00003.safetensors"
    ):
        open_weights(tmp_path / "m-00001-of-00003.safetensors")


def test_an_index_that_lists_more_than_its_shards_hold_is_refused(tmp_path):
    write_shards(tmp_path, [{"a": values(2, 2)}])
    (tmp_path / "m.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "m-00001-of-00001.safetensors", "b": "m-00001-of-00001.safetensors"}})
    )
    with pytest.raises(WeightFileError, match="lists 1 tensors that no shard holds.*b"):
        open_weights(tmp_path / "m.safetensors.index.json")


FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("scale", ["per tensor", "per row", "per row, two-dimensional"])
@pytest.mark.parametrize("style", ["weight_scale", "scale_weight", "comfy_quant"])
def test_fp8_weights_are_multiplied_by_their_scales(tmp_path, dtype, scale, style):
    value = values(4, 16)
    s = {
        "per tensor": torch.tensor(0.25),
        "per row": torch.rand(4) + 0.1,
        "per row, two-dimensional": torch.rand(4, 1) + 0.1,
    }[scale]
    stored = (value / (s.view(-1, 1) if s.ndim else s)).to(FP8[dtype])
    tensors = {
        "l.weight": stored,
        "l.bias": value[0],
        ("l.scale_weight" if style == "scale_weight" else "l.weight_scale"): s,
    }
    if style == "scale_weight":
        tensors |= {"scaled_fp8": torch.zeros(2, dtype=FP8[dtype]), "l.scale_input": torch.ones(1)}
    if style == "comfy_quant":
        text = json.dumps({"format": "float8_e4m3fn"}).encode()
        tensors |= {"l.comfy_quant": torch.tensor(list(text), dtype=torch.uint8), "l.input_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "a.safetensors")
    file = open_weights(tmp_path / "a.safetensors")
    assert sorted(file.names()) == ["l.bias", "l.weight"]
    expected = stored.float() * (s.view(-1, 1) if s.ndim else s)
    assert torch.equal(file.load("l.weight"), expected) and torch.equal(
        file.load("l.weight", torch.bfloat16), expected.bfloat16()
    )
    with torch.inference_mode():
        packed = file.load_packed("l.weight", torch.float32)
        assert type(packed) is torch.Tensor if s.ndim else packed._qdata.dtype == FP8[dtype]
        assert torch.equal(packed if s.ndim else packed.dequantize(), expected)


def test_fp8_without_a_scale_is_taken_as_it_is(tmp_path):
    value = values(4, 16).to(torch.float8_e4m3fn)
    save_file({"l.weight": value}, tmp_path / "a.safetensors")
    assert torch.equal(open_weights(tmp_path / "a.safetensors").load("l.weight", torch.float32), value.float())


@pytest.mark.parametrize("where", ["tensor", "header"])
def test_four_bit_safetensors_are_refused_by_name(tmp_path, where):
    tensors, metadata = {"l.weight": torch.zeros(4, 8, dtype=torch.uint8), "l.weight_scale": torch.ones(4, 1)}, {}
    if where == "tensor":
        tensors["l.comfy_quant"] = torch.tensor(
            list(json.dumps({"format": "svdquant_w4a4"}).encode()), dtype=torch.uint8
        )
    else:
        metadata["_quantization_metadata"] = json.dumps({"layers": {"l": {"format": "svdquant_w4a4"}}})
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with pytest.raises(WeightFileError, match="'l.weight' is stored as svdquant_w4a4, which this pack does not read"):
        open_weights(tmp_path / "a.safetensors").load("l.weight")


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": (b"", "empty or cut short"),
    "a web page": (b"<!DOCTYPE html><html><body>Sign in to download</body></html>", "a web page"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "a pickle": (b"PK\x03\x04" + bytes(60), "PyTorch checkpoint"),
    "noise": (bytes(range(7, 71)), "another kind of file"),
    "data cut short": (header({"a": ENTRY}, b"\0" * 4), "cut short"),
    "a header longer than the file": (struct.pack("<Q", 10_000) + b"{" + b" " * 50, "does not fit a file of 59"),
    "no json": (struct.pack("<Q", 8) + b"{nonsens", "not a table of tensors"),
    "a wrong size": (header({"a": {**ENTRY, "shape": [3]}}, b"\0" * 8), "occupies 8 bytes"),
    "no offsets": (header({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8), "not a table of tensors"),
    "a cut GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + bytes(8), "header"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_and_foreign_files_are_refused_in_one_sentence_with_their_name(tmp_path, what):
    content, message = DAMAGED[what]
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(WeightFileError, match=message) as error:
        open_weights(path)
    assert "model.bin" in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(WeightFileError, match="does not exist"):
        open_weights(tmp_path / "nothing.gguf")
    with pytest.raises(WeightFileError, match="is a folder with 0 sets of weights"):
        open_weights(tmp_path)


def test_unknown_tensor_names_are_key_errors_that_name_the_file(tmp_path):
    save_file({"w": values(2, 2)}, tmp_path / "a.safetensors")
    write_gguf(tmp_path / "a.gguf", {"w": ("F32", values(2, 2), None)})
    for name in ("a.safetensors", "a.gguf"):
        with pytest.raises(KeyError, match=name):
            open_weights(tmp_path / name).load("x")


def test_opening_and_loading_touch_only_what_is_asked_for(tmp_path):
    """A file whose other tensor lies beyond the end of the disk's real data (a hole) costs no memory for it."""
    path = tmp_path / "big.safetensors"
    size = 1 << 32
    text = json.dumps(
        {"small": ENTRY, "huge": {"dtype": "U8", "shape": [size], "data_offsets": [8, 8 + size]}}
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.0, 2.0))
        file.truncate(8 + len(text) + 8 + size)
    file = open_weights(path)
    assert file.load("small").tolist() == [1.0, 2.0] and file.shape("huge") == (size,) and file.nbytes("huge") == size


class Small(torch.nn.Module):
    def __init__(self, device="meta"):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4, device=device)
        self.table = torch.nn.Parameter(torch.empty(2, 3, device=device))
        self.register_buffer("statistics", torch.empty(5, device=device))
        self.register_buffer("cache", torch.zeros(1), persistent=False)


GIVEN = {"linear.weight": (4, 8), "linear.bias": (4,), "table": (2, 3), "statistics": (5,)}


def test_assign_puts_the_very_tensors_into_a_module_built_on_meta():
    module, given = Small(), {name: values(*shape) for name, shape in GIVEN.items()}
    assign(module, given)
    assert all(value.data_ptr() == given[name].data_ptr() for name, value in module.state_dict().items())
    assert not any(p.requires_grad for p in module.parameters()) and module.cache.tolist() == [0.0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda given: given.pop("table"), r"1 tensor is missing \(first: table\)"),
        (lambda given: given.update(extra=values(1)), r"1 tensor is unexpected \(first: extra\)"),
        (
            lambda given: given.update(table=values(3, 3)),
            r"1 tensor is of another shape \(first: table is \(3, 3\), expected \(2, 3\)\)",
        ),
    ],
)
def test_assign_reports_what_does_not_fit_and_changes_nothing(change, message):
    module, given = Small(), {name: values(*shape) for name, shape in GIVEN.items()}
    change(given)
    with pytest.raises(WeightsMismatch, match=message + r".* Because\."):
        assign(module, given, lambda missing, unexpected: "Because.")
    assert all(p.is_meta for p in module.parameters())


def test_assign_lists_the_first_five_names_and_the_count():
    with pytest.raises(WeightsMismatch, match=r"7 tensors are unexpected \(first: n0, n1, n2, n3, n4\)") as error:
        assign(
            Small(), {name: values(*shape) for name, shape in GIVEN.items()} | {f"n{i}": values(1) for i in range(7)}
        )
    assert error.value.unexpected == tuple(f"n{i}" for i in range(7))


def test_packed_weights_can_be_assigned():
    with torch.inference_mode():
        raw = decode.quantize(values(4, 32), FORMATS["Q8_0"])
        module = torch.nn.Linear(32, 4, device="meta")
        assign(module, {"weight": tensor.pack(raw, "Q8_0", (4, 32), torch.float32), "bias": torch.zeros(4)})
        x = values(3, 32, seed=1)
        assert tensor.is_packed(module.weight)
        assert torch.allclose(module(x), x @ decode.dequantize(raw, FORMATS["Q8_0"]).T, atol=1e-5)
