import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels then run on the CPU

TESTS = Path(__file__).parent
SLOWEST = ("test_toy.py", "test_workflows.py", "test_browser.py")
sys.path[:0] = [
    str(TESTS / "support"),
    str(TESTS.parent / "scripts"),
]  # helpers of the tests; server and workflow tools

import hostenv
import packloader  # noqa: F401  (registers ltx2_gguf)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What uses the host is marked by itself: ``-m host`` is the part that another host version must pass too.

    The slowest files begin first, so that no worker ends long after the others.
    """
    items.sort(key=lambda item: item.path.name not in SLOWEST)
    for item in items:
        if "host" in getattr(item, "fixturenames", ()):
            item.add_marker("host")


@pytest.fixture(scope="session")
def host():
    """The host's source tree, imported into this process (``comfy`` is usable)."""
    if hostenv.host_path() is None:
        if os.environ.get("CI"):
            pytest.fail("COMFYUI_PATH does not name a ComfyUI source tree")
        pytest.skip("COMFYUI_PATH does not name a ComfyUI source tree; run 'python scripts/test.py'")
    return hostenv.import_host()


@pytest.fixture(scope="session")
def gemma_gguf():
    """Path of the real Gemma-3 270M GGUF (``scripts/test.py`` fetches it and sets ``GEMMA_GGUF``)."""
    path = os.environ.get("GEMMA_GGUF")
    if not path or not Path(path).is_file():
        if os.environ.get("CI"):
            pytest.fail("GEMMA_GGUF does not name a file")
        pytest.skip("GEMMA_GGUF does not name a file; run 'python scripts/test.py'")
    return Path(path)
