"""Kernels: dequantisation (GB/s against the card's copy speed) and linear layers (TFLOP/s against dense bf16 and eager torch).

python benchmarks/bench_kernels.py [--formats Q4_0 Q8_0 …] [--rows 1 16 6144]
"""

import torch
import torch.nn.functional as F

from common import arguments, copy_bandwidth, load_pack, measure, measure_many, random_raw, save, show
from eager import DECODERS
from eager import dequantize as eager_dequantize

SHAPES = ((4096, 4096), (16384, 4096), (4096, 16384))
GEMV_SHAPES = ((2048, 3840), (4096, 4096), (15360, 3840), (36864, 4096))


def bench_dequantize(formats, device, shapes=SHAPES[:2], cache_bytes=200 << 20):
    """One row per format and shape: our kernel and plain torch, bf16 output."""
    load_pack()
    from ltx2_gguf.quant import matmul
    from ltx2_gguf.quant.formats import FORMATS

    copy = copy_bandwidth(device, 1 << (30 if device.startswith("cuda") else 22))
    rows = []
    for name in formats:
        fmt = FORMATS[name]
        for shape in shapes:
            copies = max(2, min(8, cache_bytes // (shape[0] * shape[1] * 2)))
            raws = [random_raw(name, *shape, device) for _ in range(copies)]
            outs = [torch.empty(shape, dtype=torch.bfloat16, device=device) for _ in range(copies)]
            calls = [lambda r=r, o=o: matmul.dequantize(r, fmt, out=o) for r, o in zip(raws, outs)]
            if not rows:  # the clock rises under load; the first number would be taken on the way
                measure_many(calls, device, 100)
            ms = measure_many(calls, device, 9)
            speed = (raws[0].numel() + outs[0].numel() * 2) / ms / 1e6
            row = {"format": name, "shape": f"{shape[0]}x{shape[1]}", "ms": ms, "GB/s": speed, "of copy": speed / copy}
            if name in DECODERS:
                row["eager ms"] = measure(
                    lambda: eager_dequantize(raws[0], name, fmt.type_size, torch.bfloat16), device, 3, 1
                )
                row["eager / ours"] = row["eager ms"] / ms
            rows.append(row)
            del raws, outs
    return copy, rows


def bench_linear(formats, row_counts, device, shapes=SHAPES, eager=True):
    """One row per format, shape and number of rows: ours, dense bf16, and eager dequantise-then-matmul."""
    load_pack()
    from ltx2_gguf.quant import matmul
    from ltx2_gguf.quant.formats import FORMATS

    results = []
    for shape in shapes:
        copies = max(2, min(8, (256 << 20) // (shape[0] * shape[1] * 2)))
        dense = [torch.randn(shape, device=device).mul_(0.02).to(torch.bfloat16) for _ in range(copies)]
        bias = torch.randn(shape[0], device=device).to(torch.bfloat16)
        xs = {m: torch.randn(m, shape[1], device=device).to(torch.bfloat16) for m in row_counts}
        dense_ms = {
            m: measure_many([lambda w=w, x=x: F.linear(x, w, bias) for w in dense], device) for m, x in xs.items()
        }
        del dense
        for name in formats:
            fmt = FORMATS[name]
            raws = [random_raw(name, *shape, device) for _ in range(copies)]
            for m, x in xs.items():
                ms = measure_many([lambda r=r: matmul.linear_raw(x, r, fmt, shape, bias) for r in raws], device)
                row = {
                    "format": name,
                    "shape": f"{shape[0]}x{shape[1]}",
                    "rows": m,
                    "ms": ms,
                    "TFLOP/s": 2 * m * shape[0] * shape[1] / ms / 1e9,
                }
                row |= {
                    "GB/s of bytes": raws[0].numel() / ms / 1e6,
                    "dense bf16 ms": dense_ms[m],
                    "dense / ours": dense_ms[m] / ms,
                }
                if eager and name in DECODERS:
                    row["eager ms"] = measure(
                        lambda: F.linear(x, eager_dequantize(raws[0], name, fmt.type_size, x.dtype), bias), device, 3, 1
                    )
                    row["eager / ours"] = row["eager ms"] / ms
                results.append(row)
            del raws
    return results


def main():
    load_pack()
    from ltx2_gguf.quant.formats import QUANTIZED

    args = arguments(__doc__, formats=tuple(QUANTIZED), rows=(1, 4, 8, 16, 1024, 6144), tiny=False).parse_args()
    tiny = ((256, 256),)
    with torch.inference_mode():
        copy, decoded = bench_dequantize(args.formats, args.device, tiny if args.tiny else SHAPES[:2])
        few = bench_linear(
            args.formats, [m for m in args.rows if m <= 16], args.device, tiny if args.tiny else GEMV_SHAPES
        )
        wide = bench_linear(
            [f for f in args.formats if f in DECODERS],
            [m for m in args.rows if m > 16],
            args.device,
            tiny if args.tiny else SHAPES,
        )
    show(f"dequantise to bf16 (copy {copy:.0f} GB/s)", decoded)
    show("few rows", few)
    show("many rows", wide)
    save(args.out, "kernels", args.device, {"copy_gb_s": copy, "dequantize": decoded, "linear": few + wide})


if __name__ == "__main__":
    main()
