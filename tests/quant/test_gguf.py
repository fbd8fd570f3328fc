"""The reader and the writer against gguf-py, and every refusal."""

import struct
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from ltx2_gguf.quant import decode, formats
from ltx2_gguf.quant.gguf.metadata import GGUFValue, infer
from ltx2_gguf.quant.gguf.reader import GGUFFile, GGUFFormatError
from ltx2_gguf.quant.gguf.writer import GGUFWriter

STRING, U32 = 8, 4


def write_with_gguf_py(path):
    """A file with every value type and many tensor types, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "ltxv")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -100)
    writer.add_uint16("a.u16", 60000)
    writer.add_int16("a.i16", -30000)
    writer.add_uint32("a.u32", 4_000_000_000)
    writer.add_int32("a.i32", -2_000_000_000)
    writer.add_uint64("a.u64", 2**63 + 1)
    writer.add_int64("a.i64", -(2**62))
    writer.add_float32("a.f32", 0.1)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.true", True)
    writer.add_bool("a.false", False)
    writer.add_string("a.text", 'snow \u2744 and {"json": [1, 2]}')
    writer.add_string("a.empty", "")
    writer.add_array("l.int", [1, 2, 3])
    writer.add_array("l.float", [0.5, -1.25])
    writer.add_array("l.bool", [True, False, True])
    writer.add_array("l.text", ["", "a", "\u00e4\u00f6", "longer text"])
    rng = np.random.default_rng(0)
    for name, fmt in formats.QUANTIZED.items():
        raw = rng.integers(0, 256, size=(6, 2 * fmt.type_size), dtype=np.uint8)
        writer.add_tensor(f"q.{name}", raw, raw_dtype=gguf.GGMLQuantizationType[name])
    writer.add_tensor("d.f32", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("d.f16", rng.normal(size=(2, 3, 4)).astype(np.float16))
    writer.add_tensor("d.f64", rng.normal(size=(7,)).astype(np.float64))
    writer.add_tensor("d.i8", rng.integers(-9, 9, size=(2, 2, 2, 3)).astype(np.int8))
    writer.add_tensor("d.i16", rng.integers(-9, 9, size=(5,)).astype(np.int16))
    writer.add_tensor("d.i32", rng.integers(-9, 9, size=(5, 1)).astype(np.int32))
    writer.add_tensor("d.i64", rng.integers(-9, 9, size=(1, 5)).astype(np.int64))
    bf16 = gguf.quants.quantize(rng.normal(size=(4, 8)).astype(np.float32), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("d.bf16", bf16, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_reads_like_gguf_py(path):
    """Every metadata value, name, shape, type, offset and byte of the file."""
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
        assert list(ours.metadata) == list(fields)
        for key, field in fields.items():
            assert ours.metadata[key] == field.contents(), key
            types = [gguf.GGUFValueType(t).name.lower() for t in field.types]
            assert ours.metadata.type_name(key) == (f"array of {types[1]}" if types[0] == "array" else types[0])
        assert ours.version == theirs.fields["GGUF.version"].contents()
        assert ours.data_offset == theirs.data_offset
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert info.format.ggml_id == int(tensor.tensor_type)
            assert info.shape == tuple(reversed(tensor.shape.tolist()))
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            raw = ours.raw(tensor.name)
            assert raw.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == tensor.data.tobytes()
            if not info.format.is_quantized:
                assert tuple(raw.shape) == info.shape
            del raw


def test_every_field_of_a_gguf_py_file_is_read_as_gguf_py_reads_it(tmp_path):
    assert_reads_like_gguf_py(write_with_gguf_py(tmp_path / "x.gguf"))


@pytest.mark.slow
def test_every_field_of_a_real_file_is_read_as_gguf_py_reads_it(gemma_gguf):
    assert_reads_like_gguf_py(gemma_gguf)


def test_opening_a_real_file_does_not_read_its_vocabulary(gemma_gguf):
    tracemalloc.start()
    with GGUFFile(gemma_gguf) as file:
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert file.metadata.length("tokenizer.ggml.tokens") == 262144
    assert allocated < 4e6  # the tokens alone are 262144 Python strings


def test_opening_reads_no_tensor_data(tmp_path):
    """A sparse file of 8 GB opens without its data being read or copied."""
    path = tmp_path / "big.gguf"
    header = make_file(tensors=[("w", (1 << 20, 2048), 0, 0)])
    path.write_bytes(header)
    with open(path, "r+b") as file:
        file.truncate(len(header) + (1 << 33))
    resource = pytest.importorskip("resource")

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    before = faults()
    with GGUFFile(path) as file:
        raw = file.raw("w")
        assert tuple(raw.shape) == (1 << 20, 2048) and float(raw[-1, -1]) == 0
        del raw
    assert faults() - before < 20_000  # the data alone is two million pages


def test_a_raw_tensor_is_a_view_with_its_own_storage(tmp_path):
    path = write_with_gguf_py(tmp_path / "x.gguf")
    file = GGUFFile(path)
    for name, info in file.tensors.items():
        raw = file.raw(name)
        assert raw.is_contiguous() and raw.storage_offset() == 0
        assert raw.untyped_storage().nbytes() == info.nbytes == raw.numel() * raw.element_size()
        assert raw.data_ptr() == file.raw(name).data_ptr()
    raw = file.raw("q.Q4_0")
    before, on_disk = raw.clone(), path.read_bytes()
    file.close()
    assert torch.equal(raw, before)  # the map lives as long as a tensor looks into it
    raw.zero_()
    assert path.read_bytes() == on_disk  # and is private: writing to it never reaches the file
    with pytest.raises(ValueError, match="x.gguf is closed"):
        file.raw("q.Q4_0")


def test_values_read_before_closing_stay_and_others_say_that_the_file_is_closed(tmp_path):
    with GGUFFile(write_with_gguf_py(tmp_path / "x.gguf")) as file:
        assert file.metadata["a.u8"] == 200
    assert file.metadata["a.u8"] == 200 and "a.i8" in file.metadata
    with pytest.raises(ValueError, match="closed"):
        file.metadata["a.i8"]


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_closing_unmaps_the_file_when_no_tensor_is_left(tmp_path):
    path = write_with_gguf_py(tmp_path / "mapped-here.gguf")

    def mapped():
        with open("/proc/self/maps") as maps:
            return "mapped-here.gguf" in maps.read()

    file = GGUFFile(path)
    raw = file.raw("q.Q4_0")
    assert mapped()
    file.close()
    assert mapped()
    del raw
    assert not mapped()


def test_views_do_not_warn_and_a_read_only_map_does_not_either(tmp_path, monkeypatch, recwarn):
    from ltx2_gguf.quant.gguf import mapping

    path = write_with_gguf_py(tmp_path / "x.gguf")
    file = GGUFFile(path)
    first = file.raw("d.f32")
    real = mapping.mmap.mmap

    def refuse_writable(*args, **kwargs):
        if kwargs.get("access") != mapping.mmap.ACCESS_READ:
            raise OSError(12, "Cannot allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(mapping.mmap, "mmap", refuse_writable)
    assert torch.equal(GGUFFile(path).raw("d.f32"), first)
    assert not recwarn.list


def test_a_file_mapped_by_the_caller_is_used_as_it_is(tmp_path):
    path = write_with_gguf_py(tmp_path / "x.gguf")
    buffer = bytearray(path.read_bytes())
    file = GGUFFile(path, buffer=memoryview(buffer))
    info = file.tensors["d.i8"]
    buffer[info.offset] = 77
    assert file.raw("d.i8").view(-1)[0] == 77


def test_load_decodes_and_keeps_the_logical_shape(tmp_path):
    file = GGUFFile(write_with_gguf_py(tmp_path / "x.gguf"))
    for name in ("q.Q4_0", "q.Q6_K"):
        assert torch.equal(file.load(name, torch.bfloat16).isnan(), file.load(name).isnan())
        expected = decode.dequantize(file.raw(name), file.tensors[name].format)
        assert torch.equal(file.load(name).nan_to_num(7), expected.nan_to_num(7))
    assert file.load("d.f16").data_ptr() == file.raw("d.f16").data_ptr()
    assert (file.load("d.f16").dtype, file.load("d.f16", torch.float32).dtype) == (torch.float16, torch.float32)
    assert tuple(file.load("d.f16").shape) == (2, 3, 4)
    with pytest.raises(KeyError, match="x.gguf has no tensor 'nothing'"):
        file.raw("nothing")


# Hand-made files, to break them.


def text(value):
    return struct.pack("<Q", len(value)) + value


def make_file(tensors=(), entries=(), version=3, magic=b"GGUF", counts=None, alignment=32, tail=b""):
    """tensors: (name, shape in torch order, ggml id, relative offset); entries: encoded key-value pairs."""
    n_tensors, n_entries = counts or (len(tensors), len(entries))
    data = magic + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join(entries)
    for name, shape, ggml_id, offset in tensors:
        data += text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), ggml_id, offset)
    return data + bytes(-len(data) % alignment) + tail


def entry(key, kind, payload):
    return text(key.encode()) + struct.pack("<I", kind) + payload


def refused(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFFormatError, match=message) as caught:
        GGUFFile(path)
    assert str(caught.value).startswith("bad.gguf: ")
    return str(caught.value)


F32_16 = ("w", (2, 8), 0, 0)


def test_the_smallest_file_opens(tmp_path):
    path = tmp_path / "small.gguf"
    path.write_bytes(make_file([F32_16], tail=bytes(64)))
    file = GGUFFile(path)
    assert file.architecture is None and file.tensors["w"].shape == (2, 8)
    assert repr(file) == "GGUFFile('small.gguf', architecture=None, 1 tensors, 0 metadata entries)"
    for version in (2, 3):
        path.write_bytes(make_file([F32_16], version=version, tail=bytes(64)))
        assert GGUFFile(path).version == version


def test_scalar_tensors_are_read_and_empty_or_nameless_ones_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for infos, words in (
        ([("none", (0, 8), 0, 0)], r"tensor none has the shape \(0, 8\)"),
        ([("", (1,), 0, 0)], "a tensor has no name"),
    ):
        path.write_bytes(make_file(infos, tail=bytes(4)))
        with pytest.raises(GGUFFormatError, match=words):
            GGUFFile(path)
    path.write_bytes(make_file([("one", (), 0, 0)], tail=struct.pack("<f", 2.5)))
    file = GGUFFile(path)
    assert file.raw("one").shape == () and float(file.raw("one")) == 2.5


@pytest.mark.parametrize(
    "head, message",
    [
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"<!DOCTYPE html><html><head></head><body>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        (struct.pack("<Q", 100) + b'{"__metadata__": {}}' + bytes(20), "safetensors"),
        (b"lmgg" + bytes(40), "old GGML"),
        (b"abcdefgh" * 8, "begins with b'abcd', but a GGUF file begins with b'GGUF'"),
        (b"GGUF", "4 bytes are too few"),
        (b"", "0 bytes are too few"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, head, message):
    refused(tmp_path, head, message)


def test_versions_and_byte_order_are_checked(tmp_path):
    refused(tmp_path, make_file(version=1), "version 1; expected 2 or 3. Convert it again")
    refused(tmp_path, make_file(version=4), "version 4; expected 2 or 3. Update")
    refused(tmp_path, make_file(version=3 << 24), "version 3 in big-endian byte order; expected little-endian")


def test_a_split_file_is_named_with_the_way_out(tmp_path):
    entries = [entry("split.no", 2, struct.pack("<H", 1)), entry("split.count", 2, struct.pack("<H", 3))]
    refused(tmp_path, make_file(entries=entries), "part 2 of a model split into 3 files.*llama-gguf-split --merge")
    (tmp_path / "whole.gguf").write_bytes(make_file(entries=[entry("split.count", 2, struct.pack("<H", 1))]))
    assert GGUFFile(tmp_path / "whole.gguf").metadata["split.count"] == 1


@pytest.mark.parametrize(
    "data, message",
    [
        (make_file(counts=(10**12, 0)), "announces 1000000000000 tensors"),
        (make_file(counts=(0, 10**12)), "announces 1000000000000 metadata entries"),
        (make_file(counts=(1, 0), tail=bytes(8)), "."),
        (make_file(entries=[struct.pack("<Q", 2**60) + bytes(8)]), "should take .* bytes, but the file has only"),
        (make_file(entries=[text(b"\xff\xfe") + struct.pack("<IB", 0, 1)]), "not UTF-8"),
        (make_file(entries=[entry("k", 13, b"\0")]), "'k' has unknown value type 13"),
        (make_file(entries=[entry("k", 9, struct.pack("<IQ", 9, 1))]), "'k' is an array of type 9"),
        (make_file(entries=[entry("k", 9, struct.pack("<IQ", 4, 2**40))]), "'k' at byte"),
        (make_file(entries=[entry("k", 9, struct.pack("<IQ", 8, 2**40))]), "'k' announces 1099511627776 strings"),
        (
            make_file(entries=[entry("k", 9, struct.pack("<IQQ", 8, 1, 2**40))]),
            "'k' starts at byte .* runs past the end",
        ),
        (make_file(entries=[entry("k", 0, b"\1"), entry("k", 0, b"\2")]), "'k' occurs twice"),
        (
            make_file(entries=[entry("general.alignment", 4, struct.pack("<I", 24))]),
            "general.alignment is 24; expected a power of two",
        ),
        (make_file(entries=[entry("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
        (make_file(entries=[entry("general.alignment", STRING, text(b"32"))]), "general.alignment is a string"),
        (make_file([("w", (1, 1, 1, 1, 8), 0, 0)], tail=bytes(32)), "w has 5 dimensions; GGUF allows 4"),
        (make_file([("w", (2, 8), 0, 4)], tail=bytes(96)), "w lies at offset 4, not a multiple of the alignment 32"),
        (make_file([F32_16, F32_16], tail=bytes(64)), "name w occurs twice"),
        (make_file([F32_16, ("v", (2, 8), 0, 32)], tail=bytes(96)), "tensors w and v overlap"),
        (make_file([("w", (2, 40), 2, 0)], tail=bytes(96)), "w has rows of 40 weights.*Q4_0 blocks of 32"),
        (make_file([("w", (2, 64), 31, 0)], tail=bytes(96)), "w: Found Q4_0_4_4 .*withdrawn"),
        (make_file([("w", (2, 64), 99, 0)], tail=bytes(96)), "w: Found unknown GGML type 99"),
        (
            make_file([F32_16], tail=bytes(40)),
            "24 bytes are missing .the last tensor is w.. The download was cut short",
        ),
        (make_file([("w", (2**40, 2**40), 0, 0)], tail=bytes(40)), "bytes are missing"),
    ],
)
def test_a_damaged_header_is_refused_with_what_is_wrong(tmp_path, data, message):
    refused(tmp_path, data, message)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    """Whatever byte the download stopped at, the reader raises its own error and nothing else."""
    whole = write_with_gguf_py(tmp_path / "x.gguf").read_bytes()
    end = GGUFFile(tmp_path / "x.gguf").data_offset
    path = tmp_path / "cut.gguf"
    for length in [*range(0, end, 7), end, end + 1, len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFFormatError):
            GGUFFile(path)


def test_a_header_with_random_damage_never_breaks_the_reader(tmp_path):
    whole = bytearray(write_with_gguf_py(tmp_path / "x.gguf").read_bytes())
    end = GGUFFile(tmp_path / "x.gguf").data_offset
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    refusals = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, end, size=3):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            with GGUFFile(path) as file:
                for key in file.metadata:
                    file.metadata[key]
        except GGUFFormatError:
            refusals += 1
    assert refusals > 100


def test_a_format_without_decoder_is_listed_but_not_loaded(tmp_path):
    path = tmp_path / "iq.gguf"
    path.write_bytes(make_file([("w", (1, 256), formats.UNDECODABLE["IQ3_S"].ggml_id, 0)], tail=bytes(128)))
    file = GGUFFile(path)
    assert file.tensors["w"].format.name == "IQ3_S"
    with pytest.raises(formats.UnsupportedFormatError, match="iq.gguf: tensor w is stored as IQ3_S.*Q8_0"):
        file.load("w")


# The writer.


def test_what_the_writer_writes_is_read_by_gguf_py_and_by_us(tmp_path):
    path = tmp_path / "x.gguf"
    torch.manual_seed(0)
    weights = {name: torch.randn(4, 512) for name in ("Q4_0", "Q8_0", "F16", "BF16", "F32", "Q4_K")}
    packed = {name: decode.quantize(w, name) for name, w in weights.items()}
    metadata = {
        "general.architecture": "ltxv",
        "config": '{"a": 1}',
        "small": 3,
        "negative": -3,
        "large": 2**40,
        "real": 0.25,
        "flag": True,
        "list": [1, 2],
        "typed": GGUFValue("uint16", 7),
        "words": ["a", "", "\u2744"],
        "floats": [1, 0.5],
        "empty": GGUFValue("array", [], "int32"),
    }
    specs = [(f"t.{name}", name, tuple(w.shape)) for name, w in weights.items()] + [
        ("five", "F32", (3,)),
        ("scalar", "I32", ()),
    ]
    with GGUFWriter(path, metadata, specs) as writer:
        writer.write("five", torch.arange(3.0))
        writer.write("scalar", struct.pack("<i", -5))
        for name in reversed(packed):  # any order
            writer.write(f"t.{name}", packed[name][:1])  # in pieces
            writer.write(f"t.{name}", packed[name][1:])
        assert not path.exists() and len(list(tmp_path.glob(".x-*.partial"))) == 1
    assert not list(tmp_path.glob("*.partial"))
    file = GGUFFile(path)
    types = {
        "small": "uint32",
        "negative": "int32",
        "large": "uint64",
        "real": "float32",
        "flag": "bool",
        "typed": "uint16",
    }
    types["list"] = "array of uint32"
    assert {key: file.metadata.type_name(key) for key in types} == types
    assert file.metadata["floats"] == [1.0, 0.5] and file.metadata["empty"] == []
    assert file.metadata["words"] == ["a", "", "\u2744"]
    for name in packed:
        assert torch.equal(file.raw(f"t.{name}").view(torch.uint8).view(4, -1), packed[name])
    assert file.raw("five").tolist() == [0, 1, 2] and int(file.raw("scalar")) == -5
    theirs = gguf.GGUFReader(path)
    assert {t.name: t.data_offset for t in theirs.tensors} == {t.name: t.offset for t in file.tensors.values()}
    assert all(t.data_offset % 32 == 0 for t in theirs.tensors)
    assert theirs.fields["words"].contents() == ["a", "", "\u2744"]


def test_a_copy_made_from_typed_metadata_keeps_every_type(tmp_path):
    source = GGUFFile(write_with_gguf_py(tmp_path / "x.gguf"))
    specs = [(info.name, info.format, info.shape) for info in source.tensors.values()]
    with GGUFWriter(tmp_path / "y.gguf", {key: source.metadata.typed(key) for key in source.metadata}, specs) as writer:
        for name in source.tensors:
            writer.write(name, source.raw(name))
    assert_reads_like_gguf_py(tmp_path / "y.gguf")
    copy = GGUFFile(tmp_path / "y.gguf")
    for key in source.metadata:
        assert copy.metadata.typed(key) == source.metadata.typed(key)
    for name in source.tensors:
        assert torch.equal(copy.raw(name).view(torch.uint8), source.raw(name).view(torch.uint8))


def test_a_failure_while_writing_leaves_nothing_and_spares_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="stop"):
        with GGUFWriter(path, {}, [("w", "F32", (2,))]):
            raise RuntimeError("stop")
    with pytest.raises(ValueError, match="1 of 2 tensors are incomplete, first v with 4 of 8 bytes"):
        with GGUFWriter(path, {}, [("w", "F32", (2,)), ("v", "F32", (2,))]) as writer:
            writer.write("w", torch.zeros(2))
            writer.write("v", torch.zeros(1))
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"] and path.read_bytes() == b"old"


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(ValueError, match="announced twice"):
        GGUFWriter(path, {}, [("w", "F32", (2,)), ("w", "F32", (2,))])
    with pytest.raises(ValueError, match="5 dimensions; GGUF allows 4"):
        GGUFWriter(path, {}, [("w", "F32", (1, 1, 1, 1, 2))])
    with pytest.raises(ValueError, match="40 weights.*Q4_0"):
        GGUFWriter(path, {}, [("w", "Q4_0", (2, 40))])
    with pytest.raises(TypeError, match="dict cannot be stored"):
        GGUFWriter(path, {"k": {}}, [])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="was not announced"):
        with GGUFWriter(path, {}, []) as writer:
            writer.write("w", b"")
    with pytest.raises(ValueError, match="takes 8 bytes, but 12 were given"):
        with GGUFWriter(path, {}, [("w", "F32", (2,))]) as writer:
            writer.write("w", torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_lists_without_a_single_type_are_refused():
    for value in ([], ["a", 1], [[1]]):
        with pytest.raises((TypeError, ValueError), match="GGUF type"):
            infer(value)
    with pytest.raises(ValueError, match="array of 'array'"):
        GGUFValue("array", [[1]], "array").to_bytes()
