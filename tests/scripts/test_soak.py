"""A short run of scripts/soak.py: prompts with random cancels leave nothing behind."""

import soak
import wild_files
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline

SETTINGS = {"width": 64, "height": 64, "frames": 9, "steps": 2, "cfg": 1.0, "stg": 0.0}


def test_cancelled_prompts_leave_no_file_no_thread_and_no_memory_behind(tmp_path):
    model = synthetic.make(tmp_path / "model.gguf", wild_files.geometry(), type="q4_0")
    pipeline = LTX2Pipeline.from_files(
        model, wild_files.gemma_gguf(tmp_path / "gemma.gguf"), device="cpu", memory_budget=0.3
    )
    (tmp_path / "clips").mkdir()
    said = []
    rows = soak.soak(pipeline, 16, SETTINGS, tmp_path / "clips", seed=1, report=said.append)
    ended = [row["ended"] for row in rows]
    assert ended.count("done") >= 4 and {f"cancelled in {stage}" for stage in soak.STAGES} <= set(ended)
    found = soak.halves(rows)
    for name in ("files", "threads", "device"):
        before, after = found[name]
        assert after <= before, f"{name} grew from {before} to {after}"
    assert found["rss"][1] - found["rss"][0] < 50  # MB
    assert not any("left behind" in line for line in said) and all(row["device"] == 0 for row in rows)
