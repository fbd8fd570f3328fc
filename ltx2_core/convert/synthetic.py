"""Synthetic checkpoints: random weights in the exact structure of an LTX-2 file, small enough for a laptop or a test.

Values are drawn per tensor from a seed and the tensor's bare name, so the same tensor has the same values in every container, with
or without a prefix and with or without the audio part. Scales are chosen so that activations stay near unit size through every part,
the prompt and the conditioning visibly change the result, and frames are neither flat nor clipped.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from ...quant.output import Output
from ..files import structure
from ..files.structure import Geometry, Shapes

MODEL_VERSIONS = {"2.0": "2.0.0", "2.3": "2.3.0"}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def bare_name(name: str) -> str:
    """The tensor's name without the transformer's prefix (the one prefix that files disagree on)."""
    return name.removeprefix(structure.DIT_PREFIX).removeprefix("diffusion_model.")


def tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Values for one tensor, float32. Depend on the bare name, the shape and the seed only."""
    name = bare_name(name)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1 & 0x7FFFFFFF))
    mean, std = _mean_std(name, shape)
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(std).add_(mean)


def _mean_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    leaf = name.rsplit(".", 1)[-1]
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size

    if leaf == "std-of-means":
        return 1.0, 0.1
    if leaf == "mean-of-means":
        return 0.0, 0.1
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # Sharp attention in the connector and over the text, so that a few words among 1024 context tokens matter.
        return (2.2, 0.1) if ".attn2." in name or "connector" in name else (1.2, 0.1)
    if "scale_shift_table" in name:
        return 0.0, 0.3
    if leaf == "filter":  # a low-pass filter of unit gain
        return 1 / shape[-1], 0.01
    if leaf == "mel_basis":
        return 0.02, 0.005
    if leaf in ("alpha", "beta"):
        return 0.0, 0.1
    if leaf == "learnable_registers":
        return 0.0, 1.0
    if name.endswith("aggregate_embed.bias"):
        return (
            0.0,
            1.0,
        )  # a direction that all text shares and registers lack, so that some heads look at the text alone
    if leaf == "bias":
        return 0.0, 0.02
    gain = 1.0
    if "adaln_single" in name:
        gain = 0.5 if name.endswith("adaln_single.linear.weight") else 1.4
    elif name.endswith("attn2.to_out.0.weight"):
        gain = 3.0
    elif name.endswith("decoder.conv_out.conv.weight"):
        gain = 0.35  # pixels with a spread of about a third of [-1, 1]
    elif ".res_blocks." in name or ".resblocks." in name:
        gain = 0.5
    elif name.endswith("conv_post.weight"):
        gain = 0.2  # a waveform that is not clipped
    return 0.0, gain / fan_in**0.5


def state_dict(shapes: Shapes, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Values for every name. Tables stay float32 whatever ``dtype``, as in the released files."""
    result = {}
    for name, shape in shapes.items():
        value = tensor(name, shape, seed)
        result[name] = value if "scale_shift_table" in name else value.to(dtype)
    return result


def metadata(geometry: Geometry) -> dict[str, str]:
    """The safetensors ``__metadata__`` of such a file: ``config`` (JSON text) and ``model_version``."""
    return {"config": json.dumps(structure.config(geometry)), "model_version": MODEL_VERSIONS[geometry.version]}


def save_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    with Output(path) as output:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            str(output.partial),
            metadata=dict(meta) if meta else None,
        )


def save_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, str], shards: int = 2) -> Path:
    """Write ``shards`` safetensors files and their index; returns the index's path."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map, total = {}, 0
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_safetensors(folder / file, part, meta)
        weight_map.update(dict.fromkeys(part, file))
        total += sum(t.numel() * t.element_size() for t in part.values())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return index


def gemma_size(path: str | Path) -> tuple[int, int]:
    """(width, layers) of a Gemma-3 GGUF, from its header."""
    from ...quant.gguf.reader import GGUFFile

    file = GGUFFile(path)
    try:
        keys = ("gemma3.embedding_length", "gemma3.block_count")
        if file.architecture != "gemma3" or not all(key in file.metadata for key in keys):
            raise ValueError(
                f"{Path(path).name} has architecture {file.architecture!r}; a Gemma-3 text encoder ('gemma3') is needed here."
            )
        width, layers = (int(file.metadata[key]) for key in keys)
        return width, layers
    finally:
        file.close()


def make(
    path: str | Path,
    geometry: Geometry,
    *,
    type: str = "bf16",
    audio: bool = False,
    vae: bool = True,
    projection: bool = True,
    connector: bool = True,
    with_config: bool = True,
    seed: int = 0,
) -> Path:
    """Write a synthetic checkpoint: ``.safetensors`` (type f32, bf16 or f16, released names) or ``.gguf`` (any type convert writes)."""
    path = Path(path)
    shapes = structure.checkpoint_shapes(geometry, audio=audio, vae=vae, projection=projection, connector=connector)
    meta = metadata(geometry) if with_config else {}
    if path.suffix == ".safetensors":
        if type not in DTYPES:
            raise ValueError(f"A safetensors file can be made as {', '.join(DTYPES)}; {type!r} needs a .gguf name.")
        save_safetensors(path, state_dict(shapes, seed=seed, dtype=DTYPES[type]), meta)
        return path
    if path.suffix == ".gguf":
        from .convert import write_gguf
        from .plan import AUDIO_PARTS

        tensors: Iterable[tuple[str, torch.Tensor]] = (
            (name, tensor(name, shape, seed)) for name, shape in shapes.items()
        )
        absent = {
            part for part, held in (("audio connector", connector), ("audio text projection", projection)) if not held
        }
        write_gguf(
            path,
            tensors,
            shapes,
            meta,
            type=type,
            keep=[part for part in AUDIO_PARTS if part not in absent] if audio else (),
        )
        return path
    raise ValueError(f"{path.name}: give the file a name ending in .safetensors or .gguf.")
