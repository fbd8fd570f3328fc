"""Decode latents with the LTX-2.3 video VAE of random weights: all frames at once against streamed:
time, peak memory, and how far the frames are from those of the decode at once.

    python benchmarks/bench_vae.py [--sizes 768x512x121 1280x704x241]
"""

import torch

from common import arguments, load_pack, measure, peak_memory, reset_memory, save, show
from models import random_value

WHOLE = 1 << 62  # bytes: never split


def build(device, dtype, tiny):
    load_pack()
    from ltx2_gguf.ltx2_core.vae.config import LTX2_3_VAE, reduced
    from ltx2_gguf.ltx2_core.vae.model import VideoVAE

    config = reduced(LTX2_3_VAE, 8) if tiny else LTX2_3_VAE
    vae = VideoVAE(config, dtype=dtype, device="meta").requires_grad_(False)
    vae.encoder = None
    for name, parameter in list(vae.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(
            vae.get_submodule(owner),
            leaf,
            torch.nn.Parameter(random_value(name, tuple(parameter.shape), device, dtype), requires_grad=False),
        )
    for name, buffer in list(vae.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        vae.get_submodule(owner)._buffers[leaf] = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
    return vae.eval()


def measured(args, vae, latent, plan):
    """Milliseconds of a decode and its peak memory; the frames stay on the device."""

    def decode():
        for _ in vae.decode_stream(latent, plan=plan):
            pass

    reset_memory(args.device)
    before = torch.cuda.memory_allocated() if args.device.startswith("cuda") else 0
    try:
        ms = measure(decode, args.device, args.repeats, 2)
    except torch.OutOfMemoryError:
        ms = float("nan")
    return {"ms": ms, "peak GB above weights": (peak_memory(args.device) - before) / 2**30}


def error(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def main():
    args = arguments(__doc__, sizes=("768x512x121", "1280x704x241"), gigabytes=2.0, repeats=5, tiny=False).parse_args()
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    load_pack()
    from ltx2_gguf.ltx2_core.vae.tiling import VAEPlan

    rows = []
    with torch.inference_mode():
        vae = build(args.device, dtype, args.tiny)
        for size in args.sizes:
            width, height, frames = (int(n) for n in size.split("x"))
            latent = torch.randn(
                1, 128, vae.config.latent_frames(frames), height // 32, width // 32, device=args.device
            ).to(dtype)

            plans = {
                "whole": VAEPlan(WHOLE, ((0, latent.shape[3]),), ((0, latent.shape[4]),)),
                "streamed": vae.plan("decoder", latent.shape, dtype, latent.device),
                f"streamed in {args.gigabytes:g} GB": vae.plan(
                    "decoder", latent.shape, dtype, latent.device, int(args.gigabytes * 2**30)
                ),
            }
            whole = None
            for what, plan in plans.items():
                rows.append({"size": size, "decode": what, **measured(args, vae, latent, plan)})
                frames = vae.decode(
                    latent, plan=plan, output_buffer=torch.empty(vae.decode_output_shape(latent.shape), dtype=dtype)
                )
                whole = frames if whole is None else whole
                rows[-1]["error against whole"] = error(frames, whole)
                print(f"{size} {what}: {plan.describe()}", flush=True)
    show("video VAE decode", rows)
    save(args.out, "vae", args.device, rows)


if __name__ == "__main__":
    main()
