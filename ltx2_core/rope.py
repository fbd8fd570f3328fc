"""Split-half rotary position embedding on a double-precision frequency grid.

For n axes and width D there are m = D // 2n frequencies per axis, g_j = pi/2 * theta^(j / (m-1)), computed in float64 and then
rounded to float32 (in float32 throughout, the top angle is off by up to 5e-3 rad). A position on axis a, as a fraction p of
the axis' maximum, turns by g_j * (2p - 1). Slots are laid out frequency-slow, axis-fast; the D/2 - n*m slots that are left over
stand in front and do not turn. The D/2 slots are then dealt to the heads in order, so every head has its own frequency band.

Source: Lightricks/LTX-2 ``ltx_core/model/transformer/rope.py``.
"""

import functools
import math

import numpy as np
import torch


@functools.lru_cache(maxsize=8)
def frequency_grid(theta, count):
    """pi/2 * theta^(j / (count-1)) for j = 0 … count-1, float64 rounded to float32. A tensor [count] on the CPU."""
    return torch.from_numpy((np.power(theta, np.linspace(0.0, 1.0, count)) * (math.pi / 2)).astype(np.float32))


class RotaryTable:
    """cos and sin of every token's angles, each [B or 1, nh, T, hd/2] float32.

    Unpacks like the host's own pair, ``matrix, split = table`` with matrix [B or 1, T, nh, hd/2, 2, 2], for code written
    against the host's attention; ``tables`` is what this pack's own functions take.
    """

    __slots__ = ("cos", "sin")

    def __init__(self, cos, sin):
        self.cos, self.sin = cos, sin

    @property
    def tables(self):
        """(cos, sin)."""
        return self.cos, self.sin

    def __iter__(self):
        cos, sin = self.cos.transpose(1, 2), self.sin.transpose(1, 2)  # (B, nh, T, hd/2) -> (B, T, nh, hd/2)
        yield torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
        yield True

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return tuple(self)[index]


def rotary_table(positions, max_pos, width, heads, theta, device):
    """RotaryTable for tokens at these positions.

    positions [B, n, T] float32 on the CPU, in the units of max_pos (n numbers). Angles are a product of one coordinate and one
    frequency, so sines are taken once per distinct coordinate, on the CPU (some GPU back ends lose accuracy at angles of 1e4
    rad), and gathered on ``device``.
    """
    batch, axes, tokens = positions.shape
    count = width // (2 * axes)
    pad = width // 2 - axes * count
    grid = frequency_grid(theta, count)
    with torch.inference_mode(False), torch.no_grad():  # tables are kept: they must also serve a later call that records gradients
        cos = torch.ones(batch, tokens, width // 2, dtype=torch.float32, device=device)
        sin = torch.zeros(batch, tokens, width // 2, dtype=torch.float32, device=device)
        for axis in range(axes):
            distinct, index = torch.unique(positions[:, axis], return_inverse=True)  # (B, T) -> (U,), (B, T)
            angles = grid * (distinct / max_pos[axis] * 2 - 1).unsqueeze(-1)  # (U, m)
            index = index.to(device)
            cos[..., pad + axis :: axes] = angles.cos().to(device)[index]  # (B, T, m)
            sin[..., pad + axis :: axes] = angles.sin().to(device)[index]
    return RotaryTable(*(table.unflatten(-1, (heads, -1)).transpose(1, 2) for table in (cos, sin)))  # (B, T, D/2) -> (B, nh, T, hd/2)
