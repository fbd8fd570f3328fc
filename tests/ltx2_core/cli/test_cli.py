import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wild_files
from ltx2_gguf.ltx2_core import cli
from ltx2_gguf.ltx2_core.convert import convert, synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.weights import open_weights

ROOT = Path(__file__).resolve().parents[3]
HEADER = ROOT / "tests" / "data" / "ltx-2.3-22b-dev.header.json.gz"
COMMANDS = ("inspect", "convert", "strip", "verify", "generate", "lora", "make-synthetic", "compare-reference")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return wild_files.Shelf(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that holds the pack under the name a git clone gives it, hyphens included."""
    folder = tmp_path_factory.mktemp("custom_nodes")
    try:
        (folder / "ComfyUI-LTX2-GGUF").symlink_to(ROOT, target_is_directory=True)
    except OSError:
        pytest.skip("symbolic links are not allowed here")
    return folder


def run(capsys, *args):
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def bare_python(checkout, *args, **kwargs):
    """The command in a Python without any package beside the standard library."""
    command = [sys.executable, "-S", "-m", "ComfyUI-LTX2-GGUF.ltx2_core.cli", *map(str, args)]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, **kwargs)


# -- how it is started --------------------------------------------------------------------------------------------------------------------


def test_it_runs_as_a_module_of_a_folder_with_hyphens_without_numpy_or_torch(checkout):
    done = bare_python(checkout, "convert", HEADER, "--type", "q4_0", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "Keep 1758 tensors" in done.stdout and "Output: 1758 of 5947 tensors" in done.stdout
    missing = subprocess.run([sys.executable, "-S", "-c", "import numpy"], capture_output=True)
    assert missing.returncode != 0  # the Python above really has no numpy


def test_the_self_test_needs_no_file_and_no_package(checkout):
    done = bare_python(checkout, "convert", "--self-test")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "Self-test passed."


def test_a_command_that_needs_torch_says_so_where_there_is_none(checkout, shelf):
    done = bare_python(checkout, "strip", shelf["connector.safetensors"], "out.gguf")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1
        and "needs the Python package 'torch'" in done.stderr
        and "pip install torch" in done.stderr
    )


# -- help and exit codes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        cli.main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert leaving.value.code == 0 and "examples:" in text and f"ltx2-gguf {command or ''}".strip() in text


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["inspect"],
        ["convert"],
        ["convert", "x.safetensors"],
        ["convert", "x", "y.gguf", "--type", "q9_k"],
        ["strip", "x"],
        ["lora", "x"],
        ["generate", "--prompt", "x"],
    ],
)
def test_wrong_usage_exits_with_2(capsys, args):
    with pytest.raises(SystemExit) as leaving:
        cli.main(args)
    assert leaving.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], *([command] for command in COMMANDS)])
def test_a_bare_call_shows_the_whole_help(capsys, args):
    with pytest.raises(SystemExit) as leaving:
        cli.main(args)
    assert leaving.value.code == 2 and "examples:" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    import ltx2_gguf

    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0 and capsys.readouterr().out.strip() == f"ltx2-gguf {ltx2_gguf.__version__}"
    assert f'version = "{ltx2_gguf.__version__}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_help_shows_default_values(capsys):
    for command, words in (
        ("convert", "(default: q8_0)"),
        ("make-synthetic", "(default: 18)"),
        ("compare-reference", "(default: float32)"),
    ):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert words in " ".join(capsys.readouterr().out.split())


def test_what_nobody_expected_is_one_sentence_that_says_how_to_report_it(capsys, shelf, monkeypatch):
    def broken(path):
        raise TypeError("unsupported operand\nin two lines")

    monkeypatch.setattr("ltx2_gguf.ltx2_core.cli.inspect_file.inspect", broken)
    code, out, err = run(capsys, "inspect", "x.gguf")
    assert code == 1 and out == "" and err.count("\n") == 1
    assert "Unexpected error (TypeError: unsupported operand in two lines)" in err and "/issues" in err and "-v" in err


def test_a_librarys_value_error_is_not_taken_for_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr("ltx2_gguf.ltx2_core.cli.inspect_file.inspect", lambda path: json.loads("{"))
    assert "Unexpected error (JSONDecodeError" in run(capsys, "inspect", "x.gguf")[2]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_exits_with_143_and_leaves_nothing(capsys, tmp_path, shelf, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(convert, "_encode", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = run(capsys, "convert", shelf["ltx-2.3-22b-dev.safetensors"], tmp_path / "out.gguf", "-q")
    assert code == 143 and "terminated" in err and list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "args, words",
    [
        (["inspect", "nothing.gguf"], "does not exist"),
        (["convert", "nothing.safetensors", "--dry-run"], "does not exist"),
        (["convert", "nothing.safetensors", "out.gguf"], "does not exist"),
        (["strip", "nothing.gguf", "out.gguf"], "does not exist"),
        (["make-synthetic", "out.bin"], "ending in .safetensors or .gguf"),
        (["make-synthetic", "out.safetensors", "--type", "q4_0"], "needs a .gguf name"),
        (
            ["generate", "--model", "nothing.gguf", "--text-encoder", "x.gguf", "--prompt", "x", "-o", "out.mp4"],
            "does not exist",
        ),
        (
            [
                "generate",
                "--model",
                "m.gguf",
                "--text-encoder",
                "x.gguf",
                "--prompt",
                "x",
                "-o",
                "out.mp4",
                "--image",
                "no.png@x",
            ],
            "PATH@FRAME:STRENGTH",
        ),
    ],
)
def test_an_error_is_one_sentence_on_stderr_and_exit_code_1(capsys, tmp_path, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *args)
    assert code == 1 and out == "" and words in err
    assert err.startswith("ltx2-gguf: ") and err.count("\n") == 1 and "Traceback" not in err


def test_an_interruption_exits_with_130_and_leaves_nothing(capsys, tmp_path, shelf, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_encode", interrupt)
    code, _, err = run(capsys, "convert", shelf["ltx-2.3-22b-dev.safetensors"], tmp_path / "out.gguf", "-q")
    assert code == 130 and "interrupted" in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command, name",
    [("convert", "out.gguf"), ("strip", "out.gguf"), ("lora", "out.safetensors"), ("make-synthetic", "out.gguf")],
)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(capsys, shelf, tmp_path, command, name):
    """A limit on file sizes stands for the full disk."""
    resource = pytest.importorskip("resource")
    sources = {
        "convert": shelf["ltx-2.3-22b-dev.safetensors"], "strip": shelf["ltx-2.3-22b-dev-Q4_K_M.gguf"], "lora": tmp_path / "in" / "lora.safetensors",
    }  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    weight = torch.randn(4, 256)
    save_file(
        {
            f"transformer.transformer_blocks.0.attn1.to_q.lora_{m}.weight": w.contiguous()
            for m, w in (("A", weight), ("B", weight.T))
        },
        tmp_path / "in" / "lora.safetensors",
    )
    arguments = [command, *([sources[command]] if command in sources else []), tmp_path / "out" / name]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code, _, err = run(capsys, *arguments, *([] if command == "make-synthetic" else ["-q"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and err.count("\n") == 1 and name in err and "Unexpected" not in err
    assert list((tmp_path / "out").iterdir()) == []


def test_inspect_needs_no_package_at_all(checkout, shelf):
    """Without site-packages there is neither torch nor numpy, so it answers quickly."""
    for name in (
        "connector.safetensors",
        "ltx-2.3-22b-dev-Q4_K_M.gguf",
        "gemma-3-12b-it-Q4_K_M.gguf",
        "LTX2_video_vae_bf16.safetensors",
    ):
        done = bare_python(checkout, "inspect", shelf[name])
        assert done.returncode == 0 and name in done.stdout, done.stderr


# -- commands -----------------------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_is_what_it_needs_and_where_it_goes(capsys, shelf):
    code, out, _ = run(capsys, "inspect", shelf["ltx-2.3-22b-dev-Q4_K_M.gguf"])
    assert code == 0
    for words in (
        "LTX-2.3 video transformer",
        "architecture 'ltxv'",
        "layers 1, heads 2, head dim 128, width 256",
        "Q4_K x",
        "sound stream",
        "'model_file' of",
        "still needs",
    ):
        assert words in out
    assert "text projection: a 'text_projection'" in out and "embeddings connector: an" not in out


def test_inspect_names_a_refused_file_and_still_succeeds(capsys, shelf):
    code, out, _ = run(capsys, "inspect", shelf["mmproj-BF16.gguf"])
    assert code == 0 and "vision part" in out and "goes into" not in out


def test_inspect_as_json(capsys, shelf):
    code, out, _ = run(capsys, "inspect", shelf["ltx-2-19b-dev-Q4_K_M.gguf"], "--json")
    data = json.loads(out)
    assert (
        code == 0
        and data["usable"]
        and data["version"] == "2.0"
        and data["kind"] == "dit"
        and data["audio"]["tensors"] > 50
    )
    assert data["missing"] == ["connector", "projection", "vae", "gemma"] and data["geometry"]["width"] == 256
    assert sum(data["formats"].values()) == sum(part["tensors"] for part in data["parts"].values())


def test_inspect_of_several_files_reports_the_readable_ones_and_fails_for_the_others(capsys, shelf, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    code, out, err = run(
        capsys,
        "inspect",
        shelf["connector.safetensors"],
        tmp_path / "broken.gguf",
        shelf["Llama-3.2-3B-Q8_0.gguf"],
        "--json",
    )
    assert code == 1 and [report["usable"] for report in json.loads(out)] == [True, False] and "broken.gguf" in err


def test_dry_run_as_json_of_safetensors_and_of_gguf(capsys, shelf):
    code, out, _ = run(capsys, "convert", HEADER, "--type", "q5_1", "--dry-run", "--json")
    data = json.loads(out)
    assert code == 0 and (data["total_tensors"], data["kept_tensors"], data["target"]) == (5947, 1758, "q5_1")
    code, out, _ = run(
        capsys,
        "convert",
        shelf["ltx-2.3-22b-dev-Q4_K_M.gguf"],
        "--with",
        shelf["LTX23_video_vae_bf16.safetensors"],
        "--type",
        "q4_0",
        "--dry-run",
        "--json",
    )
    data = json.loads(out)
    assert (
        code == 0
        and data["version"] == "2.3"
        and {"VAE", "transformer", "audio transformer"} <= {group["part"] for group in data["groups"]}
    )


def test_convert_writes_the_file_and_says_what_it_kept(capsys, shelf, tmp_path):
    source = shelf["ltx-2.3-22b-dev.safetensors"]
    code, out, err = run(capsys, "convert", source, tmp_path / "x.gguf", "--type", "Q4_0")
    kept = len(structure.checkpoint_shapes(wild_files.geometry()))
    assert code == 0 and f"{kept} of " in out and "100%" in err
    assert len(open_weights(tmp_path / "x.gguf").names()) == kept
    code, _, err = run(capsys, "convert", source, tmp_path / "x.gguf", "-q")
    assert code == 1 and "--overwrite" in err
    code, out, err = run(capsys, "convert", source, tmp_path / "x.gguf", "-q", "--overwrite", "--json")
    assert code == 0 and err == "" and json.loads(out)["target"] == "q8_0"


def test_convert_notes_what_the_result_lacks(capsys, shelf, tmp_path):
    code, _, err = run(capsys, "convert", shelf["ltx-2.3-22b-dev-BF16.gguf"], tmp_path / "x.gguf", "-q")
    assert code == 0 and "Note: no VAE inside" in err and "Note: no text projection inside" in err


def test_strip_reports_what_it_saved(capsys, shelf, tmp_path):
    code, out, _ = run(capsys, "strip", shelf["ltx-2.3-22b-dev-Q4_K_M.gguf"], tmp_path / "v.gguf", "-q", "--json")
    data = json.loads(out)
    assert code == 0 and data["dropped_tensors"] > 50 and data["output_bytes"] < data["source_bytes"]
    code, _, err = run(capsys, "strip", tmp_path / "v.gguf", tmp_path / "w.gguf", "-q")
    assert code == 1 and "holds no sound" in err


@pytest.mark.parametrize("version", ["2.0", "2.3"])
@pytest.mark.parametrize("name, type", [("t.safetensors", "f16"), ("t.gguf", "q5_1")])
def test_make_synthetic_makes_what_was_asked_for(capsys, tmp_path, version, name, type):
    args = [
        "make-synthetic",
        tmp_path / name,
        "--version",
        version,
        "--type",
        type,
        "--layers",
        1,
        "--connector-layers",
        1,
        "--gemma-width",
        64,
        "--gemma-layers",
        2,
        "--audio",
        "--no-vae",
    ]
    code, out, _ = run(capsys, *args)
    assert code == 0 and f"synthetic LTX-{version}" in out
    code, out, _ = run(capsys, "inspect", tmp_path / name, "--json")
    data = json.loads(out)
    assert (
        data["version"] == version
        and data["audio"]["tensors"] > 50
        and "vae" not in data["parts"]
        and {"dit", "connector", "projection"} == set(data["parts"])
    )


def test_make_synthetic_fits_the_projection_to_a_given_gemma(capsys, tmp_path, shelf):
    gemma = shelf["gemma-3-12b-it-Q4_K_M.gguf"]
    assert run(capsys, "make-synthetic", tmp_path / "t.gguf", "--gemma", gemma, "--layers", 1, "--no-vae")[0] == 0
    assert (
        open_weights(tmp_path / "t.gguf").shape("text_embedding_projection.video_aggregate_embed.weight")[1] == 256 * 3
    )
    code, _, err = run(capsys, "make-synthetic", tmp_path / "u.gguf", "--gemma", shelf["Llama-3.2-3B-Q8_0.gguf"])
    assert code == 1 and "'llama'" in err


def test_the_same_seed_makes_the_same_tensors_in_every_container(tmp_path):
    g = wild_files.geometry()
    synthetic.make(tmp_path / "a.safetensors", g, type="f32", audio=True)
    synthetic.make(tmp_path / "b.gguf", g, type="f32")
    a, b = open_weights(tmp_path / "a.safetensors"), open_weights(tmp_path / "b.gguf")
    name = "transformer_blocks.0.attn1.to_q.weight"
    assert (a.load(structure.DIT_PREFIX + name) == b.load(name)).all()
