"""``ltx2-gguf verify``: is a file whole, and does it hold what its source holds?"""

import json
from pathlib import Path

from .printing import PROG, Bar, print_out

NAME, HELP = "verify", "check a model file: whole, finite, complete, and true to the checkpoint it was made from"

EXAMPLES = f"""examples:
  {PROG} verify ltx-2.3-q4_0.gguf
  {PROG} verify ltx-2.3-q4_0.gguf --against ltx-2.3-22b-dev.safetensors
"""


def options(command) -> None:
    command.add_argument("file", type=Path, help="a GGUF or safetensors file")
    command.add_argument(
        "--against", action="append", default=[], type=Path, metavar="SOURCE",
        help="the checkpoint it was made from; repeat for what --with gave",
    )  # fmt: skip
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args) -> int:
    from ..convert.verify import verify
    from .inspect_file import inspect

    report = inspect(args.file)
    total = sum(report.part_bytes.values()) + report.audio_bytes or None
    with Bar(args.quiet, "B") as bar:
        verdict = verify(args.file, args.against, progress=lambda done, _name: bar.at("verify", done, total))
    problems = verdict.problems + _structure(args.file, report)
    if args.json:
        worst = verdict.worst
        print_out(json.dumps({
            "path": str(args.file), "title": report.title, "ok": not problems, "tensors": verdict.tensors, "identical": verdict.identical,
            "decoded": len(verdict.decoded), "worst": worst and {"tensor": worst[0], "error": worst[1]}, "problems": problems,
            "notes": verdict.notes,
        }, indent=2))  # fmt: skip
    else:
        lines = [f"{args.file}: {report.title}, {verdict.tensors} tensors"]
        if args.against:
            lines.append(f"  {verdict.identical} have the source's bytes, {len(verdict.decoded)} are of another type")
        if verdict.worst:
            lines.append(f"  largest relative error {verdict.worst[1]:.2g} ({verdict.worst[0]})")
        lines += [f"  note: {text}" for text in verdict.notes] + [f"  PROBLEM: {text}" for text in problems]
        print_out("\n".join([*lines, f"  {'not in order' if problems else 'in order'}"]))
    return 1 if problems else 0


def _structure(path: Path, report) -> list[str]:
    """Whether the parts can be built: names and shapes of a transformer and a VAE against their own geometry."""
    import torch

    from ..loading.transformer import load_dit
    from ..loading.vae import load_vae

    if report.refusal is not None:
        return [report.refusal]
    problems = []
    with torch.inference_mode():
        for part, load in (
            ("dit", lambda: load_dit(path, dtype=torch.bfloat16, require_connector=False)),
            ("vae", lambda: load_vae(path)),
        ):
            if report.has(part):
                try:
                    load()
                except ValueError as error:
                    problems.append(str(error))
    return problems
