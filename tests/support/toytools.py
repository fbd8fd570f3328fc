"""Makes ``toy`` (the demo model's tools) importable, and names the demo model."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
MODEL = ROOT / "assets" / "toy-ltx2.3-Q8_0.gguf"
FIRST_FRAME = ROOT / "assets" / "toy-first-frame.png"
