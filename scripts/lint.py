#!/usr/bin/env python3
"""Check style and types: ``python scripts/lint.py [--fix]``. With --fix the code is put into shape first.

Runs ruff (rules and format) on everything and mypy on quant and ltx2_core, with the settings in pyproject.toml. ``.ci/mypy-baseline.txt`` counts mypy's
known errors by file and kind: one more fails, one less has to be taken off (``--baseline`` counts anew).
"""

import re
import subprocess
import sys
from collections import Counter

import environment

BASELINE = environment.ROOT / ".ci" / "mypy-baseline.txt"


def run(*args, **kw):
    return subprocess.run([str(environment.venv_python()), "-m", *args], cwd=environment.ROOT, **kw)


def type_errors():
    """Counter of mypy's errors by 'file [kind]'."""
    done = run("mypy", capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout + done.stderr)
    found = re.findall(r"^(\S+?):\d+: error: (.*?)  \[([a-z-]+)\]$", done.stdout, re.M)
    return Counter(f"{file} [{kind}]" for file, _, kind in found), done.stdout


def main(argv):
    environment.ensure_venv()
    environment.ensure_test_packages()
    if "--fix" in argv:
        run("ruff", "check", "--fix", "--quiet")
        run("ruff", "format", "--quiet")
    failed = run("ruff", "check", "--quiet", "--output-format", "concise").returncode
    if run("ruff", "format", "--check", "--quiet", stdout=subprocess.DEVNULL).returncode:
        print("ruff format: some files are not in shape; run python scripts/lint.py --fix")
        failed = 1
    found, output = type_errors()
    if "--baseline" in argv:
        BASELINE.write_text("".join(f"{count} {line}\n" for line, count in sorted(found.items())), encoding="utf-8")
    listed = (line.split(" ", 1) for line in BASELINE.read_text(encoding="utf-8").splitlines())
    known = Counter({line: int(count) for count, line in listed})
    if found != known:
        failed = 1
        for line in sorted((found - known) | (known - found)):
            print(f"mypy: {line}: {found[line]} errors, .ci/mypy-baseline.txt says {known[line]}")
            if found[line] > known[line]:
                file, kind = line.split(" ")
                print("\n".join(f"  {o}" for o in output.splitlines() if o.startswith(f"{file}:") and o.endswith(kind)))
    print("lint: " + ("failed" if failed else "clean"))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
