"""``ltx2-gguf generate``: options, and the run they describe."""

import math
import sys
from pathlib import Path

from .output import PROG, Stages, print_out

EXAMPLES = f"""examples:
  {PROG} generate --model ltx-2.3-q4_0.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf --prompt "waves at dusk" -o waves.mp4
  {PROG} generate ... --image cat.png --image cat-end.png@-1:0.8 --prompt "the cat turns around" -o cat.mp4
  {PROG} generate ... --lora distilled-lora-384.safetensors:0.5 --lora camera-dolly-in.safetensors --prompt "..." -o out.mp4
  {PROG} generate ... --device cuda --memory-budget 6 --preset distilled --prompt "..." -o out.mp4
"""


def options(command) -> None:
    """Add the command's options to its parser."""
    files = command.add_argument_group("files")
    files.add_argument("--model", required=True, type=Path, help="the video transformer (GGUF or safetensors)")
    files.add_argument("--text-encoder", required=True, type=Path, help="Gemma 3 (GGUF or safetensors)")
    files.add_argument("--projection", type=Path, help="text projection, where the model file has none")
    files.add_argument("--connector", type=Path, help="embeddings connector, where the model file has none")
    files.add_argument("--vae", type=Path, help="video VAE, where the model file has none")
    files.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
        help="a LoRA for the model, in any spelling (default strength 1); repeat for several",
    )  # fmt: skip
    files.add_argument("-o", "--output", required=True, type=Path, help="the .mp4 to write")

    what = command.add_argument_group("what to make")
    what.add_argument("--prompt", required=True)
    what.add_argument("--negative-prompt", help="what to avoid, used when cfg is not 1 (default: a list of common defects)")
    what.add_argument(
        "--image", action="append", default=[], metavar="PATH[@FRAME[:STRENGTH]]",
        help="show this image at a frame (default 0; -1 is the last; strength 0..1)",
    )
    what.add_argument("--width", type=int, help="pixels, a multiple of 32")
    what.add_argument("--height", type=int, help="pixels, a multiple of 32")
    what.add_argument("--frames", type=int, help="8k+1")
    what.add_argument("--fps", type=float, help="frames per second")
    what.add_argument("--seed", type=int)

    how = command.add_argument_group("how (defaults come from the preset)")
    how.add_argument("--preset", choices=("2.0", "2.3", "2.3 HQ", "distilled"), help="official settings (default: those of the model's version)")
    how.add_argument("--steps", type=int)
    how.add_argument("--schedule", help="ltx2, 'ltx2 (tokens)', 'linear quadratic', distilled, or sigmas separated by commas")
    how.add_argument("--sampler", choices=("euler", "res_2s"))
    how.add_argument("--cfg", type=float, help="1 = no negative prompt, half the time")
    how.add_argument("--stg", type=float, help="0 = off, a third of the time less")
    how.add_argument("--rescale", type=float)
    how.add_argument("--image-crf", type=int, help="video compression given to images first (0 = none)")

    where = command.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, mps ... (default: the first accelerator)")
    where.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on the CPU, bfloat16 elsewhere")
    where.add_argument("--memory-budget", type=float, metavar="GB", help="use at most this much device memory; weights are streamed")
    where.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def parse_image(text: str) -> tuple[str, int, float]:
    """``PATH[@FRAME[:STRENGTH]]`` -> (path, frame, strength). An existing file's name may itself contain '@'."""
    if Path(text).is_file():
        return text, 0, 1.0
    path, at, place = text.rpartition("@")
    if not at:
        return text, 0, 1.0
    frame, _, strength = place.partition(":")
    try:
        return path, int(frame), float(strength) if strength else 1.0
    except ValueError:
        raise ValueError(f"Could not read the image {text!r}; write PATH, PATH@FRAME or PATH@FRAME:STRENGTH, for example cat.png@-1:0.8.") from None


def parse_lora(text: str) -> tuple[str, float]:
    """``FILE[:STRENGTH]`` -> (file, strength). An existing file's name may itself contain ':'. Raises ValueError for a file that is not there."""
    path, strength = text, 1.0
    if not Path(text).is_file() and ":" in text:
        before, _, number = text.rpartition(":")
        try:
            path, strength = before, float(number)
        except ValueError:
            pass  # the colon is part of the path
    if not Path(path).is_file():
        raise ValueError(f"The LoRA {path} does not exist; write FILE or FILE:STRENGTH, for example camera.safetensors:0.8.")
    if not math.isfinite(strength):
        raise ValueError(f"The LoRA strength {strength} in {text!r} is no number to multiply with; write for example 0.8.")
    return path, strength


def run(args) -> int:
    """Do it; returns the exit code."""
    import torch

    from .. import media
    from ..pipeline import ImageInput, LTX2Pipeline

    images = [ImageInput(path, frame, strength) for path, frame, strength in map(parse_image, args.image)]
    for given in images:
        if not Path(given.image).is_file():
            raise ValueError(f"The image {given.image} does not exist.")
    loras = [parse_lora(text) for text in args.lora]
    if not args.output.parent.is_dir():
        raise ValueError(f"The folder {args.output.parent} does not exist.")
    device = args.device or _best_device(torch)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = LTX2Pipeline.from_files(
        args.model, args.text_encoder, args.projection, args.connector, args.vae,
        device=device, dtype=dtype, memory_budget=args.memory_budget, preset=args.preset, loras=loras,
    )  # fmt: skip
    for report in () if args.quiet or args.verbose else pipeline.loras:  # warnings, and all of it with -v, come through the log
        print(report.text, file=sys.stderr)
    names = ("width", "height", "frames", "fps", "steps", "schedule", "sampler", "cfg", "stg", "rescale", "seed", "image_crf")
    settings = {name: getattr(args, name) for name in names}
    chosen = pipeline.settings(**settings)
    with Stages(args.quiet) as stages:
        frames = pipeline.stream(args.prompt, negative_prompt=args.negative_prompt, images=images, progress=stages.at, **settings)
        media.write_video(frames, chosen.fps, args.output)
    print_out(f"{args.output}: {chosen.frames} frames of {chosen.width}x{chosen.height} at {chosen.fps:g} fps, seed {chosen.seed}")
    return 0


def _best_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"
