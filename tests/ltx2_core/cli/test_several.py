"""``generate`` on several processes and on files of prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import wild_files
from ltx2_gguf.ltx2_core import cli
from ltx2_gguf.ltx2_core.convert import synthetic

ROOT = Path(__file__).resolve().parents[3]
QUICK = ("--width", 64, "--height", 64, "--frames", 9, "--steps", 2, "--cfg", 1, "--stg", 0, "--quiet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The options that name a tiny model and its text encoder."""
    folder = tmp_path_factory.mktemp("several")
    synthetic.make(folder / "model.gguf", wild_files.geometry("2.3", num_layers=2, heads=4), type="q8_0")
    wild_files.gemma_gguf(folder / "gemma.gguf")
    return ("--model", folder / "model.gguf", "--text-encoder", folder / "gemma.gguf", "--device", "cpu")


def run(capsys, *args):
    code = cli.main([str(arg) for arg in ("generate", *args)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_a_file_of_prompts_is_made_line_by_line_and_gone_on_with(capsys, files, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "a", "seed": 3}\n{"prompt": "b", "width": 63, "output": "wide.gif"}\n{"prompt": "c", "output": "c.gif"}\n'
    )
    command = (*files, *QUICK, "--prompts", prompts, "--output-dir", tmp_path / "clips")
    code, _, said = run(capsys, *command)
    assert code == 1 and "line 2: failed" in said and "63" in said
    assert {p.name for p in (tmp_path / "clips").iterdir()} == {"00001.mp4", "c.gif", "results-0.jsonl"}
    first = (tmp_path / "clips" / "00001.mp4").read_bytes()
    prompts.write_text(prompts.read_text().replace("63", "64"))
    code, out, _ = run(capsys, *command, "--json")
    assert code == 0 and [json.loads(line)["status"] for line in out.splitlines()] == [
        "already there",
        "done",
        "already there",
    ]
    assert (tmp_path / "clips" / "00001.mp4").read_bytes() == first


def test_workers_take_their_share_of_the_lines(capsys, files, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "output": f"{p}.gif"}) + "\n" for p in "abc"))
    code, _, _ = run(capsys, *files, *QUICK, "--prompts", prompts, "--output-dir", tmp_path, "--worker", "1/2")
    assert code == 0 and {p.name for p in tmp_path.iterdir()} == {"prompts.jsonl", "b.gif", "results-1.jsonl"}
    assert run(capsys, *files, "--prompts", prompts, "--output-dir", tmp_path, "--worker", "2/2")[2].startswith(
        "ltx2-gguf: The worker '2/2'"
    )


def test_the_plan_is_told_without_making_anything(capsys, files):
    code, out, _ = run(capsys, *files, "--prompt", "a", "--gpus", 4, "--explain")
    assert (
        code == 0 and out.startswith("4 ranks, 3 passes per step over 6144 tokens.") and "MiB per block and pass" in out
    )


@pytest.mark.parametrize(
    ("options", "said"),
    ((("--prompt", "a", "--prompts", "x"), "or a file of prompts"), (("--prompts", "x"), "--output-dir"), (("--prompt", "a", "--gpus", 0), "1 or more"), (("--prompt", "a", "--explain"), "name N")),
)  # fmt: skip
def test_what_does_not_fit_together_is_wrong_usage(capsys, files, options, said):
    with pytest.raises(SystemExit) as ended:
        run(capsys, *files, *options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_the_video_of_one(files, tmp_path):
    (tmp_path / "ComfyUI-LTX2-GGUF").symlink_to(ROOT, target_is_directory=True)

    def generate(name, *options):
        command = [
            sys.executable,
            "-m",
            "ComfyUI-LTX2-GGUF.ltx2_core.cli",
            "generate",
            *files,
            "--prompt",
            "a",
            "--seed",
            5,
            *QUICK,
            "-o",
            tmp_path / name,
            *options,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(c) for c in command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )

    done = generate("two.gif", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    assert "two.gif: 9 frames" in done.stdout
    assert generate("one.gif").returncode == 0
    assert (tmp_path / "one.gif").read_bytes() == (tmp_path / "two.gif").read_bytes()
    broken = generate("three.gif", "--gpus", 2, "--width", 63)
    assert broken.returncode == 1 and "Rank" in broken.stderr and not (tmp_path / "three.gif").exists()
