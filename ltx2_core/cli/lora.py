"""``ltx2-gguf lora``: rewrite a LoRA file under the released LoRAs' keys."""

import json
from pathlib import Path

from .printing import PROG, Bar, note, print_out

NAME, HELP = "lora", "rewrite a LoRA file so that any loader of LTX-2 LoRAs finds its layers"

EXAMPLES = f"""examples:
  {PROG} lora camera-diffusers.safetensors camera.safetensors
  {PROG} lora style.safetensors style-video.safetensors --drop-audio
"""


def options(command) -> None:
    command.add_argument("source", type=Path, help="LoRA for LTX-2 or LTX-2.3 in any spelling, .safetensors")
    command.add_argument("output", type=Path, help="the .safetensors to write, with the released LoRAs' spelling")
    command.add_argument(
        "--drop-audio",
        action="store_true",
        help="leave the layers of the sound stream out (a model with sound uses them)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--json", action="store_true", help="print counts and sizes as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args) -> int:
    from ..convert.lora import rewrite

    total = args.source.stat().st_size if args.source.is_file() else None
    with Bar(args.quiet, "B") as bar:

        def progress(done, _name):
            bar.at("lora", done, total)

        result = rewrite(
            args.source, args.output, keep_audio=not args.drop_audio, overwrite=args.overwrite, progress=progress
        )
    if args.json:
        print_out(json.dumps(result, indent=2))
        return 0
    layers = result["layers"]
    audio = (
        ""
        if not layers["audio"]
        else f", {layers['audio']} audio layers {'kept' if result['audio_kept'] else 'dropped'}"
    )
    added = f", {result['alphas_added']} alphas from the header" if result["alphas_added"] else ""
    renamed = f"{result['renamed']} of {result['tensors']} keys renamed, from {result['spelling']}"
    print_out(f"{args.output}: {layers['video']} video layers{audio}{added}; {renamed}")
    if result["unknown"]:
        note(f"{len(result['unknown'])} layers are not LTX-2's (first: {result['unknown'][0]}).")
    return 0
