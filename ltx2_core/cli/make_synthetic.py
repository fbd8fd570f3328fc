"""``ltx2-gguf make-synthetic``: tiny random checkpoints of the real structure."""

from pathlib import Path

from ..files.text import size_text
from .printing import PROG, print_out

NAME, HELP = "make-synthetic", "write a tiny random checkpoint of the real structure, for tests"

EXAMPLES = f"""examples:
  {PROG} make-synthetic tiny.safetensors
  {PROG} make-synthetic tiny-q4_0.gguf --version 2.0 --type q4_0 --gemma gemma-3-270m.gguf
"""


def options(command) -> None:
    command.add_argument("output", type=Path, help="a name ending in .safetensors or .gguf")
    command.add_argument("--version", default="2.3", choices=("2.0", "2.3"))
    command.add_argument(
        "--type", help="safetensors: f32, bf16 (default) or f16; GGUF: any type that convert writes (default q8_0)"
    )
    command.add_argument("--layers", type=int, default=2, help="transformer blocks (default: %(default)s)")
    command.add_argument("--heads", type=int, default=4, help="(default: %(default)s)")
    command.add_argument("--head-dim", type=int, default=64, help="width of a head (default: %(default)s)")
    command.add_argument("--connector-layers", type=int, default=2, help="(default: %(default)s)")
    command.add_argument(
        "--vae-channels",
        type=int,
        default=8,
        help="base width of the VAE, a multiple of 8 (default: %(default)s; released: 128)",
    )
    command.add_argument("--gemma", type=Path, help="a Gemma-3 GGUF: the text projection is made to fit it")
    command.add_argument(
        "--gemma-width",
        type=int,
        default=640,
        help="width of the text encoder, without --gemma (default: %(default)s, Gemma-3 270M)",
    )
    command.add_argument(
        "--gemma-layers", type=int, default=18, help="its layers, without --gemma (default: %(default)s)"
    )
    command.add_argument("--audio", action="store_true", help="with the audio stream's tensors, as in released files")
    command.add_argument("--no-vae", action="store_true", help="without the VAE")
    command.add_argument("--no-projection", action="store_true", help="without the text projection")
    command.add_argument("--no-connector", action="store_true", help="without the embeddings connector")
    command.add_argument("--no-config", action="store_true", help="without metadata, as some files in circulation")
    command.add_argument("--seed", type=int, default=0)


def run(args) -> int:
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
