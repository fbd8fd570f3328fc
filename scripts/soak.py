"""Generate many short clips, some of them cancelled at random, and print what the process holds: nothing may grow.

    python scripts/soak.py --prompts 200                       small random weights, made on the spot
    python scripts/soak.py --prompts 200 --model m.gguf --text-encoder gemma.gguf --device cuda --size 768x512x121

Columns: run, how it ended, resident memory in MB, open files, threads, bytes still counted on the device. The last line compares the second
half with the first.
"""

import argparse
import gc
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("text", "sample", "decode")


def pack():
    """The pack under the name ``ltx2_gguf``, whatever its folder is called."""
    if "ltx2_gguf" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "ltx2_gguf", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["ltx2_gguf"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["ltx2_gguf"]


class Cancelled(Exception):
    """Raised from a progress callback, as a user's cancel is."""


def resident_mb() -> float:
    """Resident memory of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    """Open file descriptors and mapped files of this process."""
    try:
        mapped = {
            line.split()[-1]
            for line in Path("/proc/self/maps").read_text().splitlines()
            if ".gguf" in line or ".safetensors" in line
        }
        return len(os.listdir("/proc/self/fd")) + len(mapped)
    except OSError:
        return 0


def soak(pipeline, prompts: int, settings: dict, folder: Path, seed: int = 0, report=print) -> list[dict]:
    """Run so many prompts, every other one cancelled at a random place; returns a row per run."""
    chance, rows = random.Random(seed), []
    for number in range(prompts):
        stop = None if chance.random() < 0.5 else (chance.choice(STAGES), chance.randint(1, 2))

        def progress(stage, done, total, stop=stop):
            if stop is not None and stage == stop[0] and done >= min(stop[1], total):
                raise Cancelled

        ended = "done"
        try:
            chunks = pipeline.stream(f"clip number {number}", progress=progress, **settings)
            pipeline.save(chunks, folder / "clip.mp4", overwrite=True)
        except Cancelled:
            ended = f"cancelled in {stop[0]}"
        gc.collect()
        row = {
            "run": number, "ended": ended, "rss": resident_mb(), "files": open_files(), "threads": threading.active_count(),
            "device": pipeline.memory.used,
        }  # fmt: skip
        rows.append(row)
        report(
            f"{row['run']:5} {row['ended']:20} {row['rss']:9.1f} MB {row['files']:4} files {row['threads']:3} threads {row['device']} B"
        )
    left = sorted(path.name for path in folder.iterdir() if path.name != "clip.mp4")
    if left:
        report(f"left behind: {', '.join(left)}")
    return rows


def halves(rows: list[dict]) -> dict:
    """Median of each figure in the second quarter and in the last."""
    quarter = len(rows) // 4
    parts = rows[quarter : 2 * quarter], rows[-quarter:]
    return {
        name: tuple(statistics.median(row[name] for row in part) for part in parts)
        for name in ("rss", "files", "threads", "device")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text-encoder", type=Path, default=os.environ.get("GEMMA_GGUF"), help="default: $GEMMA_GGUF")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-budget", type=float)
    parser.add_argument("--size", default="64x64x9", help="WIDTHxHEIGHTxFRAMES (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="which runs are cancelled, and where")
    args = parser.parse_args()
    pipeline_class = pack().LTX2Pipeline
    width, height, frames = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model is None:
            from ltx2_gguf.ltx2_core.convert import synthetic

            sizes = synthetic.gemma_size(args.text_encoder)
            geometry = synthetic.Geometry.small("2.3", gemma_width=sizes[0], gemma_layers=sizes[1])
            model = synthetic.make(Path(folder) / "model.gguf", geometry, type="q4_0")
        pipeline = pipeline_class.from_files(
            model, args.text_encoder, device=args.device, memory_budget=args.memory_budget
        )
        settings = {"width": width, "height": height, "frames": frames, "steps": args.steps, "cfg": 1.0, "stg": 0.0}
        clips = Path(folder) / "clips"
        clips.mkdir()
        found = halves(soak(pipeline, args.prompts, settings, clips, args.seed))
    print(", ".join(f"{name} {before:g} -> {after:g}" for name, (before, after) in found.items()))


if __name__ == "__main__":
    main()
