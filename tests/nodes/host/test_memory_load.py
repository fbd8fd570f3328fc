"""Opening a file of many gigabytes: seconds and main memory, on a sparse file with LTX-2.3's real structure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import json, sys
sys.path.insert(0, "tests/support")
import packloader, torch
from pathlib import Path
from ltx2_gguf.ltx2_core.convert import plan, synthetic
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.transformer import load_dit
from ltx2_gguf.quant.gguf.writer import GGUFWriter

def own():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["RssAnon"].split()[0]) * 1024

geometry = structure.Geometry.real("2.3")
shapes = {synthetic.bare_name(n): s for n, s in structure.checkpoint_shapes(geometry, vae=False, projection=False).items()}
formats = {name: plan.format_for(name, shape, "q4_0")[0] or "F32" for name, shape in shapes.items()}
writer = GGUFWriter(sys.argv[1], {"general.architecture": "ltxv", **synthetic.metadata(geometry)}, [(n, formats[n], s) for n, s in shapes.items()])
writer._written = dict(writer._size)  # nothing is written: the file stays a hole of its full length
writer.finish()
size = Path(sys.argv[1]).stat().st_size
with torch.inference_mode():
    tiny = synthetic.make(Path(sys.argv[1]).with_name("tiny.gguf"), structure.Geometry.small("2.3"), type="q8_0")
    load_dit(tiny)  # what is imported and registered on first use
    before = own()
    model = load_dit(sys.argv[1], dtype=torch.bfloat16)
    after = own()
    elements = sum(p.numel() for p in model.parameters())
    dense = sum(p.nbytes for p in model.parameters() if not hasattr(p, "_qdata"))
print(json.dumps({"size": size, "own": after - before, "dense": dense, "elements": elements}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs sparse files")
def test_the_22b_model_is_opened_in_place_and_the_map_stays_its_only_copy(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "real.gguf")], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["size"] > 8e9 and found["elements"] > 14e9
    assert found["dense"] < 300e6, "only tables, norms and biases are dense"
    assert found["own"] < found["dense"] + 300e6, "beside the map there is room for what was converted, and little else"
