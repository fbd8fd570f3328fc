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

    A slot's angle depends on one coordinate of the token alone, so the table is kept as one row per distinct coordinate
    (``rows`` = (cos, sin), each [U, m]) and the row of every token and axis (``index`` int32 [B or 1, T, n]): slot ``pad + j n + a``
    holds rows[index[.., a], j], the ``pad`` slots in front do not turn. Kernels read this form, a few hundred kilobytes instead of
    16 KB per token; ``tables`` is the full pair, made on first use.

    Unpacks like the host's own pair, ``matrix, split = table`` with matrix [B or 1, T, nh, hd/2, 2, 2], for code written
    against the host's attention.
    """

    __slots__ = ("_tables", "heads", "index", "pad", "rows")

    def __init__(self, rows, index, pad, heads):
        self.rows, self.index, self.pad, self.heads = rows, index, pad, heads
        self._tables = None

    @property
    def tables(self):
        """(cos, sin)."""
        if self._tables is None:
            batch, tokens, axes = self.index.shape
            width = self.pad + axes * self.rows[0].shape[1]
            tables = []
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # kept: must also serve a later call that records gradients
                for rows, still in zip(self.rows, (1.0, 0.0)):
                    table = torch.full((batch, tokens, width), still, dtype=torch.float32, device=rows.device)
                    for axis in range(axes):
                        table[..., self.pad + axis :: axes] = rows[self.index[..., axis]]  # (B, T, m)
                    tables.append(
                        table.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                    )  # (B, T, D/2) -> (B, nh, T, hd/2)
            self._tables = tuple(tables)
        return self._tables

    def __iter__(self):
        cos, sin = (table.transpose(1, 2) for table in self.tables)  # (B, nh, T, hd/2) -> (B, T, nh, hd/2)
        yield torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
        yield True

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return tuple(self)[index]


def rotary_table(positions, max_pos, width, heads, theta, device):
    """RotaryTable for tokens at these positions.

    positions [B, n, T] float32 on the CPU, in the units of max_pos (n numbers). Sines are taken on the CPU: some GPU back ends
    lose accuracy at angles of 1e4 rad.
    """
    axes = positions.shape[1]
    count = width // (2 * axes)
    grid = frequency_grid(theta, count)
    with torch.inference_mode(False), torch.no_grad():  # kept: must also serve a later call that records gradients
        angles, index, first = [], [], 0
        for axis in range(axes):
            distinct, places = torch.unique(positions[:, axis], return_inverse=True)  # (B, T) -> (U,), (B, T)
            angles.append(grid * (distinct / max_pos[axis] * 2 - 1).unsqueeze(-1))  # (U, m)
            index.append(places + first)
            first += distinct.shape[0]
        angles = torch.cat(angles)
        rows = angles.cos().to(device), angles.sin().to(device)
        index = torch.stack(index, dim=-1).to(device, torch.int32)  # (B, T, n)
    return RotaryTable(rows, index, width // 2 - axes * count, heads)
