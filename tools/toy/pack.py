"""Load the pack as ``ltx2_gguf`` from the repository this file lies in, for the tools in this folder."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if "ltx2_gguf" not in sys.modules:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import packloader  # noqa: F401  (registers ltx2_gguf)
