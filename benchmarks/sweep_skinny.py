"""Kernels and tiles of products with few rows of x, and dequantise kernels' tiles: which is fastest where. Half a minute on an H100.

    python benchmarks/sweep_skinny.py [--out DIR] [--formats Q4_0 …] [--workers 14]

Kernels are compiled in parallel processes first (through Triton's cache on disk). Every candidate is checked before it is timed:
relative error against float64 of at most 3e-3 in bfloat16, and the same bits twice. Prints, per format, shape and number of rows, dense
bf16, dequantise-then-multiply, what the pack does at present (``quant/kernels/skinny_choice.py``) and the fastest candidates, then where
another choice would be faster. Every timing goes to DIR/sweep_skinny.json.
"""

import concurrent.futures
import multiprocessing
import os
import time

import torch
import torch.nn.functional as F
from common import arguments, copy_bandwidth, load_pack, measure_many, random_raw, save, show

load_pack()
from ltx2_gguf.quant import decode, formats, linear  # noqa: E402
from ltx2_gguf.quant.kernels import skinny_choice, triton_fragments, triton_matmul  # noqa: E402

SHAPES = ((36864, 4096), (4096, 4096))
MORE_SHAPES = {"Q4_0": ((16384, 4096), (4096, 16384))}
ERROR_LIMIT = 3e-3
GAIN = 0.97  # of the present time: what counts as faster


def of(kernel, *tiles):
    return [(kernel, tile) for tile in tiles]


# Candidates by format and number of rows; the present choice is added to each. Tiles are in the terms of each kernel's launch.
FRAGMENTS = of("fragments", (2, 16, 1), (2, 16, 2))
FRAGMENTS_16 = of("fragments", (1, 8, 1), (1, 8, 2))
ONE = of("one row", (8, 16, 4), (1, 128, 4))
MINIMUM = {
    1: ONE,
    8: of("patterns", (32, 8, 0, 4), (32, 8, 1, 4), (16, 16, 0, 4), (16, 32, 0, 8)),
    16: of("patterns", (32, 8, 0, 4), (32, 8, 1, 4), (16, 16, 0, 4)) + of("few rows", (64, 8, 4)),
}
CANDIDATES = {
    "Q4_0": {
        1: of("words", (2, 4, 1), (4, 4, 4)) + FRAGMENTS,
        2: FRAGMENTS + of("words", (4, 2, 1)),
        4: FRAGMENTS + of("words", (4, 2, 1)),
        8: FRAGMENTS + of("patterns", (32, 8, 0, 4)),
        16: FRAGMENTS_16 + of("patterns", (32, 8, 1, 4)) + of("few rows", (64, 8, 4)),
    },
    "Q8_0": {
        1: of("words", (4, 4, 1), (8, 4, 1), (2, 4, 1), (4, 8, 1), (4, 4, 4)) + ONE,
        2: of("words", (4, 4, 1), (8, 2, 1), (4, 2, 1)) + of("patterns", (32, 8, 0, 4), (16, 16, 0, 4)),
        4: of("words", (8, 1, 1), (4, 2, 1)) + of("patterns", (32, 8, 0, 4), (16, 16, 0, 4)),
        16: of("few rows", (64, 8, 4)) + of("patterns", (16, 16, 0, 4)),
    },
    "Q6_K": {1: ONE, 8: of("patterns", (32, 8, 1, 4), (16, 16, 0, 4), (16, 32, 0, 8)), 16: of("patterns", (32, 8, 1, 4), (16, 16, 1, 4))},
    "Q4_K": MINIMUM, "Q5_K": MINIMUM, "Q5_1": MINIMUM,
    "Q2_K": {1: ONE}, "Q3_K": {1: ONE}, "IQ4_NL": {1: ONE}, "IQ4_XS": {1: ONE},
}  # fmt: skip
DECODE_TILES = ((512, 1), (1024, 2), (2048, 4), (4096, 8))
DECODE_FORMATS = ("Q4_0", "Q8_0", "Q6_K")


def shapes_of(name):
    return SHAPES + MORE_SHAPES.get(name, ())


def launch(x, raw, name, bias, y, choice):
    if choice[0] == "fragments":
        return triton_fragments.launch(x, raw, bias, y, choice[1])  # an error where it cannot run, not the kernel instead of it
    return triton_matmul.skinny_launch(x, raw, name, bias, y, choice)


def candidates(name, rows, n_out):
    found = list(CANDIDATES[name][rows])
    if rows <= skinny_choice.most_rows(name, True):
        present = skinny_choice.choose(name, rows, n_out, True)
        found += [present] if present not in found else []
    return found


def operands(name, shape, rows, device):
    x = torch.randn(rows, shape[1], device=device).to(torch.bfloat16)
    bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
    return x, random_raw(name, *shape, device), bias, torch.empty(rows, shape[0], dtype=torch.bfloat16, device=device)


def compile_case(case):
    """Launch one kernel on little data, for the compiled code that stays in Triton's cache. Returns the error, if any."""
    name, rows, choice, width = case
    try:
        with torch.inference_mode():
            if rows:
                x, raw, bias, y = operands(name, (128, width), rows, "cuda")
                launch(x, raw, name, bias, y, choice)
            else:
                out = torch.empty(64, 4096, dtype=torch.bfloat16, device="cuda")
                triton_matmul.dequantize_launch(random_raw(name, 64, 4096, "cuda"), name, out, *choice)
            torch.cuda.synchronize()
    except Exception as problem:  # a tile that does not fit the chip
        return f"{type(problem).__name__}: {problem}"[:200]
    return ""


def compile_all(cases, workers):
    """{(format, rows, choice): error} of the cases that do not compile or run."""
    if workers < 2:
        return {}
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            return {case[:3]: problem for case, problem in zip(cases, pool.map(compile_case, cases)) if problem}
    except concurrent.futures.BrokenExecutor as problem:  # a process that was killed, for memory for instance
        print(f"compiling here instead, which takes minutes: {problem}", flush=True)
        return {}


def check(name, device, bad):
    """Every candidate against float64 at a shape whose last column tile is partial; failing cases are added to ``bad``."""
    shape, worst = (1040, 4096), 0.0
    for rows in CANDIDATES[name]:
        x, raw, bias, _ = operands(name, shape, rows, device)
        weight = decode.dequantize(raw, formats.FORMATS[name], torch.float32).double()
        expected = F.linear(x.double(), weight, bias.double())
        untouched = torch.full((rows, shape[0]), float("nan"), dtype=x.dtype, device=device)
        for choice in dict.fromkeys(candidates(name, rows, SHAPES[0][0]) + candidates(name, rows, SHAPES[1][0])):
            case = (name, rows, choice)
            if case in bad:
                continue
            try:
                y, again = (launch(x, raw, name, bias, untouched.clone(), choice) for _ in range(2))
            except Exception as problem:  # a tile that does not fit the chip
                bad[case] = f"{type(problem).__name__}: {problem}"[:200]
                continue
            error = ((y.double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error)
            if not error <= ERROR_LIMIT or not torch.equal(y, again):
                bad[case] = f"relative error {error:.3g}, same bits twice: {torch.equal(y, again)}"
    return worst


def written(choice):
    return f"{choice[0]} {'/'.join(map(str, choice[1]))}"


def dense_times(shape, row_counts, device):
    """Microseconds of the dense product in bf16, by number of rows."""
    copies = max(2, min(8, (256 << 20) // (shape[0] * shape[1] * 2)))
    weights = [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(copies)]
    bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
    times = {}
    for m in row_counts:
        x = torch.randn(m, shape[1], device=device).to(torch.bfloat16)
        times[m] = 1e3 * measure_many([lambda w=w, x=x: F.linear(x, w, bias) for w in weights], device)
    return times


def time_products(name, shape, dense, device, bad, timings):
    """One row per number of rows, with the fastest candidates; every timing goes to ``timings``."""
    fmt, table = formats.FORMATS[name], []
    raws = [random_raw(name, *shape, device) for _ in range(max(2, min(16, (200 << 20) // fmt.nbytes(shape))))]
    scratch = torch.empty(shape, dtype=torch.bfloat16, device=device)
    bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
    decoded_us = None
    for m in CANDIDATES[name]:
        x = torch.randn(m, shape[1], device=device).to(torch.bfloat16)
        y = torch.empty(m, shape[0], dtype=torch.bfloat16, device=device)
        if decoded_us is None:  # depends little on the number of rows
            calls = [lambda r=r, x=x: F.linear(x, linear.dequantize(r, fmt, out=scratch), bias) for r in raws]
            decoded_us = 1e3 * measure_many(calls, device)
        present = 1e3 * measure_many([lambda r=r, x=x: linear.linear(x, r, fmt, shape, bias) for r in raws], device)
        found = []
        for choice in candidates(name, m, shape[0]):
            if (name, m, choice) not in bad:
                calls = [lambda r=r, x=x, y=y, c=choice: launch(x, r, name, bias, y, c) for r in raws]
                found.append((1e3 * measure_many(calls, device), choice))
                timings.append({"format": name, "shape": shape, "rows": m, "choice": choice, "us": found[-1][0]})
        chosen = skinny_choice.choose(name, m, shape[0], True) if m <= skinny_choice.most_rows(name, True) else None
        row = {"format": name, "shape": f"{shape[0]}x{shape[1]}", "rows": m, "dense us": dense[m], "decode + dense us": decoded_us}
        row |= {"present us": present, "dense / present": dense[m] / present, "present": written(chosen) if chosen else "decode + dense"}
        if found:
            us, choice = min(found)
            row |= {"best us": us, "GB/s": raws[0].numel() / us / 1e3, "dense / best": dense[m] / us, "best": written(choice)}
            row["next"] = ", ".join(f"{written(c)} {u:.1f}" for u, c in sorted(found)[1:9])
        table.append(row)
    return table


def better(table):
    """Where something else is faster than the present choice."""
    found = []
    for row in table:
        us, what = min((row.get("best us", float("inf")), row.get("best")), (row["decode + dense us"], "decode + dense"))
        if us < GAIN * row["present us"]:
            kept = {key: row[key] for key in ("format", "shape", "rows", "present us", "present")}
            found.append({**kept, "faster us": us, "faster": what})
    return found


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
                    calls = [lambda r=r, o=o, t=tile: triton_matmul.dequantize_launch(r, name, o, *t) for r, o in zip(raws, outs)]
                    row["/".join(map(str, tile))] = nbytes / measure_many(calls, device, 9) / 1e6 / copy
            rows.append(row)
    return rows


def main():
    parser = arguments(__doc__, formats=tuple(CANDIDATES), workers=min(14, os.cpu_count() or 1))
    args = parser.parse_args()
    if not args.device.startswith("cuda"):
        raise SystemExit("No CUDA GPU is visible to torch; there is nothing to time here.")
    start = time.perf_counter()
    cases = [(name, m, c, k) for name in args.formats for m in CANDIDATES[name] for n, k in shapes_of(name) for c in candidates(name, m, n)]
    cases = [case for case in cases if case[2][0] != "fragments" or case[1] >= 8]  # compiled once for up to eight rows
    cases = list(dict.fromkeys(cases + [(name, 0, tile, 0) for name in DECODE_FORMATS for tile in DECODE_TILES]))
    bad = compile_all(cases, args.workers)
    print(f"{len(cases)} kernels compiled: {time.perf_counter() - start:.1f} s", flush=True)
    checks, timings, best, results = [], [], [], {}
    with torch.inference_mode():
        copy = copy_bandwidth(args.device)
        shapes = dict.fromkeys(shape for name in args.formats for shape in shapes_of(name))
        dense = {shape: dense_times(shape, (1, 2, 4, 8, 16), args.device) for shape in shapes}
        for name in args.formats:
            checks.append({"format": name, "largest relative error": check(name, args.device, bad)})
            rows = [row for shape in shapes_of(name) for row in time_products(name, shape, dense[shape], args.device, bad, timings)]
            best += rows
            show(f"{name} (error at most {checks[-1]['largest relative error']:.2g}; {time.perf_counter() - start:.1f} s)", rows)
            results = {"copy_gb_s": copy, "checks": checks, "best": best, "timings": timings}
            save(args.out, "sweep_skinny", args.device, results)  # kept if the time for this runs out
        show("faster than the present choice", better(best))
        decoding = time_decoding(DECODE_FORMATS, ((4096, 4096), (16384, 4096)), args.device, copy, bad)
        show(f"dequantise to bf16, share of the copy speed ({copy:.0f} GB/s) by tile bytes / warps", decoding)
    failed = [{"case": str(case), "why": why} for case, why in bad.items()]
    show("left out", failed)
    save(args.out, "sweep_skinny", args.device, {**results, "decoding": decoding, "left_out": failed})
    print(f"{time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
