"""Triton kernel of the skinny product: y = x W^T + b for at most sixteen rows of x, straight from GGML blocks.

A program owns N output columns and runs through the input width, B *units* at a time. A unit is W words of four packed bytes whose
scales are the same for all lower and for all upper nibbles. Bytes are read as 32-bit words where the block size is a multiple of
four, as 16-bit halves elsewhere, neighbouring threads reading neighbours. A byte of Q8_0 counts as two nibbles that meet the same x.

Codes are not converted to numbers one by one. OR-ed into the mantissa of 128.0 (bfloat16) or 1024.0 (float16) a code q *is* the
number 128 + q, and one logical instruction does that for two weights. These numbers meet x on the tensor cores, exactly, unit by
unit; the constant part is taken off by a product of x with a constant matrix, and the unit's scale is applied to the sum in float32.
So no weight is rounded at all, which is nearer to the file than dequantise-then-matmul. Weights stay in the order that masking the words
gives, and x is permuted instead: it is a thousand times smaller.

Units of a step belong to different warps (a batched product), so the input width is split within the program; one sum at the end
adds the parts in a fixed order, and results do not vary from run to run. Nothing is allocated.

Importing this module imports triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from .triton_launch import Launcher, cdiv, power_of_2


@dataclass(frozen=True)
class Unit:
    """Geometry of a format as this kernel sees it.

    words: 32-bit words of packed bytes per unit; rows: units per block; first: byte offset of the block's first unit
    per_byte: weights per byte; group: units between a byte's first and second weight
    """

    words: int
    rows: int
    first: int
    per_byte: int = 2
    group: int = 1

    @property
    def weights(self) -> int:
        return 4 * self.words * self.per_byte


UNITS = {
    "Q4_0": Unit(4, 1, 2),
    "Q5_1": Unit(4, 1, 8),
    "Q8_0": Unit(8, 1, 2, per_byte=1),
    "Q4_K": Unit(8, 4, 16),
    "Q5_K": Unit(8, 4, 48),
    "Q6_K": Unit(4, 8, 0, group=4),
}

#: The bit pattern, twice, of the number whose mantissa takes the codes.
MAGIC = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}


@triton.jit
def _load(address, inside, EVEN: tl.constexpr):
    """What lies at an address; 0 outside. EVEN: there is no outside."""
    if EVEN:
        return tl.load(address)
    else:
        return tl.load(address, mask=inside, other=0)


@triton.jit
def _read(address, inside, W: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr):
    """The 32-bit words at addresses [B, N, W]: themselves, twice, where they lie at multiples of four (WIDE), else their 16-bit halves.

    ORDER: let neighbouring threads read along W. Triton takes that from a statement that the elements are contiguous. It is true of words
    in a row. For halves it is not, and does no harm only at addresses that are not known to be multiples of four: those loads
    stay 16 bits wide. At multiples of four two halves that are not neighbours would be read as one word.
    """
    pointer = tl.pointer_type(tl.int32 if WIDE else tl.uint16)
    address = address.to(pointer)
    if ORDER:
        address = tl.max_contiguous(address, [1, 1, W])
    low = _load(address, inside, EVEN)
    high = low
    if not WIDE:
        high = _load(address + 1, inside, EVEN)
    return low, high


@triton.jit
def _join(low, high, WIDE: tl.constexpr):
    if WIDE:
        return low
    else:
        return low.to(tl.int32) | (high.to(tl.int32) << 16)


@triton.jit
def _word(address, inside, W: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ORDER: tl.constexpr):
    low, high = _read(address, inside, W, EVEN, WIDE, ORDER)
    return _join(low, high, WIDE)


@triton.jit
def _half(address, inside, EVEN: tl.constexpr):
    """The float16 at an address, as float32; 0 outside."""
    return _load(address.to(tl.pointer_type(tl.float16)), inside, EVEN).to(tl.float32)


@triton.jit
def _byte(address, inside, EVEN: tl.constexpr):
    """The uint8 at an address, as int32; 0 outside."""
    return _load(address, inside, EVEN).to(tl.int32)


@triton.jit
def _k_scale_min(scales, i, inside, EVEN: tl.constexpr):
    """The i-th of eight 6-bit (scale, minimum) pairs of Q4_K and Q5_K; see ``kernels.triton_decode._k_scale_min``."""
    j = i % 4
    s = _byte(scales + j, inside, EVEN)
    m = _byte(scales + 4 + j, inside, EVEN)
    both = _byte(scales + 8 + j, inside, EVEN)
    scale = tl.where(i >= 4, (both & 15) | ((s >> 2) & 48), s & 63)
    minimum = tl.where(i >= 4, (both >> 4) | ((m >> 2) & 48), m & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _operand(even, odd, dtype: tl.constexpr, B: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Words [B, N, W] that hold two numbers each, of bytes 0 and 2, and of bytes 1 and 3 -> [B, N, 4 W], bytes in order 0 2 1 3."""
    words = tl.join(even, odd)
    first = words.to(tl.int16).to(dtype, bitcast=True)
    second = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(first, second), (B, N, 4 * W))


@triton.jit
def _constant(value: tl.constexpr, dtype: tl.constexpr, B: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """A constant operand [B, N, 4 W], built like the others so that it gets their layout."""
    half = tl.full((B, N, 2 * W), value, tl.float32).to(dtype)
    return tl.reshape(tl.join(half, half), (B, N, 4 * W))


@triton.jit
def _columns(address, inside, B: tl.constexpr, M: tl.constexpr, W: tl.constexpr, EVEN: tl.constexpr):
    """x at addresses [B, M, 4 W] -> [B, 4 W, M], in the order of :func:`_operand`."""
    value = _load(address, inside, EVEN)
    return tl.reshape(tl.permute(tl.reshape(value, (B, M, W, 2, 2)), (0, 2, 4, 3, 1)), (B, 4 * W, M))


@triton.jit
def _fifth_of_word(bits):
    """Bits 0-3 belong to bytes 0-3 -> bytes 0, 2 at bits 0, 16 and bytes 1, 3 at bits 1, 17."""
    return (bits & 15) | (bits << 14)


@triton.jit(do_not_specialize=["n_rows"])
def _skinny_kernel(
    x, raw, bias, y, n_rows, n_out, width, row_bytes, units, magic,
    FORMAT: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, V: tl.constexpr, G: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
    N: tl.constexpr, B: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n], N columns per program, up to M rows; EVEN: whole steps only; WIDE: words lie at fours."""
    tl.static_assert(B % R == 0)
    ORDER: tl.constexpr = WIDE or SIZE % 4 != 0
    dtype = x.dtype.element_ty
    BASE: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    n = tl.program_id(0) * N + tl.arange(0, N)
    w_row = tl.minimum(n, n_out - 1).to(tl.int64) * row_bytes
    m = tl.minimum(tl.arange(0, M), n_rows - 1)
    u2 = tl.arange(0, B)[:, None]
    u3 = tl.arange(0, B)[:, None, None]
    word = tl.arange(0, W)[None, None, :]
    rows = raw + w_row[None, :, None]
    packed = rows + ((u3 // R) * SIZE + FIRST + (u3 % R) * (4 * W) + 4 * word)  # [B, N, W]
    block = raw + w_row[None, :] + (u2 // R) * SIZE  # [B, N]
    columns = x + (m * width)[None, :, None] + ((u3 // G) * (4 * W * V * G) + (u3 % G) * (4 * W) + tl.arange(0, 4 * W)[None, None, :])

    # What a code's number exceeds the weight by, in units of the scale; formats with a minimum fold it into that.
    CENTRE: tl.constexpr = 8 if FORMAT == "Q4_0" or FORMAT == "Q8_0" else (32 if FORMAT == "Q6_K" else 0)
    EXCESS: tl.constexpr = BASE + CENTRE
    HAS_MIN: tl.constexpr = FORMAT == "Q5_1" or FORMAT == "Q4_K" or FORMAT == "Q5_K"
    constant = _constant(1.0 if HAS_MIN else -EXCESS, dtype, B, N, W)
    if FORMAT == "Q8_0":
        lower = _constant(-BASE, dtype, B, N, W)
    pairs = 0x000F000F
    total = tl.zeros((B, N, M), tl.float32)
    if AHEAD:
        low, high = _read(packed, u3 < units, W, EVEN, WIDE, ORDER)
    for start in tl.range(0, units, B, num_stages=1):
        in2 = start + u2 < units
        in3 = start + u3 < units
        if AHEAD:
            v = _join(low, high, WIDE)
            low, high = _read(packed + (B // R) * SIZE, start + B + u3 < units, W, False, WIDE, ORDER)
        else:
            v = _word(packed, in3, W, EVEN, WIDE, ORDER)
        a = (v & pairs) ^ magic
        b = ((v >> 8) & pairs) ^ magic
        if FORMAT == "Q8_0":  # two's complement: the upper nibble's top bit flipped, it is 8 more
            c = ((v >> 4) & pairs) ^ (magic ^ 0x00080008)
            e = ((v >> 12) & pairs) ^ (magic ^ 0x00080008)
        else:
            c = ((v >> 4) & pairs) ^ magic
            e = ((v >> 12) & pairs) ^ magic
        if FORMAT == "Q5_1":
            fifth = _word(rows + (u3 * SIZE + (FIRST - 4) + word * 0), in3, W, EVEN, WIDE, SIZE % 4 != 0)
            f = _fifth_of_word(fifth >> (4 * word))
            g = _fifth_of_word(fifth >> (4 * word + 16))
            a |= (f << 4) & 0x00100010
            b |= (f << 3) & 0x00100010
            c |= (g << 4) & 0x00100010
            e |= (g << 3) & 0x00100010
        if FORMAT == "Q5_K":
            f = _word(rows + ((u3 // 4) * SIZE + 16 + 4 * word), in3, W, EVEN, WIDE, ORDER) >> ((u3 % 4) * 2)
            a |= (f << 4) & 0x00100010
            b |= (f >> 4) & 0x00100010
            c |= (f << 3) & 0x00100010
            e |= (f >> 5) & 0x00100010
        if FORMAT == "Q6_K":
            upper = rows + ((u3 // 8) * SIZE + 128 + ((u3 % 8) // 4) * 32 + (u3 % 2) * 16 + 4 * word)
            f = _word(upper, in3, W, EVEN, WIDE, ORDER) >> (((u3 % 4) // 2) * 2)
            a |= (f << 4) & 0x00300030
            b |= (f >> 4) & 0x00300030
            c |= f & 0x00300030
            e |= (f >> 8) & 0x00300030
        w0 = _operand(a, b, dtype, B, N, W)
        w1 = _operand(c, e, dtype, B, N, W)
        x0 = _columns(columns, in3, B, M, W, EVEN)
        if FORMAT == "Q8_0":
            d = _half(block, in2, EVEN)[:, :, None]
            p0 = tl.dot(w0, x0, tl.dot(lower, x0))
            p1 = tl.dot(w1, x0, tl.dot(constant, x0))
            total += d * (p0 + 16.0 * p1)
        else:
            x1 = _columns(columns + 4 * W * G, in3, B, M, W, EVEN)
            if FORMAT == "Q4_0":
                d = _half(block, in2, EVEN)[:, :, None]
                p = tl.dot(constant, x0)
                p = tl.dot(constant, x1, p)
                p = tl.dot(w0, x0, p)
                p = tl.dot(w1, x1, p)
                total += d * p
            elif FORMAT == "Q5_1":
                d = _half(block, in2, EVEN)
                least = _half(block + 2, in2, EVEN) - d * BASE
                total += d[:, :, None] * tl.dot(w1, x1, tl.dot(w0, x0))
                total += least[:, :, None] * tl.dot(constant, x1, tl.dot(constant, x0))
            elif FORMAT == "Q6_K":
                d = _half(block + 208, in2, EVEN)
                scales = block + (192 + ((u2 % 8) // 4) * 8 + u2 % 4)
                s0 = ((_byte(scales, in2, EVEN) << 24) >> 24).to(tl.float32) * d
                s1 = ((_byte(scales + 4, in2, EVEN) << 24) >> 24).to(tl.float32) * d
                total += s0[:, :, None] * tl.dot(w0, x0, tl.dot(constant, x0))
                total += s1[:, :, None] * tl.dot(w1, x1, tl.dot(constant, x1))
            else:
                tl.static_assert(FORMAT == "Q4_K" or FORMAT == "Q5_K", "format without a skinny product")
                d = _half(block, in2, EVEN)
                dmin = _half(block + 2, in2, EVEN)
                s0, m0 = _k_scale_min(block + 4, (u2 % 4) * 2, in2, EVEN)
                s1, m1 = _k_scale_min(block + 4, (u2 % 4) * 2 + 1, in2, EVEN)
                s0 *= d
                s1 *= d
                m0 = -dmin * m0 - s0 * BASE
                m1 = -dmin * m1 - s1 * BASE
                total += s0[:, :, None] * tl.dot(w0, x0)
                total += m0[:, :, None] * tl.dot(constant, x0)
                total += s1[:, :, None] * tl.dot(w1, x1)
                total += m1[:, :, None] * tl.dot(constant, x1)
        packed += (B // R) * SIZE
        rows += (B // R) * SIZE
        block += (B // R) * SIZE
        columns += B * 4 * W * V
    result = tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    m = tl.arange(0, M)
    tl.store(y + m[None, :] * n_out + n[:, None], result.to(y.dtype.element_ty), mask=(m[None, :] < n_rows) & (n[:, None] < n_out))


_skinny = Launcher(_skinny_kernel, enable_fp_fusion=True)


def launch(x, raw, fmt_name, bias, y, tile):
    """x [M, K] contiguous float16 or bfloat16, raw uint8 [N, row_bytes] -> y [M, N], given and returned.

    tile: (output columns, units, 1 to load a step's bytes before the step before it is computed else 0, warps) of a program
    """
    unit, fmt = UNITS[fmt_name], FORMATS[fmt_name]
    n_rows, width = x.shape
    n_out = y.shape[1]
    n, b, ahead, warps = tile
    units = width // unit.weights
    constants = (fmt_name, fmt.type_size, unit.words, unit.rows, unit.first, unit.per_byte, unit.group)
    wide = fmt.type_size % 4 == 0 and raw.data_ptr() % 4 == 0
    constants += (bias is not None, units % b == 0, wide, bool(ahead), n, b, max(8, power_of_2(n_rows)))
    args = (x, raw, y if bias is None else bias, y, n_rows, n_out, width, fmt.row_bytes(width), units, MAGIC[x.dtype])
    _skinny((cdiv(n_out, n), 1, 1), args, constants, warps)
    return y
