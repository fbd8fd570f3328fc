"""Tile sizes of the skinny product and of the dequantise kernels: which is fastest where. About a minute on an H100.

    python benchmarks/sweep_skinny.py [--out DIR] [--formats Q4_0 …] [--workers 14]

Kernels are compiled in parallel processes first (through Triton's cache on disk). Every tile is checked before it is timed: relative
error against float64 of at most 3e-3 in bfloat16, and the same bits twice. Prints the fastest tile per format, shape and number of
rows beside dense bf16 and what the pack does at present, and writes every timing to DIR/sweep_skinny.json.
"""

import concurrent.futures
import multiprocessing
import os
import time

import torch
import torch.nn.functional as F
from common import arguments, copy_bandwidth, load_pack, measure_many, random_raw, save, show

load_pack()
from ltx2_gguf.quant import formats, kernels_triton, linear, reference, skinny_triton  # noqa: E402

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384), (36864, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64)
ERROR_LIMIT = 3e-3

# (output columns, units, load ahead, warps) by the padded number of rows; the first list of each pair for Q4_0, the second for the rest.
TILES = {
    8: (
        [(64, 8, 0, 4), (64, 8, 1, 4), (64, 8, 0, 8), (64, 16, 0, 8), (32, 8, 0, 4), (32, 8, 1, 4), (32, 16, 0, 8), (32, 16, 1, 8),
         (16, 8, 1, 4), (16, 16, 0, 4), (16, 16, 1, 4), (16, 32, 0, 8), (16, 32, 1, 8), (16, 64, 0, 16), (16, 64, 0, 8), (32, 32, 0, 16),
         (64, 4, 0, 4), (64, 4, 1, 4), (128, 4, 0, 4), (32, 4, 1, 2)],
        [(64, 8, 0, 4), (64, 8, 0, 8), (32, 8, 0, 4), (32, 8, 1, 4), (32, 16, 0, 8), (16, 16, 0, 4), (16, 16, 1, 4), (16, 32, 0, 8), (16, 64, 0, 16)],
    ),
    16: (
        [(128, 8, 0, 8), (64, 8, 0, 4), (64, 8, 0, 8), (64, 8, 1, 8), (64, 16, 0, 16), (32, 8, 0, 4), (32, 8, 1, 4), (32, 8, 1, 8), (32, 16, 0, 8),
         (32, 16, 1, 8), (16, 16, 1, 4), (16, 32, 0, 8), (16, 32, 1, 8), (16, 64, 0, 16), (64, 4, 0, 4), (64, 4, 1, 4), (128, 4, 0, 4), (32, 4, 1, 4)],
        [(64, 8, 0, 8), (32, 8, 0, 4), (32, 8, 1, 4), (32, 8, 0, 8), (32, 16, 0, 8), (16, 16, 0, 4), (16, 16, 1, 4), (16, 32, 0, 8), (16, 64, 0, 16)],
    ),
    32: ([(64, 8, 0, 8), (32, 8, 0, 8), (32, 8, 0, 4), (32, 4, 0, 4), (64, 4, 0, 4)], [(64, 8, 0, 8), (32, 8, 0, 8), (32, 8, 0, 4)]),
    64: ([(32, 8, 0, 8), (32, 4, 0, 4), (16, 8, 0, 8)], [(32, 8, 0, 8), (16, 8, 0, 8)]),
}  # fmt: skip
DECODE_TILES = ((512, 1), (1024, 1), (1024, 2), (1024, 4), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
DECODE_FORMATS = ("Q4_0", "Q8_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS")
UNTILED = ("Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS")  # formats that have the older kernels only


def padded(rows):
    return max(8, 1 << (rows - 1).bit_length())


def tiles_of(name, rows):
    return TILES[padded(rows)][0 if name == "Q4_0" else 1]


def operands(name, shape, rows, device):
    x = torch.randn(rows, shape[1], device=device).to(torch.bfloat16)
    bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
    return x, random_raw(name, *shape, device), bias, torch.empty(rows, shape[0], dtype=torch.bfloat16, device=device)


def compile_case(case):
    """Launch one kernel on little data, for the compiled code that stays in Triton's cache. Returns the error, if any."""
    name, rows, tile = case
    try:
        with torch.inference_mode():
            if rows:
                x, raw, bias, y = operands(name, (128, 4096), rows, "cuda")
                skinny_triton.launch(x, raw, name, bias, y, tile)
            else:
                out = torch.empty(64, 4096, dtype=torch.bfloat16, device="cuda")
                kernels_triton.dequantize_launch(random_raw(name, 64, 4096, "cuda"), name, out, *tile)
            torch.cuda.synchronize()
    except Exception as problem:  # a tile that does not fit the chip
        return f"{type(problem).__name__}: {problem}"[:200]
    return ""


def compile_all(cases, workers):
    """{case: error} of the cases that do not compile or run."""
    if workers < 2:
        return {}
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            return {case: problem for case, problem in zip(cases, pool.map(compile_case, cases)) if problem}
    except concurrent.futures.BrokenExecutor as problem:  # a process that was killed, for memory for instance
        print(f"compiling here instead, which takes minutes: {problem}", flush=True)
        return {}


def check(name, device, bad):
    """Every tile against float64 at a shape whose last column tile is partial; failing cases are added to ``bad``."""
    shape, worst = (1040, 4096), 0.0
    for rows in (5, 16, 32, 64):
        x, raw, bias, _ = operands(name, shape, rows, device)
        weight = reference.dequantize(raw, formats.FORMATS[name], torch.float32)
        expected = F.linear(x.double(), weight.double(), bias.double())
        for tile in tiles_of(name, rows):
            case = (name, padded(rows), tile)
            if case in bad:
                continue
            try:
                y, again = (
                    skinny_triton.launch(x, raw, name, bias, torch.full((rows, shape[0]), float("nan"), dtype=x.dtype, device=device), tile)
                    for _ in range(2)
                )
            except Exception as problem:  # a tile that does not fit the chip
                bad[case] = f"{type(problem).__name__}: {problem}"[:200]
                continue
            error = ((y.double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error)
            if not error <= ERROR_LIMIT or not torch.equal(y, again):
                bad[case] = f"relative error {error:.3g}, same bits twice: {torch.equal(y, again)}"
    return worst


def time_products(names, shapes, row_counts, device, bad):
    """(one row per tile, one row per case with the fastest tile)."""
    timings, best = [], []
    for shape in shapes:
        dense_copies = max(2, min(8, (256 << 20) // (shape[0] * shape[1] * 2)))
        dense = [torch.randn(shape, device=device).mul_(0.02).to(torch.bfloat16) for _ in range(dense_copies)]
        bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
        xs = {m: torch.randn(m, shape[1], device=device).to(torch.bfloat16) for m in row_counts}
        ys = {m: torch.empty(m, shape[0], dtype=torch.bfloat16, device=device) for m in row_counts}
        dense_us = {m: 1e3 * measure_many([lambda w=w, x=x: F.linear(x, w, bias) for w in dense], device) for m, x in xs.items()}
        del dense
        for name in names:
            fmt = formats.FORMATS[name]
            copies = max(2, min(16, (200 << 20) // fmt.nbytes(shape)))
            raws = [random_raw(name, *shape, device) for _ in range(copies)]
            scratch = torch.empty(shape, dtype=torch.bfloat16, device=device)
            for m, x in xs.items():
                row = {"format": name, "shape": f"{shape[0]}x{shape[1]}", "rows": m, "dense us": dense_us[m]}
                decoded = [lambda r=r, x=x: F.linear(x, linear.dequantize(r, fmt, out=scratch), bias) for r in raws]
                if m in (1, 16, 64):
                    row["decode + dense us"] = 1e3 * measure_many(decoded, device)
                if m in (1, 2, 16):
                    row["present us"] = 1e3 * measure_many([lambda r=r, x=x: linear.linear(x, r, fmt, shape, bias) for r in raws], device)
                found = []
                for tile in tiles_of(name, m) if name in skinny_triton.UNITS else ():
                    if (name, padded(m), tile) not in bad:
                        calls = [lambda r=r, x=x, m=m, t=tile: skinny_triton.launch(x, r, name, bias, ys[m], t) for r in raws]
                        found.append((1e3 * measure_many(calls, device), tile))
                        timings.append({**row, "tile": tile, "us": found[-1][0]})
                if found:
                    us, tile = min(found)
                    row |= {"us": us, "GB/s": raws[0].numel() / us / 1e3, "dense / ours": dense_us[m] / us, "tile": "/".join(map(str, tile))}
                    row["next"] = " ".join("/".join(map(str, t)) + f"={u:.1f}" for u, t in sorted(found)[1:4])
                best.append(row)
            del raws
    return timings, best


def time_decoding(names, shapes, device, copy, bad):
    rows = []
    for shape in shapes:
        for name in names:
            copies = max(2, min(8, (400 << 20) // (shape[0] * shape[1] * 2)))
            raws = [random_raw(name, *shape, device) for _ in range(copies)]
            outs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(copies)]
            nbytes = raws[0].numel() + outs[0].numel() * 2
            row = {"format": name, "shape": f"{shape[0]}x{shape[1]}"}
            for tile in DECODE_TILES:
                if (name, 0, tile) not in bad:
                    ms = measure_many([lambda r=r, o=o, t=tile: kernels_triton.dequantize_launch(r, name, o, *t) for r, o in zip(raws, outs)], device, 9)
                    row["/".join(map(str, tile))] = nbytes / ms / 1e6 / copy
            rows.append(row)
    return rows


def main():
    parser = arguments(__doc__, formats=("Q4_0", "Q8_0", "Q5_1", "Q4_K", "Q6_K"), workers=min(14, os.cpu_count() or 1))
    args = parser.parse_args()
    if not args.device.startswith("cuda"):
        raise SystemExit("No CUDA GPU is visible to torch; there is nothing to time here.")
    start = time.perf_counter()
    cases = [(name, rows, tile) for rows in (64, 32, 16, 8) for name in args.formats for tile in tiles_of(name, rows)]
    cases += [(name, 0, tile) for name in DECODE_FORMATS for tile in DECODE_TILES]
    bad = compile_all(cases, args.workers)
    print(f"{len(cases)} kernels compiled: {time.perf_counter() - start:.1f} s", flush=True)
    with torch.inference_mode():
        checks = [{"format": name, "largest relative error": check(name, args.device, bad)} for name in args.formats]
        show("checks", checks)
        print(f"checked: {time.perf_counter() - start:.1f} s", flush=True)
        copy = copy_bandwidth(args.device)
        timings, best = time_products(args.formats, SHAPES[3:] + SHAPES[:1], ROWS, args.device, bad)
        show("fastest tile (output columns / units / ahead / warps)", best)
        save(args.out, "sweep_skinny", args.device, {"copy_gb_s": copy, "checks": checks, "best": best, "timings": timings})
        print(f"timed: {time.perf_counter() - start:.1f} s", flush=True)
        decoding = time_decoding(DECODE_FORMATS, SHAPES[:2], args.device, copy, bad)
        show(f"dequantise to bf16, share of the copy speed ({copy:.0f} GB/s) by tile bytes / warps", decoding)
        others = time_products(UNTILED, SHAPES[:1] + SHAPES[3:], (1, 2, 16), args.device, bad)[1]
        show("formats without the new kernel", others)
        more_timings, more = time_products(args.formats, SHAPES[1:3], (1, 4, 16), args.device, bad)
        show("other shapes", more)
    failed = [{"case": str(case), "why": why} for case, why in bad.items()]
    show("left out", failed)
    results = {"copy_gb_s": copy, "checks": checks, "best": best + more, "others": others, "decoding": decoding, "timings": timings + more_timings}
    save(args.out, "sweep_skinny", args.device, {**results, "left_out": failed})
    print(f"{time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
