"""Decode time and peak memory of the video VAE: the whole clip in one piece, and rolling through time in steps.

    python benchmarks/vae_memory.py                      # on CUDA: LTX-2.3's real widths, random weights, 768x512x121 and 1280x704x241
    python benchmarks/vae_memory.py --device cpu         # a reduced VAE on a small clip: checks the script, not the speed

Frames end up as uint8 in CPU memory in every case, and weights are part of every peak. Ratios are against the one-piece decode of the same run.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import packloader  # noqa: F401  (registers ltx2_gguf)
from ltx2_gguf.ltx2_core.vae import tiling
from ltx2_gguf.ltx2_core.vae.config import LTX2_0_VAE, LTX2_3_VAE, reduced
from ltx2_gguf.ltx2_core.vae.model import VideoVAE

GIB = 2**30
# size: (GiB for weights, state and activations together, seconds against the one-piece decode)
TARGETS = {(768, 512, 121): (3.0, 1.05), (1280, 704, 241): (5.0, None)}


def build(version, device, dtype, channels):
    """The decoder alone, with random weights that keep activations at the size trained ones have."""
    config = replace({"2.3": LTX2_3_VAE, "2.0": LTX2_0_VAE}[version], has_encoder=False)
    if channels != 128:
        config = reduced(config, channels)
    torch.manual_seed(0)
    with torch.device(device):
        vae = VideoVAE(config, dtype=dtype)
    if device.type == "cuda":
        vae = vae.to(memory_format=torch.channels_last_3d)
    return vae.eval().requires_grad_(False)


def cases(vae, shape, dtype, device):
    """(name, plan, chunk): the one-piece decode first."""
    whole = ((0, shape[3]),), ((0, shape[4]),)
    unlimited = tiling.plan(vae.config, "decoder", shape, dtype.itemsize)
    estimate = tiling.peak_bytes(vae.config, "decoder", 1, *shape[2:], dtype.itemsize, 1 << 60)
    yield "one piece", tiling.VAEPlan(1 << 60, *whole, bytes=estimate), None
    yield "rolling, automatic steps", unlimited, None
    yield "rolling, 2 latent frames at a time", unlimited, 2
    small = tiling.SMALLEST_STEP
    yield "rolling, smallest steps", tiling.plan(vae.config, "decoder", shape, dtype.itemsize, largest_step=small), None


def measure(vae, latent, plan, chunk, repeats, device):
    """(median seconds, peak bytes with weights, frames) after one run that is not counted."""
    cuda = device.type == "cuda"
    output = torch.empty(vae.decode_output_shape(latent.shape), dtype=torch.uint8)
    times = []
    for run in range(repeats + 1):
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        vae.decode(latent, chunk, output_buffer=output, plan=plan)
        if cuda:
            torch.cuda.synchronize()
        if run:
            times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    return statistics.median(times), peak, output


def layouts(vae, device, dtype):
    """Seconds of one convolution per level, contiguous and channels last: which layout the card's library prefers."""
    results = []
    for name, block in vae.decoder.up_blocks.named_children():
        if not hasattr(block, "res_blocks"):
            continue
        conv = block.res_blocks[0].conv1.conv
        channels = conv.in_channels
        x = torch.randn(1, channels, 10, 4096 // channels * 16, 4096 // channels * 24, device=device, dtype=dtype)
        row = {"block": name, "channels": channels}
        for label, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last_3d)):
            a, weight = x.contiguous(memory_format=layout), conv.weight.contiguous(memory_format=layout)
            for repeat in range(4):
                if repeat == 1:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                torch.nn.functional.conv3d(a, weight, conv.bias, padding=conv.padding)
            torch.cuda.synchronize()
            row[label] = (time.perf_counter() - start) / 3
            row[label + " TFLOP/s"] = 2 * 27 * channels**2 * 8 * x.shape[3] * x.shape[4] / row[label] / 1e12
        results.append(row)
        print(f"  conv {channels:5d} channels: contiguous {row['contiguous'] * 1e3:7.2f} ms, channels last {row['channels last'] * 1e3:7.2f} ms "
              f"({row['channels last TFLOP/s']:.0f} TFLOP/s)")  # fmt: skip
    return results


def profile(vae, latent, plan):
    """The kernels that take most of an automatic decode's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        vae.decode(
            latent, output_buffer=torch.empty(vae.decode_output_shape(latent.shape), dtype=torch.uint8), plan=plan
        )
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=80))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--version", choices=("2.3", "2.0"), default="2.3")
    parser.add_argument(
        "--sizes", nargs="+", metavar="WxHxF", help="pixel sizes (default: 768x512x121 1280x704x241; on a CPU 64x96x33)"
    )
    parser.add_argument(
        "--channels", type=int, help="base width of the VAE, a multiple of 8 (default: 128; on a CPU 8)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="timed runs per case (default: 2)")
    parser.add_argument(
        "--layouts", action="store_true", help="also time one convolution per level in both memory layouts (CUDA)"
    )
    parser.add_argument("--profile", action="store_true", help="also list the slowest kernels of the first size (CUDA)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes = [
        tuple(map(int, size.split("x")))
        for size in args.sizes or (["768x512x121", "1280x704x241"] if cuda else ["64x96x33"])
    ]
    vae = build(args.version, device, dtype, args.channels or (128 if cuda else 8))
    weights = sum(p.nbytes for p in vae.parameters())
    report = {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU",
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(),
        "version": args.version, "dtype": str(dtype), "weights_gib": weights / GIB, "runs": [],
    }  # fmt: skip
    print(
        f"{report['device']}, torch {torch.__version__}, {args.version} decoder, {dtype}, weights {weights / GIB:.2f} GiB"
    )
    passed = True
    with torch.inference_mode():
        if args.layouts and cuda:
            report["layouts"] = layouts(vae, device, dtype)
        for width, height, frames in sizes:
            shape = (1, vae.config.latent_channels, vae.config.latent_frames(frames), height // 32, width // 32)
            latent = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            reference = None
            print(f"{width}x{height}x{frames}")
            for name, plan, chunk in cases(vae, shape, dtype, device):
                try:
                    seconds, (peak, reserved), output = measure(vae, latent, plan, chunk, args.repeats, device)
                except (tiling.VAEMemoryError, torch.OutOfMemoryError) as error:
                    print(f"  {name:36s} does not fit: {error}")
                    report["runs"].append({"size": [width, height, frames], "case": name, "error": str(error)})
                    continue
                if reference is None:
                    reference = seconds, output
                ratio = seconds / reference[0]
                difference = (output.int() - reference[1].int()).abs()
                report["runs"].append({
                    "size": [width, height, frames], "case": name, "chunk": chunk,
                    "step_mib": None if plan.split_bytes >> 50 else plan.split_bytes / tiling.MIB,
                    "seconds": seconds, "ratio": ratio, "peak_gib": peak / GIB, "reserved_gib": reserved / GIB,
                    "estimate_gib": (plan.bytes + weights) / GIB, "largest_difference_of_255": int(difference.max()),
                })  # fmt: skip
                print(f"  {name:36s} {seconds:7.3f} s  {ratio:5.2f} x  peak {peak / GIB:5.2f} GiB "
                      f"(reserved {reserved / GIB:5.2f}, estimated {(plan.bytes + weights) / GIB:5.2f})  largest difference {int(difference.max())} of 255")  # fmt: skip
                if (
                    name == "rolling, automatic steps"
                    and (width, height, frames) in TARGETS
                    and cuda
                    and args.version == "2.3"
                ):
                    budget, slower = TARGETS[width, height, frames]
                    fits, fast = peak / GIB <= budget, slower is None or ratio <= slower
                    passed = passed and fits and fast
                    time_target = "" if slower is None else f", {'ok' if fast else 'MISSED'} {slower} x"
                    print(f"    target: {'ok' if fits else 'MISSED'} {budget} GiB{time_target}")
            if args.profile and cuda:
                profile(vae, latent, tiling.plan(vae.config, "decoder", shape, dtype.itemsize))
                args.profile = False
    report["targets_met"] = passed
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
