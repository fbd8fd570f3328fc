"""Triton kernels of the int8 product, with scales, bias and GELU in its epilogue.

    y[m, n] = sum_k a[m, k] b[n, k] * x_scales[m] * w_scales[n] + bias[n], then GELU (tanh form) if asked; the sum is an exact integer

Importing this module imports triton.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_launch import Launcher, cdiv


@triton.jit
def gelu_tanh(x):
    """GELU, tanh form: x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _tile_at(number, rows, n_out, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. Numbers run through GROUP row tiles per column tile: a's and b's tiles are read again from the L2 cache."""
    column_tiles = tl.cdiv(n_out, N)
    group = number // (GROUP * column_tiles)
    group_rows = tl.minimum(tl.cdiv(rows, M) - group * GROUP, GROUP)
    within = number % (GROUP * column_tiles)
    return (group * GROUP + within % group_rows) * M, (within // group_rows) * N


@triton.jit
def _finished(total, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """The sums of rows m and columns n with scales, bias and GELU, float32."""
    value = (
        total.to(tl.float32)
        * tl.load(x_scales + m, mask=m < rows, other=0.0)[:, None]
        * tl.load(w_scales + n, mask=n < n_out, other=0.0)[None, :]
    )
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu_tanh(value)
    return value


@triton.jit
def _product_kernel(
    a, b, x_scales, w_scales, bias, y, rows, n_out, width,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m0, n0 = _tile_at(tl.program_id(0), rows, n_out, M, N, GROUP)
    m, n, k = m0 + tl.arange(0, M), n0 + tl.arange(0, N), tl.arange(0, K)
    a_tile = a + (tl.minimum(m, rows - 1).to(tl.int64) * width)[:, None] + k[None, :]
    b_tile = b + (tl.minimum(n, n_out - 1).to(tl.int64) * width)[None, :] + k[:, None]
    total = tl.zeros((M, N), tl.int32)
    for start in tl.range(0, width, K, num_stages=STAGES):
        inside = start + k < width
        total = tl.dot(
            tl.load(a_tile, mask=inside[None, :], other=0),
            tl.load(b_tile, mask=inside[:, None], other=0),
            total,
            out_dtype=tl.int32,
        )
        a_tile += K
        b_tile += K
    value = _finished(total, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS, GELU)
    tl.store(
        y + m.to(tl.int64)[:, None] * n_out + n[None, :],
        value.to(y.dtype.element_ty),
        mask=(m < rows)[:, None] & (n < n_out)[None, :],
    )


_product = Launcher(_product_kernel)

#: Tile (rows, columns, depth), row tiles per group, pipeline stages and warps, by compute capability.
TILES = {9: (128, 128, 128, 8, 3, 4), 8: (128, 128, 64, 8, 4, 8)}


@lru_cache(maxsize=16)
def _tile(device):
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return TILES.get(major, TILES[8])


def product(xq, x_scales, wq, w_scales, bias, y, gelu=False, tile=None):
    """xq int8 [M, K], wq int8 [N, K], K and N multiples of 16, with their scales float32 [M], [N] -> y [M, N], given and returned."""
    (rows, width), n_out = xq.shape, wq.shape[0]
    m, n, k, group, stages, warps = tile or _tile(xq.device)
    args = (xq, wq, x_scales, w_scales, y if bias is None else bias, y, rows, n_out, width)
    _product((cdiv(rows, m) * cdiv(n_out, n), 1, 1), args, (bias is not None, gelu, m, n, k, group, stages), warps)
    return y
