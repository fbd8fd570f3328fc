"""The scripts that write docs/fidelity.md and docs/quantisation.md run, and the committed pages have what they write."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *args):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def first_columns(page, columns):
    """The leading cells of every table row of the measured table."""
    rows = [line.strip("| \n").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ") and not line.startswith("|---")]
    return [tuple(row[:columns]) for row in rows if len(row) >= 6]


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
