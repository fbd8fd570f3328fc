#!/usr/bin/env python3
"""Set up everything and pass the tests: ``python scripts/test.py [--fast] [pytest arguments]``.

The first run installs a host, torch and the reference packages (several minutes, about 9 GB); later runs start at once.
"""

import os
import subprocess
import sys

import environment


def main(argv):
    fast = "--fast" in argv
    extra = [a for a in argv if a != "--fast"]
    variables = environment.ensure(tests=True)
    env = {**os.environ, **variables, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    workers = max(1, min(4, (os.cpu_count() or 1)))
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    command = [environment.venv_python(), "-m", "pytest", "-n", workers, "--dist", "loadfile", "-q", "--durations", "15"]
    if fast:
        command += ["-m", "not slow"]
    return subprocess.run([str(c) for c in [*command, *extra]], cwd=environment.ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
