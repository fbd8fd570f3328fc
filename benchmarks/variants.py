"""Choices in the code that only a whole run on a GPU can decide, each measured against the default in one process.

``gpu_check.py`` runs these: ``products`` is what the processor pays for a layer, ``gemma_variants`` and ``fast_kinds`` compare the module
constants they name.
"""

import contextlib
import gc
import time

import torch
import torch.nn.functional as F

from common import load_pack, measure, random_raw, synchronize


@contextlib.contextmanager
def setting(module, **values):
    """Module constants of other values inside the block."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def issued(fn, device, count=100):
    """Microseconds of the processor per call, from an idle device; few enough calls that the driver's queue does not fill."""
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            fn()
        best = min(best, (time.perf_counter() - start) / count * 1e6)
    synchronize(device)
    return best


def products(device, width=512, tokens=64):
    """Processor time per linear layer of a size whose work on the GPU takes less: dense, packed, and where the packed one spends it."""
    load_pack()
    from ltx2_gguf.ltx2_core.transformer import fused
    from ltx2_gguf.quant import scratch, tensor
    from ltx2_gguf.quant.kernels import triton_dequantize

    layer = torch.nn.Linear(width, width, dtype=torch.bfloat16, device=device).requires_grad_(False)
    packed = torch.nn.Linear(width, width, dtype=torch.bfloat16, device=device)
    raw = random_raw("Q4_0", width, width, device)
    packed.weight = torch.nn.Parameter(tensor.pack(raw, "Q4_0", (width, width), torch.bfloat16), requires_grad=False)
    packed.bias = layer.bias
    x, out = (
        torch.randn(1, tokens, width, device=device).to(torch.bfloat16),
        torch.empty(width, width, dtype=torch.bfloat16, device=device),
    )
    one = x[:, :1].contiguous()
    cases = [
        ("dense product", lambda: F.linear(x, layer.weight, layer.bias)),
        ("packed product, direct", lambda: fused.linear(packed, x)),
        ("packed product, by way of the module", lambda: packed(x)),
        ("packed product of one row, direct", lambda: fused.linear(packed, one)),
        ("  of it: is it ready", lambda: fused._ready(packed, x)),
        ("  of it: scratch memory", lambda: scratch.matrix((width, width), x.dtype, x.device)),
        ("  of it: launch of the decoding kernel", lambda: triton_dequantize.launch(raw, "Q4_0", out)),
    ]
    return [{"what": what, "us of the processor": issued(fn, device)} for what, fn in cases]


def gemma_variants(device, formats=("BF16", "Q4_0"), tokens=(128, 1024), tiny=False):
    """Milliseconds of a Gemma-3 12B encode: as it is, and with one choice changed."""
    from bench_gemma import build, gemma_config

    load_pack()
    from ltx2_gguf.ltx2_core.text import gemma
    from ltx2_gguf.ltx2_core.transformer import fused

    choices = [("default", gemma, {}), ("passes in torch", fused, {"_HAS_TRITON": False}), ("default again", gemma, {})]
    config, rows = gemma_config(tiny), []
    for fmt_name in formats:
        model = build(config, fmt_name, device)
        for count in tokens:
            ids = torch.randint(0, config.vocab_size, (1, count), device=device)
            row = {"format": fmt_name, "tokens": count}
            for label, module, values in choices:
                with setting(module, **values):
                    row[label] = measure(lambda: model(ids, collect_device=device), device, 3)
            row["to main memory"] = measure(lambda: model(ids), device, 3, 1)
            with setting(gemma, GATHERED_BYTES=1):
                row["to main memory, one by one"] = measure(lambda: model(ids), device, 3, 1)
            synchronize(device)
            start = time.perf_counter()
            model(ids, collect_device=device)
            row["queued"] = (time.perf_counter() - start) * 1e3
            synchronize(device)
            rows.append(row)
        del model
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
    return rows


def fast_kinds(device, layers=24, tokens=6144, fmt_name="Q8_0"):
    """A step in exact mode and in fast mode as it is (fp8, and int8 where that errs most), with fp8 everywhere, or int8 everywhere."""
    from bench_step import FPS, inputs, using_kind
    from models import dit_config, our_dit

    load_pack()
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute

    config = dit_config(layers)
    model = our_dit(config, fmt_name, device)
    latent, sigma, context = inputs(config, tokens, device, torch.bfloat16)

    def step():
        return model.velocity(latent, sigma, context, FPS)

    exact = step().double()
    rows = [{"compute": "exact", "ms": measure(step, device, 4)}]
    set_compute(model, "fast")
    for label in ("mixed", "fp8", "int8"):
        with using_kind(label):
            velocity = step().double()
            row = {
                "compute": label,
                "ms": measure(step, device, 4),
                "cosine": F.cosine_similarity(velocity.flatten(), exact.flatten(), dim=0).item(),
            }
        rows.append(row | {"x exact": row["ms"] / rows[0]["ms"]})
    return rows


def fast_tokens(device, layers=12, counts=(512, 1024, 1536, 2048, 3072, 4096, 6144), formats=("Q4_0", "Q8_0")):
    """A step in exact mode and in 8 bits at every number of tokens: where they cross is ``eight_bit.MIN_TOKENS``."""
    from bench_step import FPS, inputs
    from models import dit_config, our_dit

    load_pack()
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute
    from ltx2_gguf.quant import eight_bit

    config, rows = dit_config(layers), []
    for fmt_name in formats:
        model = our_dit(config, fmt_name, device)
        for tokens in counts:
            latent, sigma, context = inputs(config, tokens, device, torch.bfloat16)
            row = {"format": fmt_name, "tokens": tokens}
            with setting(eight_bit, MIN_TOKENS=1):
                for mode in ("exact", "fast"):
                    set_compute(model, mode)
                    row[f"{mode} ms"] = measure(lambda: model.velocity(latent, sigma, context, FPS), device, 4)
            rows.append(row | {"fast / exact": row["fast ms"] / row["exact ms"]})
        del model
    return rows
