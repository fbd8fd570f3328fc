"""Triton kernel of y = x W^T + b for one to four rows of x, straight from raw GGML blocks of every format.

A program computes two outputs: it runs through two rows of W. A thread owns a *unit* of packed bytes in each at a time: a 32-bit word of
the formats with 32 weights per block, sixteen bytes of the formats with 256, because so many bytes share their scales. Neighbouring
threads own neighbouring units. All tiles are one-dimensional, so between the loads and the sum at the end nothing moves between threads,
whatever layouts a version of Triton prefers: no shared memory, no barrier.

Bit operations turn a word of packed bytes into words of four codes, one per byte, and a weight is scale * code + offset. So

    sum_k x[k] w[k] = scale * sum_k x[k] code[k] + offset * sum_k x[k]

where the second sum is the same for both rows of W. Weights are not rounded, sums are float32 in a fixed order, and nothing is allocated.

Importing this module imports triton. Source of the layouts: ggml ``src/ggml-common.h``, ``src/ggml-quants.c``; same as ``decode.py``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from ..tracing import is_plain
from .triton_decode import LANES, _byte, _half, _iq4_level, _k_scale_min, _q3_k_scale
from .triton_launch import Launcher, cdiv, power_of_2

#: Most rows of x.
MOST_ROWS = 4
#: Warps of a program where the width has units for them.
MOST_WARPS = 4
#: Units of a step per thread and row of W, by words per unit: one of sixteen bytes, or as many bytes in words.
UNROLL = {4: 1, 1: 4}


@triton.jit
def _word(address, WIDE: tl.constexpr):
    """The 32-bit word at an even address; WIDE: at a multiple of four."""
    if WIDE:
        word = tl.load(address.to(tl.pointer_type(tl.int32)))
    else:
        half = address.to(tl.pointer_type(tl.uint16))
        word = tl.load(half).to(tl.int32) | (tl.load(half + 1).to(tl.int32) << 16)
    return word


@triton.jit
def _spread(bits):
    """Bits 0 to 3 -> bit 4 of bytes 0 to 3."""
    return (((bits & 15) * 0x00204081) & 0x01010101) << 4


@triton.jit
def _codes(block, r, at, FORMAT: tl.constexpr, WIDE: tl.constexpr):
    """Codes of the four bytes from ``at`` on in row r of a block: a word per weight of a byte, of which the first V are meaningful."""
    if FORMAT == "Q8_0":
        c0 = _word(block + 2 + r * 16 + at, WIDE) ^ -0x7F7F7F80  # flips the sign bits: q + 128
        c1 = c0
        c2 = c0
        c3 = c0
    elif FORMAT == "Q2_K" or FORMAT == "Q3_K":
        q = _word(block + (16 if FORMAT == "Q2_K" else 32) + r * 16 + at, WIDE)
        c0 = q & 0x03030303
        c1 = (q >> 2) & 0x03030303
        c2 = (q >> 4) & 0x03030303
        c3 = (q >> 6) & 0x03030303
        if FORMAT == "Q3_K":
            third = _word(block + (r % 2) * 16 + at, WIDE) >> ((r // 2) * 4)
            c0 |= (third & 0x01010101) << 2
            c1 |= ((third >> 1) & 0x01010101) << 2
            c2 |= ((third >> 2) & 0x01010101) << 2
            c3 |= ((third >> 3) & 0x01010101) << 2
    else:
        if FORMAT == "Q4_0" or FORMAT == "IQ4_NL":
            first: tl.constexpr = 2
        elif FORMAT == "Q4_1":
            first: tl.constexpr = 4
        elif FORMAT == "Q5_0":
            first: tl.constexpr = 6
        elif FORMAT == "Q5_1" or FORMAT == "IQ4_XS":
            first: tl.constexpr = 8
        elif FORMAT == "Q4_K":
            first: tl.constexpr = 16
        elif FORMAT == "Q5_K":
            first: tl.constexpr = 48
        else:
            tl.static_assert(FORMAT == "Q6_K", "format without a matrix-vector kernel")
            first: tl.constexpr = 0
        q = _word(block + first + r * 16 + at, WIDE)
        c0 = q & 0x0F0F0F0F
        c1 = (q >> 4) & 0x0F0F0F0F
        if FORMAT == "Q5_0" or FORMAT == "Q5_1":
            fifth = _word(block + (2 if FORMAT == "Q5_0" else 4), WIDE) >> at
            c0 |= _spread(fifth)
            c1 |= _spread(fifth >> 16)
        elif FORMAT == "Q5_K":
            fifth = _word(block + 16 + (r % 2) * 16 + at, WIDE) >> ((r // 2) * 2)
            c0 |= (fifth & 0x01010101) << 4
            c1 |= ((fifth >> 1) & 0x01010101) << 4
        elif FORMAT == "Q6_K":
            upper = _word(block + 128 + (r // 4) * 32 + (r % 2) * 16 + at, WIDE) >> (((r % 4) // 2) * 2)
            c0 |= (upper & 0x03030303) << 4
            c1 |= ((upper >> 4) & 0x03030303) << 4
        c2 = c0
        c3 = c0
    return c0, c1, c2, c3


@triton.jit
def _scales(block, r, FORMAT: tl.constexpr):
    """(scale, offset) of each weight of row r's bytes: a weight is scale * code + offset."""
    if FORMAT == "Q4_K" or FORMAT == "Q5_K":
        d = _half(block)
        dmin = _half(block + 2)
        s0, m0 = _k_scale_min(block + 4, (r // 2) * 2)
        s1, m1 = _k_scale_min(block + 4, (r // 2) * 2 + 1)
        s0 = d * s0
        s1 = d * s1
        o0 = -dmin * m0
        o1 = -dmin * m1
        s2 = s0
        s3 = s0
        o2 = o0
        o3 = o0
    elif FORMAT == "Q2_K":
        d = _half(block + 80)
        dmin = _half(block + 82)
        scales = block + (r // 2) * 8 + r % 2
        b0 = _byte(scales)
        b1 = _byte(scales + 2)
        b2 = _byte(scales + 4)
        b3 = _byte(scales + 6)
        s0 = d * (b0 & 15).to(tl.float32)
        s1 = d * (b1 & 15).to(tl.float32)
        s2 = d * (b2 & 15).to(tl.float32)
        s3 = d * (b3 & 15).to(tl.float32)
        o0 = -dmin * (b0 >> 4).to(tl.float32)
        o1 = -dmin * (b1 >> 4).to(tl.float32)
        o2 = -dmin * (b2 >> 4).to(tl.float32)
        o3 = -dmin * (b3 >> 4).to(tl.float32)
    elif FORMAT == "Q3_K":
        d = _half(block + 108)
        i = (r // 2) * 8 + r % 2
        s0 = d * _q3_k_scale(block + 96, i)
        s1 = d * _q3_k_scale(block + 96, i + 2)
        s2 = d * _q3_k_scale(block + 96, i + 4)
        s3 = d * _q3_k_scale(block + 96, i + 6)
        o0 = -4.0 * s0
        o1 = -4.0 * s1
        o2 = -4.0 * s2
        o3 = -4.0 * s3
    elif FORMAT == "Q6_K":
        d = _half(block + 208)
        scales = (block + 192 + (r // 4) * 8 + r % 4).to(tl.pointer_type(tl.int8))
        s0 = d * tl.load(scales).to(tl.float32)
        s1 = d * tl.load(scales + 4).to(tl.float32)
        o0 = -32.0 * s0
        o1 = -32.0 * s1
        s2 = s0
        s3 = s0
        o2 = o0
        o3 = o0
    else:
        d = _half(block)
        if FORMAT == "Q4_1" or FORMAT == "Q5_1":
            o0 = _half(block + 2)
        elif FORMAT == "IQ4_NL":
            o0 = 0.0 * d
        elif FORMAT == "IQ4_XS":
            upper = _byte(block + 2 + r // 4) >> ((r % 4) * 2)
            lower = _byte(block + 4 + r // 2) >> ((r % 2) * 4)
            d = d * (((lower & 15) | ((upper & 3) << 4)) - 32).to(tl.float32)
            o0 = 0.0 * d
        elif FORMAT == "Q4_0":
            o0 = -8.0 * d
        elif FORMAT == "Q5_0":
            o0 = -16.0 * d
        else:
            tl.static_assert(FORMAT == "Q8_0", "format without a matrix-vector kernel")
            o0 = -128.0 * d
        s0 = d
        s1 = d
        s2 = d
        s3 = d
        o1 = o0
        o2 = o0
        o3 = o0
    return s0, o0, s1, o1, s2, o2, s3, o3


@triton.jit
def _two(bits, dtype: tl.constexpr):
    """Two halves of a 32-bit word as float32."""
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32), (bits >> 16).to(tl.int16).to(
        dtype, bitcast=True
    ).to(tl.float32)


@triton.jit
def _four(x, column, inside):
    """x[column] and its three neighbours as float32, 0 outside. Columns are multiples of four; x is read in 8 bytes."""
    dtype: tl.constexpr = x.dtype.element_ty
    wide = x.to(tl.pointer_type(tl.int64))
    if dtype == tl.float32:
        low = tl.load(wide + column // 2, mask=inside, other=0)
        high = tl.load(wide + column // 2 + 1, mask=inside, other=0)
        x0 = low.to(tl.int32).to(tl.float32, bitcast=True)
        x1 = (low >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        x2 = high.to(tl.int32).to(tl.float32, bitcast=True)
        x3 = (high >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        both = tl.load(wide + column // 4, mask=inside, other=0)
        x0, x1 = _two(both.to(tl.int32), dtype)
        x2, x3 = _two((both >> 32).to(tl.int32), dtype)
    return x0, x1, x2, x3


@triton.jit
def _number(codes, byte: tl.constexpr, FORMAT: tl.constexpr):
    code = (codes >> (8 * byte)) & 255
    if FORMAT == "IQ4_NL" or FORMAT == "IQ4_XS":
        return _iq4_level(code)
    return code.to(tl.float32)


@triton.jit
def _weighed(total, x0, x1, x2, x3, x_sum, codes, scale, offset, FORMAT: tl.constexpr):
    """total plus four values of x times four weights."""
    p = x0 * _number(codes, 0, FORMAT)
    p = x1 * _number(codes, 1, FORMAT) + p
    p = x2 * _number(codes, 2, FORMAT) + p
    p = x3 * _number(codes, 3, FORMAT) + p
    total = scale * p + total
    return offset * x_sum + total


@triton.jit
def _pair(ta, tb, x, column, inside, ca, sa, oa, cb, sb, ob, FORMAT: tl.constexpr):
    """The sums of rows a and b of W plus four values of x times their weights."""
    x0, x1, x2, x3 = _four(x, column, inside)
    x_sum = (x0 + x1) + (x2 + x3)
    ta = _weighed(ta, x0, x1, x2, x3, x_sum, ca, sa, oa, FORMAT)
    tb = _weighed(tb, x0, x1, x2, x3, x_sum, cb, sb, ob, FORMAT)
    return ta, tb


@triton.jit
def _pairs(
    ta, tb, x, column, inside, ca0, ca1, ca2, ca3, sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3, cb0, cb1, cb2, cb3, sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3,
    FORMAT: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """:func:`_pair` for all weights of a word of packed bytes: V to a byte, STEP columns apart."""
    ta, tb = _pair(ta, tb, x, column, inside, ca0, sa0, oa0, cb0, sb0, ob0, FORMAT)
    if V > 1:
        ta, tb = _pair(ta, tb, x, column + STEP, inside, ca1, sa1, oa1, cb1, sb1, ob1, FORMAT)
    if V > 2:
        ta, tb = _pair(ta, tb, x, column + 2 * STEP, inside, ca2, sa2, oa2, cb2, sb2, ob2, FORMAT)
        ta, tb = _pair(ta, tb, x, column + 3 * STEP, inside, ca3, sa3, oa3, cb3, sb3, ob3, FORMAT)
    return ta, tb


@triton.jit
def _finish(ta, tb, m, n, bias, y, n_rows, n_out, HAS_BIAS: tl.constexpr):
    a = tl.sum(ta, axis=0)
    b = tl.sum(tb, axis=0)
    if HAS_BIAS:
        a += tl.load(bias + n).to(tl.float32)
        b += tl.load(bias + tl.minimum(n + 1, n_out - 1)).to(tl.float32)
    y += m * n_out + n
    tl.store(y, a.to(y.dtype.element_ty), mask=m < n_rows)
    tl.store(y + 1, b.to(y.dtype.element_ty), mask=(m < n_rows) & (n + 1 < n_out))


@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["x", "raw"])
def _gemv_kernel(
    x, raw, bias, y, n_rows, n_out, width, row_bytes, units,
    FORMAT: tl.constexpr, SIZE: tl.constexpr, V: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, WIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, M: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n] for two rows of W; T units of WORDS words, UNROLL times, per step. Alignment of x and raw
    is not used, so that every load has the layout of the tiles."""
    n = tl.program_id(0) * 2
    wa = raw + n.to(tl.int64) * row_bytes
    wb = raw + tl.minimum(n + 1, n_out - 1).to(tl.int64) * row_bytes
    x1 = x + tl.minimum(1, n_rows - 1) * width
    x2 = x + tl.minimum(2, n_rows - 1) * width
    x3 = x + tl.minimum(3, n_rows - 1) * width
    a0 = tl.zeros((T,), tl.float32)
    b0 = a0
    a1 = a0
    b1 = a0
    a2 = a0
    b2 = a0
    a3 = a0
    b3 = a0
    for start in tl.range(0, units, T * UNROLL, num_stages=1):
        for i in tl.static_range(UNROLL):
            unit = start + i * T + tl.arange(0, T)
            inside = unit < units
            unit = tl.minimum(unit, units - 1)  # its bytes then meet zeros
            row = unit * WORDS // 4  # of sixteen bytes, counted through all blocks of a row of W
            block = (row // ROWS) * SIZE
            r = row % ROWS
            sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3 = _scales(wa + block, r, FORMAT)
            sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3 = _scales(wb + block, r, FORMAT)
            for j in tl.static_range(WORDS):
                if WORDS == 4:
                    at = 4 * j
                else:
                    at = (unit % 4) * 4
                ca0, ca1, ca2, ca3 = _codes(wa + block, r, at, FORMAT, WIDE)
                cb0, cb1, cb2, cb3 = _codes(wb + block, r, at, FORMAT, WIDE)
                column = (row // G) * (16 * G * V) + (row % G) * 16 + at
                a0, b0 = _pairs(a0, b0, x, column, inside, ca0, ca1, ca2, ca3, sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3,
                                cb0, cb1, cb2, cb3, sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3, FORMAT, V, 16 * G)  # fmt: skip
                if M > 1:
                    a1, b1 = _pairs(a1, b1, x1, column, inside, ca0, ca1, ca2, ca3, sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3,
                                    cb0, cb1, cb2, cb3, sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3, FORMAT, V, 16 * G)  # fmt: skip
                if M > 2:
                    a2, b2 = _pairs(a2, b2, x2, column, inside, ca0, ca1, ca2, ca3, sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3,
                                    cb0, cb1, cb2, cb3, sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3, FORMAT, V, 16 * G)  # fmt: skip
                    a3, b3 = _pairs(a3, b3, x3, column, inside, ca0, ca1, ca2, ca3, sa0, oa0, sa1, oa1, sa2, oa2, sa3, oa3,
                                    cb0, cb1, cb2, cb3, sb0, ob0, sb1, ob1, sb2, ob2, sb3, ob3, FORMAT, V, 16 * G)  # fmt: skip
    _finish(a0, b0, 0, n, bias, y, n_rows, n_out, HAS_BIAS)
    if M > 1:
        _finish(a1, b1, 1, n, bias, y, n_rows, n_out, HAS_BIAS)
    if M > 2:
        _finish(a2, b2, 2, n, bias, y, n_rows, n_out, HAS_BIAS)
        _finish(a3, b3, 3, n, bias, y, n_rows, n_out, HAS_BIAS)


_gemv = Launcher(_gemv_kernel, enable_fp_fusion=True)


def tile_of(fmt_name, width):
    """(units of a step per thread and row of W, warps) of a program."""
    words = _words(fmt_name)
    units, unroll = width // (4 * words * LANES[fmt_name].per_byte), UNROLL[words]
    return unroll, min(MOST_WARPS, power_of_2(cdiv(units, 32 * unroll)))


def _words(fmt_name):
    """32-bit words of packed bytes per unit."""
    return 4 if FORMATS[fmt_name].block_size == 256 else 1


def launch(x, raw, fmt_name, bias, y, tile=None):
    """The kernel call behind :func:`gemv`: x [M, K] contiguous, y [M, N] of x's dtype, given and returned.

    tile: as of :func:`tile_of`, open for measuring
    """
    (n_rows, width), n_out = x.shape, y.shape[1]
    if x.data_ptr() % 8:  # x is read in 8 bytes
        x = x.clone()
    constants = constants_of(fmt_name, width, raw.data_ptr() % 4 == 0, bias is not None, n_rows, tile)
    units = width // (4 * _words(fmt_name) * LANES[fmt_name].per_byte)
    args = (x, raw, y if bias is None else bias, y, n_rows, n_out, width, FORMATS[fmt_name].row_bytes(width), units)
    _gemv((cdiv(n_out, 2), 1, 1), args, constants, constants[-2] // 32)
    return y


@lru_cache(maxsize=1024)
def constants_of(fmt_name, width, aligned, has_bias, n_rows, tile=None):
    """The kernel's constants. aligned: the packed bytes start at a multiple of four."""
    lanes, fmt = LANES[fmt_name], FORMATS[fmt_name]
    unroll, warps = tile or tile_of(fmt_name, width)
    wide = aligned and fmt.type_size % 4 == 0
    return (
        fmt_name, fmt.type_size, lanes.per_byte, lanes.group, lanes.rows, _words(fmt_name), wide, has_bias, power_of_2(n_rows), 32 * warps, unroll,
    )  # fmt: skip


@torch.library.custom_op("ltx2_gguf::gemv", mutates_args=())
def _gemv_op(x: torch.Tensor, raw: torch.Tensor, fmt_name: str, bias: torch.Tensor | None, n_out: int) -> torch.Tensor:
    return launch(x, raw, fmt_name, bias, x.new_empty((x.shape[0], n_out)))


@_gemv_op.register_fake
def _(x, raw, fmt_name, bias, n_out):
    return x.new_empty((x.shape[0], n_out))


def gemv(x, raw, fmt_name, out_features, in_features, bias=None):
    """x [..., in_features], at most :data:`MOST_ROWS` rows, times the packed matrix [out_features, in_features], plus bias.

    Returns [..., out_features] in x's dtype (float32, float16 or bfloat16). The same inputs give the same bits on every call.
    """
    rows = x.reshape(-1, in_features).contiguous()
    if is_plain(rows, raw, bias):
        y = launch(
            rows, raw, fmt_name, bias, torch.empty((rows.shape[0], out_features), dtype=x.dtype, device=x.device)
        )
    else:
        y = torch.ops.ltx2_gguf.gemv(rows, raw, fmt_name, bias, out_features)
    return y.view(*x.shape[:-1], out_features)
