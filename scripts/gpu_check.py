"""Everything that needs a GPU, in one run of a few minutes: kernels against their references, then the benchmarks.

    python scripts/gpu_check.py [--out DIR] [--only SECTION …] [--skip SECTION …]

Sections run one after another; one that fails is reported with its traceback and the others still run. Results go to DIR/*.json,
a short table is printed at the end, and the exit status says whether everything passed. COMFYUI_PATH, when set, names a
ComfyUI tree whose own model is measured beside ours, and GGUF_PACK_PATH a ComfyUI-GGUF tree whose decoding is measured on that model.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch
import torch.nn.attention
import torch.nn.functional as F

from common import copy_bandwidth, environment, load_pack, measure, measure_many, random_raw, save, show

SECTIONS = {}
STARTED = {}  # processes that run beside the sections
DEVICE = "cuda"


def section(fn):
    SECTIONS[fn.__name__] = fn
    return fn


def error(got, expected):
    """||got - expected|| / ||expected|| in float64; NaN counts as infinite."""
    value = (got.double() - expected.double()).norm() / expected.double().norm()
    return float("inf") if torch.isnan(value) else value.item()


def check(name, value, limit, rows):
    rows.append({"check": name, "error": float(value), "limit": limit, "ok": "yes" if value <= limit else "NO"})
    return value <= limit


def finish(title, rows, out):
    show(title, rows)
    save(out, "check_" + title.split()[0], DEVICE, rows)
    bad = [row["check"] for row in rows if row["ok"] == "NO"]
    if bad:
        raise AssertionError(f"{len(bad)} checks failed: {', '.join(bad[:8])}")


def start_unit_tests(out):
    """Begin the kernel tests in a process of their own: most of their time is compilation, which runs beside the next sections."""
    workers = str(min(10, os.cpu_count() or 1))
    files = [
        "tests/quant/test_triton.py",
        "tests/ltx2_core/transformer/test_fused.py",
        "tests/quant/test_eight_bit.py",
        "tests/quant/test_matmul.py",
        "tests/ltx2_core/text/test_gemma_fused.py",
    ]
    files += ["tests/ltx2_core/vae/test_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, *files]
    with open(out / "unit_tests.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


@section
def quant(out):
    """Packed products at real shapes: decode exactness in bf16, products of few and many rows, GELU epilogue, streams, graph capture."""
    from ltx2_gguf.quant import decode, matmul, tensor
    from ltx2_gguf.quant.formats import FORMATS, QUANTIZED

    rows = []
    for name, fmt in QUANTIZED.items():
        raw = random_raw(name, 1024, 4096, DEVICE)
        wide = decode.dequantize(raw, fmt, torch.float32)
        out_bf16 = torch.full((1024, 4096), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        matmul.dequantize(raw, fmt, out=out_bf16)
        check(f"{name} bf16 bits", 0.0 if torch.equal(out_bf16, wide.to(torch.bfloat16)) else 1.0, 0.0, rows)
        for m in (1, 2, 3, 4, 5, 64):
            x = torch.randn(m, 4096, device=DEVICE).to(torch.bfloat16)
            bias = torch.randn(1024, device=DEVICE).to(torch.bfloat16)
            expected = F.linear(x.double(), wide.double(), bias.double())
            check(
                f"{name} linear {m} rows",
                error(matmul.linear_raw(x, raw, fmt, (1024, 4096), bias), expected),
                4e-3,
                rows,
            )
    for name, shape, dtype, limit in (
        ("Q4_0", (1007, 4096), torch.float16, 1e-3),
        ("Q4_K", (2048, 15360), torch.float32, 1e-5),
        ("Q6_K", (515, 768), torch.bfloat16, 3e-3),
    ):
        raw = random_raw(name, *shape, DEVICE)
        wide = decode.dequantize(raw, FORMATS[name], torch.float32)
        for m in (1, 3):
            x = torch.randn(m, shape[1], device=DEVICE).to(dtype)
            label = f"{name} {shape[0]}x{shape[1]}, {m} rows, {dtype}".replace("torch.", "")
            check(
                label, error(matmul.linear_raw(x, raw, FORMATS[name], shape), x.double() @ wide.double().T), limit, rows
            )
    raw = random_raw("Q4_0", 4096, 4096, DEVICE)
    weight = tensor.pack(raw, "Q4_0", (4096, 4096), torch.bfloat16)
    x, bias = (
        torch.randn(700, 4096, device=DEVICE).to(torch.bfloat16),
        torch.randn(4096, device=DEVICE).to(torch.bfloat16),
    )
    dense = weight.dequantize()
    expected = F.linear(x.double(), dense.double(), bias.double())
    check(
        "GELU in the epilogue",
        error(matmul.linear(x, weight, bias, gelu=True), F.gelu(expected, approximate="tanh")),
        4e-3,
        rows,
    )

    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(F.linear(x, weight, bias))
    torch.cuda.synchronize()
    check("four streams at once", max(error(r, expected) for r in results), 4e-3, rows)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = F.linear(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    check("CUDA graph replay", error(captured, F.linear(x.double(), dense.double(), bias.double())), 4e-3, rows)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    F.linear(x, weight, bias)
    check(
        "allocations per call beyond the output",
        torch.cuda.memory_stats()["allocation.all.allocated"] - before - 1,
        0,
        rows,
    )
    finish("quant", rows, out)


@section
def network(out):
    """A two-layer DiT at full width: Triton against plain torch, per-token timesteps, graph capture, torch.compile."""
    from bench_step import FPS, inputs
    from ltx2_gguf.ltx2_core.transformer import fused
    from ltx2_gguf.quant import tensor
    from models import dit_config, our_dit

    rows, config = [], dit_config(2)
    model = our_dit(config, "Q4_0", DEVICE)
    dense = our_dit(config, "BF16", "meta", torch.float32)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(
            dense.get_submodule(owner),
            leaf,
            torch.nn.Parameter(tensor.unpack(parameter, torch.bfloat16).float(), requires_grad=False),
        )
    dense.dtype = torch.float32
    latent, sigma, context = inputs(config, 1024, DEVICE, torch.bfloat16)
    mask = torch.ones(1, 1, *latent.shape[2:], device=DEVICE)
    mask[:, :, 0] = 0.2
    spotted = mask * torch.rand_like(mask).round().clamp(0.5)
    for label, extra in (
        ("one timestep", {}),
        ("per frame", {"denoise_mask": mask}),
        ("per token", {"denoise_mask": spotted}),
    ):
        truth = dense.velocity(latent.float(), sigma, context.float(), FPS, **extra)
        got = model.velocity(latent, sigma, context, FPS, **extra)
        fused._HAS_TRITON = False  # the element-wise passes in torch; products are checked in the section before
        plain = model.velocity(latent, sigma, context, FPS, **extra)
        fused._HAS_TRITON = True
        decode = error(plain, truth)
        print(f"{label}: plain torch bf16 {decode:.3g}")
        check(f"velocity against float32, {label}", error(got, truth), max(1.2 * decode, 4e-3), rows)

    graph = torch.cuda.CUDAGraph()
    for _ in range(2):
        model.velocity(latent, sigma, context, FPS)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = model.velocity(latent, sigma, context, FPS)
    graph.replay()
    check("CUDA graph of a step", error(captured, model.velocity(latent, sigma, context, FPS)), 0.0, rows)

    block, x = model.transformer_blocks[0], torch.randn(1, 256, config.inner_dim, device=DEVICE).to(torch.bfloat16)
    pe = model._rotary_tables_for((4, 8, 8), FPS, None, None, torch.device(DEVICE))["v_pe"]
    rows_of = torch.randn(1, 1, 9 * config.inner_dim, device=DEVICE).to(torch.bfloat16) * 0.1
    prompt = torch.randn(1, 1, 2 * config.inner_dim, device=DEVICE).to(torch.bfloat16) * 0.1
    empty = x.new_zeros(1, 0, 0)

    def call(fn):
        return fn(
            (x.clone(), empty),
            v_context=context,
            v_timestep=rows_of,
            v_pe=pe,
            v_prompt_timestep=prompt,
            transformer_options={},
        )[0]

    start = time.perf_counter()
    compiled = call(torch.compile(block, fullgraph=True, dynamic=False))
    print(f"torch.compile of a block: {time.perf_counter() - start:.1f} s")
    check("torch.compile, fullgraph", error(compiled, call(block)), 4e-3, rows)
    finish("network", rows, out)


@section
def unit_tests(out):
    """Wait for the kernel tests, which run on the GPU when there is one."""
    try:
        status = STARTED["unit_tests"].wait(timeout=240)
    finally:
        STARTED["unit_tests"].kill()
        print((out / "unit_tests.log").read_text()[-2500:])
    if status:
        raise AssertionError(f"pytest ended with status {status}")


@section
def card(out):
    """Copy speed and dense bf16 product: the two ceilings."""
    copy = copy_bandwidth(DEVICE)
    a = torch.randn(8192, 8192, device=DEVICE).to(torch.bfloat16)
    product = 2 * 8192**3 / measure(lambda: a @ a, DEVICE, 10) / 1e9
    show("card", [{"copy GB/s": copy, "bf16 8192^3 TFLOP/s": product, **environment(DEVICE)}])
    backends = torch.nn.attention.SDPBackend
    rows = []
    for tokens in (6144, 14080):
        q = torch.randn(1, tokens, 4096, device=DEVICE).to(torch.bfloat16).unflatten(-1, (32, 128)).transpose(1, 2)
        row = {
            "attention tokens": tokens,
            "default ms": measure(lambda: F.scaled_dot_product_attention(q, q, q), DEVICE, 3),
        }
        for label, backend in (("cuDNN ms", backends.CUDNN_ATTENTION), ("flash ms", backends.FLASH_ATTENTION)):
            with torch.nn.attention.sdpa_kernel(backend):
                row[label] = measure(lambda: F.scaled_dot_product_attention(q, q, q), DEVICE, 3)
        rows.append(row)
    show("attention, 32 heads of 128", rows)
    save(out, "card", DEVICE, {"copy_gb_s": copy, "bf16_tflop_s": product, "attention": rows})


@section
def fast(out):
    """fp8 and int8 products at real shapes against the same arithmetic in torch, and their speed against dense bf16."""
    from ltx2_gguf.quant import eight_bit, matmul
    from ltx2_gguf.quant.formats import FORMATS
    from ltx2_gguf.quant.kernels import triton_eight_bit, triton_int8

    rows, speeds = [], []
    for name in ("Q4_0", "Q6_K"):
        raw, fmt = random_raw(name, 4096, 4096, DEVICE), FORMATS[name]
        bias = torch.randn(4096, device=DEVICE).to(torch.bfloat16)
        x = torch.randn(512, 4096, device=DEVICE).to(torch.bfloat16)
        exact = matmul.linear_raw(x, raw, fmt, (4096, 4096), bias)
        for kind in ("fp8", "int8"):
            got = eight_bit.linear(x, raw, fmt, (4096, 4096), bias, kind)
            check(
                f"{name} {kind} against torch",
                error(got, eight_bit.reference_linear(x, raw, fmt, bias, kind)),
                4e-3,
                rows,
            )
            check(f"{name} {kind} against exact", error(got, exact), 0.06, rows)
        got = eight_bit.linear(x, raw, fmt, (4096, 4096), bias, "int8", True)
        expected = F.gelu(eight_bit.reference_linear(x, raw, fmt, bias, "int8").float(), approximate="tanh")
        check(f"{name} int8 with GELU against torch", error(got, expected), 6e-3, rows)
    for shape in ((4096, 4096), (16384, 4096), (4096, 16384)):
        raw, fmt = random_raw("Q4_0", *shape, DEVICE), FORMATS["Q4_0"]
        x = torch.randn(6144, shape[1], device=DEVICE).to(torch.bfloat16)
        bias = torch.randn(shape[0], device=DEVICE).to(torch.bfloat16)
        w = torch.randn(shape, device=DEVICE).mul_(0.02).to(torch.bfloat16)
        row = {
            "shape": f"{shape[0]}x{shape[1]}",
            "rows": 6144,
            "dense bf16 ms": measure_many([lambda: F.linear(x, w, bias)] * 4, DEVICE),
        }
        for kind, (dtype, _) in eight_bit.KINDS.items():
            wq, w_scale = torch.empty(shape, dtype=dtype, device=DEVICE), torch.empty(shape[0], device=DEVICE)
            row[f"{kind} weight ms"] = measure_many(
                [lambda: triton_eight_bit.weight_rows(raw, "Q4_0", wq, w_scale)] * 4, DEVICE
            )
            row[f"{kind} activations ms"] = measure_many([lambda: eight_bit.quantize(x, kind)] * 4, DEVICE)
            xq, x_scale = eight_bit.quantize(x, kind)
            if kind == "fp8":

                def product():
                    return torch._scaled_mm(
                        xq,
                        wq.t(),
                        x_scale[:, None],
                        w_scale[None, :],
                        bias=bias,
                        out_dtype=torch.bfloat16,
                        use_fast_accum=True,
                    )

                row["fp8 product ms"] = measure_many([product] * 4, DEVICE)
                continue
            y = torch.empty(6144, shape[0], dtype=torch.bfloat16, device=DEVICE)
            for tile in (
                triton_int8.TILES[9],
                (128, 256, 128, 8, 3, 8),
                (128, 128, 128, 8, 4, 4),
                (256, 128, 64, 8, 4, 8),
            ):
                label = "int8 product " + "/".join(map(str, tile))
                try:
                    row[label] = measure_many(
                        [lambda: triton_int8.product(xq, x_scale, wq, w_scale, bias, y, False, tile)] * 4, DEVICE
                    )
                except Exception as problem:  # a tile that does not fit the chip's shared memory
                    print(f"{label}: {type(problem).__name__}: {problem}")
        speeds.append(row)
    for row in speeds:
        show(
            f"fast products, {row['shape']}",
            [{"what": key, "ms": value} for key, value in row.items() if key not in ("shape", "rows")],
        )
    save(out, "fast", DEVICE, speeds)
    import fast_error
    import variants as choices

    kinds = choices.fast_kinds(DEVICE)
    show("a step of 24 blocks, Q8_0, 6144 tokens", kinds)
    crossing = choices.fast_tokens(DEVICE)
    show("exact and 8 bits by tokens, 12 blocks (eight_bit.MIN_TOKENS)", crossing)
    found = {"kinds": kinds, "tokens": crossing}
    if os.environ.get("GEMMA_GGUF"):
        settings = {
            "width": 128,
            "height": 128,
            "frames": 25,
            "steps": 10,
            "cfg": 2.0,
            "stg": 0.0,
            "rescale": 0.7,
            "seed": 1,
            "negative_prompt": "",
        }
        found["trained"] = fast_error.trained_weights(
            Path(fast_error.TOY), os.environ["GEMMA_GGUF"], DEVICE, fast_error.PROMPTS[:1], settings
        )
        show("fast mode, the demo model", found["trained"])
    save(out, "fast_kinds", DEVICE, found)
    finish("fast", rows, out)


@section
def launches(out):
    """Where the processor's time goes at 1024 tokens, Q4_0: the profile of three steps."""
    import cProfile
    import pstats

    from bench_step import FPS, inputs, queued
    from models import dit_config, our_dit

    config, rows = dit_config(12), []
    for fmt_name in ("BF16", "Q4_0"):
        model = our_dit(config, fmt_name, DEVICE)
        latent, sigma, context = inputs(config, 1024, DEVICE, torch.bfloat16)

        def step():
            return model.velocity(latent, sigma, context, FPS)

        for _ in range(3):
            step()
        rows.append({"format": fmt_name, "12 blocks, ms": measure(step, DEVICE, 5)} | queued(step, DEVICE, 1024))
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(3):
            step()
        profile.disable()
        torch.cuda.synchronize()
        if fmt_name != "BF16":
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        del model
    import variants as choices

    per_layer = choices.products(DEVICE)
    show("launches", rows)
    show("processor time per linear layer", per_layer)
    save(out, "launches", DEVICE, {"steps": rows, "per layer": per_layer})


@section
def variants(out):
    """The whole step with choices that a kernel by itself cannot show."""
    from bench_step import FPS, inputs
    from ltx2_gguf.quant.kernels import triton_dequantize
    from models import dit_config, our_dit

    config, rows = dit_config(24), []
    model = our_dit(config, "Q8_0", DEVICE)
    launch = triton_dequantize.launch
    for tokens in (6144, 14080):
        latent, sigma, context = inputs(config, tokens, DEVICE, torch.bfloat16)

        def step():
            return measure(lambda: model.velocity(latent, sigma, context, FPS), DEVICE, 5)

        row = {"tokens, 24 blocks": tokens, "default": step()}
        for size in ((1024, 4), (4096, 8)):
            triton_dequantize.launch = lambda raw, name, w, size=size: launch(raw, name, w, *size)
            row[f"decode {size[0]}/{size[1]}"] = step()
        triton_dequantize.launch = launch
        row["default again"] = step()
        rows.append(row)
    show("variants", rows)
    save(out, "variants", DEVICE, rows)


@section
def gemma_variants(out):
    """Gemma-3 12B with choices that a kernel by itself cannot show."""
    import variants as choices

    rows = choices.gemma_variants(DEVICE)
    show("Gemma-3 12B, ms", rows)
    save(out, "gemma_variants", DEVICE, rows)


@section
def passes(out):
    """Element-wise kernels at 6144 x 4096: GB/s counted as each tensor once, and a few launch shapes."""
    from ltx2_gguf.ltx2_core.transformer import fused
    from ltx2_gguf.ltx2_core.transformer import triton_fused as ft

    copy, t, d, heads = copy_bandwidth(DEVICE), 6144, 4096, 32
    new = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device=DEVICE).to(dtype)
    x, y, k = new(1, t, d), new(1, t, d), new(1, t, d)
    table = new(1, 1, 9, d) * 0.1
    shift, scale, gate = table[:, :, :3].unbind(2)
    weights, logits = new(2, d), new(1, t, heads)
    pe = tuple(torch.randn(1, t, heads, 64, device=DEVICE).transpose(1, 2) for _ in range(2))
    tile = x.numel() * 2
    cases = {
        "rms_modulate": (lambda: fused.rms_modulate(x, scale, shift, 1e-6), 2 * tile),
        "gate_residual_": (lambda: fused.gate_residual_(x, y, gate), 3 * tile),
        "gate_residual_rms_modulate_": (
            lambda: fused.gate_residual_rms_modulate_(x, y, gate, scale, shift, 1e-6),
            4 * tile,
        ),
        "qk_norm_rope": (lambda: fused.qk_norm_rope(y, k, *weights, pe, heads, 1e-6), 4 * tile + 2 * pe[0].numel() * 4),
        "qk_norm": (
            lambda: fused.qk_norm_rope(y, k[:, :1024].contiguous(), *weights, None, heads, 1e-6),
            2 * tile + 4 * 1024 * d * 2,
        ),
        "head_gate": (lambda: fused.head_gate(x, logits), 2 * tile),
        "layer_norm_modulate": (lambda: fused.layer_norm_modulate(x, scale, shift, 1e-6), 2 * tile),
    }
    rows = []
    for name, (fn, nbytes) in cases.items():
        ms = measure_many([fn] * 8, DEVICE)
        rows.append({"pass": name, "us": ms * 1e3, "GB/s": nbytes / ms / 1e6, "of copy": nbytes / ms / 1e6 / copy})
    variants = []
    for token_limit in (1, 2, 4, 8):
        for warps in (4, 8, 16):
            h = torch.empty_like(x)
            ms = measure_many(
                [lambda: ft._stream(x, y, gate, scale, shift, h, 1e-6, 1, token_limit, warps)] * 8, DEVICE
            )
            variants.append(
                {
                    "tokens per program": token_limit,
                    "warps": warps,
                    "us": ms * 1e3,
                    "of copy": 4 * tile / ms / 1e6 / copy,
                }
            )
    show("passes", rows)
    show("stream kernel", sorted(variants, key=lambda row: row["us"])[:6])
    save(out, "passes", DEVICE, {"copy_gb_s": copy, "passes": rows, "stream_variants": variants})


@section
def decode_tiles(out):
    """Tile sizes of the dequantise kernel."""
    from ltx2_gguf.quant.kernels import triton_dequantize as kt

    rows = []
    for name in ("Q4_0", "Q8_0", "Q5_1", "Q4_K", "Q6_K"):
        raws = [random_raw(name, 4096, 4096, DEVICE) for _ in range(6)]
        outs = [torch.empty(4096, 4096, dtype=torch.bfloat16, device=DEVICE) for _ in range(6)]
        row = {"format": name}
        for tile, warps in ((1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8)):
            calls = [lambda r=r, o=o, t=tile, w=warps: kt.launch(r, name, o, t, w) for r, o in zip(raws, outs)]
            row[f"{tile}/{warps}"] = measure_many(calls, DEVICE) * 1e3
        rows.append(row)
    show("dequantise 4096x4096, microseconds by tile bytes / warps", rows)
    save(out, "decode_tiles", DEVICE, rows)


@section
def kernels(out):
    """benchmarks/bench_kernels.py."""
    import bench_kernels
    from ltx2_gguf.quant.formats import QUANTIZED
    from ltx2_gguf.quant.kernels import triton_gemv

    copy, decoded = bench_kernels.bench_dequantize(list(QUANTIZED), DEVICE)
    show(f"dequantise to bf16 (copy {copy:.0f} GB/s)", decoded)
    few = bench_kernels.bench_linear(
        ["Q4_0", "Q8_0", "Q4_K", "Q6_K"], [1, 2, 4, 5, 8, 16], DEVICE, bench_kernels.GEMV_SHAPES, eager=False
    )
    show("few rows", few)
    wide = bench_kernels.bench_linear(["Q4_0", "Q8_0", "Q5_1", "Q4_K"], [64, 1024, 6144], DEVICE, bench_kernels.SHAPES)
    show("many rows", wide)
    tiles = []
    for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0"):  # units of a step per thread, and warps, of a matrix-vector program
        for shape in ((2048, 3840), (15360, 3840), (3840, 15360)):
            raws = [random_raw(name, *shape, DEVICE) for _ in range(max(2, (160 << 20) // (shape[0] * shape[1])))]
            x, y = (
                torch.randn(1, shape[1], device=DEVICE).to(torch.bfloat16),
                torch.empty(1, shape[0], dtype=torch.bfloat16, device=DEVICE),
            )
            row = {
                "format": name,
                "shape": f"{shape[0]}x{shape[1]}",
                "chosen": "/".join(map(str, triton_gemv.tile_of(name, shape[1]))),
            }
            for tile in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)):
                ms = measure_many([lambda r=r: triton_gemv.launch(x, r, name, None, y, tile) for r in raws], DEVICE)
                row["/".join(map(str, tile))] = raws[0].numel() / ms / 1e6
            tiles.append(row)
    show("matrix-vector kernel, GB/s by units per thread and warps", tiles)
    save(out, "kernels", DEVICE, {"copy_gb_s": copy, "dequantize": decoded, "linear": few + wide, "tiles": tiles})


def _benchmark(name, out, *options):
    module = __import__(f"bench_{name}")
    before, sys.argv = sys.argv, [f"bench_{name}.py", "--out", str(out), *options]
    try:
        module.main()
    finally:
        sys.argv = before


@section
def step(out):
    """benchmarks/bench_step.py, the host's eager rows at 6144 tokens alone."""
    pack = os.environ.get("GGUF_PACK_PATH")
    _benchmark("step", out, "--repeats", "4", "--eager-tokens", "6144", *(["--gguf-pack", pack] if pack else []))


@section
def gemma(out):
    """benchmarks/bench_gemma.py."""
    _benchmark("gemma", out)


@section
def vae(out):
    """benchmarks/bench_vae.py."""
    _benchmark("vae", out, "--sizes", "768x512x121", "--repeats", "1")


@section
def load(out):
    """benchmarks/bench_load.py."""
    _benchmark("load", out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--skip", nargs="*", default=[], choices=list(SECTIONS))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No CUDA GPU is visible to torch; this script has nothing to check here.")
    load_pack()
    args.out.mkdir(parents=True, exist_ok=True)
    selected = [name for name in SECTIONS if name in args.only and name not in args.skip]
    if "unit_tests" in selected:
        STARTED["unit_tests"] = start_unit_tests(args.out)
    summary = []
    for name, fn in SECTIONS.items():
        if name not in selected:
            continue
        print(f"\n=== {name}: {fn.__doc__.splitlines()[0]}", flush=True)
        start = time.perf_counter()
        try:
            with torch.inference_mode():
                fn(args.out)
            result = "ok"
        except Exception:  # a failing section must not keep the others from running
            traceback.print_exc(file=sys.stdout)
            result = "FAILED"
        torch.cuda.empty_cache()
        summary.append({"section": name, "result": result, "seconds": time.perf_counter() - start})
    show("summary", summary)
    save(args.out, "gpu_check", DEVICE, summary)
    return 1 if any(row["result"] != "ok" for row in summary) else 0


if __name__ == "__main__":
    sys.exit(main())
