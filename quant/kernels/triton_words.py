"""Triton kernel of the product with one to four rows of x without tensor cores: y = x W^T + b straight from Q4_0 and Q8_0 blocks.

A thread owns a 32-bit word of packed bytes in each of N rows of W at a time, and neighbouring threads own neighbouring words. All tiles
have the same shape and layout, so between the loads and the sum at the end nothing moves between threads: no shared memory, no barrier.
Words are read as 16-bit halves, because blocks of these formats start at even addresses and seldom at better ones.

A code becomes a number in one instruction after a shift: moved to the upper mantissa bits of 16.0 or 256.0 it *is* the number 16 + q or
256 + q in float32. What that exceeds the weight by is the same for all rows of W, so it meets x once per program. Weights are
not rounded. Results do not vary from run to run, and nothing is allocated.

Importing this module imports triton.
"""

import triton
import triton.language as tl

from ..formats import FORMATS
from .triton_launch import Launcher, cdiv, power_of_2

#: Words of packed bytes per block.
WORDS = {"Q4_0": 4, "Q8_0": 8}
#: Bit patterns of 256 (of 384 = 256 + 128 for signed bytes) and of 16, which take the codes. They are arguments of the kernel, because an
#: instruction has room for one constant, and that is the mask.
MAGIC = {"Q4_0": (0x43800000, 0x41800000), "Q8_0": (0x43C00000, 0)}
#: Most rows of x.
MOST_ROWS = 4


@triton.jit
def _four(x, inside, dtype: tl.constexpr, EVEN: tl.constexpr):
    """Four neighbouring values of x at addresses of 64-bit words, as float32."""
    if EVEN:
        v = tl.load(x)
    else:
        v = tl.load(x, mask=inside, other=0)
    low = v.to(tl.int32)
    high = (v >> 32).to(tl.int32)
    x0 = low.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x1 = (low >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x2 = high.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    x3 = (high >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _number(bits, mask: tl.constexpr, magic):
    return ((bits & mask) ^ magic).to(tl.float32, bitcast=True)


@triton.jit
def _product(x, inside, w0, w1, w2, w3, w4, w5, w6, w7, FORMAT: tl.constexpr, dtype: tl.constexpr, EVEN: tl.constexpr):
    """A word's weights [T, N], in units of the scale and with their excess, times x at [T, 1] -> their sum without the excess."""
    x0, x1, x2, x3 = _four(x, inside, dtype, EVEN)
    if FORMAT == "Q8_0":
        p = -384.0 * ((x0 + x1) + (x2 + x3))
    else:
        x4, x5, x6, x7 = _four(x + 4, inside, dtype, EVEN)
        p = -264.0 * ((x0 + x1) + (x2 + x3)) - 24.0 * ((x4 + x5) + (x6 + x7))
    p = w0 * x0 + p
    p = w1 * x1 + p
    p = w2 * x2 + p
    p = w3 * x3 + p
    if FORMAT != "Q8_0":
        p = w4 * x4 + p
        p = w5 * x5 + p
        p = w6 * x6 + p
        p = w7 * x7 + p
    return p


@triton.jit
def _finish(total, m, n, bias, y, n_rows, n_out, HAS_BIAS: tl.constexpr):
    result = tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(y + m * n_out + n, result.to(y.dtype.element_ty), mask=(n < n_out) & (m < n_rows))


@triton.jit(do_not_specialize=["n_rows"])
def _words_kernel(
    x, raw, bias, y, n_rows, n_out, width, row_bytes, words, magic, upper_magic,
    FORMAT: tl.constexpr, SIZE: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    N: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n], N columns per program; T words, UNROLL times, per step; EVEN: whole steps only."""
    dtype = x.dtype.element_ty
    n = tl.program_id(0) * N + tl.arange(0, N)
    i = tl.arange(0, T)[:, None]
    rows = raw + (tl.minimum(n, n_out - 1).to(tl.int64) * row_bytes)[None, :]
    scale = rows + (i // W) * SIZE  # [T, N]
    packed = scale + 2 + 4 * (i % W)
    xw = x.to(tl.pointer_type(tl.int64)) + ((i // W) * 8 + i % W)  # [T, 1], four values each
    stride = width // 4
    total0 = tl.zeros((T, N), tl.float32)
    total1 = total0
    total2 = total0
    total3 = total0
    for start in tl.range(0, words, T * UNROLL, num_stages=1):
        for u in tl.static_range(UNROLL):
            half = (packed + u * (T // W * SIZE)).to(tl.pointer_type(tl.uint16))
            address = (scale + u * (T // W * SIZE)).to(tl.pointer_type(tl.float16))
            inside = start + u * T + i < words
            if EVEN:
                low = tl.load(half).to(tl.int32)
                high = tl.load(half + 1).to(tl.int32)
                d = tl.load(address).to(tl.float32)
            else:
                low = tl.load(half, mask=inside, other=0).to(tl.int32)
                high = tl.load(half + 1, mask=inside, other=0).to(tl.int32)
                d = tl.load(address, mask=inside, other=0.0).to(tl.float32)
            if FORMAT == "Q8_0":  # 256 + (q + 128): flipping the top bit adds 128
                w0 = _number(low << 15, 0x007F8000, magic)
                w1 = _number(low << 7, 0x007F8000, magic)
                w2 = _number(high << 15, 0x007F8000, magic)
                w3 = _number(high << 7, 0x007F8000, magic)
                w4 = w0
                w5 = w0
                w6 = w0
                w7 = w0
            else:  # lower nibbles: 256 + q, upper ones: 16 + q
                w0 = _number(low << 15, 0x00078000, magic)
                w4 = _number(low << 15, 0x00780000, upper_magic)
                w1 = _number(low << 7, 0x00078000, magic)
                w5 = _number(low << 7, 0x00780000, upper_magic)
                w2 = _number(high << 15, 0x00078000, magic)
                w6 = _number(high << 15, 0x00780000, upper_magic)
                w3 = _number(high << 7, 0x00078000, magic)
                w7 = _number(high << 7, 0x00780000, upper_magic)
            xu = xw + u * (T // W * 8)
            total0 += d * _product(xu, inside, w0, w1, w2, w3, w4, w5, w6, w7, FORMAT, dtype, EVEN)
            if M > 1:
                total1 += d * _product(xu + tl.minimum(1, n_rows - 1) * stride, inside, w0, w1, w2, w3, w4, w5, w6, w7, FORMAT, dtype, EVEN)
            if M > 2:
                total2 += d * _product(xu + tl.minimum(2, n_rows - 1) * stride, inside, w0, w1, w2, w3, w4, w5, w6, w7, FORMAT, dtype, EVEN)
                total3 += d * _product(xu + tl.minimum(3, n_rows - 1) * stride, inside, w0, w1, w2, w3, w4, w5, w6, w7, FORMAT, dtype, EVEN)
        scale += UNROLL * (T // W * SIZE)
        packed += UNROLL * (T // W * SIZE)
        xw += UNROLL * (T // W * 8)
    _finish(total0, 0, n, bias, y, n_rows, n_out, HAS_BIAS)
    if M > 1:
        _finish(total1, 1, n, bias, y, n_rows, n_out, HAS_BIAS)
    if M > 2:
        _finish(total2, 2, n, bias, y, n_rows, n_out, HAS_BIAS)
        _finish(total3, 3, n, bias, y, n_rows, n_out, HAS_BIAS)


_words = Launcher(_words_kernel, enable_fp_fusion=True)


def takes(x, raw):
    """Whether x and raw start at addresses that the kernel's loads can take: x is read in 8 bytes, raw in 2."""
    return x.data_ptr() % 8 == 0 and raw.data_ptr() % 2 == 0


def launch(x, raw, fmt_name, bias, y, tile):
    """x [M, K] contiguous float16 or bfloat16, raw uint8 [N, row_bytes] -> y [M, N], given and returned. M at most ``MOST_ROWS``.

    tile: (output columns, words per thread and column in a step, warps) of a program
    """
    fmt, per_block = FORMATS[fmt_name], WORDS[fmt_name]
    n_rows, width = x.shape
    n_out = y.shape[1]
    n, unroll, warps = tile
    words, step = width // fmt.block_size * per_block, 32 * warps
    constants = (fmt_name, fmt.type_size, per_block, bias is not None, words % (step * unroll) == 0, n, step, unroll, power_of_2(n_rows))
    args = (x, raw, y if bias is None else bias, y, n_rows, n_out, width, fmt.row_bytes(width), words, *MAGIC[fmt_name])
    _words((cdiv(n_out, n), 1, 1), args, constants, warps)
    return y
