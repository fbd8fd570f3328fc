"""What a training run writes: weights as float16 safetensors in parts of at most 15 MB, curves as JSON, contact sheets as PNG."""

import json
import os
from pathlib import Path

import numpy as np
import torch

PART_BYTES = 15_000_000


def _replace(path: Path, write) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def save_weights(folder: Path, stem: str, tensors: dict[str, torch.Tensor]) -> None:
    """``stem.0.safetensors``, ``stem.1.safetensors``, ...: float16, except tensors whose values float16 would clip."""
    from safetensors.torch import save_file

    parts, size = [{}], 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", torch.float16).contiguous()
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
    return {name: tensor.float() for path in paths for name, tensor in load_file(path).items()}


def save_json(path: Path, data) -> None:
    _replace(path, lambda partial: partial.write_text(json.dumps(data)))


def contact_sheet(path: Path, rows: list[list[np.ndarray]], columns: int = 2, scale: int = 1) -> None:
    """rows: per clip, uint8 pictures [H, W, 3] laid side by side; clips fill ``columns`` columns."""
    from PIL import Image

    strips = [np.concatenate(row, axis=1) for row in rows]
    height = -(-len(strips) // columns)
    strips += [np.zeros_like(strips[0])] * (height * columns - len(strips))
    sheet = np.concatenate([np.concatenate(strips[c * height : (c + 1) * height], axis=0) for c in range(columns)], axis=1)
    image = Image.fromarray(sheet)
    if scale != 1:
        image = image.resize((image.width // scale, image.height // scale), Image.Resampling.LANCZOS)
    _replace(path, lambda partial: image.save(partial, format="PNG"))


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """[N, 3, T, H, W] in [-1, 1] -> uint8 [N, T, H, W, 3]."""
    return ((pixels.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
