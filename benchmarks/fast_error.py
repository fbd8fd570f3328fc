"""What the fast mode's rounding does to a velocity: trained weights (the demo model) and random ones, in plain torch on any device.

    python benchmarks/fast_error.py [--gemma GGUF] [--prompts 2] [--steps 20] [--toy assets/toy-ltx2.3-Q8_0.gguf]

The arithmetic is ``quant.eight_bit.reference_linear``, which the kernels are tested against, so no 8-bit tensor cores are needed. On the demo
model every velocity of a run (GEMMA_GGUF names its text encoder) is computed twice from the same state, exact and fast, and the run
goes on with the exact one; then the whole run is repeated in fast mode. Without a text encoder only random weights are measured.
"""

import contextlib
import os
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F

from bench_step import FPS, inputs
from common import ROOT, arguments, load_pack, save, show
from models import dit_config, our_dit

KINDS = ("fp8", "mixed", "int8")  # mixed: the fast mode where fp8 exists
FEWEST_TOKENS = 32  # small models have few; on a device fewer than eight_bit.MIN_TOKENS are computed exactly
TOY = ROOT / "assets" / "toy-ltx2.3-Q8_0.gguf"
PROMPTS = (
    "A red circle moves to the right on a black background.", "A yellow star moves to the left on a dark background.",
    "A blue square moves down on a white background.", "A green triangle moves up on a black background.",
)  # fmt: skip


@contextlib.contextmanager
def emulated(kind):
    """Products of fast layers by the torch definition of this kind (a key of ``KINDS``), on whatever device they are."""
    load_pack()
    from ltx2_gguf.quant import eight_bit

    def kind_for(device, tokens, shape, dtype, compute):
        if compute == "exact" or tokens < FEWEST_TOKENS or shape[0] % 16 or shape[1] % 16:
            return None
        return kind if kind != "mixed" else "int8" if compute == "fast int8" else "fp8"

    def quantize(rows, kind):
        q, scale = eight_bit.quantize_rows(rows, kind)
        return q, scale[:, 0]

    before = {name: getattr(eight_bit, name) for name in ("kind_for", "quantize", "product")}
    eight_bit.kind_for, eight_bit.quantize, eight_bit.product = kind_for, quantize, eight_bit.reference_product
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(eight_bit, name, value)


def difference(fast, exact):
    """(cosine, relative error) of two velocities."""
    fast, exact = fast.flatten().double(), exact.flatten().double()
    return F.cosine_similarity(fast, exact, dim=0).item(), ((fast - exact).norm() / exact.norm()).item()


def random_weights(device, formats=("Q4_0", "Q8_0", "Q4_K", "Q6_K"), layers=8, heads=8, head_dim=64, tokens=96):
    """One step of a small random model per format: rows with cosine and error of every kind."""
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute
    from ltx2_gguf.quant import tensor

    config, rows = dit_config(layers, heads, head_dim), []
    for fmt_name in formats:
        torch.manual_seed(0)
        model = our_dit(config, fmt_name, device, torch.float32)
        latent, sigma, context = inputs(config, tokens, device, torch.float32)
        weight = tensor.unpack(model.transformer_blocks[0].ff.net[2].weight)
        row = {"weights": f"random {fmt_name}", "mean / std": (weight.mean() / weight.std()).item()}
        exact = model.velocity(latent, sigma, context, FPS)
        row["fast layers"] = set_compute(model, "fast")
        for kind in KINDS:
            with emulated(kind):
                row[f"{kind} cosine"], row[f"{kind} error"] = difference(
                    model.velocity(latent, sigma, context, FPS), exact
                )
        rows.append(row)
    return rows


def trained_weights(path, gemma, device, prompts, settings):
    """The demo model: rows per kind over all velocities of its runs, and how far the fast runs' clips end from the exact ones."""
    from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute

    pipeline = LTX2Pipeline.from_files(path, gemma, device=device, dtype=torch.float32)
    dit, velocity = pipeline.dit, pipeline.dit.velocity
    exact_clips = [pipeline.generate(prompt, **settings) for prompt in prompts]
    rows = []
    for kind in KINDS:
        found = []

        def both(*args, **kwargs):
            exact = velocity(*args, **kwargs)
            set_compute(dit, "fast")
            with emulated(kind):
                found.append(difference(velocity(*args, **kwargs), exact))
            set_compute(dit, "exact")
            return exact

        dit.velocity = both
        for prompt in prompts:
            pipeline.generate(prompt, **settings)
        del dit.velocity
        row = {"weights": path.name, "kind": kind, "velocities": len(found), "fast layers": set_compute(dit, "fast")}
        with emulated(kind):
            clips = [pipeline.generate(prompt, **settings) for prompt in prompts]
        set_compute(dit, "exact")
        cosines, errors = zip(*found)
        row |= {
            "cosine, median": statistics.median(cosines),
            "cosine, lowest": min(cosines),
            "error, median": statistics.median(errors),
        }
        mse = [(a - b).square().mean().item() for a, b in zip(clips, exact_clips)]
        rows.append(row | {"PSNR of the clips, dB": statistics.mean(-10 * torch.tensor(m).log10().item() for m in mse)})
    return rows


def main():
    load_pack()
    args = arguments(__doc__, gemma=os.environ.get("GEMMA_GGUF", ""), toy=str(TOY), prompts=2, steps=20).parse_args()
    with torch.inference_mode():
        results = {"random": random_weights(args.device)}
        show("fast mode, random weights", results["random"])
        if args.gemma:
            settings = {
                "width": 128,
                "height": 128,
                "frames": 25,
                "steps": args.steps,
                "cfg": 2.0,
                "stg": 0.0,
                "rescale": 0.7,
                "seed": 1,
            }
            results["trained"] = trained_weights(
                Path(args.toy), args.gemma, args.device, PROMPTS[: args.prompts], settings | {"negative_prompt": ""}
            )
            show("fast mode, the demo model", results["trained"])
    save(args.out, "fast_error", args.device, results)


if __name__ == "__main__":
    main()
