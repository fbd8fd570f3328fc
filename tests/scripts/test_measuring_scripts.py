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
        [sys.executable, ROOT / "benchmarks" / script, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def first_columns(page, columns):
    """The leading cells of every table row of the measured table."""
    rows = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [tuple(row[:columns]) for row in rows if len(row) >= 6]


@pytest.fixture
def benchmarks(monkeypatch):
    """The folder of benchmarks on the import path, as it is for its scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_the_performance_page_has_the_tables_of_the_committed_results(benchmarks):
    import report

    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert report.fill(page, report.load([ROOT / "benchmarks" / "results" / "h100"])) == page
    with pytest.raises(ValueError, match="begin environment"):
        report.fill("no markers", {})


def test_a_run_with_the_hosts_rows_needs_no_other_run_and_judges_the_fast_mode_once(benchmarks):
    import goals
    import report

    def row(what, weights, ms, **more):
        return {"what": what, "format": weights, "tokens": 6144, "ms": ms, **more}

    ours = row("ours exact", "Q4_0", 280.0) | {"x host bf16": 0.74, "eager / ours": 1.7, "pack / ours": 2.1}
    fast = [row(f"ours fast {kind}", "Q4_0", 220.0) | {"x host bf16": 0.59, "cosine": 0.9992} for kind in ("mixed", "fp8", "int8")]
    run = {"environment": {}, "results": [ours, *fast, row("host", "BF16", 378.0)]}
    assert report.HOST_ELSEWHERE not in report.step(run)
    assert report.HOST_ELSEWHERE in report.step({"results": [ours]})
    found = [line for line in goals.rows({"step": run}) if "/ this" in line[0] or "fast" in line[0]]
    assert [(line[0], line[4], line[5]) for line in found] == [
        ("exact, plain eager / this", "1.700", "**missed**"),
        ("exact, ComfyUI-GGUF's / this", "2.100", "reached"),
        ("fast, × host in bf16", "0.590", "reached"),
        ("fast, cosine with exact", "0.9992", "reached"),
    ]


def test_a_step_is_measured_and_its_results_are_there_after_every_format(tmp_path):
    options = ("--tiny", "--no-host", "--device", "cpu", "--tokens", 32, "--repeats", 1, "--formats", "BF16", "Q8_0")
    run("bench_step.py", *options, "--out", tmp_path)
    rows = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [(row["what"], row["format"]) for row in rows] == [("floor", "BF16"), ("ours exact", "BF16"), ("ours exact", "Q8_0")]
    assert all(row["x floor"] > 0 and row["ms"] > 0 for row in rows) and rows[2]["x ours bf16"] > 0


@pytest.mark.slow
def test_the_fidelity_page_is_what_its_script_writes(host, tmp_path):
    run("fidelity.py", "--out", tmp_path / "fidelity.md")
    committed = ROOT / "docs" / "fidelity.md"
    assert first_columns(tmp_path / "fidelity.md", 5) == first_columns(committed, 5)
    for line in (tmp_path / "fidelity.md").read_text().splitlines():
        error = re.search(r"\| float32 \| \w+ \| (\S+) \|$", line)
        assert error is None or float(error[1]) < 2e-5, line


@pytest.mark.slow
def test_the_quantisation_page_is_what_its_script_writes(tmp_path):
    run("quant_quality.py", "--layers", 2, "--grid", 1, 2, 3, "--out", tmp_path / "quantisation.md")
    assert first_columns(tmp_path / "quantisation.md", 2) == first_columns(ROOT / "docs" / "quantisation.md", 2)
    assert (tmp_path / "images" / "quantisation.png").stat().st_size > 10_000


def test_every_bfloat16_row_of_the_committed_page_is_within_twice_the_reference():
    rows = re.findall(r"ours (\S+), reference (\S+) \|", (ROOT / "docs" / "fidelity.md").read_text())
    assert len(rows) >= 4 and all(float(ours) <= 2 * float(theirs) for ours, theirs in rows)


def test_the_few_row_figures_are_those_of_the_kernels_that_are_chosen(benchmarks):
    """The goals name the fastest of the sweep; quant/kernels/skinny_choice.py was written after it."""
    import json

    import goals

    from ltx2_gguf.quant.kernels import skinny_choice

    sweep = json.loads((ROOT / "benchmarks" / "results" / "h100" / "sweep_skinny.json").read_text(encoding="utf-8"))
    best = {row["rows"]: row for row in sweep["results"]["best"] if row["format"] == "Q4_0" and row["shape"] == "36864x4096"}
    assert sorted(best) == sorted(goals.SKINNY_ROWS)
    for rows, row in best.items():
        kernel, tile = skinny_choice.choose("Q4_0", rows, 36864, True)
        assert row["best"] == f"{kernel} {'/'.join(map(str, tile))}"
