"""Load a 48-block LTX-2.3 Q4_0 GGUF (7.4 GB of random weights, written first, file cached) onto the GPU: seconds and memory.

python benchmarks/bench_load.py [--folder /tmp] [--layers 48]
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import torch

from common import arguments, load_pack, random_raw, save, show, synchronize
from models import dit_config


def write(path, config, fmt_name, device):
    """A GGUF with the transformer's tensors under their bare names."""
    from ltx2_gguf.ltx2_core.convert.plan import format_for
    from ltx2_gguf.ltx2_core.transformer.model import LTX2Model
    from ltx2_gguf.quant.formats import QUANTIZED
    from ltx2_gguf.quant.gguf.writer import GGUFWriter

    shapes = {
        name: tuple(p.shape) for name, p in LTX2Model(config, dtype=torch.bfloat16, device="meta").named_parameters()
    }
    formats = {name: format_for(name, shape, fmt_name.lower())[0] or "BF16" for name, shape in shapes.items()}
    formats = {name: fmt if fmt in QUANTIZED else "BF16" for name, fmt in formats.items()}
    with GGUFWriter(
        path, {"general.architecture": "ltxv"}, [(name, formats[name], shape) for name, shape in shapes.items()]
    ) as writer:
        for name, shape in shapes.items():
            if formats[name] == "BF16":
                data = torch.randn(shape).mul_(0.02).to(torch.bfloat16)
            else:
                data = random_raw(formats[name], *shape, device)
            writer.write(name, data)


def resident_bytes():
    """(resident set, of which file pages) of this process, from /proc; zeros elsewhere."""
    try:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0
    return tuple(int(status[key].split()[0]) * 1024 for key in ("VmRSS", "RssFile"))


def main():
    args = arguments(__doc__, folder=tempfile.gettempdir(), layers=48, format="Q4_0", tiny=False).parse_args()
    load_pack()
    from ltx2_gguf.ltx2_core.loading.transformer import load_dit

    config = dit_config(2, 4, 32) if args.tiny else dit_config(args.layers)
    path = os.path.join(args.folder, "ltx2-gguf-bench.gguf")
    torch.zeros(1, device=args.device)
    rows = []
    try:
        write(path, config, args.format, args.device)
        Path(path).read_bytes() if args.tiny else os.system(f"cat '{path}' > /dev/null")  # into the page cache
        for attempt in (1, 2):
            before = resident_bytes()
            start = time.perf_counter()
            with torch.inference_mode():
                model = load_dit(
                    path,
                    device=args.device,
                    dtype=torch.bfloat16 if args.device != "cpu" else None,
                    require_connector=False,
                )
            synchronize(args.device)
            seconds = time.perf_counter() - start
            after = resident_bytes()
            private = (after[0] - after[1]) - (before[0] - before[1])
            rows.append(
                {
                    "load": attempt,
                    "file GB": os.path.getsize(path) / 1e9,
                    "seconds": seconds,
                    "private RSS GB": private / 1e9,
                }
            )
            del model
    finally:
        if os.path.exists(path):
            os.remove(path)
    show("load", rows)
    save(args.out, "load", args.device, rows)


if __name__ == "__main__":
    main()
