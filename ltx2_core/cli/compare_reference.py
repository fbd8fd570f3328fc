"""``ltx2-gguf compare-reference``: numbers beside those of a reference; the comparison itself is in compare.py."""

import json
from pathlib import Path

from .printing import PROG, print_out

NAME, HELP = "compare-reference", "compare this pack's numbers with reference implementations"

EXAMPLES = f"""examples:
  {PROG} compare-reference inputs.safetensors --checkpoint model.gguf --make-inputs       (then run them through a reference)
  {PROG} compare-reference reference.safetensors --checkpoint model.gguf --checkpoint vae.safetensors
"""


def options(command) -> None:
    command.add_argument(
        "file", type=Path, help="safetensors of inputs and expected outputs (docs/developer/compare-reference.md)"
    )
    command.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="a file of the model; repeat for its parts",
    )
    command.add_argument(
        "--make-inputs", action="store_true", help="write FILE with inputs for these checkpoints instead of comparing"
    )
    command.add_argument("--only", choices=("dit", "connector", "features", "vae"), help="compare this component only")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="compute type (default: %(default)s)",
    )
    command.add_argument("--device", default="cpu", help="where to compute (default: %(default)s)")
    command.add_argument("--tolerance", type=float, help="largest relative error allowed (default: by precision)")
    command.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(args) -> int:
    from . import compare

    if args.make_inputs:
        tensors = compare.make_inputs(args.file, args.checkpoint)
        print_out(
            f"{args.file}: {len(tensors)} tensors; run them through a reference and add what it gives (docs/developer/compare-reference.md)"
        )
        return 0
    rows = compare.compare(
        args.file, args.checkpoint, compare.DTYPES[args.dtype], args.device, args.only, args.tolerance
    )
    if args.json:
        print_out(json.dumps([{**vars(row), "passed": row.passed} for row in rows], indent=2))
    else:
        from ..files.weights import open_weights

        print_out(compare.render(rows, open_weights(args.file).metadata))
    return 0 if all(row.passed for row in rows) else 1
