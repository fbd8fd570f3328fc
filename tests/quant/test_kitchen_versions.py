"""The layouts on the oldest and the newest comfy-kitchen, which ``scripts/test.py`` puts beside the environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "scripts"))
import environment


@pytest.mark.slow
@pytest.mark.parametrize("version", environment.KITCHENS)
def test_packed_tensors_and_their_products_work_on(version):
    folder = environment.home() / "comfy-kitchen" / version
    if not (folder / "comfy_kitchen").is_dir():
        pytest.skip(f"comfy-kitchen {version} is not in {folder.parent}; run scripts/test.py once")
    variables = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import comfy_kitchen; print(comfy_kitchen.__file__)"],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()).is_relative_to(folder)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        HERE / "test_tensor.py",
        HERE / "test_matmul.py",
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
