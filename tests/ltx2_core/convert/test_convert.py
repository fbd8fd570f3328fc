import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from ltx2_gguf.ltx2_core.convert import convert, synthetic
from ltx2_gguf.ltx2_core.convert.convert import ConvertError
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.names import audio_part
from ltx2_gguf.ltx2_core.files.structure import Geometry
from ltx2_gguf.ltx2_core.files.weights import ORIG_SHAPE, open_weights
from ltx2_gguf.quant import output as outputs
from ltx2_gguf.quant.formats import FORMATS
from ltx2_gguf.quant.gguf.reader import GGUFFile
from ltx2_gguf.quant.output import OutputError

ROOT = Path(__file__).resolve().parents[3]


def small(version="2.3", **sizes):
    return Geometry.small(version, gemma_width=64, gemma_layers=2, num_layers=1, connector_layers=1, registers=32, connector_head_dim=64, **sizes) if version == "2.3" else Geometry.small(
        version, gemma_width=64, gemma_layers=2, num_layers=1, connector_layers=1, registers=32, **sizes
    )  # fmt: skip


@pytest.fixture(scope="module", params=["2.3", "2.0"])
def checkpoint(request, tmp_path_factory):
    """An audio-and-video safetensors checkpoint in bfloat16 and its tensors."""
    return make_checkpoint(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def checkpoint_23(tmp_path_factory):
    """The same for one version, where the version does not matter."""
    return make_checkpoint("2.3", tmp_path_factory)


def make_checkpoint(version, tmp_path_factory):
    geometry = small(version)
    path = tmp_path_factory.mktemp("checkpoint") / f"ltx-{version}.safetensors"
    synthetic.make(path, geometry, audio=True)
    return version, path, synthetic.state_dict(structure.checkpoint_shapes(geometry), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Convert a source once per module: ``converted(path, target)`` -> path of ``<target>.gguf``."""
    done = {}

    def run(source, target):
        if (source, target) not in done:
            done[source, target] = tmp_path_factory.mktemp("converted") / f"{target}.gguf"
            convert.convert([source], done[source, target], target)
        return done[source, target]

    return run


def bare(name):
    return name.removeprefix(structure.DIT_PREFIX)


def rel(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12)).item()


def same_bytes(a, b):
    return a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("target", ["f32", "bf16", "f16", "q8_0", "q5_1", "q4_0"])
def test_every_tensor_is_what_gguf_py_makes_of_the_source(checkpoint, converted, target):
    version, path, tensors = checkpoint
    output = converted(path, target)
    written = {t.name: t for t in gguf.GGUFReader(output).tensors}
    assert set(written) == {bare(name) for name in tensors}
    for name, value in tensors.items():
        t = written[bare(name)]
        rows = (
            value.float().numpy().reshape(-1, value.shape[-1])
            if value.dim() < 5
            else value.float().numpy().reshape(-1, 27)
        )
        expected = gguf.quants.quantize(rows, t.tensor_type)
        assert np.array_equal(np.asarray(t.data).reshape(-1).view(np.uint8), expected.reshape(-1).view(np.uint8)), name


@pytest.mark.parametrize("target, bound", [("q6_k", 0.025), ("q5_k", 0.045), ("q4_k", 0.09)])
def test_k_quants_are_written_for_rows_of_256_and_close_to_the_source(checkpoint_23, converted, target, bound):
    _, path, tensors = checkpoint_23
    output = converted(path, target)
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    weights = open_weights(output)
    assert weights.format(name) == target.upper()
    assert rel(weights.load(name), tensors[structure.DIT_PREFIX + name]) < bound


def test_the_header_says_what_readers_look_for(checkpoint, converted):
    version, path, _ = checkpoint
    output = converted(path, "q4_0")
    fields = {f.name: f.contents() for f in gguf.GGUFReader(output).fields.values()}
    assert fields["general.architecture"] == "ltxv" and fields["general.name"] == "q4_0"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0 and fields["general.quantization_version"] == 2
    assert fields["model_version"] == {"2.0": "2.0.0", "2.3": "2.3.0"}[version]
    config = json.loads(fields["config"])
    assert set(config) == {"transformer", "vae", "scheduler"} and config["transformer"]["num_layers"] == 1


def test_file_types_are_llama_cpps_numbers():
    names = {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_S", "q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S"}
    for fmt, number in convert.FILE_TYPES.items():
        assert gguf.LlamaFileType[names.get(fmt, f"MOSTLY_{fmt.upper()}")] == number


def test_convolutions_are_flattened_and_their_shape_is_recorded(checkpoint_23, converted):
    _, path, tensors = checkpoint_23
    output = converted(path, "q8_0")
    name = "vae.decoder.conv_in.conv.weight"
    file, weights = GGUFFile(output), open_weights(output)
    assert len(file.tensors[name].shape) == 3 and file.tensors[name].shape[-1] == 27
    assert file.metadata[ORIG_SHAPE + name] == list(tensors[name].shape) and weights.shape(name) == tuple(
        tensors[name].shape
    )
    assert rel(weights.load(name), tensors[name]) < 1e-5


def test_shards_give_the_same_tensors_as_one_file(checkpoint_23, converted, tmp_path):
    version, path, _ = checkpoint_23
    shapes = structure.checkpoint_shapes(small(version), audio=True)
    index = synthetic.save_sharded(
        tmp_path / "sharded",
        synthetic.state_dict(shapes, dtype=torch.bfloat16),
        synthetic.metadata(small(version)),
        shards=3,
    )
    for source in (index, index.parent):
        convert.convert([source], tmp_path / "b.gguf", "q5_1", overwrite=True)
        a, b = GGUFFile(converted(path, "q5_1")), GGUFFile(tmp_path / "b.gguf")
        assert set(a.tensors) == set(b.tensors)
        assert all(torch.equal(a.raw(name), b.raw(name)) for name in a.tensors)


def test_a_gguf_converted_to_its_own_type_is_the_same_file(checkpoint_23, converted, tmp_path):
    original = converted(checkpoint_23[1], "q4_0")
    convert.convert([original], tmp_path / "q4_0.gguf", "q4_0")
    assert same_bytes(original, tmp_path / "q4_0.gguf")


def test_converting_over_float32_loses_nothing(checkpoint_23, converted):
    path = checkpoint_23[1]
    assert same_bytes(converted(path, "q5_1"), converted(converted(path, "f32"), "q5_1"))


def test_quantised_sources_are_requantised_downwards_and_copied_upwards(checkpoint_23, converted):
    name = "transformer_blocks.0.attn1.to_q.weight"
    first = converted(checkpoint_23[1], "q8_0")
    second = converted(first, "q4_0")
    q8, q4, up = (GGUFFile(path) for path in (first, second, converted(second, "q8_0")))
    assert [f.tensors[name].format.name for f in (q8, q4, up)] == ["Q8_0", "Q4_0", "Q4_0"]
    assert torch.equal(up.raw(name), q4.raw(name))
    assert rel(q4.load(name), q8.load(name)) < 0.1


def test_companion_files_make_one_complete_file(tmp_path):
    geometry = small()
    full = tmp_path / "full.safetensors"
    synthetic.make(full, geometry)
    parts = {
        "dit.safetensors": structure.dit_shapes(geometry),
        "text.safetensors": {
            "text_embedding_projection." + n: s for n, s in structure.projection_shapes(geometry, audio=True).items()
        },
        "connector.safetensors": {structure.DIT_PREFIX + n: s for n, s in structure.connector_shapes(geometry).items()},
    }
    for name, shapes in parts.items():
        synthetic.save_safetensors(
            tmp_path / name, synthetic.state_dict(shapes, dtype=torch.bfloat16), synthetic.metadata(geometry)
        )
    vae = {
        name.removeprefix("vae."): synthetic.tensor(name, shape).bfloat16()
        for name, shape in structure.checkpoint_shapes(geometry).items()
        if name.startswith("vae.")
    }
    synthetic.save_safetensors(tmp_path / "vae.safetensors", vae)
    convert.convert([full], tmp_path / "a.gguf", "q8_0")
    convert.convert([tmp_path / n for n in (*parts, "vae.safetensors")], tmp_path / "b.gguf", "q8_0")
    a, b = GGUFFile(tmp_path / "a.gguf"), GGUFFile(tmp_path / "b.gguf")
    assert set(a.tensors) == set(b.tensors)
    assert [name for name in a.tensors if not torch.equal(a.raw(name), b.raw(name))] == []


@pytest.mark.parametrize("scale", ["one", "per row"])
def test_fp8_weights_are_multiplied_out(tmp_path, scale):
    geometry = small()
    tensors = synthetic.state_dict(structure.checkpoint_shapes(geometry), dtype=torch.bfloat16)
    name = structure.DIT_PREFIX + "transformer_blocks.0.ff.net.0.proj.weight"
    value = tensors[name].float()
    factor = (value.abs().amax(1) if scale == "per row" else value.abs().amax()) / 448
    fp8 = (value / (factor[:, None] if scale == "per row" else factor)).to(torch.float8_e4m3fn)
    tensors |= {name: fp8, name.replace(".weight", ".weight_scale"): factor}
    synthetic.save_safetensors(tmp_path / "fp8.safetensors", tensors, synthetic.metadata(geometry))
    convert.convert([tmp_path / "fp8.safetensors"], tmp_path / "out.gguf", "q8_0")
    weights = open_weights(tmp_path / "out.gguf")
    exact = fp8.float() * (factor[:, None] if scale == "per row" else factor)
    assert rel(weights.load(bare(name)), exact) < 0.01 and bare(name).replace(".weight", ".weight_scale") not in weights


def test_write_gguf_equals_converting_the_saved_tensors(tmp_path):
    geometry = small()
    synthetic.make(tmp_path / "x.safetensors", geometry, type="f32")
    synthetic.make(tmp_path / "a.gguf", geometry, type="q5_1")
    (tmp_path / "b").mkdir()
    convert.convert([tmp_path / "x.safetensors"], tmp_path / "b" / "a.gguf", "q5_1")
    a, b = GGUFFile(tmp_path / "a.gguf"), GGUFFile(tmp_path / "b" / "a.gguf")
    assert set(a.tensors) == set(b.tensors) and all(torch.equal(a.raw(n), b.raw(n)) for n in a.tensors)
    assert dict(a.metadata) == dict(b.metadata)


# -- nothing half-written -----------------------------------------------------------------------------------------------------------------


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".safetensors")


def test_an_interruption_leaves_nothing_behind(checkpoint_23, tmp_path):
    _, path, _ = checkpoint_23

    def interrupt(done, name):
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.convert([path], tmp_path / "out.gguf", "q8_0", progress=interrupt)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "value, target, words",
    [
        (float("nan"), "q8_0", "NaN or infinity"),
        (float("inf"), "bf16", "NaN or infinity"),
        (1e5, "f16", "beyond float16's range; convert to bf16"),
    ],
)
def test_a_value_that_cannot_be_stored_stops_the_conversion_and_names_its_tensor(tmp_path, value, target, words):
    geometry = small()
    tensors = synthetic.state_dict(structure.checkpoint_shapes(geometry), dtype=torch.bfloat16)
    name = structure.DIT_PREFIX + "transformer_blocks.0.attn2.to_v.weight"
    tensors[name][3, 5] = value
    synthetic.save_safetensors(tmp_path / "bad.safetensors", tensors, synthetic.metadata(geometry))
    with pytest.raises(ConvertError, match=words) as error:
        convert.convert([tmp_path / "bad.safetensors"], tmp_path / "out.gguf", target)
    assert "attn2.to_v.weight" in str(error.value) and leftovers(tmp_path) == []


def test_an_existing_output_survives_a_failed_conversion(tmp_path, checkpoint_23):
    _, path, _ = checkpoint_23
    output = tmp_path / "out.gguf"
    output.write_bytes(b"precious")

    def fail(done, name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        convert.convert([path], output, "q8_0", overwrite=True, progress=fail)
    assert output.read_bytes() == b"precious" and leftovers(tmp_path) == ["out.gguf"]


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, checkpoint_23, monkeypatch):
    _, path, _ = checkpoint_23
    monkeypatch.setattr(
        outputs.shutil, "disk_usage", lambda _: os.terminal_size((0, 0)) and type("U", (), {"free": 1000})()
    )
    with pytest.raises(OutputError, match="needs 0.1 GB and .* has 0.0 GB free"):
        convert.convert([path], tmp_path / "out.gguf", "q8_0")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "name, words",
    [
        ("out.bin", "ending in .gguf"),
        ("no/out.gguf", "does not exist"),
        ("there.gguf", "exists already; choose another name or pass --overwrite"),
    ],
)
def test_an_unusable_output_is_refused(tmp_path, checkpoint_23, name, words):
    _, path, _ = checkpoint_23
    (tmp_path / "there.gguf").write_bytes(b"x")
    with pytest.raises(OutputError, match=words):
        convert.convert([path], tmp_path / name, "q8_0")


def test_the_source_is_never_overwritten(tmp_path):
    synthetic.make(tmp_path / "x.gguf", small())
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        convert.convert([tmp_path / "x.gguf"], tmp_path / "x.gguf", "q4_0", overwrite=True)
    assert (tmp_path / "x.gguf").read_bytes() == before


# -- strip ----------------------------------------------------------------------------------------------------------------------------


def test_strip_removes_the_sound_and_copies_the_rest_byte_for_byte(tmp_path):
    source, output = tmp_path / "av.gguf", tmp_path / "v.gguf"
    synthetic.make(source, small(), type="q4_0", audio=True)
    result = convert.strip(source, output)
    a, b = GGUFFile(source), GGUFFile(output)
    audio = [name for name in a.tensors if name not in b.tensors]
    assert result["dropped_tensors"] == len(audio) > 50 and result["kept_tensors"] == len(b.tensors)
    assert {audio_part(name) for name in audio} == {"dit", "connector", "projection", "vae", "vocoder"}
    assert all(torch.equal(a.raw(name), b.raw(name)) for name in b.tensors)
    assert {key: a.metadata.typed(key) for key in b.metadata} == {key: b.metadata.typed(key) for key in b.metadata}
    assert set(a.metadata) - set(b.metadata) <= {ORIG_SHAPE + name for name in audio}
    assert result["output_bytes"] == sum(t.nbytes for t in b.tensors.values())


def test_strip_refuses_what_has_no_sound(tmp_path, gemma_gguf):
    synthetic.make(tmp_path / "v.gguf", small())
    synthetic.make(tmp_path / "v.safetensors", small())
    for source, words in (
        (tmp_path / "v.gguf", "holds no sound"),
        (tmp_path / "v.safetensors", "not a GGUF file"),
        (gemma_gguf, "no LTX-2 transformer"),
    ):
        with pytest.raises(ConvertError, match=words):
            convert.strip(source, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


# -- memory -----------------------------------------------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import packloader
from ltx2_gguf.ltx2_core.convert import convert
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert([sys.argv[2]], sys.argv[3], "q8_0")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures with Linux's resource counters")
@pytest.mark.parametrize("dtype, itemsize", [("BF16", 2), ("F8_E4M3", 1)])
def test_a_tensor_of_gigabytes_is_converted_in_a_few_hundred_megabytes(tmp_path, dtype, itemsize):
    """The largest tensor of the released checkpoints: the text projection, [4096, 188160]."""
    geometry = small()
    shapes = structure.checkpoint_shapes(geometry, vae=False)
    big = structure.PROJECTION_PREFIX + "video_aggregate_embed.weight"
    shapes[big] = (4096, 188160)
    table, offset = {"__metadata__": synthetic.metadata(geometry)}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * (itemsize if name == big else 2)
        table[name] = {
            "dtype": dtype if name == big else "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    raw = json.dumps(table).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)  # zeros that take no room on disk
    args = [
        sys.executable,
        "-c",
        _MEASURE,
        str(ROOT / "tests" / "support"),
        str(tmp_path / "big.safetensors"),
        str(tmp_path / "out.gguf"),
    ]
    grown_gb = float(subprocess.run(args, capture_output=True, text=True, check=True).stdout)
    assert grown_gb < 1.0
    assert (tmp_path / "out.gguf").stat().st_size > FORMATS["Q8_0"].nbytes((4096, 188160))
