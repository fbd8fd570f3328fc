"""The scripts that write the measured pages of docs/ run, and the committed pages have what they write."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *args):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def first_columns(page, columns):
    """The leading cells of every table row of the measured table."""
    rows = [
        line.strip("| \n").split(" | ")
        for line in page.read_text().splitlines()
        if line.startswith("| ") and not line.startswith("|---")
    ]
    return [tuple(row[:columns]) for row in rows if len(row) >= 6]


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmarks on the import path, as it is for its scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_page_of_results_is_what_its_script_writes_from_the_committed_files(benchmarks):
    import report

    page = (ROOT / "benchmarks" / "results" / "README.md").read_text(encoding="utf-8")
    assert report.document(report.load([ROOT / "benchmarks" / "results" / "h100"])) == page


def test_goals_are_judged_from_one_run(benchmarks):
    import goals

    def row(what, weights, ms, **more):
        return {"what": what, "format": weights, "tokens": 6144, "ms": ms, **more}

    run = {
        "results": [
            row("ours exact", "Q4_0", 280.0) | {"x floor": 1.2},
            row("ours fast mixed", "Q4_0", 220.0) | {"x host bf16": 0.59, "cosine": 0.9992},
        ]
    }
    assert [(line[0], line[4], line[5]) for line in goals.rows({"step": run})] == [
        ("exact step, × floor", "1.2", "**missed**"),
        ("fast step, × host in bf16", "0.59", "kept"),
        ("fast, cosine with exact", "0.9992", "kept"),
    ]


def test_a_step_is_measured_and_its_results_are_there_after_every_format(tmp_path):
    options = ("--tiny", "--no-host", "--device", "cpu", "--tokens", 32, "--repeats", 1, "--formats", "BF16", "Q8_0")
    run("bench_step.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [(row["what"], row["format"]) for row in rows] == [
        ("floor", "BF16"),
        ("ours exact", "BF16"),
        ("ours exact", "Q8_0"),
    ]
    assert all(row["x floor"] > 0 and row["ms"] > 0 for row in rows) and rows[2]["x ours bf16"] > 0


@pytest.mark.slow
def test_the_fidelity_page_is_what_its_script_writes(host, tmp_path):
    if '"0.30.0"' not in (host / "comfyui_version.py").read_text(encoding="utf-8"):
        pytest.skip("the page compares with ComfyUI 0.30.0")
    run("fidelity.py", "--out", tmp_path / "fidelity.md")
    committed = ROOT / "docs" / "fidelity.md"
    assert first_columns(tmp_path / "fidelity.md", 5) == first_columns(committed, 5)
    for line in (tmp_path / "fidelity.md").read_text().splitlines():
        error = re.search(r"\| float32 \| \w+ \| (\S+) \|$", line)
        assert error is None or float(error[1]) < 2e-5, line


@pytest.mark.slow
def test_the_quantisation_page_is_what_its_script_writes(tmp_path):
    run("quant_quality.py", "--layers", 2, "--grid", 1, 2, 3, "--out", tmp_path / "quantisation.md")
    assert first_columns(tmp_path / "quantisation.md", 1) == first_columns(ROOT / "docs" / "quantisation.md", 1)
    assert (tmp_path / "images" / "quantisation.png").stat().st_size > 10_000


def test_every_bfloat16_row_of_the_committed_page_is_within_twice_the_reference():
    rows = re.findall(r"ours (\S+), reference (\S+) \|", (ROOT / "docs" / "fidelity.md").read_text())
    assert len(rows) >= 4 and all(float(ours) <= 2 * float(theirs) for ours, theirs in rows)
