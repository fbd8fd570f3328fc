"""The pack as pip installs it, in a fresh environment that holds only what the wheel's requirements ask for."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from toytools import MODEL as TOY

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (
    "import importlib.metadata as m; (e,) = m.entry_points(group='console_scripts', name='ltx2-gguf'); "
    "raise SystemExit(e.load()())"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the checkout (building leaves files behind), without a network."""
    pytest.importorskip("setuptools")
    source, target = tmp_path_factory.mktemp("source") / "pack", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*", "tests", "benchmarks", "build", "*.egg-info", "__pycache__", "assets", "tools"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", str(target), str(source)], check=True)
    return next(target.glob("*.whl"))


def fresh_environment(folder, wheel, packages):
    """(interpreter, its site-packages) of an environment with the wheel and these installed packages, linked."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip())
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    for package in packages:
        for file in importlib.metadata.distribution(package).files or ():
            source, target = Path(file.locate()), site / file
            if ".." in file.parts or "__pycache__" in file.parts or not source.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                target.symlink_to(source)
    return python


def needed(requirements, seen=None):
    """Names of these requirements and of everything they require in turn, as far as it is installed here."""
    from packaging.requirements import Requirement

    seen = {} if seen is None else seen
    for text in requirements:
        requirement = Requirement(text)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        extras = set(requirement.extras) or {""}
        if extras <= seen.get(name, set()):
            continue
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras | {"headless"}
        ):
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        seen[name] = seen.get(name, set()) | extras
        further = [Requirement(r) for r in distribution.requires or ()]
        wanted = [r for r in further if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)]
        for r in wanted:
            r.marker = None
        needed([str(r) for r in wanted], seen)
    return seen


def run(python, *args, **kwargs):
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [python, "-c", COMMAND, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, **kwargs)


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        found = {name for name in file.namelist() if ".dist-info/" not in name}
    folders = (ROOT / "quant", ROOT / "ltx2_core", ROOT / "nodes")
    expected = {"__init__.py", *(str(p.relative_to(ROOT).as_posix()) for f in folders for p in f.rglob("*.py"))}
    assert found == {f"ltx2_gguf/{name}" for name in expected}


@pytest.mark.slow
def test_without_any_package_the_command_plans_and_names_what_it_lacks_for_more(wheel, tmp_path):
    python = fresh_environment(tmp_path / "venv", wheel, ())
    done = run(python, "convert", "--self-test")
    assert done.returncode == 0 and "Self-test passed." in done.stdout, done.stderr
    done = run(python, "generate", "--model", TOY, "--text-encoder", TOY, "--prompt", "x", "-o", tmp_path / "x.mp4")
    assert done.returncode == 1 and "'torch'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_the_headless_extra_asks_for_is_enough_to_generate(wheel, tmp_path, gemma_gguf):
    with zipfile.ZipFile(wheel) as file:
        metadata = file.read(next(name for name in file.namelist() if name.endswith("METADATA"))).decode()
    requirements = re.findall(r"^Requires-Dist: (.*extra == .headless.*)$", metadata, re.M)
    assert len(requirements) >= 5
    packages = needed(requirements)
    assert "torch" in packages and "gguf" not in packages and "transformers" not in packages
    python = fresh_environment(tmp_path / "venv", wheel, packages)
    video = tmp_path / "toy.mp4"
    sizes = ["--width", 64, "--height", 64, "--frames", 9, "--steps", 2, "--cfg", 1, "--stg", 0]
    files = ["--model", TOY, "--text-encoder", gemma_gguf]
    done = run(python, "generate", *files, *sizes, "--prompt", "a red circle", "--device", "cpu", "-o", video)
    assert done.returncode == 0, done.stderr[-2000:]
    import av

    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
