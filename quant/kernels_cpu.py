"""Products on packed weights for the CPU: decode a tile of rows, multiply, next tile.

Only a tile of the weight exists as numbers at any time.
"""

import torch

from . import reference
from .formats import BlockFormat

# Weights per tile.
TILE_WEIGHTS = 1 << 20


def linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None) -> torch.Tensor:
    """``x [..., in] @ decode(raw).T + bias`` -> ``[..., out]`` in the dtype of x."""
    out_features, in_features = shape
    rows = x.reshape(-1, in_features)
    compute = rows.float()
    out = torch.empty(rows.shape[0], out_features, dtype=torch.float32)
    step = max(1, TILE_WEIGHTS // in_features)
    for start in range(0, out_features, step):
        tile = reference.dequantize(raw[start : start + step], fmt)
        torch.mm(compute, tile.t(), out=out[:, start : start + step])
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], out_features)
