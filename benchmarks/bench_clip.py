"""Seconds per clip, from the prompt to decoded frames, with models of random weights at the real geometry (files already loaded).

    python benchmarks/bench_clip.py [--format Q4_0] [--compute exact fast]

A clip is: the prompts through Gemma-3 12B (Q4_K, 256 tokens each), the preset's steps with its number of passes, and the streamed VAE decode. Each part is
measured by itself (medians of --repeats runs) and the clip is their sum, so a 30-step clip does not have to be run to be known.
"""

import gc

import torch

from bench_gemma import build as build_gemma
from bench_gemma import gemma_config
from bench_step import FPS, inputs
from bench_vae import build as build_vae
from common import arguments, load_pack, measure, reset_memory, save, show
from models import dit_config, our_dit

PROMPT_TOKENS = 256
PRESETS = {"dev": "2.3", "distilled": "distilled"}


def tokens_of(size):
    """Video tokens of a (width, height, frames)."""
    width, height, frames = size
    return (width // 32) * (height // 32) * ((frames - 1) // 8 + 1)


def free():
    gc.collect()
    torch.cuda.empty_cache()


def main():
    args = arguments(
        __doc__, format="Q4_0", sizes=("768x512x121", "1280x704x121"), compute=("exact", "fast"), repeats=3, tiny=False
    ).parse_args()
    load_pack()
    from ltx2_gguf.ltx2_core.sampling.guidance import PRESETS as OFFICIAL
    from ltx2_gguf.ltx2_core.transformer.compute_mode import set_compute

    dtype = torch.bfloat16
    sizes = [tuple(int(n) for n in size.split("x")) for size in args.sizes]
    rows = []
    with torch.inference_mode():
        config = gemma_config(args.tiny)
        gemma = build_gemma(config, "Q4_K", args.device)
        ids = torch.randint(0, config.vocab_size, (1, PROMPT_TOKENS), device=args.device)
        encode = measure(lambda: gemma(ids, collect_device=args.device), args.device, args.repeats)
        del gemma
        free()

        vae = build_vae(args.device, dtype, args.tiny)
        decode = {}
        for size in sizes:
            width, height, frames = size
            latent = torch.randn(1, 128, (frames - 1) // 8 + 1, height // 32, width // 32, device=args.device).to(dtype)
            decode[size] = measure(
                lambda latent=latent: [None for _ in vae.decode_stream(latent)], args.device, args.repeats
            )
        del vae
        free()

        network = dit_config(2, 4, 32) if args.tiny else dit_config()
        model = our_dit(network, args.format, args.device)
        for compute in args.compute:
            set_compute(model, compute)
            for size in sizes:
                latent, sigma, context = inputs(network, tokens_of(size), args.device, dtype)
                step = measure(lambda: model.velocity(latent, sigma, context, FPS), args.device, args.repeats)
                for name, preset in PRESETS.items():
                    official = OFFICIAL[preset]
                    passes = official.guidance(len(model.transformer_blocks)).passes
                    prompts = 2 if official.cfg != 1.0 else 1
                    seconds = (prompts * encode + official.steps * passes * step + decode[size]) / 1e3
                    rows.append({
                        "size": "x".join(map(str, size)), "model": name, "weights": args.format, "compute": compute, "steps": official.steps,
                        "passes per step": passes, "pass ms": step, "prompt ms": prompts * encode, "decode ms": decode[size], "clip s": seconds,
                    })  # fmt: skip
                    reset_memory(args.device)
    show("seconds per clip", rows)
    save(args.out, "clip", args.device, rows)


if __name__ == "__main__":
    main()
