"""One denoise step of LTX-2.3 (video, 48 blocks x 4096) with resident random weights: ours, the host's, and the floor below both.

    python benchmarks/bench_step.py [--tokens 6144 14080] [--formats BF16 Q4_0 …] [--no-host] [--no-fast]

*floor* is the sum of the step's dense bf16 matrix products and attention calls, run on the same shapes in the same process. The
host's model is measured when COMFYUI_PATH names a ComfyUI tree, in bf16 and with a plain eager dequantise-then-matmul; --gguf-pack
names a ComfyUI-GGUF tree whose own dequantisation is then measured in the same place ("host pack"). *queued* is how long the processor
takes to issue a step: where it comes near the step's time, the GPU waits for it.
"""

import contextlib
import gc
import time

import torch
import torch.nn.functional as F
from common import arguments, load_pack, measure, peak_memory, reset_memory, save, show, synchronize
from eager import PackLinear, pack_dequantizer
from models import dit_config, host_available, host_dit, host_step, make_eager, our_dit, packed_names

GRIDS = {1024: (4, 16, 16), 6144: (16, 16, 24), 14080: (16, 22, 40)}  # latent frames, rows, columns
TEXT_TOKENS = 1024
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
                for layer, value in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context), (attn.to_gate_logits, x), (attn.to_out[0], x)):
                    F.linear(value, layer.weight, layer.bias)
                F.scaled_dot_product_attention(q, keys, keys)
            F.linear(x, block.ff.net[0].proj.weight, block.ff.net[0].proj.bias)
            F.linear(wide, block.ff.net[2].weight, block.ff.net[2].bias)
        F.linear(x, weight, model.proj_out.bias)

    return run


def ours(config, fmt_name, tokens, device, repeats, with_floor=False, with_fast=False):
    """Rows of results for one format at several token counts."""
    from ltx2_gguf.ltx2_core.compute_mode import set_compute

    model = our_dit(config, fmt_name, device)
    rows = []
    for count in tokens:
        latent, sigma, context = inputs(config, count, device, model.dtype)
        if with_floor:
            run = floor(model, latent[0, 0].numel(), context.shape[1], config.num_attention_heads)
            rows.append({"what": "floor", "format": "BF16", "tokens": count, "ms": measure(run, device, repeats, 1)})
            del run
        reset_memory(device)
        base = peak_memory(device)

        def step():
            return model.velocity(latent, sigma, context, FPS)

        exact = step()
        row = {"what": "ours exact", "format": fmt_name, "tokens": count, "ms": measure(step, device, repeats, 1), "queued ms": queued(step, device)}
        rows.append(row | {"activations MB": (peak_memory(device) - base) / 2**20})
        if with_fast and set_compute(model, "fast"):
            for kind in fast_kinds(device):
                with using_kind(kind):
                    fast = step()
                    row = {"what": f"ours fast {kind}", "format": fmt_name, "tokens": count, "ms": measure(step, device, repeats, 1), "queued ms": queued(step, device)}
                row["cosine"] = F.cosine_similarity(fast.flatten().double(), exact.flatten().double(), dim=0).item()
                row["relative error"] = ((fast.double() - exact.double()).norm() / exact.double().norm()).item()
                rows.append(row)
            set_compute(model, "exact")
    return rows, packed_names(model)


def queued(step, device):
    """Milliseconds until all of a step's work is issued, from an idle device."""
    times = []
    for _ in range(3):
        synchronize(device)
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    synchronize(device)
    return min(times)


def fast_kinds(device):
    """What can be measured here: "mixed" is the fast mode as it is, the others are that kind in all its layers."""
    from ltx2_gguf.quant import fast

    best = fast.kind_of(torch.device(device))
    return {"fp8": ("mixed", "fp8", "int8"), "int8": ("int8",), None: ()}[best]


@contextlib.contextmanager
def using_kind(kind):
    """8-bit products of this kind in all fast layers; "mixed": of each layer's own."""
    from ltx2_gguf.quant import fast

    before = fast.kind_for
    if kind != "mixed":
        fast.kind_for = lambda device, compute: None if compute == "exact" else kind
    try:
        yield
    finally:
        fast.kind_for = before


def host(config, packed_by_format, tokens, device, repeats, pack=""):
    """Rows for the host's model in bf16 and, per format, with eager dequantisation (this repository's plain one, and another pack's)."""
    model = host_dit(config, device)
    rows = []

    def times(what, fmt_name):
        for count in tokens:
            latent, sigma, context = inputs(config, count, device, model.dtype)
            ms = measure(lambda: host_step(model, latent, sigma, context, FPS), device, max(2, repeats - 2), 1)
            rows.append({"what": what, "format": fmt_name, "tokens": count, "ms": ms})

    dequantize_tensor = None
    if pack:
        try:
            dequantize_tensor = pack_dequantizer(pack)
        except ImportError as error:  # it needs the gguf package
            print(f"{pack} is left out: {error}")
    times("host", "BF16")
    for fmt_name, packed in packed_by_format.items():
        make_eager(model, packed, device)
        times("host eager", fmt_name)
        if dequantize_tensor is not None:
            make_eager(model, packed, device, lambda *layer: PackLinear(*layer, dequantize_tensor))
            times("host pack", fmt_name)
    return rows


def add_ratios(rows):
    """Express every time in floors and in the host's times at the same token count."""
    def time_of(what, fmt, tokens):
        return next((row["ms"] for row in rows if (row["what"], row["format"], row["tokens"]) == (what, fmt, tokens)), None)

    for row in rows:
        fmt, tokens = row["format"], row["tokens"]
        for label, other in (("x floor", time_of("floor", "BF16", tokens)), ("x host bf16", time_of("host", "BF16", tokens)), ("x ours bf16", time_of("ours exact", "BF16", tokens))):
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
    rows, packed_by_format = [], {}
    with torch.inference_mode():
        for fmt_name in args.formats:
            try:
                new, packed = ours(config, fmt_name, args.tokens, args.device, args.repeats, fmt_name == "BF16", not args.no_fast and fmt_name in ("Q4_0", "Q8_0"))
                rows += new
                show(f"{fmt_name}", add_ratios([dict(row) for row in rows if row["format"] in (fmt_name, "BF16")]))
                if packed:
                    packed_by_format[fmt_name] = packed
            except torch.OutOfMemoryError as error:
                print(f"{fmt_name}: {error}")
            gc.collect()
            reset_memory(args.device)
        if host_available() and not args.no_host:
            eager = {name: packed for name, packed in packed_by_format.items() if name in args.eager}
            rows += host(config, eager, args.tokens, args.device, args.repeats, args.gguf_pack)
    return add_ratios(rows)


def main():
    load_pack()
    args = arguments(
        __doc__, tokens=(1024, 6144, 14080), formats=("BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K", "Q6_K"), eager=("Q4_0", "Q5_1", "Q8_0", "Q4_K"),
        repeats=5, layers=48, no_host=False, no_fast=False, tiny=False, gguf_pack="",
    ).parse_args()  # fmt: skip
    rows = run(args)
    show("one denoise step", rows)
    save(args.out, "step", args.device, rows)


if __name__ == "__main__":
    main()
