"""What a training run writes: weights as float16 safetensors in parts of at most 15 MB, curves as JSON, contact sheets as PNG.

python tools/toy/files.py RUN FOLDER    shrinks a run's weights to what a later run resumes from
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

PART_BYTES = 15_000_000


def _replace(path: Path, write) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


SCALE = ".row_scale"  # suffix of the scales beside a tensor kept as 8-bit rows


def save_weights(folder: Path, stem: str, tensors: dict[str, torch.Tensor], small: bool = False) -> None:
    """``stem.0.safetensors``, ``stem.1.safetensors``, ...: float16; with ``small`` matrices become 8-bit rows (enough to resume from)."""
    from safetensors.torch import save_file

    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if small and tensor.ndim == 2:
            scale = tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            stored[name] = (tensor.float() / scale).round().to(torch.int8)
            stored[name + SCALE] = scale
        else:
            stored[name] = tensor.to(torch.float16).contiguous()
    parts, size = [{}], 0
    for name, tensor in stored.items():
        if size + tensor.nbytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    for i, part in enumerate(parts):
        _replace(folder / f"{stem}.{i}.safetensors", lambda path, part=part: save_file(part, path))


def load_weights(folder: Path, stem: str) -> dict[str, torch.Tensor] | None:
    """All parts of ``stem`` as float32, None when there are none."""
    from safetensors.torch import load_file

    paths = sorted(Path(folder).glob(f"{stem}.*.safetensors"))
    if not paths:
        return None
    stored = {name: tensor.float() for path in paths for name, tensor in load_file(path).items()}
    return {name: tensor * stored.get(name + SCALE, 1.0) for name, tensor in stored.items() if not name.endswith(SCALE)}


def shrink(run: Path, folder: Path) -> None:
    """Copy a run's weights into ``folder`` for resuming: the VAE as it is, the rest as 8-bit rows."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, "vae", load_weights(run, "vae"))
    save_weights(folder, "dit", load_weights(run, "dit"), small=True)


def save_json(path: Path, data) -> None:
    _replace(path, lambda partial: partial.write_text(json.dumps(data)))


def contact_sheet(
    path: Path, rows: list[list[np.ndarray]], columns: int = 2, scale: int = 1, colours: int | None = None
) -> None:
    """rows: per clip, uint8 pictures [H, W, 3] laid side by side; clips fill ``columns`` columns. colours: size of a palette, for a small file."""
    from PIL import Image

    strips = [np.concatenate(row, axis=1) for row in rows]
    height = -(-len(strips) // columns)
    strips += [np.zeros_like(strips[0])] * (height * columns - len(strips))
    sheet = np.concatenate(
        [np.concatenate(strips[c * height : (c + 1) * height], axis=0) for c in range(columns)], axis=1
    )
    image = Image.fromarray(sheet)
    if scale != 1:
        image = image.resize((image.width // scale, image.height // scale), Image.Resampling.LANCZOS)
    if colours:
        image = image.quantize(colours, kmeans=2, dither=Image.Dither.NONE)
    _replace(path, lambda partial: image.save(partial, format="PNG", optimize=True))


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[N, 3, T, H, W] in [-1, 1] -> uint8 [N, T, H, W, 3]."""
    return (
        ((pixels.float() + 1) * 127.5)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        .permute(0, 2, 3, 4, 1)
        .contiguous()
        .cpu()
        .numpy()
    )


if __name__ == "__main__":
    shrink(Path(sys.argv[1]), Path(sys.argv[2]))
