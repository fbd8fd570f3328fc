"""One denoise step of LTX-2.3 (video, 48 blocks x 4096) with resident random weights: ours, the host's, and the floor below both.

    python benchmarks/bench_step.py [--tokens 6144 14080] [--formats BF16 Q4_0 …] [--eager-tokens 6144] [--no-host] [--no-fast]

*floor* is the sum of the step's dense bf16 matrix products and attention calls, run on the same shapes in the same process. The
host's model is measured when COMFYUI_PATH names a ComfyUI tree, in bf16 and with a plain eager dequantise-then-matmul; --gguf-pack
names a ComfyUI-GGUF tree whose own dequantisation is then measured in the same place ("host pack"). *queued* is how long the processor
takes to issue a step at few tokens: where it comes near the step's time, the GPU waits for it.

The host comes right after this pack's bf16, and the results are written after every format, so that a run that is cut short has what
the ratios need. Of long steps no more than ``LONG_REPEATS`` are timed.
"""

import contextlib
import gc
import time

import torch
import torch.nn.functional as F

from common import arguments, load_pack, measure, peak_memory, reset_memory, save, show, synchronize
from eager import PackLinear, pack_dequantizer
from models import dit_config, host_available, host_dit, host_step, import_host, make_eager, our_dit, packed_formats

GRIDS = {1024: (4, 16, 16), 6144: (16, 16, 24), 14080: (16, 22, 40)}  # latent frames, rows, columns
TEXT_TOKENS = 1024
LONG, LONG_REPEATS = 10_000, 3  # tokens
QUEUED_TOKENS = 2048  # with more, a step has more launches' worth of work than the driver takes in advance
STARTED = time.perf_counter()
FPS = 24.0


def inputs(config, tokens, device, dtype):
    grid = GRIDS.get(tokens) or (1, 1, tokens)
    latent = torch.randn(1, config.in_channels, *grid, device=device).to(dtype)
    context = torch.randn(1, TEXT_TOKENS if tokens >= 1024 else 32, config.context_dim, device=device).to(dtype)
    return latent, torch.full((1,), 0.7, device=device), context


def floor(model, tokens, text_tokens, heads):
    """A function that runs every matrix product (bias included) and attention of one step with the model's dense weights."""
    weight = model.proj_out.weight
    x = torch.randn(1, tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    wide = torch.randn(1, tokens, model.config.ff_dim, device=weight.device).to(weight.dtype)
    c = torch.randn(1, text_tokens, model.config.context_dim, device=weight.device).to(weight.dtype)
    q, text_k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (x, c))

    def run():
        for block in model.transformer_blocks:
            for attn, context, keys in ((block.attn1, x, q), (block.attn2, c, text_k)):
                for layer, value in (
                    (attn.to_q, x),
                    (attn.to_k, context),
                    (attn.to_v, context),
                    (attn.to_gate_logits, x),
                    (attn.to_out[0], x),
                ):
                    F.linear(value, layer.weight, layer.bias)
                F.scaled_dot_product_attention(q, keys, keys)
            F.linear(x, block.ff.net[0].proj.weight, block.ff.net[0].proj.bias)
            F.linear(wide, block.ff.net[2].weight, block.ff.net[2].bias)
        F.linear(x, weight, model.proj_out.bias)

    return run


def timed(what, fmt_name, tokens, step, device, repeats, warmup=1):
    """A row of results, told as soon as it is there."""
    ms = measure(step, device, min(repeats, LONG_REPEATS) if tokens > LONG else repeats, warmup)
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {what}, {fmt_name}, {tokens} tokens: {ms:.1f} ms", flush=True)
    return {"what": what, "format": fmt_name, "tokens": tokens, "ms": ms}


def ours(config, fmt_name, tokens, device, repeats, with_floor=False, kind_tokens=None):
    """Rows of results for one format at several token counts; fast mode too unless ``kind_tokens`` is None.

    kind_tokens: token counts at which fast mode is also measured with one kind of 8-bit products throughout
    """
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute

    model = our_dit(config, fmt_name, device)
    rows = []
    for count in tokens:
        latent, sigma, context = inputs(config, count, device, model.dtype)
        if with_floor:
            run = floor(model, latent[0, 0].numel(), context.shape[1], config.num_attention_heads)
            rows.append(timed("floor", "BF16", count, run, device, repeats))
            del run
        reset_memory(device)
        base = peak_memory(device)

        def step():
            return model.velocity(latent, sigma, context, FPS)

        exact = step()
        row = timed("ours exact", fmt_name, count, step, device, repeats) | queued(step, device, count)
        rows.append(row | {"activations MB": (peak_memory(device) - base) / 2**20})
        if kind_tokens is not None and set_compute(model, "fast"):
            for kind in fast_kinds(device)[: None if count in kind_tokens else 1]:
                with using_kind(kind):
                    eight_bit = step()
                    row = timed(f"ours fast {kind}", fmt_name, count, step, device, repeats) | queued(
                        step, device, count
                    )
                row["cosine"] = F.cosine_similarity(
                    eight_bit.flatten().double(), exact.flatten().double(), dim=0
                ).item()
                row["relative error"] = ((eight_bit.double() - exact.double()).norm() / exact.double().norm()).item()
                rows.append(row)
            set_compute(model, "exact")
    return rows


def queued(step, device, tokens):
    """{"queued ms": milliseconds until all of a step's work is issued, from an idle device}, empty with many tokens."""
    if tokens > QUEUED_TOKENS:
        return {}
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    synchronize(device)
    return {"queued ms": min(times)}


def fast_kinds(device):
    """What can be measured here: "mixed" is the fast mode as it is, the others are that kind in all its layers."""
    from ltx2_gguf.quant import eight_bit

    best = eight_bit.kind_for(torch.device(device), 1 << 20, (4096, 4096), torch.bfloat16, "fast")
    return {"fp8": ("mixed", "fp8", "int8"), "int8": ("int8",), None: ()}[best]


@contextlib.contextmanager
def using_kind(kind):
    """8-bit products of this kind in all fast layers; "mixed": of each layer's own."""
    from ltx2_gguf.quant import eight_bit

    before = eight_bit.kind_for
    if kind != "mixed":
        eight_bit.kind_for = lambda device, tokens, shape, dtype, compute: (
            None if before(device, tokens, shape, dtype, compute) is None else kind
        )
    try:
        yield
    finally:
        eight_bit.kind_for = before


def host(config, formats, tokens, eager_tokens, device, repeats, pack=""):
    """Yields rows for the host's model: in bf16, then per format with eager dequantisation (the plain one here, and another pack's)."""
    model = host_dit(config, device)

    def times(what, fmt_name, tokens):
        rows = []
        for count in tokens:
            latent, sigma, context = inputs(config, count, device, model.dtype)
            rows.append(
                timed(
                    what,
                    fmt_name,
                    count,
                    lambda: host_step(model, latent, sigma, context, FPS),
                    device,
                    max(2, repeats - 2),
                )
            )
        return rows

    dequantize_tensor = None
    if pack:
        try:
            dequantize_tensor = pack_dequantizer(pack)
        except ImportError as error:  # it needs the gguf package
            print(f"{pack} is left out: {error}")
    yield times("host", "BF16", tokens)
    for fmt_name in formats:
        packed = packed_formats(config, fmt_name)
        make_eager(model, packed, device)
        yield times("host eager", fmt_name, eager_tokens)
        if dequantize_tensor is not None:
            make_eager(model, packed, device, lambda *layer: PackLinear(*layer, dequantize_tensor))
            yield times("host pack", fmt_name, eager_tokens)


def add_ratios(rows):
    """Express every time in floors and in the host's times at the same token count."""

    def time_of(what, fmt, tokens):
        return next(
            (row["ms"] for row in rows if (row["what"], row["format"], row["tokens"]) == (what, fmt, tokens)), None
        )

    for row in rows:
        fmt, tokens = row["format"], row["tokens"]
        for label, other in (
            ("x floor", time_of("floor", "BF16", tokens)),
            ("x host bf16", time_of("host", "BF16", tokens)),
            ("x ours bf16", time_of("ours exact", "BF16", tokens)),
        ):
            if other:
                row[label] = row["ms"] / other
        eager = time_of("host eager", fmt, tokens)
        if eager and row["what"].startswith("ours"):
            row["eager / ours"] = eager / row["ms"]
        pack = time_of("host pack", fmt, tokens)
        if pack and row["what"].startswith("ours"):
            row["pack / ours"] = pack / row["ms"]
    return rows


def run(args):
    config = dit_config(2, 4, 32) if args.tiny else dit_config(args.layers)
    with_host, rows = host_available() and not args.no_host, []
    failed = None
    if with_host:
        import_host()  # before anything is timed: it may change torch's settings

    def add(new):
        rows.extend(new)
        save(args.out, "step", args.device, add_ratios([dict(row) for row in rows]))

    def rows_of(fmt_name):
        kinds = None if args.no_fast or fmt_name not in ("Q4_0", "Q8_0") else args.kind_tokens
        try:
            add(ours(config, fmt_name, args.tokens, args.device, args.repeats, fmt_name == "BF16", kinds))
        except torch.OutOfMemoryError as error:
            print(f"{fmt_name}: {error}")
        gc.collect()
        reset_memory(args.device)

    with torch.inference_mode():
        if "BF16" in args.formats:
            rows_of("BF16")
        if with_host:
            eager = [name for name in args.eager if name in args.formats]
            try:
                for new in host(
                    config, eager, args.tokens, args.eager_tokens, args.device, args.repeats, args.gguf_pack
                ):
                    add(new)
            except Exception as error:  # this pack's own rows are still wanted
                failed = error
            gc.collect()
            reset_memory(args.device)
        for fmt_name in args.formats:
            if fmt_name != "BF16":
                rows_of(fmt_name)
    if failed is not None:
        raise failed
    return add_ratios(rows)


def main():
    load_pack()
    args = arguments(
        __doc__, tokens=(1024, 6144, 14080), formats=("BF16", "Q4_0", "Q8_0", "Q4_K", "Q5_1", "Q6_K"),
        eager=("Q4_0", "Q8_0", "Q4_K", "Q5_1"),
        eager_tokens=(1024, 6144, 14080), kind_tokens=(6144,), repeats=5, layers=48, no_host=False, no_fast=False, tiny=False, gguf_pack="",
    ).parse_args()  # fmt: skip
    rows = run(args)
    show("one denoise step", rows)
    save(args.out, "step", args.device, rows)


if __name__ == "__main__":
    main()
