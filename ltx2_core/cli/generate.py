"""``ltx2-gguf generate``: options, and the run they describe."""

import json
import math
from pathlib import Path

from ..sampling.guidance import PRESETS
from . import several
from .printing import PROG, Bar, note, print_out

NAME, HELP = "generate", "make a video from a prompt (and images), without ComfyUI"

EXAMPLES = f"""examples:
  {PROG} generate --model ltx-2.3-q4_0.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf --prompt "waves at dusk" -o waves.mp4
  {PROG} generate ... --image cat.png --image cat-end.png@-1:0.8 --prompt "the cat turns around" -o cat.webm
  {PROG} generate ... --lora distilled-lora-384.safetensors:0.5 --lora camera-dolly-in.safetensors --prompt "..." -o out.mp4
  {PROG} generate ... --device cuda --memory-budget 6 --preset distilled --prompt "..." -o out.mp4
  {PROG} generate ... --sound --audio-vae ltx-2.3-audio-vae.safetensors --prompt "..." -o with-sound.mp4
  {PROG} generate ... --audio song.mp3 --prompt "a singer on a stage" -o song.mp4
  {PROG} generate ... --gpus 4 --prompt "..." -o out.mp4
  {PROG} generate ... --prompts prompts.jsonl --output-dir clips
  {PROG} generate ... --dry-run               (checks everything, and tells memory and time)
"""

SOUND_SETTINGS = ("audio_cfg", "modality")
SETTINGS = (
    "width",
    "height",
    "frames",
    "fps",
    "steps",
    "schedule",
    "sampler",
    "cfg",
    "stg",
    "rescale",
    "seed",
    "image_crf",
    *SOUND_SETTINGS,
)


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
    files.add_argument(
        "--audio-vae",
        action="append",
        type=Path,
        metavar="FILE",
        help="audio VAE and vocoder, where the model file has none; repeat for two files",
    )
    files.add_argument("-o", "--output", type=Path, help="the .mp4, .webm or .gif to write")
    files.add_argument("--overwrite", action="store_true", help="replace the output if it exists")

    what = command.add_argument_group("what to make")
    what.add_argument("--prompt", help="what the video shows")
    what.add_argument(
        "--negative-prompt", help="what to avoid, used when cfg is not 1 (default: a list of common defects)"
    )
    what.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="PATH[@FRAME[:STRENGTH]]",
        help="show this image at a frame (default 0; -1 is the last; strength 0..1)",
    )
    what.add_argument(
        "--sound", action="store_true", help="make the sound too (the model file must hold the audio stream)"
    )
    what.add_argument(
        "--audio", type=Path, metavar="FILE", help="a soundtrack that the picture follows; implies --sound"
    )
    what.add_argument("--width", type=int, help=f"pixels, a multiple of 32 ({_defaults('width')})")
    what.add_argument("--height", type=int, help=f"pixels, a multiple of 32 ({_defaults('height')})")
    what.add_argument("--frames", type=int, help=f"8k+1 ({_defaults('frames')})")
    what.add_argument("--fps", type=float, help=f"frames per second ({_defaults('fps')})")
    what.add_argument("--seed", type=int, help="the starting noise (default: a random one, which is printed)")

    how = command.add_argument_group("how")
    how.add_argument(
        "--preset", choices=tuple(PRESETS), help="official settings (default: those of the model's version)"
    )
    how.add_argument("--steps", type=int, help=f"denoising steps ({_defaults('steps')})")
    how.add_argument(
        "--schedule",
        help=f"ltx2, 'ltx2 (tokens)', 'linear quadratic', distilled, or sigmas separated by commas ({_defaults('schedule')})",
    )
    how.add_argument("--sampler", choices=("euler", "res_2s"), help=f"({_defaults('sampler')})")
    how.add_argument("--cfg", type=float, help=f"1 = no negative prompt, half the time ({_defaults('cfg')})")
    how.add_argument("--stg", type=float, help=f"0 = off, a third of the time less ({_defaults('stg')})")
    how.add_argument("--rescale", type=float, help=f"0 = off ({_defaults('rescale')})")
    how.add_argument("--audio-cfg", type=float, help="cfg of the sound (default: the preset's, 7 for the full model)")
    how.add_argument(
        "--modality",
        type=float,
        help="how strongly picture and sound are drawn to each other, 1 = off (default: the preset's, 3)",
    )
    how.add_argument(
        "--image-crf", type=int, help=f"video compression given to images first, 0 = none ({_defaults('image_crf')})"
    )

    where = command.add_argument_group("where")
    where.add_argument("--device", help="cpu, cuda, mps ... (default: the first accelerator, else the CPU)")
    where.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on the CPU, bfloat16 elsewhere"
    )
    where.add_argument(
        "--compute", choices=("exact", "fast"), default="exact", help="fast: 8-bit products where the device has them"
    )
    where.add_argument(
        "--memory-budget",
        type=float,
        metavar="GB",
        help="use at most this much device memory; weights are streamed (default: no limit)",
    )
    where.add_argument(
        "--dry-run", action="store_true", help="check files and settings, estimate memory and time, and make nothing"
    )
    where.add_argument("--json", action="store_true", help="print the result as JSON")
    where.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    several.options(command)
    command.set_defaults(usage_error=command.error)


def _defaults(name: str) -> str:
    """The presets' values of a setting, in words."""
    values: dict[object, list[str]] = {}
    for preset, row in PRESETS.items():
        values.setdefault(getattr(row, name), []).append(preset)
    written = {value: f"{value:g}" if isinstance(value, float) else str(value) for value in values}
    if len(values) == 1:
        return f"default: {written[next(iter(values))]}"
    most = max(values, key=lambda value: len(values[value]))
    rest = ", ".join(f"{' and '.join(presets)}: {written[value]}" for value, presets in values.items() if value != most)
    return f"default: {written[most]}; {rest}"


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
        raise ValueError(
            f"Could not read the image {text!r}; write PATH, PATH@FRAME or PATH@FRAME:STRENGTH, for example cat.png@-1:0.8."
        ) from None


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
        raise ValueError(
            f"The LoRA {path} does not exist; write FILE or FILE:STRENGTH, for example camera.safetensors:0.8."
        )
    if not math.isfinite(strength):
        raise ValueError(
            f"The LoRA strength {strength} in {text!r} is no number to multiply with; write for example 0.8."
        )
    return path, strength


def run(args) -> int:
    """Do it; returns the exit code."""
    several.check(args)
    if args.output is None and args.prompts is None and not (args.dry_run or args.explain):
        args.usage_error("name the video to write with -o, or pass --dry-run")
    images, loras = [parse_image(text) for text in args.image], [parse_lora(text) for text in args.lora]
    for path, _, _ in images:
        if not Path(path).is_file():
            raise ValueError(f"The image {path} does not exist.")
    if args.output is not None:
        _check_output(args)
    if args.gpus is not None and args.gpus > 1 and not (args.dry_run or args.explain):
        return several.launch(args)
    jobs = None if args.prompts is None else several.read_jobs(args)
    import torch

    from .. import media
    from ..pipeline import LTX2Pipeline

    ranks = several.ranks(args) if args.prompts is None else None
    pipeline = LTX2Pipeline.from_files(
        args.model, args.text_encoder, args.projection, args.connector, args.vae, device=several.own_device(args), ranks=ranks,
        dtype=getattr(torch, args.dtype) if args.dtype else None, memory_budget=args.memory_budget, preset=args.preset, loras=loras,
        compute=args.compute, sound=args.sound or args.audio is not None, audio_vae=args.audio_vae,
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in SETTINGS}
    if jobs is not None:
        return several.make_all(args, jobs, lambda job: _one_line(pipeline, args, settings, job))
    settings["seed"] = several.common_seed(args.seed, ranks)
    chosen = pipeline.settings(**settings)
    if args.explain:
        return several.explain(pipeline, chosen, args.gpus)
    if args.output is not None:
        media.check_video(args.output, chosen.fps)
    for report in (
        () if args.quiet or args.verbose else pipeline.loras
    ):  # warnings, and all of it with -v, come through the log
        note(report.text)
    with Bar(args.quiet) as bar:
        frames = pipeline.stream(
            args.prompt,
            negative_prompt=args.negative_prompt,
            images=images,
            audio=args.audio,
            progress=bar.at,
            **settings,
        )
        if args.dry_run:
            return _dry_run(pipeline, chosen, args)
        if args.seed is None and not args.quiet:
            note(f"seed {chosen.seed}")
        if ranks is not None and not ranks.is_first:
            list(frames)  # none come: the first rank decodes and writes
            return 0
        pipeline.save(frames, args.output, overwrite=args.overwrite)
    if args.json:
        print_out(json.dumps({"output": str(args.output), **pipeline.made}, indent=2))
    else:
        what = f"{chosen.frames} frames of {chosen.width}x{chosen.height} at {chosen.fps:g} fps, seed {chosen.seed}"
        print_out(f"{args.output}: {what}")
    return 0


def _one_line(pipeline, args, settings: dict, job) -> dict:
    """Make the video of one line of ``--prompts``; returns what to record."""
    run = settings | job.settings
    negative = run.pop("negative_prompt", args.negative_prompt)
    run["seed"] = several.common_seed(run["seed"], None)
    images = [parse_image(text) for text in (*args.image, *job.images)]
    with Bar(args.quiet) as bar:
        pipeline.save(
            pipeline.stream(job.prompt, negative_prompt=negative, images=images, progress=bar.at, **run), job.output
        )
    return {"seed": run["seed"]}


def _check_output(args) -> None:
    from ...quant.output import check_output

    check_output(args.output, suffixes=(".mp4", ".webm", ".gif"), overwrite=args.overwrite)


def _dry_run(pipeline, chosen, args) -> int:
    from ..estimate import estimate

    found = estimate(pipeline, chosen)
    if args.json:
        print_out(
            json.dumps(
                {"output": args.output and str(args.output), **pipeline.made, "estimate": found.as_dict()}, indent=2
            )
        )
    else:
        size = f"{chosen.frames} frames of {chosen.width}x{chosen.height} at {chosen.fps:g} fps"
        print_out(
            "\n".join([f"Would make {size}, {len(chosen.sigmas) - 1} steps, seed {chosen.seed}.", *found.lines()])
        )
    return 0
