"""``ltx2-gguf calibrate``: measure what each layer of a model is fed, for ``convert --importance``."""

from pathlib import Path

from .printing import PROG, Bar, print_out

NAME, HELP = "calibrate", "measure over a few prompts what each input of each layer counts, for 'convert --importance'"

EXAMPLES = f"""examples:
  {PROG} calibrate importance.safetensors --model ltx-2.3-22b-dev.safetensors --text-encoder gemma-3-12b-it-Q4_K_M.gguf --memory-budget 12
  {PROG} calibrate importance.safetensors --model ltx-2.3-q8_0.gguf --text-encoder gemma.gguf --prompt "a cat" --prompt "rain on a window"
"""

PROMPTS = (
    "A woman in a red coat walks along a rainy street at night, neon signs reflected in the puddles.",
    "A wide aerial view of waves rolling onto a rocky coast at sunset.",
    "A close-up of hands kneading dough on a floured table, soft morning light.",
    "A cartoon fox runs through a snowy forest, the camera follows from the side.",
)


def options(command) -> None:
    """Add the command's options to its parser."""
    command.add_argument("output", type=Path, help="the .safetensors file to write")
    command.add_argument(
        "--model",
        required=True,
        type=Path,
        help="the video transformer, in as many bits as there are (GGUF or safetensors)",
    )
    command.add_argument("--text-encoder", required=True, type=Path, help="Gemma 3 (GGUF or safetensors)")
    command.add_argument("--projection", type=Path, help="text projection, where the model file has none")
    command.add_argument("--connector", type=Path, help="embeddings connector, where the model file has none")
    command.add_argument("--vae", type=Path, help="video VAE, where the model file has none")
    command.add_argument("--prompt", action="append", help="repeat for several (default: four of different kinds)")
    command.add_argument("--width", type=int, default=512, help="pixels, a multiple of 32")
    command.add_argument("--height", type=int, default=320, help="pixels, a multiple of 32")
    command.add_argument("--frames", type=int, default=33, help="8k+1")
    command.add_argument("--steps", type=int, default=8, help="denoising steps per prompt")
    command.add_argument("--device", help="cpu, cuda, mps ... (default: the first accelerator, else the CPU)")
    command.add_argument(
        "--memory-budget", type=float, metavar="GB", help="use at most this much device memory (default: no limit)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args) -> int:
    """Do it; returns the exit code."""
    from ...quant.output import check_output

    check_output(args.output, suffixes=(".safetensors",), overwrite=args.overwrite, sources=[args.model])
    from ..convert.importance import Recorder, write_importance
    from ..pipeline import LTX2Pipeline

    pipeline = LTX2Pipeline.from_files(
        args.model,
        args.text_encoder,
        args.projection,
        args.connector,
        args.vae,
        device=args.device,
        memory_budget=args.memory_budget,
    )
    recorder = Recorder()
    with Bar(args.quiet) as bar, recorder.recording(pipeline.dit):
        for seed, prompt in enumerate(args.prompt or PROMPTS):
            settings = pipeline.settings(
                width=args.width, height=args.height, frames=args.frames, steps=args.steps, seed=seed
            )
            pipeline.sample(prompt, settings, progress=bar.at)
    count = write_importance(args.output, recorder, args.model.name, overwrite=args.overwrite)
    print_out(f"{args.output}: {count} matrices, {recorder.rows} rows")
    return 0
