"""The command line: ``ltx2-gguf <command>``, or ``python -m <folder of this pack>.ltx2_core.cli <command>`` from the folder above it.

Exit codes: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 130 interrupted. Tables and JSON go to stdout, everything else to
stderr. Planning (``convert --dry-run``, ``convert --self-test``) runs with the standard library alone.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from . import plan as planning

# The command as people type it; ``python -m`` would otherwise show the module's path.
PROG = "ltx2-gguf"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (usage errors leave through argparse with 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__package__ or "."):
            raise
        print(f"{PROG}: '{args.command}' needs the Python package '{error.name}', which is not installed. {_INSTALL}", file=sys.stderr)
        return 1
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        # What the pack raises for a caller: WeightFileError, PlanError, ConvertError, ConfigError, MemoryBudgetError, a full disk ...
        if args.verbose:
            logging.exception("details")
        print(f"{PROG}: {_sentence(error)}", file=sys.stderr)
        return 1


_INSTALL = "Install what a run needs with: pip install torch numpy safetensors comfy-kitchen sentencepiece av tqdm pillow"


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="LTX-2 and LTX-2.3 video from GGUF weights.", formatter_class=_Help, epilog=_EXAMPLES)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, help_text, examples, options, run in (
        ("inspect", "say what a file is, what it needs and where it goes", _INSPECT, _inspect_options, _inspect),
        ("convert", "write a GGUF of the video model from safetensors or GGUF files", _CONVERT, _convert_options, _convert),
        ("strip", "copy an audio-and-video GGUF without its sound, bytes unchanged", _STRIP, _strip_options, _strip),
        ("generate", "make a video from a prompt (and images), without ComfyUI", _GENERATE, _generate_options, _generate),
        ("make-synthetic", "write a tiny random checkpoint of the real structure, for tests", _SYNTHETIC, _synthetic_options, _make_synthetic),
        ("compare-reference", "compare this pack's numbers with reference implementations", _COMPARE, _compare_options, _compare),
    ):
        sentence = help_text[0].upper() + help_text[1:] + "."
        command = commands.add_parser(name, help=help_text, description=sentence, formatter_class=_Help, epilog=examples)
        command.add_argument("-v", "--verbose", action="store_true", help="log what is done, and full errors")
        options(command)
        command.set_defaults(run=run)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks."""


_EXAMPLES = f"""examples:
  {PROG} inspect ltx-2.3-22b-dev-Q4_K_M.gguf
  {PROG} convert ltx-2.3-22b-dev.safetensors ltx-2.3-q4_0.gguf --type q4_0
  {PROG} generate --model ltx-2.3-q4_0.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf --prompt "waves at dusk" -o waves.mp4
"""

# -- inspect -------------------------------------------------------------------------------------------------------------------------

_INSPECT = f"""examples:
  {PROG} inspect model.gguf
  {PROG} inspect *.safetensors --json
"""


def _inspect_options(command) -> None:
    command.add_argument("files", nargs="+", type=Path, help="GGUF or safetensors files")
    command.add_argument("--json", action="store_true", help="print JSON: one object, or a list for several files")


def _inspect(args) -> int:
    from .inspect_file import as_dict, inspect, render

    reports, failed = [], False
    for path in args.files:
        try:
            reports.append(inspect(path))
        except (ValueError, OSError) as error:
            if len(args.files) == 1:
                raise
            failed = True
            print(f"{PROG}: {_sentence(error)}", file=sys.stderr)
    if args.json:
        data = [as_dict(report) for report in reports]
        _print(json.dumps(data[0] if len(args.files) == 1 else data, indent=2))
    else:
        _print("\n\n".join(render(report) for report in reports))
    return 1 if failed else 0


# -- convert and strip ---------------------------------------------------------------------------------------------------------------

_CONVERT = f"""examples:
  {PROG} convert ltx-2.3-22b-dev.safetensors ltx-2.3-q4_0.gguf --type q4_0
  {PROG} convert ltx-2.3-22b-dev.safetensors --type q8_0 --dry-run        (the plan only; needs nothing but Python)
  {PROG} convert dit.gguf out.gguf --type q5_1 --with video_vae.safetensors --with text_projection.safetensors
  {PROG} convert --self-test
"""


def _convert_options(command) -> None:
    command.add_argument("source", nargs="?", type=Path, help="checkpoint: .safetensors, its .index.json or folder, or .gguf")
    command.add_argument("output", nargs="?", type=Path, help="the .gguf to write")
    command.add_argument("--type", default="q8_0", choices=tuple(planning.TARGETS), help="format of the large matrices (default: %(default)s)")
    command.add_argument(
        "--with", dest="companions", action="append", default=[], type=Path, metavar="FILE", help="a file that holds what the source lacks"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--dry-run", action="store_true", help="print what would be kept and how, and write nothing")
    command.add_argument("--self-test", action="store_true", help="check the keep/drop rule on complete checkpoints, without any file")
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    command.set_defaults(usage_error=command.error)


def _convert(args) -> int:
    if args.self_test:
        for line in planning.self_test():
            _print(line)
        _print("Self-test passed.")
        return 0
    if args.source is None:
        args.usage_error("name the checkpoint to convert, or pass --self-test")
    if args.dry_run:
        _print_plan(_plan(args), args.json)
        return 0
    if args.output is None:
        args.usage_error("name the .gguf file to write, or pass --dry-run")
    from .convert import convert, plan_for

    sources = [args.source, *args.companions]
    total = sum(row.entry.nbytes for row in plan_for(sources, args.type).kept)
    with _Bar(total, "convert", args.quiet) as bar:
        plan = convert(sources, args.output, args.type, overwrite=args.overwrite, progress=bar.at)
    if args.json:
        _print_plan(plan, True)
    else:
        for warning in plan.warnings:
            print(f"Note: {warning}", file=sys.stderr)
        _print(f"{args.output}: {len(plan.kept)} of {len(plan.rows)} tensors, {planning.size_text(plan.output_bytes)}")
    return 0


def _plan(args) -> planning.Plan:
    """The plan from headers: with the standard library where it can read them, else (GGUF) through the weight readers."""
    sources = [args.source, *args.companions]
    if any(_is_gguf(path) for path in sources):
        from .convert import plan_for

        return plan_for(sources, args.type)
    first, *others = (planning.read_inventory(path) for path in sources)
    return planning.make_plan(first, args.type, companions=others)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _print_plan(plan: planning.Plan, as_json: bool) -> None:
    _print(json.dumps(planning.summary(plan), indent=2) if as_json else planning.render(plan))


_STRIP = f"""examples:
  {PROG} strip ltx-2.3-22b-dev-Q4_K_M.gguf ltx-2.3-22b-dev-video-Q4_K_M.gguf
"""


def _strip_options(command) -> None:
    command.add_argument("source", type=Path, help="audio-and-video .gguf")
    command.add_argument("output", type=Path, help="the .gguf to write")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--json", action="store_true", help="print counts and sizes as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _strip(args) -> int:
    from .convert import strip

    with _Bar(args.source.stat().st_size if args.source.is_file() else None, "strip", args.quiet) as bar:
        result = strip(args.source, args.output, overwrite=args.overwrite, progress=bar.at)
    if args.json:
        _print(json.dumps(result, indent=2))
    else:
        saved = planning.size_text(result["source_bytes"] - result["output_bytes"])
        _print(f"{args.output}: {result['kept_tensors']} tensors kept, {result['dropped_tensors']} of the sound dropped, {saved} smaller")
    return 0


# -- generate ------------------------------------------------------------------------------------------------------------------------

_GENERATE = f"""examples:
  {PROG} generate --model ltx-2.3-q4_0.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf --prompt "waves at dusk" -o waves.mp4
  {PROG} generate ... --image cat.png --image cat-end.png@-1:0.8 --prompt "the cat turns around" -o cat.mp4
  {PROG} generate ... --device cuda --memory-budget 6 --preset distilled --prompt "..." -o out.mp4
"""


def _generate_options(command) -> None:
    files = command.add_argument_group("files")
    files.add_argument("--model", required=True, type=Path, help="the video transformer (GGUF or safetensors)")
    files.add_argument("--text-encoder", required=True, type=Path, help="Gemma 3 (GGUF or safetensors)")
    files.add_argument("--projection", type=Path, help="text projection, where the model file has none")
    files.add_argument("--connector", type=Path, help="embeddings connector, where the model file has none")
    files.add_argument("--vae", type=Path, help="video VAE, where the model file has none")
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


def _generate(args) -> int:
    import torch

    from . import media
    from .pipeline import ImageInput, LTX2Pipeline

    images = [ImageInput(path, frame, strength) for path, frame, strength in map(parse_image, args.image)]
    for given in images:
        if not Path(given.image).is_file():
            raise ValueError(f"The image {given.image} does not exist.")
    if not args.output.parent.is_dir():
        raise ValueError(f"The folder {args.output.parent} does not exist.")
    device = args.device or _best_device(torch)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipeline = LTX2Pipeline.from_files(
        args.model, args.text_encoder, args.projection, args.connector, args.vae,
        device=device, dtype=dtype, memory_budget=args.memory_budget, preset=args.preset,
    )  # fmt: skip
    names = ("width", "height", "frames", "fps", "steps", "schedule", "sampler", "cfg", "stg", "rescale", "seed", "image_crf")
    settings = {name: getattr(args, name) for name in names}
    run = pipeline.settings(**settings)
    with _Stages(args.quiet) as stages:
        frames = pipeline.stream(args.prompt, negative_prompt=args.negative_prompt, images=images, progress=stages.at, **settings)
        media.write_mp4(frames, run.fps, args.output)
    _print(f"{args.output}: {run.frames} frames of {run.width}x{run.height} at {run.fps:g} fps, seed {run.seed}")
    return 0


def _best_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# -- make-synthetic ------------------------------------------------------------------------------------------------------------------

_SYNTHETIC = f"""examples:
  {PROG} make-synthetic tiny.safetensors
  {PROG} make-synthetic tiny-q4_0.gguf --version 2.0 --type q4_0 --gemma gemma-3-270m.gguf
"""


def _synthetic_options(command) -> None:
    command.add_argument("output", type=Path, help="a name ending in .safetensors or .gguf")
    command.add_argument("--version", default="2.3", choices=("2.0", "2.3"))
    command.add_argument("--type", help="safetensors: f32, bf16 (default) or f16; GGUF: any type that convert writes (default q8_0)")
    command.add_argument("--layers", type=int, default=2, help="transformer blocks (default: %(default)s)")
    command.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
    command.add_argument("--head-dim", type=int, default=64, help="width of a head (default: %(default)s)")
    command.add_argument("--connector-layers", type=int, default=2, help="(default: %(default)s)")
    command.add_argument("--vae-channels", type=int, default=8, help="base width of the VAE, a multiple of 8 (default: %(default)s; released: 128)")
    command.add_argument("--gemma", type=Path, help="a Gemma-3 GGUF: the text projection is made to fit it")
    command.add_argument("--gemma-width", type=int, default=640, help="width of the text encoder, without --gemma (default: %(default)s, Gemma-3 270M)")
    command.add_argument("--gemma-layers", type=int, default=18, help="its layers, without --gemma (default: %(default)s)")
    command.add_argument("--audio", action="store_true", help="with the audio stream's tensors, as in released files")
    command.add_argument("--no-vae", action="store_true", help="without the VAE")
    command.add_argument("--no-projection", action="store_true", help="without the text projection")
    command.add_argument("--no-connector", action="store_true", help="without the embeddings connector")
    command.add_argument("--no-config", action="store_true", help="without metadata, as some files in circulation")
    command.add_argument("--seed", type=int, default=0)


def _make_synthetic(args) -> int:
    from . import synthetic

    width, layers = synthetic.gemma_size(args.gemma) if args.gemma else (args.gemma_width, args.gemma_layers)
    geometry = synthetic.Geometry.small(
        args.version, gemma_width=width, gemma_layers=layers, num_layers=args.layers, heads=args.heads, head_dim=args.head_dim,
        connector_layers=args.connector_layers, vae_channels=args.vae_channels,
    )  # fmt: skip
    kind = args.type or ("q8_0" if args.output.suffix == ".gguf" else "bf16")
    synthetic.make(
        args.output, geometry, type=kind, audio=args.audio, vae=not args.no_vae, projection=not args.no_projection,
        connector=not args.no_connector, with_config=not args.no_config, seed=args.seed,
    )  # fmt: skip
    _print(f"{args.output}: synthetic LTX-{args.version}, {planning.size_text(args.output.stat().st_size)}")
    return 0


# -- compare-reference ---------------------------------------------------------------------------------------------------------------

_COMPARE = f"""examples:
  {PROG} compare-reference inputs.safetensors --checkpoint model.gguf --make-inputs       (then run them through a reference)
  {PROG} compare-reference reference.safetensors --checkpoint model.gguf --checkpoint vae.safetensors
"""


def _compare_options(command) -> None:
    command.add_argument("file", type=Path, help="safetensors of inputs and expected outputs (docs/compare-reference.md)")
    command.add_argument("--checkpoint", action="append", required=True, type=Path, metavar="FILE", help="a file of the model; repeat for its parts")
    command.add_argument("--make-inputs", action="store_true", help="write FILE with inputs for these checkpoints instead of comparing")
    command.add_argument("--only", choices=("dit", "connector", "features", "vae"), help="compare this component only")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="compute type (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    command.add_argument("--tolerance", type=float, help="largest relative error allowed (default: by precision)")
    command.add_argument("--json", action="store_true", help="print the rows as JSON")


def _compare(args) -> int:
    from . import compare

    if args.make_inputs:
        tensors = compare.make_inputs(args.file, args.checkpoint)
        _print(f"{args.file}: {len(tensors)} tensors; run them through a reference and add what it gives (docs/compare-reference.md)")
        return 0
    rows = compare.compare(args.file, args.checkpoint, compare.DTYPES[args.dtype], args.device, args.only, args.tolerance)
    if args.json:
        _print(json.dumps([{**vars(row), "passed": row.passed} for row in rows], indent=2))
    else:
        from .weights import open_weights

        _print(compare.render(rows, open_weights(args.file).metadata))
    return 0 if all(row.passed for row in rows) else 1


# -- output --------------------------------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Bar:
    """A progress bar of bytes on stderr. It appears with the first progress, so that a refused command prints its one sentence alone."""

    def __init__(self, total: int | None, title: str, quiet: bool):
        self.total, self.title, self.quiet, self.bar = total, title, quiet, None

    def at(self, done: int, _what: str) -> None:
        if self.quiet:
            return
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.title, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


class _Stages:
    """One bar after the other for the stages of a generation."""

    def __init__(self, quiet: bool):
        self.quiet, self.stage, self.bar = quiet, None, None

    def at(self, stage: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if stage != self.stage:
            self.close()
            from tqdm import tqdm

            self.stage, self.bar = stage, tqdm(total=total, desc=stage, file=sys.stderr, dynamic_ncols=True)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "_Stages":
        return self

    def __exit__(self, *_) -> None:
        self.close()


if __name__ == "__main__":
    sys.exit(main())
