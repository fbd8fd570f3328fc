"""A converted file beside its source: true, damaged, incomplete, exchanged."""

import json
import shutil

import pytest
import torch

import wild_files
from ltx2_gguf.ltx2_core import cli
from ltx2_gguf.ltx2_core.convert import convert, synthetic
from ltx2_gguf.ltx2_core.convert.verify import verify
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.quant.gguf.reader import GGUFFile

NAME = "transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return wild_files.full_checkpoint(tmp_path_factory.mktemp("verify") / "source.safetensors")


@pytest.fixture(scope="module")
def converted(source):
    convert.convert([source], source.parent / "q.gguf", "q4_0")
    return source.parent / "q.gguf"


@pytest.mark.parametrize("target", ["bf16", "f16", "q8_0", "q6_k", "q5_1", "q4_k_m", "q4_0", "q3_k", "q2_k"])
def test_what_was_converted_is_true_to_its_source(source, tmp_path, target):
    convert.convert([source], tmp_path / "a.gguf", target)
    verdict = verify(tmp_path / "a.gguf", [source])
    assert verdict.problems == [] and verdict.identical + len(verdict.decoded) == verdict.tensors > 50
    assert verdict.identical > 0 and (verdict.worst[1] == 0) == (target == "bf16")


def test_a_source_in_parts_and_a_stripped_file(source, tmp_path):
    g = wild_files.geometry()
    synthetic.make(tmp_path / "av.gguf", g, type="q8_0", audio=True)
    convert.strip(tmp_path / "av.gguf", tmp_path / "v.gguf")
    verdict = verify(tmp_path / "v.gguf", [tmp_path / "av.gguf"])
    assert verdict.problems == [] and verdict.identical == verdict.tensors and "audio" in verdict.notes[0]


def damaged(path, target, name=NAME, offset=100, value=None):
    """A copy with one changed byte in a tensor's data, or with ``value`` (bytes) there."""
    shutil.copy(path, target)
    file = GGUFFile(path)
    start = file.info(name).offset + offset
    file.close()
    with open(target, "r+b") as data:
        data.seek(start)
        old = data.read(1 if value is None else len(value))
        data.seek(start)
        data.write(bytes([old[0] ^ 0x10]) if value is None else value)
    return target


def test_a_flipped_bit_in_a_tensor_of_the_same_type_is_found(source, tmp_path):
    convert.convert([source], tmp_path / "a.gguf", "bf16")
    verdict = verify(damaged(tmp_path / "a.gguf", tmp_path / "b.gguf"), [source])
    assert len(verdict.problems) == 1 and NAME in verdict.problems[0] and "differs" in verdict.problems[0]


def test_damaged_scales_are_found_with_and_without_a_source(source, converted, tmp_path):
    nan = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    path = damaged(converted, tmp_path / "b.gguf", offset=0, value=nan)
    for against in ([], [source]):
        (problem,) = verify(path, against).problems
        assert problem == f"{NAME} (Q4_0) holds NaN or infinity."
    large = torch.tensor([60000.0], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    (problem,) = verify(damaged(converted, tmp_path / "c.gguf", offset=0, value=large), [source]).problems
    assert "away from the source" in problem and NAME in problem


def test_another_checkpoint_and_a_cut_one_are_told(source, converted, tmp_path):
    g = wild_files.geometry()
    synthetic.make(tmp_path / "other.safetensors", g, seed=1)
    verdict = verify(converted, [tmp_path / "other.safetensors"])
    assert len(verdict.problems) > 20 and "away from the source" in verdict.problems[-1]
    shapes = {
        name: shape
        for name, shape in structure.checkpoint_shapes(g).items()
        if not name.endswith("transformer_blocks.0." + "ff.net.2.bias")
    }
    wild_files.write_safetensors(tmp_path / "cut.safetensors", shapes, g)
    (problem,) = verify(converted, [tmp_path / "cut.safetensors"]).problems
    assert "1 tensors are not in the source" in problem and "ff.net.2.bias" in problem
    (problem,) = verify(tmp_path / "cut.safetensors", [converted]).problems
    assert "1 tensors of the source are missing" in problem


def test_the_command_says_it_and_its_exit_code_too(capsys, source, converted, tmp_path):
    assert cli.main(["verify", str(converted), "--against", str(source), "-q"]) == 0
    out = capsys.readouterr().out
    assert "are of another type" in out and out.rstrip().endswith("in order") and "largest relative error" in out
    broken = damaged(converted, tmp_path / "b.gguf", offset=0, value=b"\x00\x7e")
    assert cli.main(["verify", str(broken), "--json", "-q"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is False and NAME in data["problems"][0]
    shapes = {
        name: shape
        for name, shape in structure.checkpoint_shapes(wild_files.geometry()).items()
        if not name.endswith("proj_out.bias")
    }
    cut = wild_files.write_safetensors(tmp_path / "cut.safetensors", shapes, wild_files.geometry())
    assert cli.main(["verify", str(cut), "-q"]) == 1
    assert "proj_out.bias" in capsys.readouterr().out
