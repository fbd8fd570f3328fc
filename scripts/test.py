#!/usr/bin/env python3
"""Set up everything and pass the tests: ``python scripts/test.py [--fast] [pytest arguments]``.

``python scripts/test.py --run SCRIPT [arguments]`` runs a script (a benchmark, the fidelity table) in the same environment instead.

The first run installs a host, torch and the reference packages (several minutes, about 9 GB); later runs start at once.
"""

import os
import subprocess
import sys

import environment


def main(argv):
    variables = environment.ensure(tests=True)
    env = {**os.environ, **variables, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0")  # threads that wait for each other must not take the other worker's core
    if argv[:1] == ["--run"]:
        return subprocess.run([str(environment.venv_python()), *argv[1:]], cwd=environment.ROOT, env=env).returncode
    fast = "--fast" in argv
    extra = [a for a in argv if a != "--fast"]
    workers = max(1, min(4, (os.cpu_count() or 1)))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    command = [environment.venv_python(), "-m", "pytest", "-n", workers, "--dist", "loadfile", "-q", "--durations", "15"]
    if fast:
        command += ["-m", "not slow"]
    return subprocess.run([str(c) for c in [*command, *extra]], cwd=environment.ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
