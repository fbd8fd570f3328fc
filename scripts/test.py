#!/usr/bin/env python3
"""Set up everything and pass the tests: ``python scripts/test.py [--fast] [--host FOLDER] [pytest arguments]``.

``--fast`` leaves the slow tests out. ``--host FOLDER`` runs what touches the host against another ComfyUI tree, in an environment with that
host's own pins; ``--hosts`` runs everything on the pinned host, then that part on every tree archived beside the checkout.
``python scripts/test.py --run SCRIPT [arguments]`` runs a script (a benchmark, the fidelity table) in the same environment instead.

The first run installs a host, torch and the reference packages (several minutes, about 9 GB); later runs start at once.
"""

import argparse
import os
import subprocess
import sys

import environment

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
QUIET_THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}  # threads that wait for each other must not take another worker's core


def pytest(extra, host=None):
    """Run pytest in the environment of `host` (None: the pinned one); returns its exit status."""
    python, variables = environment.ensure(tests=True, host=host)
    workers = max(1, min(4, os.cpu_count() or 1))
    env = {**os.environ, **variables, **OFFLINE, **QUIET_THREADS}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        workers,
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "-q",
        "--durations",
        "15",
        *extra,
    ]
    return subprocess.run([str(c) for c in command], cwd=environment.ROOT, env=env).returncode


def main(argv):
    if argv[:1] == ["--run"]:
        python, variables = environment.ensure(tests=True)
        return subprocess.run(
            [str(python), *argv[1:]], cwd=environment.ROOT, env={**os.environ, **variables, **OFFLINE, **QUIET_THREADS}
        ).returncode
    parser = argparse.ArgumentParser(
        prog="test.py", description=__doc__.split("\n\n")[0], add_help=False, allow_abbrev=False
    )
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--host", metavar="FOLDER")
    parser.add_argument("--hosts", action="store_true")
    args, extra = parser.parse_known_args(argv)
    fast = ["not slow"] if args.fast else []
    of_the_host = ["-m", " and ".join(["host", *fast])]
    if args.host:
        return pytest([*of_the_host, *extra], args.host)
    status = pytest([*(["-m", *fast] if fast else []), *extra])
    for host in environment.archived_hosts() if args.hosts else []:
        if status:
            break  # the last line is then the summary of the run that failed
        print(f"\n{host.name}: what touches the host", flush=True)
        status = pytest([*of_the_host, *extra], host)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
