"""Decode GGML blocks inside a Triton kernel: one function per format, shared by every kernel that reads quantised bytes.

A block is cut into *rows* of sixteen bytes ("lanes"), because sixteen consecutive bytes of every format share their scales.
A lane holds V weights of the block: one (Q8_0), two nibbles or four crumbs. For row r of a tensor (counted from its first byte
through all blocks) and lane l, weight v lands at column

    (r // G) * (16 * G * V)  +  (r % G) * 16  +  v * 16 * G  +  l

where G is the number of rows whose bytes lie between a byte's first and second weight (``Lanes`` holds V, G and rows per block).
Each decoder gets ``raw`` (pointer to uint8, or a tensor of such pointers), ``row`` and ``lane`` in shapes that broadcast together,
e.g. ``[R, 1]`` and ``[1, 16]``, and returns four float32 tensors, of which the first V are used. Scales are computed once per row,
in the shape of ``row``. Fields are read at two-byte alignment at best: block sizes are even, but seldom more.

Every product d * q is exact in float32 (11 bits of float16 times at most 13 bits of integers), so only the final add or subtract of
a minimum rounds, and the result equals gguf-py bit for bit whether or not the compiler contracts it to a fused multiply-add.

Importing this module imports triton. Source of the layouts: ggml ``src/ggml-common.h``, ``src/ggml-quants.c``; same as ``decode.py``.
"""

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Lanes:
    """Geometry of a format as the kernels see it: V weights per byte, G rows per group, rows per block."""

    per_byte: int
    group: int
    rows: int


LANES = {
    "Q4_0": Lanes(2, 1, 1),
    "Q4_1": Lanes(2, 1, 1),
    "Q5_0": Lanes(2, 1, 1),
    "Q5_1": Lanes(2, 1, 1),
    "Q8_0": Lanes(1, 1, 2),
    "Q2_K": Lanes(4, 2, 4),
    "Q3_K": Lanes(4, 2, 4),
    "Q4_K": Lanes(2, 2, 8),
    "Q5_K": Lanes(2, 2, 8),
    "Q6_K": Lanes(2, 4, 8),
    "IQ4_NL": Lanes(2, 1, 1),
    "IQ4_XS": Lanes(2, 1, 8),
}


@triton.jit
def _half(address):
    """The float16 stored at an address, as float32."""
    return tl.load(address.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _byte(address):
    """The uint8 stored at an address, as int32."""
    return tl.load(address).to(tl.int32)


@triton.jit
def _word(address):
    """The little-endian 32-bit word at an even address."""
    half = address.to(tl.pointer_type(tl.uint16))
    return tl.load(half).to(tl.int32) | (tl.load(half + 1).to(tl.int32) << 16)


@triton.jit
def _q4_0(raw, row, lane):
    """d, 16 x qs: d * (q - 8)."""
    block = raw + row * 18
    d = _half(block)
    q = _byte(block + 2 + lane)
    low = d * ((q & 15) - 8).to(tl.float32)
    high = d * ((q >> 4) - 8).to(tl.float32)
    return low, high, low, high


@triton.jit
def _q4_1(raw, row, lane):
    """d, m, 16 x qs: d * q + m."""
    block = raw + row * 20
    d = _half(block)
    m = _half(block + 2)
    q = _byte(block + 4 + lane)
    low = d * (q & 15).to(tl.float32) + m
    high = d * (q >> 4).to(tl.float32) + m
    return low, high, low, high


@triton.jit
def _q5_0(raw, row, lane):
    """d, 4 x qh, 16 x qs: d * (q - 16), the fifth bit of weight i in bit i of qh."""
    block = raw + row * 22
    d = _half(block)
    fifth = _word(block + 2) >> lane  # bit 0: low nibble's, bit 16: high nibble's
    q = _byte(block + 6 + lane)
    low = d * (((q & 15) | ((fifth << 4) & 16)) - 16).to(tl.float32)
    high = d * (((q >> 4) | ((fifth >> 12) & 16)) - 16).to(tl.float32)
    return low, high, low, high


@triton.jit
def _q5_1(raw, row, lane):
    """d, m, 4 x qh, 16 x qs: d * q + m."""
    block = raw + row * 24
    d = _half(block)
    m = _half(block + 2)
    fifth = _word(block + 4) >> lane
    q = _byte(block + 8 + lane)
    low = d * ((q & 15) | ((fifth << 4) & 16)).to(tl.float32) + m
    high = d * ((q >> 4) | ((fifth >> 12) & 16)).to(tl.float32) + m
    return low, high, low, high


@triton.jit
def _q8_0(raw, row, lane):
    """d, 32 x int8: d * q."""
    block = raw + (row // 2) * 34
    d = _half(block)
    q = tl.load((block + 2 + (row % 2) * 16 + lane).to(tl.pointer_type(tl.int8)))
    w = d * q.to(tl.float32)
    return w, w, w, w


@triton.jit
def _q2_k(raw, row, lane):
    """16 x (4-bit scale, 4-bit minimum), 64 x qs, d, dmin: d * scale * q - dmin * minimum per 16 weights."""
    block = raw + (row // 4) * 84
    r = row % 4
    q = _byte(block + 16 + r * 16 + lane)
    d = _half(block + 80)
    dmin = _half(block + 82)
    scales = block + (r // 2) * 8 + r % 2
    s0 = _byte(scales)
    s1 = _byte(scales + 2)
    s2 = _byte(scales + 4)
    s3 = _byte(scales + 6)
    w0 = d * (s0 & 15).to(tl.float32) * (q & 3).to(tl.float32) - dmin * (s0 >> 4).to(tl.float32)
    w1 = d * (s1 & 15).to(tl.float32) * ((q >> 2) & 3).to(tl.float32) - dmin * (s1 >> 4).to(tl.float32)
    w2 = d * (s2 & 15).to(tl.float32) * ((q >> 4) & 3).to(tl.float32) - dmin * (s2 >> 4).to(tl.float32)
    w3 = d * (s3 & 15).to(tl.float32) * (q >> 6).to(tl.float32) - dmin * (s3 >> 4).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _q3_k_scale(scales, i):
    """The i-th of sixteen 6-bit scales, minus 32: low nibbles in bytes 0-7, high pairs of bits in bytes 8-11."""
    low = _byte(scales + i % 8) >> ((i // 8) * 4)
    high = _byte(scales + 8 + i % 4) >> ((i // 4) * 2)
    return (((low & 15) | ((high & 3) << 4)) - 32).to(tl.float32)


@triton.jit
def _q3_k(raw, row, lane):
    """32 x hmask, 64 x qs, 12 x scales, d: d * (scale - 32) * (q - 4), the third bit of q in hmask."""
    block = raw + (row // 4) * 110
    r = row % 4
    q = _byte(block + 32 + r * 16 + lane)
    third = _byte(block + (r % 2) * 16 + lane) >> ((r // 2) * 4)
    d = _half(block + 108)
    i = (r // 2) * 8 + r % 2
    w0 = d * _q3_k_scale(block + 96, i) * (((q & 3) | ((third << 2) & 4)) - 4).to(tl.float32)
    w1 = d * _q3_k_scale(block + 96, i + 2) * ((((q >> 2) & 3) | ((third << 1) & 4)) - 4).to(tl.float32)
    w2 = d * _q3_k_scale(block + 96, i + 4) * ((((q >> 4) & 3) | (third & 4)) - 4).to(tl.float32)
    w3 = d * _q3_k_scale(block + 96, i + 6) * (((q >> 6) | ((third >> 1) & 4)) - 4).to(tl.float32)
    return w0, w1, w2, w3


@triton.jit
def _k_scale_min(scales, i):
    """The i-th of eight 6-bit (scale, minimum) pairs of Q4_K and Q5_K; pairs 4-7 keep their upper bits in bytes 0-7."""
    j = i % 4
    s = _byte(scales + j)
    m = _byte(scales + 4 + j)
    both = _byte(scales + 8 + j)
    upper = i >= 4
    scale = tl.where(upper, (both & 15) | ((s >> 2) & 48), s & 63)
    minimum = tl.where(upper, (both >> 4) | ((m >> 2) & 48), m & 63)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _q4_k(raw, row, lane):
    """d, dmin, 12 x scales, 128 x qs: d * scale * q - dmin * minimum per 32 weights."""
    block = raw + (row // 8) * 144
    r = row % 8
    d = _half(block)
    dmin = _half(block + 2)
    s0, m0 = _k_scale_min(block + 4, (r // 2) * 2)
    s1, m1 = _k_scale_min(block + 4, (r // 2) * 2 + 1)
    q = _byte(block + 16 + r * 16 + lane)
    low = (d * s0) * (q & 15).to(tl.float32) - dmin * m0
    high = (d * s1) * (q >> 4).to(tl.float32) - dmin * m1
    return low, high, low, high


@triton.jit
def _q5_k(raw, row, lane):
    """d, dmin, 12 x scales, 32 x qh, 128 x qs: as Q4_K, the fifth bit of sub-block i in bit i of qh."""
    block = raw + (row // 8) * 176
    r = row % 8
    d = _half(block)
    dmin = _half(block + 2)
    s0, m0 = _k_scale_min(block + 4, (r // 2) * 2)
    s1, m1 = _k_scale_min(block + 4, (r // 2) * 2 + 1)
    fifth = _byte(block + 16 + (r % 2) * 16 + lane) >> ((r // 2) * 2)
    q = _byte(block + 48 + r * 16 + lane)
    low = (d * s0) * ((q & 15) | ((fifth << 4) & 16)).to(tl.float32) - dmin * m0
    high = (d * s1) * ((q >> 4) | ((fifth << 3) & 16)).to(tl.float32) - dmin * m1
    return low, high, low, high


@triton.jit
def _q6_k(raw, row, lane):
    """128 x ql, 64 x qh, 16 x int8 scale, d: d * scale * (q - 32) per 16 weights, two upper bits of q in qh."""
    block = raw + (row // 8) * 210
    r = row % 8
    d = _half(block + 208)
    scales = (block + 192 + (r // 4) * 8 + r % 4).to(tl.pointer_type(tl.int8))
    s0 = tl.load(scales).to(tl.float32)
    s1 = tl.load(scales + 4).to(tl.float32)
    q = _byte(block + r * 16 + lane)
    upper = _byte(block + 128 + (r // 4) * 32 + (r % 2) * 16 + lane) >> (((r % 4) // 2) * 2)
    low = (d * s0) * (((q & 15) | ((upper << 4) & 48)) - 32).to(tl.float32)
    high = (d * s1) * (((q >> 4) | (upper & 48)) - 32).to(tl.float32)
    return low, high, low, high


@triton.jit
def _iq4_level(q):
    """The q-th of the sixteen IQ4 levels (0 to 15), as float32.

    The levels are a polynomial of fourth degree rounded to whole numbers (this one misses them by 0.44 at most), which takes a third
    of the instructions of a look-up in registers. Adding 1.5 * 2^23 rounds: the sum keeps no fraction bits.
    """
    q = q.to(tl.float32)
    value = tl.fma(q, 0.00144801848, 0.03627324849)
    value = tl.fma(q, value, -1.43856370449)
    value = tl.fma(q, value, 24.50059890747)
    return tl.fma(q, value, 12582912.0 - 127.0) - 12582912.0


@triton.jit
def _iq4_nl(raw, row, lane):
    """d, 16 x qs: d * level[q]."""
    block = raw + row * 18
    d = _half(block)
    q = _byte(block + 2 + lane)
    low = d * _iq4_level(q & 15)
    high = d * _iq4_level(q >> 4)
    return low, high, low, high


@triton.jit
def _iq4_xs(raw, row, lane):
    """d, 16 bits scales_h, 4 x scales_l, 128 x qs: d * (scale - 32) * level[q] per 32 weights."""
    block = raw + (row // 8) * 136
    r = row % 8
    d = _half(block)
    upper = _byte(block + 2 + r // 4) >> ((r % 4) * 2)
    lower = _byte(block + 4 + r // 2) >> ((r % 2) * 4)
    d = d * (((lower & 15) | ((upper & 3) << 4)) - 32).to(tl.float32)
    q = _byte(block + 8 + r * 16 + lane)
    low = d * _iq4_level(q & 15)
    high = d * _iq4_level(q >> 4)
    return low, high, low, high


@triton.jit
def decode(raw, row, lane, FORMAT: tl.constexpr):
    """Weights of the given rows and lanes in float32: four tensors, the first V of them meaningful."""
    if FORMAT == "Q4_0":
        w0, w1, w2, w3 = _q4_0(raw, row, lane)
    elif FORMAT == "Q4_1":
        w0, w1, w2, w3 = _q4_1(raw, row, lane)
    elif FORMAT == "Q5_0":
        w0, w1, w2, w3 = _q5_0(raw, row, lane)
    elif FORMAT == "Q5_1":
        w0, w1, w2, w3 = _q5_1(raw, row, lane)
    elif FORMAT == "Q8_0":
        w0, w1, w2, w3 = _q8_0(raw, row, lane)
    elif FORMAT == "Q2_K":
        w0, w1, w2, w3 = _q2_k(raw, row, lane)
    elif FORMAT == "Q3_K":
        w0, w1, w2, w3 = _q3_k(raw, row, lane)
    elif FORMAT == "Q4_K":
        w0, w1, w2, w3 = _q4_k(raw, row, lane)
    elif FORMAT == "Q5_K":
        w0, w1, w2, w3 = _q5_k(raw, row, lane)
    elif FORMAT == "Q6_K":
        w0, w1, w2, w3 = _q6_k(raw, row, lane)
    elif FORMAT == "IQ4_NL":
        w0, w1, w2, w3 = _iq4_nl(raw, row, lane)
    else:
        tl.static_assert(FORMAT == "IQ4_XS", "format without a Triton decoder")
        w0, w1, w2, w3 = _iq4_xs(raw, row, lane)
    return w0, w1, w2, w3
