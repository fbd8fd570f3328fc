"""Triton kernels of the fast mode: weights and activations re-expressed with one scale per row. (The int8 product is in ``kernels/triton_int8.py``.)

A program owns a row. It decodes or loads the row once, finds its largest magnitude, and writes the row divided by
scale = largest / limit (limit 448 for float8 e4m3, 127 for int8), together with the scale. Importing this module imports triton.
The same arithmetic in torch is in ``eight_bit.py``.
"""

import triton
import triton.language as tl

from ..formats import FORMATS
from .triton_decode import LANES, decode
from .triton_launch import Launcher, power_of_2


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
def store_row(target, scale, value, inside, INT8: tl.constexpr):
    """A whole row in 8 bits, and its scale. value: float32, zero outside."""
    row_scale, inverse = _row_scale(tl.max(tl.abs(value)), INT8)
    tl.store(scale, row_scale)
    _store_quantized(target, value * inverse, inside, INT8)


@triton.jit
def _weight_rows_kernel(
    raw,
    q,
    scales,
    width,
    row_bytes,
    lane_rows,
    INT8: tl.constexpr,
    FORMAT: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    LANE_ROWS: tl.constexpr,
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
def _activation_rows_kernel(x, q, scales, width, INT8: tl.constexpr, BLOCK: tl.constexpr):
    """x [M, width] -> q [M, width], scales [M]."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + m * width + column, mask=inside, other=0.0).to(tl.float32)
    store_row(q + m * width + column, scales + m, value, inside, INT8)


_weight_rows = Launcher(_weight_rows_kernel)
_activation_rows = Launcher(_activation_rows_kernel)


def weight_rows(raw, fmt_name, q, scales):
    """Packed weight -> q [N, K] (int8 or float8 e4m3) and scales float32 [N], both given."""
    lanes, fmt = LANES[fmt_name], FORMATS[fmt_name]
    n_out, width = q.shape
    lane_rows = width // (16 * lanes.per_byte)
    block = power_of_2(lane_rows)
    constants = (not q.is_floating_point(), fmt_name, lanes.per_byte, lanes.group, block)
    warps = max(1, min(16, block * 16 * lanes.per_byte // 1024))
    _weight_rows((n_out, 1, 1), (raw, q, scales, width, fmt.row_bytes(width), lane_rows), constants, warps)


def activation_rows(x, q, scales):
    """x [M, K] contiguous -> q [M, K] and scales float32 [M], both given."""
    width = x.shape[1]
    block = power_of_2(width)
    _activation_rows(
        (x.shape[0], 1, 1), (x, q, scales, width), (not q.is_floating_point(), block), max(1, min(16, block // 1024))
    )
