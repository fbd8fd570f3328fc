"""Run damaged files through the pack and count what becomes of them. As a script: ``python tests/fuzz/harness.py --cases 100000``."""

import argparse
import concurrent.futures
import logging
import multiprocessing
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random

if "ltx2_gguf" not in sys.modules:  # as a script, and in the processes it starts
    sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parent)]
    import packloader  # noqa: F401

import mutate
import targets

HANG_SECONDS = 20
SLOW_SECONDS = 1.0
MEMORY_BASE = 50 << 20


class Hang(BaseException):
    """A case did not end."""


def _alarm(*_):
    raise Hang


def is_sentence(error: BaseException) -> bool:
    """Whether an error is one the pack raises on purpose, with a text that can be shown."""
    ours = type(error).__module__.startswith("ltx2_gguf")
    text = str(error)
    return ours and isinstance(error, ValueError) and bool(text) and text.isprintable() and len(text) <= 2100


def run(corpus, numbers, base_seed=0, on_bad=None) -> Counter:
    """Cases ``numbers``; returns counts of "accepted", "refused", "raw", "hang", "slow", "memory". on_bad(number, seed name, what, details)."""
    counts = Counter()
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _alarm)
    for number in numbers:
        random = Random(f"{base_seed}:{number}")
        seed = corpus.seeds[number % len(corpus.seeds)]
        data = random.choice(mutate.MUTATORS[seed.container])(random, seed.data, seed.header)
        if random.random() < 0.2:
            data = (
                random.choice(mutate.GENERAL)(random, data, min(seed.header, len(data)) or 1)
                if len(data) > 64
                else data
            )
        path = corpus.folder / (seed.name if seed.loader != "index" else f"shards/{seed.name}")
        path.write_bytes(data)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.process_time()
        what, details = "accepted", ""
        try:
            signal.alarm(HANG_SECONDS)
            corpus.run(seed, path)
        except Hang:
            what, details = "hang", traceback.format_exc()
        except Exception as error:  # what is not ours is what is looked for
            what = "refused" if is_sentence(error) else "raw"
            details = traceback.format_exc() if what == "raw" else ""
        finally:
            signal.alarm(0)
        counts[what] += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        if time.process_time() - start > SLOW_SECONDS:
            counts["slow"] += 1
            details = details or f"{time.process_time() - start:.1f} s"
        if grown > 2 * len(data) + MEMORY_BASE:
            counts["memory"] += 1
            details = details or f"{grown / 2**20:.0f} MB for a file of {len(data)} bytes"
        if details and on_bad:
            on_bad(number, seed.name, what, details)
    logging.disable(logging.NOTSET)
    return counts


def _worker(job):
    first, last, base_seed, limit = job
    found = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = targets.Corpus(Path(folder))
        run(corpus, range(20))  # what is imported and allocated once
        counts = run(
            corpus, range(first, last), base_seed, lambda *bad: found.append(bad) if len(found) < limit else None
        )
    return counts, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--show", type=int, default=20, help="failures to print")
    args = parser.parse_args()
    start, step = time.time(), max(1, min(2000, args.cases // args.jobs))
    jobs = [(first, min(first + step, args.cases), args.seed, args.show) for first in range(0, args.cases, step)]
    counts, shown = Counter(), Counter()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for done, (part, found) in enumerate(pool.map(_worker, jobs), 1):
            counts += part
            for number, name, what, details in found:
                place = "\n".join(details.strip().splitlines()[-3:])
                if shown[place] == 0 and len(shown) < args.show:
                    print(f"\ncase {number} ({name}): {what}\n{details}", flush=True)
                shown[place] += 1
            print(f"{done}/{len(jobs)} parts, {dict(counts)}", file=sys.stderr, flush=True)
    total = sum(counts[what] for what in ("accepted", "refused", "raw", "hang"))
    print(
        f"{total} cases in {time.time() - start:.0f} s: "
        + ", ".join(f"{what} {counts[what]}" for what in ("accepted", "refused", "raw", "hang", "slow", "memory"))
    )
    return 1 if counts["raw"] or counts["hang"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
