"""Triton kernels of the fast mode: weights and activations re-expressed with one scale per row, and the int8 product with scales,
bias and GELU in its epilogue.

A program owns a row. It decodes or loads the row once, finds its largest magnitude, and writes the row divided by
scale = largest / limit (limit 448 for float8 e4m3, 127 for int8), together with the scale. Importing this module imports triton.
The same arithmetic in torch is in ``fast.py``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .decode_triton import LANES, decode
from .formats import FORMATS
from .launch import Launcher, cdiv, power_of_2


@triton.jit
def _store_quantized(target, value, inside, INT8: tl.constexpr):
    """Round to nearest even and store; |value| is within the type's limit up to rounding."""
    if INT8:
        rounded = (value + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum keeps no fraction bits
        tl.store(target, tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8), mask=inside)
    else:
        tl.store(target, value.to(target.dtype.element_ty), mask=inside)  # the conversion saturates


@triton.jit
def _row_scale(largest, INT8: tl.constexpr):
    """(scale, 1 / scale); a row of zeros gets scale 1."""
    limit = 127.0 if INT8 else 448.0
    scale = tl.where(largest > 0.0, largest / limit, 1.0)
    return scale, 1.0 / scale


@triton.jit
def _weight_rows_kernel(
    raw, q, scales, width, row_bytes, lane_rows, INT8: tl.constexpr, FORMAT: tl.constexpr, V: tl.constexpr, G: tl.constexpr, LANE_ROWS: tl.constexpr
):
    """raw [N, row_bytes] -> q [N, width], scales [N]. LANE_ROWS: rows of sixteen bytes per weight row, padded to a power of two."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, LANE_ROWS)[:, None]
    lane = tl.arange(0, 16)[None, :]
    inside = row < lane_rows
    w0, w1, w2, w3 = decode(raw + n * row_bytes, tl.minimum(row, lane_rows - 1), lane, FORMAT)
    magnitude = tl.abs(w0)
    if V > 1:
        magnitude = tl.maximum(magnitude, tl.abs(w1))
    if V > 2:
        magnitude = tl.maximum(magnitude, tl.maximum(tl.abs(w2), tl.abs(w3)))
    scale, inverse = _row_scale(tl.max(tl.reshape(magnitude, (LANE_ROWS * 16,), can_reorder=True), axis=0), INT8)
    tl.store(scales + n, scale)
    target = q + n * width + (row // G) * (16 * G * V) + (row % G) * 16 + lane
    _store_quantized(target, w0 * inverse, inside, INT8)
    if V > 1:
        _store_quantized(target + 16 * G, w1 * inverse, inside, INT8)
    if V > 2:
        _store_quantized(target + 32 * G, w2 * inverse, inside, INT8)
        _store_quantized(target + 48 * G, w3 * inverse, inside, INT8)


@triton.jit
def _gelu(x):
    """GELU, tanh form: x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _token_rows_kernel(x, q, scales, width, INT8: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """x [M, width] -> q [M, width], scales [M], of gelu(x) if asked."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + m * width + column, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = _gelu(value)
    scale, inverse = _row_scale(tl.max(tl.abs(value), axis=0), INT8)
    tl.store(scales + m, scale)
    _store_quantized(q + m * width + column, value * inverse, inside, INT8)


@triton.jit
def _int8_product_kernel(
    a, b, x_scales, w_scales, bias, y, rows, n_out, width,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k a[m, k] b[n, k] * x_scales[m] * w_scales[n] + bias[n], then GELU (tanh form) if asked; the sum is an exact integer.

    Programs run through GROUP row tiles per column tile, so that tiles of a and b are read again while they are in the L2 cache.
    """
    column_tiles = tl.cdiv(n_out, N)
    group = tl.program_id(0) // (GROUP * column_tiles)
    group_rows = tl.minimum(tl.cdiv(rows, M) - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    m = (group * GROUP + within % group_rows) * M + tl.arange(0, M)
    n = (within // group_rows) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    a_tile = a + (tl.minimum(m, rows - 1).to(tl.int64) * width)[:, None] + k[None, :]
    b_tile = b + (tl.minimum(n, n_out - 1).to(tl.int64) * width)[None, :] + k[:, None]
    total = tl.zeros((M, N), tl.int32)
    for start in tl.range(0, width, K, num_stages=STAGES):
        inside = start + k < width
        total = tl.dot(tl.load(a_tile, mask=inside[None, :], other=0), tl.load(b_tile, mask=inside[:, None], other=0), total, out_dtype=tl.int32)
        a_tile += K
        b_tile += K
    value = total.to(tl.float32) * tl.load(x_scales + m, mask=m < rows, other=0.0)[:, None] * tl.load(w_scales + n, mask=n < n_out, other=0.0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = _gelu(value)
    tl.store(y + m.to(tl.int64)[:, None] * n_out + n[None, :], value.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < n_out)[None, :])


_weight_rows = Launcher(_weight_rows_kernel)
_token_rows = Launcher(_token_rows_kernel)
_int8_product = Launcher(_int8_product_kernel)


def weight_rows(raw, fmt_name, q, scales):
    """Packed weight -> q [N, K] (int8 or float8 e4m3) and scales float32 [N], both given."""
    lanes, fmt = LANES[fmt_name], FORMATS[fmt_name]
    n_out, width = q.shape
    lane_rows = width // (16 * lanes.per_byte)
    block = power_of_2(lane_rows)
    constants = (not q.is_floating_point(), fmt_name, lanes.per_byte, lanes.group, block)
    warps = max(1, min(16, block * 16 * lanes.per_byte // 1024))
    _weight_rows((n_out, 1, 1), (raw, q, scales, width, fmt.row_bytes(width), lane_rows), constants, warps)


def token_rows(x, q, scales, gelu=False):
    """x [M, K] contiguous, GELU (tanh form) applied first if asked -> q [M, K] and scales float32 [M], both given."""
    width = x.shape[1]
    block = power_of_2(width)
    _token_rows((x.shape[0], 1, 1), (x, q, scales, width), (not q.is_floating_point(), gelu, block), max(1, min(16, block // 1024)))


#: Tile (rows, columns, depth), row tiles per group, pipeline stages and warps of the int8 product, by compute capability.
INT8_TILES = {9: (128, 128, 128, 8, 3, 4), 8: (128, 128, 64, 8, 4, 8)}


@lru_cache(maxsize=16)
def _int8_tile(device):
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8
    return INT8_TILES.get(major, INT8_TILES[8])


def int8_product(xq, x_scales, wq, w_scales, bias, y, gelu=False, tile=None):
    """xq int8 [M, K], wq int8 [N, K] with their scales -> y [M, N], given and returned."""
    rows, width = xq.shape
    n_out = wq.shape[0]
    m, n, k, group, stages, warps = tile or _int8_tile(xq.device)
    args = (xq, wq, x_scales, w_scales, y if bias is None else bias, y, rows, n_out, width)
    _int8_product((cdiv(rows, m) * cdiv(n_out, n), 1, 1), args, (bias is not None, gelu, m, n, k, group, stages), warps)
    return y
