"""The command line: ``ltx2-gguf <command>``, or ``python -m <folder of this pack>.ltx2_core.cli <command>`` from the folder above it.

Exit codes: 0 done, 1 an error (one sentence on stderr), 2 wrong usage, 130 interrupted. Tables and JSON go to stdout, everything else to
stderr. Planning (``convert --dry-run``, ``convert --self-test``) runs with the standard library alone.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from . import generate
from ..convert import plan as planning
from ..files.text import size_text
from .generate import parse_image, parse_lora  # noqa: F401  (part of what this module offers)
from .output import Bar, PROG, print_out


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
        ("generate", "make a video from a prompt (and images), without ComfyUI", generate.EXAMPLES, generate.options, generate.run),
        ("lora", "rewrite a LoRA file so that any loader of LTX-2 LoRAs finds its layers", _LORA, _lora_options, _lora),
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
        print_out(json.dumps(data[0] if len(args.files) == 1 else data, indent=2))
    else:
        print_out("\n\n".join(render(report) for report in reports))
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
            print_out(line)
        print_out("Self-test passed.")
        return 0
    if args.source is None:
        args.usage_error("name the checkpoint to convert, or pass --self-test")
    if args.dry_run:
        _print_plan(_plan(args), args.json)
        return 0
    if args.output is None:
        args.usage_error("name the .gguf file to write, or pass --dry-run")
    from ..convert.convert import convert, plan_for

    sources = [args.source, *args.companions]
    total = sum(row.entry.nbytes for row in plan_for(sources, args.type).kept)
    with Bar(total, "convert", args.quiet) as bar:
        plan = convert(sources, args.output, args.type, overwrite=args.overwrite, progress=bar.at)
    if args.json:
        _print_plan(plan, True)
    else:
        for warning in plan.warnings:
            print(f"Note: {warning}", file=sys.stderr)
        print_out(f"{args.output}: {len(plan.kept)} of {len(plan.rows)} tensors, {size_text(plan.output_bytes)}")
    return 0


def _plan(args) -> planning.Plan:
    """The plan from headers: with the standard library where it can read them, else (GGUF) through the weight readers."""
    sources = [args.source, *args.companions]
    if any(_is_gguf(path) for path in sources):
        from ..convert.convert import plan_for

        return plan_for(sources, args.type)
    first, *others = (planning.read_inventory(path) for path in sources)
    return planning.make_plan(first, args.type, companions=others)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _print_plan(plan: planning.Plan, as_json: bool) -> None:
    print_out(json.dumps(planning.summary(plan), indent=2) if as_json else planning.render(plan))


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
    from ..convert.convert import strip

    with Bar(args.source.stat().st_size if args.source.is_file() else None, "strip", args.quiet) as bar:
        result = strip(args.source, args.output, overwrite=args.overwrite, progress=bar.at)
    if args.json:
        print_out(json.dumps(result, indent=2))
    else:
        saved = size_text(result["source_bytes"] - result["output_bytes"])
        print_out(f"{args.output}: {result['kept_tensors']} tensors kept, {result['dropped_tensors']} of the sound dropped, {saved} smaller")
    return 0


# -- lora ----------------------------------------------------------------------------------------------------------------------------

_LORA = f"""examples:
  {PROG} lora camera-diffusers.safetensors camera.safetensors
  {PROG} lora style.safetensors style-video.safetensors --drop-audio
"""


def _lora_options(command) -> None:
    command.add_argument("source", type=Path, help="LoRA for LTX-2 or LTX-2.3 in any spelling, .safetensors")
    command.add_argument("output", type=Path, help="the .safetensors to write, with the released LoRAs' spelling")
    command.add_argument("--drop-audio", action="store_true", help="leave the layers of the sound stream out (a model with sound uses them)")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--json", action="store_true", help="print counts and sizes as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _lora(args) -> int:
    from ..convert.lora import rewrite

    with Bar(args.source.stat().st_size if args.source.is_file() else None, "lora", args.quiet) as bar:
        result = rewrite(args.source, args.output, keep_audio=not args.drop_audio, overwrite=args.overwrite, progress=bar.at)
    if args.json:
        print_out(json.dumps(result, indent=2))
        return 0
    layers = result["layers"]
    audio = "" if not layers["audio"] else f", {layers['audio']} audio layers {'kept' if result['audio_kept'] else 'dropped'}"
    added = f", {result['alphas_added']} alphas from the header" if result["alphas_added"] else ""
    print_out(f"{args.output}: {layers['video']} video layers{audio}{added}; {result['renamed']} of {result['tensors']} keys renamed, from {result['spelling']}")
    if result["unknown"]:
        print(f"Note: {len(result['unknown'])} layers are not LTX-2's (first: {result['unknown'][0]}).", file=sys.stderr)
    return 0


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
    from ..convert import synthetic

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
    print_out(f"{args.output}: synthetic LTX-{args.version}, {size_text(args.output.stat().st_size)}")
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
        print_out(f"{args.file}: {len(tensors)} tensors; run them through a reference and add what it gives (docs/compare-reference.md)")
        return 0
    rows = compare.compare(args.file, args.checkpoint, compare.DTYPES[args.dtype], args.device, args.only, args.tolerance)
    if args.json:
        print_out(json.dumps([{**vars(row), "passed": row.passed} for row in rows], indent=2))
    else:
        from ..files.weights import open_weights

        print_out(compare.render(rows, open_weights(args.file).metadata))
    return 0 if all(row.passed for row in rows) else 1
