#!/usr/bin/env python3
"""Try the pack with other ComfyUI versions: ``python scripts/try_host.py 0.23.0 ../ComfyUI … [-- pytest arguments]``.

Each argument is a source tree or a released version, which git fetches. For every one the tests that touch the host and both demo clips run in an
environment with that host's own pins; a table at the end says what came out, and the exit status says whether all of it worked.
"""

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import environment

SCRIPTS = Path(__file__).parent


def source_tree(name):
    """The folder of `name`: itself when it is a tree, else that version's, fetched once."""
    if (Path(name) / "main.py").is_file():
        return Path(name).resolve()
    if not re.fullmatch(r"\d+\.\d+\.\d+", name):
        raise SystemExit(f"{name} is neither a ComfyUI source tree nor a version such as 0.23.0.")
    folder = environment.home() / "hosts" / f"comfyui-{name}"
    if not (folder / "main.py").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not environment.clone_host(folder, name):
            raise SystemExit(f"ComfyUI {name} could not be fetched with git; give its folder instead.")
    return folder


def version_of(folder):
    return re.search(r'"([^"]+)"', (folder / "comfyui_version.py").read_text(encoding="utf-8")).group(1)


def pinned(folder, package):
    lines = [line for line in environment.requirements_of(folder) if line.startswith(package)]
    return lines[0].removeprefix(package).lstrip("=") if lines else "none"


def try_one(folder, extra):
    """Run tests and demo; returns the table's row."""
    report = environment.home() / "try_host.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, SCRIPTS / "test.py", "--host", folder, f"--junitxml={report}", *extra]
    subprocess.run([str(c) for c in command])
    row = {
        "version": version_of(folder),
        "kitchen": pinned(folder, "comfy-kitchen"),
        "aimdo": pinned(folder, "comfy-aimdo"),
    }
    row.update({"tests": "none ran", "demo": "failed", "failed": []})
    if report.is_file():
        cases = list(ElementTree.parse(report).iter("testcase"))
        bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(c.find("skipped") is not None for c in cases)
        row["failed"] = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
        row["tests"] = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"
    videos = environment.home() / "videos" / row["version"]
    command = [sys.executable, SCRIPTS / "demo.py", "--host", folder, "--output", videos]
    if subprocess.run([str(c) for c in command]).returncode == 0:
        row["demo"] = "works"
    return row


def main(argv):
    names, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    if not names or names[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    rows = [try_one(folder, extra) for folder in [source_tree(name) for name in names]]
    print()
    for row in rows:
        print(
            f"ComfyUI {row['version']} (comfy-kitchen {row['kitchen']}, comfy-aimdo {row['aimdo']}): {row['tests']}; demo {row['demo']}"
        )
        for name in row["failed"]:
            print(f"  failed: {name}")
    return 1 if any(row["failed"] or row["tests"] == "none ran" or row["demo"] != "works" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
