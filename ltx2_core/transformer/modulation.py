"""Modulation rows for tokens whose timesteps mostly coincide.

A token's scale, shift and gate depend on its timestep alone. Computed per token they are 36 864 numbers each (2.4 GB in
bfloat16 for a 1920x1088 clip of 121 frames), so they are computed once per distinct timestep: one row for the clip when nothing
is masked, one per latent frame when a mask does not vary within frames (image conditioning), and one per distinct value plus an
index per token otherwise.
"""

import torch

_ALL = slice(None)


class Modulation:
    """Rows for T tokens: ``data`` [B, n, R*D] where row r covers T//n tokens, or [1, U, R*D] with ``index`` [B, T] into U.

    Offers the methods of the host's compressed timestep, for code that calls them on a block's ``v_timestep``.
    """

    __slots__ = ("data", "index", "tokens")

    def __init__(self, data, tokens, index=None):
        self.data, self.tokens, self.index = data, tokens, index

    def rows(self, table, rows):
        """table[rows] + data[rows], each [B, n, D] or, with an index, [B, T, D]. table [R, D]; rows: a slice of R."""
        data = self.data
        data = data.view(*data.shape[:-1], *table.shape)  # (B, n, R*D) -> (B, n, R, D)
        if rows != _ALL:
            data, table = data[:, :, rows], table[rows]
        if table.dtype != data.dtype or table.device != data.device:
            table = table.to(device=data.device, dtype=data.dtype)
        values = (data + table).unbind(dim=2)
        if self.index is None:
            return values
        return tuple(value[0][self.index] for value in values)  # (1, U, D) -> (B, T, D)

    def expand(self):
        """[B, T, R*D]."""
        if self.index is not None:
            return self.data[0][self.index]
        return spread(self.data, self.tokens)

    def expand_for_computation(self, scale_shift_table, batch_size, indices=slice(None)):
        """The chosen rows with the table added, each expanded to [B, T, D] (B rows are there already: batch_size is not needed)."""
        values = self.rows(scale_shift_table, indices)
        return values if self.index is not None else tuple(spread(value, self.tokens) for value in values)


def spread(value, tokens):
    """[B, n, X] -> [B, tokens, X], each row repeated; n = 1 stays as it is, it broadcasts."""
    n = value.shape[1]
    if n in (1, tokens):
        return value
    return value.unsqueeze(2).expand(-1, -1, tokens // n, -1).flatten(1, 2)


def distinct_timesteps(timesteps, frames):
    """Reduce timesteps [B, T] to (values [N] float32, layout) such that ``layout`` turns per-value rows into a Modulation.

    frames: number of equal runs of tokens to try (None when tokens were dropped and frames are ragged).
    Layout is a function (rows [N, X]) -> Modulation.
    """
    tokens = timesteps.shape[1]
    if tokens > 1 and frames and tokens % frames == 0:
        grid = timesteps.unflatten(1, (frames, -1))
        low, high = grid.amin(dim=2), grid.amax(dim=2)  # (B, F)
        # One device read for both questions: constant within frames, constant over the clip.
        per_frame, constant = torch.stack(((low == high).all(), (low.amin(1) == high.amax(1)).all())).tolist()
        if per_frame:
            values = low[:, :1] if constant else low
            return values.flatten().float(), lambda rows: Modulation(rows.unflatten(0, values.shape), tokens)
    elif tokens == 1:
        return timesteps.flatten().float(), lambda rows: Modulation(rows.unsqueeze(1), tokens)
    values, index = torch.unique(timesteps.float(), return_inverse=True)
    return values, lambda rows: Modulation(rows.unsqueeze(0), tokens, index)
