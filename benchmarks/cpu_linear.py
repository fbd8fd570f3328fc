"""Packed linear layers on the CPU beside a dense float32 layer of the same shape.

    python benchmarks/cpu_linear.py [--formats Q4_0 Q5_1 Q8_0] [--rows 256 1024] [--size 4096] [--threads 2] [--json out.json]

For each format and number of rows, the packed layer and the dense one run alternately; the ratio is the median over the pairs, so that
other load on the machine hits both. "wall" is elapsed time; "cpu" is processor time of the process, which other processes disturb
less (with several threads it also counts waiting in spin loops). "eager" is a decode of the whole weight followed by the dense
product, in plain torch.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import packloader  # noqa: F401
from ltx2_gguf.quant import decode, formats, matmul


def packed_weight(name, size):
    """Random but finite packed rows of a ``[size, size]`` weight."""
    if name in decode.ENCODABLE:
        return decode.quantize(torch.randn(size, size) * 0.02, name)
    fmt = formats.FORMATS[name]
    raw = torch.randint(0, 256, (size * size // fmt.block_size, fmt.type_size), dtype=torch.uint8)
    for field in ("d", "dmin", "m"):
        if field in dict(fmt.fields):
            at = fmt.offset(field)
            raw[:, at : at + 2] = (torch.rand(raw.shape[0], 1) * 0.01).half().view(torch.uint8)
    return raw.view(size, -1)


def timed(function):
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(name, rows, size, dtype, pairs):
    """Times of packed, dense and eager products of ``[rows, size] x [size, size]``."""
    fmt = formats.FORMATS[name]
    raw = packed_weight(name, size)
    dense = decode.dequantize(raw, fmt)
    x = torch.randn(rows, size, dtype=dtype)
    dense_x = x.float()
    runs = {
        "dense": lambda: torch.nn.functional.linear(dense_x, dense),
        "packed": lambda: matmul.linear_raw(x, raw, fmt, (size, size)),
        "eager": lambda: torch.nn.functional.linear(dense_x, decode.dequantize(raw, fmt)),
    }
    times = {key: [] for key in runs}
    for run in runs.values():
        run()
    for _ in range(pairs):
        for key, run in runs.items():
            times[key].append(timed(run))
    median = {key: [statistics.median(column) for column in zip(*values)] for key, values in times.items()}
    ratio = [statistics.median(p[i] / d[i] for p, d in zip(times["packed"], times["dense"])) for i in (0, 1)]
    return {
        "format": name, "rows": rows, "size": size, "dtype": str(dtype).removeprefix("torch."),
        "dense_ms": median["dense"][0] * 1e3, "packed_ms": median["packed"][0] * 1e3, "eager_ms": median["eager"][0] * 1e3,
        "wall_ratio": ratio[0], "cpu_ratio": ratio[1], "wall_ratio_of_best": min(t[0] for t in times["packed"]) / min(t[0] for t in times["dense"]),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--formats", nargs="+", default=["Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"], choices=list(formats.QUANTIZED)
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = {"cpu": platform.processor() or platform.machine(), "capability": torch.backends.cpu.get_cpu_capability(),
               "threads": options.threads, "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    print(json.dumps(machine))
    print(
        f"{'format':8}{'dtype':>10}{'rows':>6}{'dense ms':>10}{'packed ms':>11}{'eager ms':>10}{'wall':>7}{'best':>7}{'cpu':>7}   (packed / dense)"
    )
    results = []
    with torch.inference_mode():
        for dtype in options.dtypes:
            for name in options.formats:
                for rows in options.rows:
                    r = compare(name, rows, options.size, getattr(torch, dtype), options.pairs)
                    results.append(r)
                    print(f"{name:8}{dtype:>10}{rows:6}{r['dense_ms']:10.1f}{r['packed_ms']:11.1f}{r['eager_ms']:10.1f}"
                          f"{r['wall_ratio']:7.3f}{r['wall_ratio_of_best']:7.3f}{r['cpu_ratio']:7.3f}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
