"""``ltx2-gguf convert``: write a GGUF of the video model. Planning (``--dry-run``, ``--self-test``) runs with the standard library alone."""

import json
from pathlib import Path

from ..convert import plan as planning
from ..files.text import size_text
from .printing import PROG, Bar, note, print_out

NAME, HELP = "convert", "write a GGUF of the video model from safetensors or GGUF files"

EXAMPLES = f"""examples:
  {PROG} convert ltx-2.3-22b-dev.safetensors ltx-2.3-q4_0.gguf --type q4_0
  {PROG} convert ltx-2.3-22b-dev.safetensors --type q8_0 --dry-run        (the plan only; needs nothing but Python)
  {PROG} convert dit.gguf out.gguf --type q5_1 --with video_vae.safetensors --with text_projection.safetensors
  {PROG} convert ltx-2.3-22b-dev.safetensors out.gguf --type q4_k_m --importance ltx-2.3.importance.safetensors
  {PROG} convert ltx-2.3-22b-dev.safetensors ltx-2.3-av-q4_0.gguf --type q4_0 --with-audio --audio-vae ltx-2.3-audio-vae.safetensors
  {PROG} convert --self-test
"""


def options(command) -> None:
    command.add_argument(
        "source", nargs="?", type=Path, help="checkpoint: .safetensors, its .index.json or folder, or .gguf"
    )
    command.add_argument("output", nargs="?", type=Path, help="the .gguf to write")
    command.add_argument(
        "--type",
        default="q8_0",
        type=str.lower,
        choices=tuple(planning.TARGETS),
        help="format of the large matrices, in any case",
    )
    command.add_argument(
        "--with",
        dest="companions",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a file that holds what the source lacks",
    )
    command.add_argument(
        "--importance",
        type=Path,
        metavar="FILE",
        help="what each input counts, as 'calibrate' measured it: less error at the same size",
    )
    command.add_argument(
        "--with-audio", action="store_true", help="keep the audio stream, its connector and its text projection"
    )
    command.add_argument(
        "--audio-vae",
        type=Path,
        metavar="FILE",
        help="also write the audio VAE and the vocoder to this .safetensors file (needs no other output)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--dry-run", action="store_true", help="print what would be kept and how, and write nothing")
    command.add_argument(
        "--self-test", action="store_true", help="check the keep/drop rule on complete checkpoints, without any file"
    )
    command.add_argument("--json", action="store_true", help="print the plan as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    command.set_defaults(usage_error=command.error)


def run(args) -> int:
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
    if args.audio_vae is not None:
        from ..convert.convert import extract_audio_vae

        made = extract_audio_vae([args.source, *args.companions], args.audio_vae, overwrite=args.overwrite)
        print_out(f"{args.audio_vae}: {made['tensors']} tensors, {size_text(made['bytes'])}")
        if args.output is None:
            return 0
    if args.output is None:
        args.usage_error("name the .gguf file to write, or pass --dry-run")
    from ..convert.convert import convert, plan_for

    sources = [args.source, *args.companions]
    total = sum(row.entry.nbytes for row in plan_for(sources, args.type, with_audio=args.with_audio).kept)
    with Bar(args.quiet, "B") as bar:

        def progress(done, _name):
            bar.at("convert", done, total)

        plan = convert(
            sources,
            args.output,
            args.type,
            importance=args.importance,
            with_audio=args.with_audio,
            overwrite=args.overwrite,
            progress=progress,
        )
    if args.json:
        _print_plan(plan, True)
    else:
        for warning in plan.warnings:
            note(warning)
        print_out(f"{args.output}: {len(plan.kept)} of {len(plan.rows)} tensors, {size_text(plan.output_bytes)}")
    return 0


def _plan(args) -> planning.Plan:
    """The plan from headers: with the standard library where it can read them, else (GGUF) through the weight readers."""
    sources = [args.source, *args.companions]
    if any(_is_gguf(path) for path in sources):
        from ..convert.convert import plan_for

        return plan_for(sources, args.type, with_audio=args.with_audio)
    first, *others = (planning.read_inventory(path) for path in sources)
    return planning.make_plan(first, args.type, companions=others, keep=planning.AUDIO_MODEL if args.with_audio else ())


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _print_plan(plan: planning.Plan, as_json: bool) -> None:
    print_out(json.dumps(planning.summary(plan), indent=2) if as_json else planning.render(plan))
