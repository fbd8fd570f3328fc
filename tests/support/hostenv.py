"""Bring the real host's code into the test process, in the one order that works.

The host parses ``sys.argv`` when ``comfy`` is first imported, so arguments are set and parsing is enabled before that.
The environment variable ``COMFYUI_PATH`` names the host's source tree (``scripts/test.py`` sets it).
"""

import os
import sys
from pathlib import Path


def host_path():
    """The host's source tree, or None when ``COMFYUI_PATH`` names none."""
    path = os.environ.get("COMFYUI_PATH")
    return Path(path) if path and (Path(path) / "comfy" / "ops.py").is_file() else None


def import_host():
    """Put the host first on ``sys.path`` and import ``comfy`` for the CPU. Safe to call more than once."""
    path = host_path()
    if path is None:
        raise RuntimeError(
            "COMFYUI_PATH does not name a ComfyUI source tree; run the tests with 'python scripts/test.py'."
        )
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    if "comfy.options" not in sys.modules:
        argv, sys.argv = sys.argv, ["x", "--cpu"]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args
        finally:
            sys.argv = argv
    import comfy.model_management

    return path
