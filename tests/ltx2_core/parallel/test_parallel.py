"""Several ranks compute what one process computes, send what the plan says, and end together when one of them dies."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wild_files
from ltx2_gguf.ltx2_core.convert import synthetic
from ltx2_gguf.ltx2_core.parallel import launch, prompts
from ltx2_gguf.ltx2_core.parallel.plan import Work, plan

SUPPORT = Path(__file__).parents[2] / "support"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel") / "model.gguf"
    synthetic.make(path, wild_files.geometry("2.3", num_layers=2, heads=4), type="q8_0")
    wild_files.gemma_gguf(path.with_name("gemma.gguf"))
    return path


@pytest.fixture(scope="module", params=(2, 4))
def found(request, model, tmp_path_factory):
    """What so many ranks found out (tests/support/parallel_ranks.py)."""
    out = tmp_path_factory.mktemp("ranks") / "found.json"
    env = {
        **os.environ,
        "WORLD_SIZE": str(request.param),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        str(SUPPORT / "parallel_ranks.py"),
        str(model),
        str(model.with_name("gemma.gguf")),
        str(out),
    ]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=SUPPORT)
        for rank in range(request.param)
    ]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * request.param
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(out.read_text())


@pytest.mark.slow
def test_ranks_compute_what_one_process_computes(found):
    assert len(found["errors"]) >= 14
    assert {name: error for name, error in found["errors"].items() if not error < 1e-6} == {}


@pytest.mark.slow
def test_ranks_send_what_the_plan_says_and_nothing_else(found):
    assert all(sent == planned for sent, planned in found["sent"])


def test_a_plan_takes_groups_where_they_are_faster():
    work = Work(tokens=6144, width=4096, heads=32, layers=48, parameters=13_000_000_000)
    assert [(p.groups, p.ranks) for p in (plan(work, 1, 2), plan(work, 2, 2), plan(work, 3, 2), plan(work, 2, 4), plan(work, 3, 4))] == [
        (1, 2), (2, 1), (1, 2), (2, 2), (1, 4),
    ]  # fmt: skip
    split = plan(work, 1, 4)
    assert split.bytes_per_block() <= 3 * 4 * work.tokens * work.width * 2 / 4 / 4 * 1.001
    assert "1536 tokens each" in split.text()
    with pytest.raises(ValueError, match="divides 32"):
        plan(work, 1, 3)


# -- processes ------------------------------------------------------------------------------------------------------------------------------

DIES = "import os, signal, sys, time\nif os.environ['RANK'] == '1': {}\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("death", "said"),
    (
        ("print('no such file', file=sys.stderr); sys.exit(1)", "Rank 1 of 3 failed: no such file"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "Rank 1 of 3 was ended by SIGKILL"),
    ),
)
def test_a_rank_that_dies_ends_the_run_with_its_rank_and_cause(death, said):
    start = time.monotonic()
    with pytest.raises(launch.RankError, match=said):
        launch.launch([sys.executable, "-c", DIES.format(death)], 3)
    assert time.monotonic() - start < 55  # the other ranks were ended, not waited for


# -- a file of prompts ----------------------------------------------------------------------------------------------------------------------


def lines(tmp_path, *entries):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries))
    return path


def test_a_file_of_prompts_is_resumed_and_records_errors_by_line(tmp_path):
    path = lines(
        tmp_path, {"prompt": "a", "seed": 1}, "", {"prompt": "b", "output": "b.mp4"}, {"prompt": "c"}, {"prompt": "d"}
    )
    jobs = prompts.read(path, tmp_path)
    assert [(job.line, job.output.name) for job in jobs] == [
        (1, "00001.mp4"),
        (3, "b.mp4"),
        (4, "00004.mp4"),
        (5, "00005.mp4"),
    ]
    assert [job.line for worker in range(2) for job in prompts.share(jobs, worker, 2)] == [1, 4, 3, 5]
    (tmp_path / "b.mp4").write_bytes(b"there")

    def make(job):
        if job.prompt == "c":
            raise ValueError("no\nluck")
        job.output.write_bytes(b"video")
        return {"seed": job.settings.get("seed", 10)}

    records = list(prompts.work(jobs, make, tmp_path / "results.jsonl"))
    assert [record["status"] for record in records] == ["done", "already there", "failed", "done"]
    written = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(record["line"], record.get("error"), record.get("seed")) for record in written] == [
        (1, None, 1),
        (4, "no luck", None),
        (5, None, 10),
    ]
    assert [record["status"] for record in prompts.work(jobs, make, tmp_path / "results.jsonl")] == [
        "already there",
        "already there",
        "failed",
        "already there",
    ]


@pytest.mark.parametrize(
    ("entry", "said"),
    (
        ("{", "Line 1 of .* is no JSON"), ({"seed": 1}, 'no text under "prompt"'), ({"prompt": "a", "sed": 1}, "unknown setting 'sed'"), ("", "holds no prompts"),
        ({"prompt": "a", "seed": "1"}, "gives seed as '1'"), ({"prompt": "a", "output": "../b.mp4"}, "without a folder"), ({"prompt": "a", "images": "b.png"}, "no list"),
    ),
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path, entry, said):
    with pytest.raises(prompts.PromptFileError, match=said):
        prompts.read(lines(tmp_path, entry), tmp_path)


def test_two_lines_with_one_output_are_refused(tmp_path):
    with pytest.raises(prompts.PromptFileError, match="Lines 1 and 2"):
        prompts.read(lines(tmp_path, {"prompt": "a", "output": "x.mp4"}, {"prompt": "b", "output": "x.mp4"}), tmp_path)
