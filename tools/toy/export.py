"""A training run's weights as one checkpoint with the released files' names, and that checkpoint through the pack's converter.

    python tools/toy/export.py RUN OUT.safetensors      float32, with the ``config`` metadata
    python tools/toy/export.py RUN OUT.gguf --type q8_0

The checkpoint holds transformer, connector, text projection and VAE. The small matrix trained in place of the projection and the basis
it works in are multiplied into ``video_aggregate_embed`` (``text.fold``).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "toy"

from ltx2_gguf.ltx2_core.convert import convert
from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.files.structure import DIT_PREFIX, PROJECTION_PREFIX, VAE_PREFIX, Geometry

from . import files, pack, text  # noqa: F401
from .model import dit_config
from .train_vae import vae_config

GEMMA_LAYERS = 18  # of the 270M text encoder


def metadata() -> dict[str, str]:
    """``config`` and ``model_version`` as the released safetensors carry them, with the toy's sizes."""
    dit = dit_config()
    geometry = Geometry.small(
        "2.3", num_layers=dit.num_layers, heads=dit.num_attention_heads, head_dim=dit.attention_head_dim, gemma_width=text.GEMMA_WIDTH,
        gemma_layers=GEMMA_LAYERS, connector_layers=dit.connector.num_layers, registers=dit.connector.num_learnable_registers,
        vae_channels=vae_config().encoder_base_channels,
    )  # fmt: skip
    config = structure.config(geometry) | {"vae": vae_config().to_metadata()}
    return {"config": json.dumps(config), "model_version": "2.3.0"}


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run under its released name, float32."""
    trained, vae = files.load_weights(run, "dit"), files.load_weights(run, "vae")
    if trained is None or vae is None:
        raise FileNotFoundError(
            f"{run} holds no finished run; it needs dit.*.safetensors and vae.*.safetensors from train_all.py."
        )
    basis = {name: trained[f"basis.{name}"] for name in ("mean", "directions", "scale")}
    weight, bias = text.fold(trained["projection.weight"], trained["projection.bias"], basis, GEMMA_LAYERS + 1)
    tensors = {
        DIT_PREFIX + name.removeprefix("dit."): value for name, value in trained.items() if name.startswith("dit.")
    }
    tensors[PROJECTION_PREFIX + "video_aggregate_embed.weight"] = weight
    tensors[PROJECTION_PREFIX + "video_aggregate_embed.bias"] = bias
    tensors |= {VAE_PREFIX + name: value for name, value in vae.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def export(run: Path, output: Path, kind: str = "q8_0") -> None:
    """Write the run as ``output``: .safetensors in float32, or .gguf in the converter's format ``kind``."""
    from safetensors.torch import save_file

    if output.suffix == ".safetensors":
        save_file(checkpoint(run), str(output), metadata=metadata())
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "toy.safetensors"
        export(run, source)
        convert.convert([source], output, kind, overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="q8_0")
    args = parser.parse_args()
    export(args.run, args.output, args.type)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")
