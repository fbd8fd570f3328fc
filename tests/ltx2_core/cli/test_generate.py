"""``ltx2-gguf generate``: what is refused before any weight loads, what is written, and what the file says of itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import wild_files
from ltx2_gguf.ltx2_core import cli, estimate, pipeline
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.sampling.guidance import PRESETS

ROOT = Path(__file__).resolve().parents[3]
SMALL = [
    "--width",
    64,
    "--height",
    64,
    "--frames",
    9,
    "--fps",
    12,
    "--steps",
    2,
    "--cfg",
    1,
    "--stg",
    0,
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return wild_files.Shelf(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    path = tmp_path_factory.mktemp("pictures") / "p.png"
    Image.fromarray(np.full((70, 90, 3), (200, 40, 60), np.uint8)).save(path)
    return path


def run(capsys, *args):
    """(exit code, stdout, stderr) of a command in this process."""
    code = cli.main([str(arg) for arg in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def command(shelf, output, *more, model="ltx-2.3-video-q4_0.gguf", text="gemma-3-12b-it-Q4_K_M.gguf"):
    files = ["--model", shelf[model], "--text-encoder", shelf[text]]
    return ["generate", *files, "--prompt", "a kite", *([] if output is None else ["-o", output]), *SMALL, *more]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.png", ("a.png", 0, 1.0)),
        ("a.png@-1", ("a.png", -1, 1.0)),
        ("a.png@16:0.5", ("a.png", 16, 0.5)),
        ("me@home.png@8", ("me@home.png", 8, 1.0)),
    ],
)
def test_images_are_written_as_path_frame_and_strength(text, expected):
    assert cli.parse_image(text) == expected


def test_a_file_whose_name_holds_an_at_sign_is_taken_as_it_is(tmp_path):
    path = tmp_path / "me@home.png"
    path.write_bytes(b"")
    assert cli.parse_image(str(path)) == (str(path), 0, 1.0)


def test_the_help_tells_the_presets_values(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default: 768; 2.3 HQ: 1920" in text and "default: 24" in text and "a random one, which is printed" in text
    assert all(
        f"{name}: {PRESETS[name].steps}" in text or f"default: {PRESETS[name].steps};" in text for name in PRESETS
    )


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_video_says_what_it_was_made_from(capsys, shelf, picture, tmp_path, suffix):
    from ltx2_gguf.ltx2_core import media

    path = tmp_path / f"v{suffix}"
    code, out, err = run(capsys, *command(shelf, path, "--image", f"{picture}@0:0.9"))
    assert code == 0, err
    seed = int(out.rsplit("seed ", 1)[1])
    assert f"9 frames of 64x64 at 12 fps, seed {seed}" in out and f"Note: seed {seed}" in err and "sample" in err
    frames, rate = media.read_video(path)
    assert frames.shape == (9, 64, 64, 3) and abs(float(rate) - 12) <= 0.5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]

    code, out, _ = run(capsys, "inspect", path, "--json")
    made = json.loads(out)["made_from"]
    assert (
        code == 0 and made["prompt"] == "a kite" and made["seed"] == seed and made["steps"] == 2 and made["cfg"] == 1.0
    )
    assert made["model"] == "ltx-2.3-video-q4_0.gguf" and made["images"] == [
        {"image": "p.png", "frame": 0, "strength": 0.9}
    ]
    assert str(tmp_path) not in out.replace(json.loads(out)["path"], "")
    assert "prompt:" in run(capsys, "inspect", path)[1]

    before = path.read_bytes()
    code, _, err = run(capsys, *command(shelf, path))
    assert code == 1 and "--overwrite" in err and path.read_bytes() == before
    assert run(capsys, *command(shelf, path, "--overwrite", "--seed", seed, "-q"))[0] == 0


def test_two_runs_without_a_seed_get_different_ones(capsys, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.LTX2Pipeline, "save", lambda *_, **__: 0)
    seeds = {json.loads(run(capsys, *command(shelf, tmp_path / "v.mp4", "--json", "-q"))[1])["seed"] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    "more, words",
    [
        (["-o", "v.avi"], "ending in .mp4 or .webm or .gif"),
        (["-o", "."], "ending in"),
        (["-o", "folder.mp4"], "is a folder"),
        (["-o", "no/v.mp4"], "does not exist"),
        (["--image", "gone.png"], "gone.png does not exist"),
        (["--image", "text.png"], "cannot be read as a picture"),
        (["--image", "PICTURE@9"], "Frame 9 is outside the video"),
        (["--image", "PICTURE@-10"], "outside"),
        (["--image", "PICTURE@0:nan"], "strength is nan"),
        (["--image", "PICTURE@0:2"], "strength is 2"),
        (["--width", 100], "multiples of 32"),
        (["--frames", 10], "8k+1"),
        (["--fps", "inf"], "frame rate is inf"),
        (["--fps", "nan"], "frame rate is nan"),
        (["--fps", 0], "above 0"),
        (["--cfg", "nan"], "cfg is nan"),
        (["--stg", "inf"], "stg is inf"),
        (["--seed", 2**64], "between 0 and 18446744073709551615"),
        (["--seed", -1], "between 0 and"),
        (["--memory-budget", "inf"], "memory budget is inf"),
        (["--memory-budget", "-1"], "above 0"),
        (["--device", "gpu"], "Unknown device 'gpu'"),
        (["--device", "cuda:99"], "cuda"),
        (["--schedule", "karras"], "Unknown schedule"),
        (["--vae", "CONNECTOR"], "without the video VAE"),
        (["--projection", "CONNECTOR"], "without the text projection"),
        (["--text-encoder", "CONNECTOR"], "without the Gemma-3 text encoder"),
        (["--model", "CONNECTOR"], "no video transformer"),
        (["--vae", "OLD_VAE"], "holds the video VAE of LTX-2, but"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_any_weight_loads(
    capsys, shelf, picture, tmp_path, monkeypatch, more, words
):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    settings_need_the_model = more[0] not in (
        "-o",
        "--vae",
        "--projection",
        "--text-encoder",
        "--model",
        "--device",
        "--memory-budget",
    )
    for loader in ("load_text_encoder", "load_vae", *(() if settings_need_the_model else ("load_dit",))):
        monkeypatch.setattr(pipeline, loader, load)
    names = {"CONNECTOR": "connector.safetensors", "OLD_VAE": "LTX2_video_vae_bf16.safetensors"}
    more = [shelf[names[word]] if word in names else str(word).replace("PICTURE", str(picture)) for word in more]
    code, out, err = run(capsys, *command(shelf, "v.mp4"), *more)
    assert code == 1 and out == "" and words in err, err
    assert err.startswith("ltx2-gguf: ") and err.count("\n") == 1 and "Traceback" not in err and "Unexpected" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "text.png"]


@pytest.mark.parametrize("lacking", ["vae", "projection", "connector"])
def test_a_model_that_lacks_a_part_is_told_what_to_add(capsys, shelf, tmp_path, monkeypatch, lacking):
    full = structure.checkpoint_shapes(wild_files.geometry(), **{lacking: False})
    path = wild_files.write_safetensors(tmp_path / "m.safetensors", full, wild_files.geometry())
    monkeypatch.setattr(pipeline, "load_dit", None)  # not reached
    code, _, err = run(
        capsys,
        "generate",
        "--model",
        path,
        "--text-encoder",
        shelf["gemma-3-12b-it-Q4_K_M.gguf"],
        "--prompt",
        "x",
        "-o",
        tmp_path / "v.mp4",
    )
    assert code == 1 and f"as '{lacking}'" in err and err.count("\n") == 1


def test_a_projection_for_another_gemma_is_refused(capsys, shelf, tmp_path):
    g = wild_files.geometry("2.3", gemma_width=128)
    path = wild_files.write_safetensors(tmp_path / "m.safetensors", structure.checkpoint_shapes(g), g)
    code, _, err = run(
        capsys,
        "generate",
        "--model",
        path,
        "--text-encoder",
        shelf["gemma-3-12b-it-Q4_K_M.gguf"],
        "--prompt",
        "x",
        "-o",
        tmp_path / "v.mp4",
    )
    assert code == 1 and "takes 384 numbers per token" in err and "gives 768" in err


def test_a_dry_run_checks_estimates_and_makes_nothing(capsys, shelf, tmp_path):
    code, out, err = run(capsys, *command(shelf, tmp_path / "v.mp4", "--dry-run"))
    assert code == 0 and "Would make 9 frames of 64x64" in out and "memory:" in out and "time:" in out, err
    code, out, _ = run(capsys, *command(shelf, None, "--dry-run", "--json"))
    data = json.loads(out)
    assert code == 0 and data["estimate"]["tokens"] == 8 and data["estimate"]["passes"] == 2 and data["output"] is None
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        cli.main([str(arg) for arg in command(shelf, None)])


def test_the_arithmetic_is_what_torch_counts(shelf):
    """Beside torch's own counter of operations, on dense weights (packed products are not seen by it)."""
    from torch.utils.flop_counter import FlopCounterMode

    from ltx2_gguf.ltx2_core.loading.transformer import load_dit
    from ltx2_gguf.ltx2_core.loading.vae import load_vae

    path = shelf["ltx-2.3-22b-dev.safetensors"]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's fused attention
        dit, vae = load_dit(path, dtype=torch.float32), load_vae(path, dtype=torch.float32)
        latent, context = torch.randn(1, 128, 3, 8, 8), torch.randn(1, 1024, dit.config.context_dim)
        with FlopCounterMode(display=False) as counter:
            dit.velocity(latent, 0.5, context, 24.0)
        assert estimate.pass_flops(dit, 192) == pytest.approx(counter.get_total_flops(), rel=0.1)
        with FlopCounterMode(display=False) as counter:
            vae.decode(latent[:, :, :, :2, :2])
        assert estimate.decoder_flops(vae.config, 3, 2, 2) == pytest.approx(
            counter.get_total_flops(), rel=0.35
        )  # plus padding in time


def test_a_full_disk_in_the_middle_is_one_sentence_and_leaves_nothing(capsys, shelf, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code, _, err = run(capsys, *command(shelf, tmp_path / "v.mp4", "-q", "--seed", 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1 and err.count("\n") == 1 and "v.mp4" in err and "Unexpected" not in err
    assert list(tmp_path.iterdir()) == [] and shutil.disk_usage(tmp_path).free


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_while_sampling_leaves_nothing(shelf, tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "ltx2_gguf").symlink_to(ROOT, target_is_directory=True)
    (tmp_path / "out").mkdir()
    arguments = map(str, command(shelf, tmp_path / "out" / "v.mp4", "--steps", 1000))
    process = subprocess.Popen(
        [sys.executable, "-m", "ltx2_gguf.ltx2_core.cli", *arguments], env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said = ""
    while "sample" not in said:  # the bar of the sampling stage
        letter = process.stderr.read(1)
        assert letter, said
        said += letter
    assert len(list((tmp_path / "out").iterdir())) == 1  # the temporary file
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 143 and "terminated" in rest
    assert list((tmp_path / "out").iterdir()) == []


def test_a_bad_file_of_prompts_is_told_before_anything_is_loaded(capsys, shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_dit", None)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": 3}')
    files = ["--model", shelf["ltx-2.3-video-q4_0.gguf"], "--text-encoder", shelf["gemma-3-12b-it-Q4_K_M.gguf"]]
    code, _, err = run(capsys, "generate", *files, "--prompts", tmp_path / "p.jsonl", "--output-dir", tmp_path)
    assert code == 1 and "Line 2 of" in err and err.count("\n") == 1
