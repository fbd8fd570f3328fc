"""What every benchmark here needs: the pack, timing, random quantised weights, results as JSON and as a table.

Times are medians of device events. Short kernels are captured into a CUDA graph that walks over several copies of the operands, so
that neither launch gaps nor a warm cache enter the number. Weights are random bytes with scales that give them a standard
deviation of 0.02, never zeros. Scales differ from block to block: a GPU at its power limit multiplies faster when operands have few
different values, and real weights do not.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WEIGHT_STD = 0.02

# Minimum over scale that centres random codes on zero, for formats with a minimum (in units of the codes' own scale).
_CENTRE = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}

# Formats whose codes reach further down than up and whose scale has either sign, as quantisers choose it: that of the block's largest
# weight, which gets the lowest code. With one sign all weights of a random matrix would lean to one side.
_EITHER_SIGN = ("Q4_0", "Q5_0", "IQ4_NL")


def load_pack():
    """Import this pack as ``ltx2_gguf``, whatever its folder is called."""
    if "ltx2_gguf" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "ltx2_gguf", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["ltx2_gguf"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["ltx2_gguf"]


def arguments(description, **defaults):
    """Command line shared by all benchmarks: --out, --device, and one option per default given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in defaults.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action="store_true")
        elif isinstance(value, (list, tuple)):
            parser.add_argument(option, nargs="*", type=type(value[0]), default=list(value))
        else:
            parser.add_argument(option, type=type(value), default=value)
    return parser


def environment(device):
    """Hardware and versions, for the record."""
    info = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    if importlib.util.find_spec("triton"):
        import triton

        info["triton"] = triton.__version__
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
        info["cuda"] = torch.version.cuda
    return info


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure(fn, device, repeats=5, warmup=2):
    """Median milliseconds of fn()."""
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        if torch.device(device).type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            fn()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure_many(fns, device, repeats=5):
    """Median milliseconds of one of fns, which are run one after another (captured in one CUDA graph on a GPU)."""
    if torch.device(device).type != "cuda":
        return measure(lambda: [fn() for fn in fns], device, 3, 1) / len(fns)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for fn in fns:
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [fn() for fn in fns]
    elapsed = measure(graph.replay, device, repeats) / len(fns)
    del kept
    return elapsed


def copy_bandwidth(device, nbytes=1 << 30):
    """GB/s of a device copy, counting bytes read and bytes written."""
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / measure(lambda: target.copy_(source), device, 10) / 1e6


def random_raw(fmt_name, rows, cols, device, std=WEIGHT_STD):
    """Random bytes of a weight [rows, cols] in a block format, scaled to a standard deviation. uint8 [rows, row_bytes]."""
    load_pack()
    from ltx2_gguf.quant import decode, formats

    fmt = formats.FORMATS[fmt_name]
    fields = dict(fmt.fields)

    def fill(blocks, d):
        values = {"d": d, "dmin": d * _CENTRE.get(fmt_name, 0.0), "m": d * _CENTRE.get(fmt_name, 0.0)}
        for field in ("d", "dmin", "m"):
            if field in fields:
                at = fmt.offset(field)
                blocks[:, at : at + 2] = values[field].to(torch.float16).view(torch.uint8)
        return blocks

    def spread(count):
        size = 0.5 + torch.rand(count, 1, device=device)
        return size * (torch.randint(0, 2, (count, 1), device=device) * 2 - 1) if fmt_name in _EITHER_SIGN else size

    sample = fill(torch.randint(0, 256, (2048, fmt.type_size), dtype=torch.uint8, device=device), spread(2048))
    unit = decode.dequantize(sample, fmt, torch.float32).std().item()
    blocks = torch.randint(0, 256, (rows * cols // fmt.block_size, fmt.type_size), dtype=torch.uint8, device=device)
    return fill(blocks, spread(len(blocks)) * (std / unit)).view(rows, -1)


def peak_memory(device):
    """Peak bytes since the last reset; 0 without a GPU."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0


def reset_memory(device):
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def save(out, name, device, results):
    """Write results and environment to out/name.json."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(device), "results": results}, indent=1) + "\n")
    print(f"wrote {path}", flush=True)


def show(title, rows):
    """Print a list of dicts as a table."""
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(column), *(len(line[i]) for line in text)) for i, column in enumerate(columns)]
    print(f"\n{title}")
    for line in [columns, *text]:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths)), flush=True)


def _cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
