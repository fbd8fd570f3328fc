"""``ltx2-gguf strip``: copy a GGUF without its audio tensors."""

import json
from pathlib import Path

from ..files.text import size_text
from .printing import PROG, Bar, print_out

NAME, HELP = "strip", "copy an audio-and-video GGUF without its sound, bytes unchanged"

EXAMPLES = f"""examples:
  {PROG} strip ltx-2.3-22b-dev-Q4_K_M.gguf ltx-2.3-22b-dev-video-Q4_K_M.gguf
"""


def options(command) -> None:
    command.add_argument("source", type=Path, help="audio-and-video .gguf")
    command.add_argument("output", type=Path, help="the .gguf to write")
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("--json", action="store_true", help="print counts and sizes as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args) -> int:
    from ..convert.convert import strip

    total = args.source.stat().st_size if args.source.is_file() else None
    with Bar(args.quiet, "B") as bar:

        def progress(done, _name):
            bar.at("strip", done, total)

        result = strip(args.source, args.output, overwrite=args.overwrite, progress=progress)
    if args.json:
        print_out(json.dumps(result, indent=2))
    else:
        saved = size_text(result["source_bytes"] - result["output_bytes"])
        kept, dropped = result["kept_tensors"], result["dropped_tensors"]
        print_out(f"{args.output}: {kept} tensors kept, {dropped} of the sound dropped, {saved} smaller")
    return 0
