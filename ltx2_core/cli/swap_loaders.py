"""``ltx2-gguf swap-loaders``: an official ComfyUI workflow with its loaders swapped for this pack's."""

import json
from pathlib import Path

from ..files.workflows import WorkflowError, swap_loaders
from .printing import PROG, print_out

NAME, HELP = "swap-loaders", "put this pack's loaders into an official ComfyUI workflow of LTX-2"

EXAMPLES = f"""examples:
  {PROG} swap-loaders video_ltx2_3_t2v.json t2v-gguf.json --model ltx-2.3-22b-Q4_K_M.gguf --text-encoder gemma-3-12b-it-Q4_K_M.gguf
"""


def options(command) -> None:
    command.add_argument("workflow", type=Path, help="a workflow saved by ComfyUI (.json)")
    command.add_argument("output", type=Path, help="the workflow to write (.json)")
    command.add_argument("--model", required=True, help="name of the model file as the loader lists it")
    command.add_argument("--text-encoder", required=True, help="name of the Gemma file as the loader lists it")
    command.add_argument(
        "--audio-vae", default="auto", help="name of the audio VAE's file as the loader lists it (default: auto)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")


def run(args) -> int:
    from ...quant.output import Output, check_output

    if not args.workflow.is_file():
        raise WorkflowError(f"{args.workflow} does not exist.")
    try:
        workflow = json.loads(args.workflow.read_text("utf-8"))
    except ValueError as error:
        raise WorkflowError(f"{args.workflow.name} is not JSON ({error}).") from error
    changed, count = swap_loaders(workflow, args.model, args.text_encoder, args.audio_vae)
    check_output(args.output, suffixes=(".json",), overwrite=args.overwrite, sources=[args.workflow])
    with Output(args.output, args.overwrite) as output:
        output.file.write(json.dumps(changed, indent=1).encode())
    print_out(f"{args.output}: {count} loaders swapped")
    return 0
