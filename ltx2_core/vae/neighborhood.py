"""Attention of every position of a clip to its neighbours in time and space.

Along an axis of length L position i looks at K neighbours from clamp(i - K//2, 0, L - K) on: at a border the window moves inwards and stays as
large. An axis shorter than K is looked at as a whole.

On NVIDIA GPUs the kernel of comfy-kitchen is used where it has one (0.2.28 and newer). Elsewhere blocks of queries meet the box of all their
windows in torch's attention, with a mask: more products than needed, but dense ones.

Letters: T, H, W size of the clip; h heads of d; K window.

Source: NATTEN's ``na3d`` (the meaning of windows at borders).
"""

import functools

import torch
import torch.nn.functional as F

BLOCK = (4, 8, 8)
"""Queries of a block along time, height and width where no kernel is at hand."""


@functools.cache
def _kernel():
    """comfy-kitchen's ``na3d``, or None."""
    try:
        import comfy_kitchen
    except ImportError:
        return None
    return getattr(comfy_kitchen, "na3d", None)


def neighborhood_attention(q, k, v, window, frames: slice) -> torch.Tensor:
    """softmax(q k^T) v over each position's neighbours, for the positions of ``frames``; q is scaled already.

    q, k, v [B, T, H, W, h, d]; window (Kt, Kh, Kw). Returns [B, frames, H, W, h, d].
    """
    kernel = _kernel() if q.is_cuda and torch.version.cuda is not None and not torch.is_grad_enabled() else None
    if kernel is not None:
        return kernel(q, k, v, list(window), None, 1.0)[:, frames]
    return in_blocks(q, k, v, window, frames)


class _Axis:
    """One axis cut into blocks of equal length; the last one overlaps the one before where it must."""

    def __init__(self, length: int, window: int, block: int, first: int, stop: int, device):
        window, self.block = min(window, length), min(block, stop - first)
        self.box = min(length, self.block + window - 1)
        self.starts = [min(start, stop - self.block) for start in range(first, stop, self.block)]
        self.boxes = [min(max(start - window // 2, 0), length - self.box) for start in self.starts]
        queries = torch.tensor(self.starts, device=device)[:, None] + torch.arange(
            self.block, device=device
        )  # (blocks, block)
        keys = torch.tensor(self.boxes, device=device)[:, None] + torch.arange(self.box, device=device)  # (blocks, box)
        left = (queries - window // 2).clamp(0, length - window)[:, :, None]
        self.keys = keys
        self.sees = (keys[:, None] >= left) & (keys[:, None] < left + window)  # (blocks, block, box)


def in_blocks(q, k, v, window, frames: slice) -> torch.Tensor:
    """``neighborhood_attention`` on any device, a row of blocks at a time."""
    B, T, H, W, heads, d = q.shape
    first, stop, _ = frames.indices(T)
    spans = ((T, first, stop), (H, 0, H), (W, 0, W))
    t, h, w = (_Axis(n, size, block, a, b, q.device) for (n, a, b), size, block in zip(spans, window, BLOCK))
    out = q.new_empty(B, stop - first, H, W, heads, d)
    columns, blocks = w.keys.flatten(), len(w.starts)

    def boxed(x, ti, hi):
        """The boxes of a row of blocks: [blocks, B*h, box, d]."""
        x = x[:, t.boxes[ti] : t.boxes[ti] + t.box, h.boxes[hi] : h.boxes[hi] + h.box].index_select(3, columns)
        return x.unflatten(3, (blocks, w.box)).permute(3, 0, 5, 1, 2, 4, 6).flatten(1, 2).flatten(2, 4)

    for ti, t_start in enumerate(t.starts):
        for hi, h_start in enumerate(h.starts):
            sees = (
                t.sees[ti][:, None, None, :, None, None] & h.sees[hi][:, None, None, :, None]
            )  # (qt, qh, 1, kt, kh, 1)
            sees = sees[None] & w.sees[:, None, None, :, None, None, :]  # (blocks, qt, qh, qw, kt, kh, kw)
            mask = sees.flatten(4).flatten(1, 3)[:, None]  # (blocks, 1, queries, keys)
            rows = q[:, t_start : t_start + t.block, h_start : h_start + h.block]
            queries = torch.stack(
                [rows[:, :, :, start : start + w.block] for start in w.starts]
            )  # (blocks, B, qt, qh, qw, h, d)
            queries = queries.permute(0, 1, 5, 2, 3, 4, 6).flatten(1, 2).flatten(2, 4)  # (blocks, B*h, queries, d)
            y = F.scaled_dot_product_attention(queries, boxed(k, ti, hi), boxed(v, ti, hi), attn_mask=mask, scale=1.0)
            y = y.unflatten(2, (t.block, h.block, w.block)).unflatten(1, (B, heads)).permute(0, 1, 3, 4, 5, 2, 6)
            for start, part in zip(w.starts, y):
                out[
                    :, t_start - first : t_start - first + t.block, h_start : h_start + h.block, start : start + w.block
                ] = part
    return out
