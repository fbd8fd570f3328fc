"""What ComfyUI's registry asks of a node pack: the checks of ``comfy node validate``, made here so that they need no network."""

import subprocess
import sys
from pathlib import Path

import pathspec
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[1]
MAIN = "https://raw.githubusercontent.com/ltx2-gguf/ComfyUI-LTX2-GGUF/main/"


@pytest.fixture(scope="module")
def archive():
    """Paths that the registry's archive holds: what git tracks and .comfyignore does not name."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout")
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    ignored = pathspec.PathSpec.from_lines("gitwildmatch", lines)
    return [path for path in done.stdout.splitlines() if not ignored.match_file(path) and (ROOT / path).exists()]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_field_that_the_registry_shows_is_filled(project):
    about, comfy = project["project"], project["tool"]["comfy"]
    assert about["name"] == "ltx2-gguf" and about["version"].count(".") == 2 and about["license"] == {"file": "LICENSE"}
    assert {"Repository", "Documentation", "Bug Tracker"} <= set(about["urls"])
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"].startswith(">=0.")


@pytest.mark.parametrize("field, ratio, largest", [("Icon", 1, 400), ("Banner", 21 / 9, 2100)])
def test_icon_and_banner_are_in_the_repository_and_have_the_shape_that_is_shown(project, field, ratio, largest):
    from PIL import Image

    url = project["tool"]["comfy"][field]
    assert url.startswith(MAIN)
    width, height = Image.open(ROOT / url.removeprefix(MAIN)).size
    assert width / height == pytest.approx(ratio, rel=0.01) and width <= largest


def test_the_archive_holds_what_runs_and_nothing_of_development(archive):
    tops = {path.split("/")[0] for path in archive}
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "quant", "ltx2_core", "nodes", "workflows"} <= tops
    assert not tops & {"tests", "benchmarks", "tools", ".ci", "setup.py"}


def test_the_archive_passes_the_registrys_security_rules(archive):
    """No exec, no eval, one statement a line: warnings today, errors soon."""
    files = [path for path in archive if path.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S102,S307,E702", "--quiet", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
