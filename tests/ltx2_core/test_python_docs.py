"""The examples of docs/python.md run as they stand, on small files of the same names and at a small size."""

import re
from pathlib import Path

import numpy as np
import pytest

import ltx2_gguf
import wild_files
from ltx2_gguf.ltx2_core import media, pipeline
from ltx2_gguf.ltx2_core.convert import synthetic

PAGE = Path(__file__).resolve().parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"## (.+)\n[\s\S]*?```python\n([\s\S]*?)```", PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("python")
    wild_files.gemma_gguf(folder / "gemma-3-12b-it-Q4_K_M.gguf")
    synthetic.make(folder / "ltx-2.3-q4_0.gguf", wild_files.geometry(), type="q4_0")
    for name in ("cat.png", "cat-end.png"):
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / name)
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(4, 256), f"{layer}.lora_B.weight": torch.randn(256, 4)},
        folder / "camera.safetensors",
    )
    return folder


@pytest.fixture
def small(monkeypatch):
    """Whatever size an example asks for, it is made at a small one, in two steps, within a budget that small weights need."""
    decide, runs = pipeline.decide, []

    def quick(*args, **given):
        runs.append(given)
        return decide(*args, **{**given, "width": 64, "height": 64, "frames": 9, "steps": 2})

    monkeypatch.setattr(pipeline, "decide", quick)
    return runs


def test_the_page_has_its_examples():
    assert [title for title, _ in EXAMPLES] == [
        "Prompt to video", "Images to video, two key frames", "LoRA", "Frames as they are made", "A memory budget",
    ]  # fmt: skip


@pytest.mark.parametrize("title, code", EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_an_example_runs(folder, small, monkeypatch, capsys, title, code):
    monkeypatch.chdir(folder)
    names = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert small and type(names["pipeline"]) is ltx2_gguf.LTX2Pipeline
    saved = re.findall(r'save\(\w+, "(.+?)"', code)
    for name in saved:
        assert len(media.read_video(folder / name)[0]) == 9
        assert media.read_metadata(folder / name)["prompt"] in code
    assert saved or title == "LoRA"
    if title == "LoRA":
        assert (names["with_lora"] - names["weaker"]).abs().max() > 0 and names["pipeline"].loras == []
    if title.startswith("Images"):
        assert [image["frame"] for image in names["pipeline"].made["images"]] == [0, -1]
    if title.startswith("A memory"):
        assert float(capsys.readouterr().out.split()[0]) <= 6


def test_the_package_gives_its_names_without_importing_them_first():
    assert ltx2_gguf.__version__.count(".") == 2
    assert ltx2_gguf.ImageInput("a.png", 8, 0.5).frame == 8
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ltx2_gguf.Nothing  # noqa: B018
