"""Triton kernel of the product with up to sixteen rows of x on tensor cores, straight from Q4_0 blocks: y = x W^T + b.

Every tensor here has one element per thread, so the code reads as what one thread does, and MMA operands are built in registers from the
words a thread loads: nothing decoded passes through shared memory. A warp owns 256 columns of W (a *strip*: 8 blocks, 144 bytes,
36 words), keeps x's values for it in registers, in the order in which the codes come, and runs through W by itself, sixteen rows of it
(a *tile*) at a time. After every few tiles the warps of a program, which share the input width, add their parts in a fixed order, so
results do not vary from run to run.

Four neighbouring threads (a quad) read a row of W, sixteen bytes at a time. Two blocks are nine words, s a scale and h two bytes of codes:

    word     0     1     2     3     4     5     6     7     8     (of pair p; the quad's thread p mod 4 has words 0, 4 and 8)
    holds   s h   h h   h h   h h   h s   h h   h h   h h   h h

so each thread of a quad has as many codes of each block as the others, which is what an MMA with one scale per row and block needs.

Codes are not converted to numbers one by one. OR-ed into the mantissa of 128.0 (bfloat16) or 1024.0 (float16) a code q *is* the number
128 + q, and one logical instruction does that for two weights. What that exceeds the weight by meets x once per program. The block's
scale is applied to the sum over the block in float32: no weight is rounded.

Runs on NVIDIA GPUs, and in Triton's interpreter for tests; see :func:`takes`. Importing this module imports triton.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_launch import Launcher, cdiv, version
from .triton_split import add_parts
from .triton_warp import PTX, butterfly, four_words, mma, of_quad, sum_over_warps, sum_text, transposed

#: Columns of a strip.
STRIP = 256
#: Most rows of x.
MOST_ROWS = 16
#: Compiled and checked with this version of Triton and newer ones; with older ones the former kernels are taken.
OLDEST_TRITON = (3, 6)
#: The bit pattern, twice, of the number whose mantissa takes the codes, and what a code's number exceeds the weight by.
MAGIC = {torch.bfloat16: (0x43004300, 136.0), torch.float16: (0x64006400, 1032.0)}


@triton.jit
def _middle(low, high, first):
    """The upper half of low and the lower half of high where ``first``, else low."""
    if PTX:
        order = tl.where(first, 0x5432, 0x3210)
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, order], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.where(first, ((low >> 16) & 0xFFFF) | (high << 16), low)


@triton.jit
def _codes(word, magic):
    """Eight codes -> four pairs of numbers: of the lower nibbles of bytes 0, 2, the upper ones of these, and the same of bytes 1, 3."""
    pairs = 0x000F000F
    return (word & pairs) ^ magic, ((word >> 4) & pairs) ^ magic, ((word >> 8) & pairs) ^ magic, ((word >> 12) & pairs) ^ magic


@triton.jit
def _x_of(at, inside):
    """x for a word of codes, whose halves start at columns that ``at`` holds pointers to -> four words, in the order of :func:`_codes`."""
    first, second = at
    pair = tl.pointer_type(tl.int32)
    l0 = tl.load(first.to(pair), mask=inside, other=0)
    l1 = tl.load(second.to(pair), mask=inside, other=0)
    u0 = tl.load((first + 16).to(pair), mask=inside, other=0)
    u1 = tl.load((second + 16).to(pair), mask=inside, other=0)
    return (
        (l0 & 0xFFFF) | (l1 << 16),
        (u0 & 0xFFFF) | (u1 << 16),
        ((l0 >> 16) & 0xFFFF) | (l1 & -65536),
        ((u0 >> 16) & 0xFFFF) | (u1 & -65536),
    )


@triton.jit
def _x_of_strip(x, inside, t):
    """x at pointers to a strip's first column, one per thread -> 4 words for each of its 8 blocks."""
    values = ()
    for p in tl.static_range(4):
        role = (t - p) & 3
        first = role == 0
        half = tl.where(first, 0, 2 * role - 1)
        block = x + 64 * p
        values = values + _x_of((block + 2 * half, block + 2 * tl.where(first, 7, 2 * role)), inside)
        half = tl.where(first, 6, 2 * role - 2)
        values = values + _x_of((block + 32 + 2 * half, block + 34 + 2 * half), inside)
    return values


@triton.jit
def _eleven_bits(value):
    return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _add_pair(total, word, dtype: tl.constexpr):
    first = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    second = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return total + (first + second)


@triton.jit
def _sums_of_strip(xs, inside, excess, t, M: tl.constexpr, dtype: tl.constexpr, T: tl.constexpr):
    """-excess times the sums of x over blocks 2 t and 2 t + 1 of a strip, each in three parts that add up to it. xs: of _x_of_strip."""
    values = ()
    for b in tl.static_range(2):
        total = tl.zeros((T,), tl.float32)
        for p in tl.static_range(4):
            block = tl.zeros((T,), tl.float32)
            for i in tl.static_range(4):
                block = _add_pair(block, xs[32 * M + 8 * p + 4 * b + i], dtype)
            block += butterfly(block, 1, T)
            block += butterfly(block, 2, T)
            total = tl.where(t == p, block, total)
        total *= -excess
        upper = _eleven_bits(total)
        middle = _eleven_bits(total - upper)
        values = values + (upper, middle, total - upper - middle)
    return values


@triton.jit
def _rows(raw, tile, g, n_out, row_words):
    """Pointers to a strip in rows g and g + 8 of a tile."""
    n = tl.minimum(tile * 16 + g, n_out - 1)
    e = tl.minimum(tile * 16 + 8 + g, n_out - 1)
    return raw + n.to(tl.int64) * row_words, raw + e.to(tl.int64) * row_words


@triton.jit
def _words(rows, t):
    """Words of a strip, of both rows in turn: twice the quad's t-th sixteen bytes, then the t-th word of what is left."""
    values = ()
    for c in tl.static_range(0, 8, 4):
        d0, d1, d2, d3 = four_words(rows[0] + 4 * c, t)
        e0, e1, e2, e3 = four_words(rows[1] + 4 * c, t)
        values = values + (d0, e0, d1, e1, d2, e2, d3, e3)
    return values + (tl.load(rows[0] + (32 + t)), tl.load(rows[1] + (32 + t)))


@triton.jit
def _own(w, t, T: tl.constexpr):
    """Loaded words -> for c up to 8 the t-th word of the c-th sixteen bytes, of both rows in turn."""
    d0, d1, d2, d3 = transposed(w[0], w[2], w[4], w[6], t, T)
    e0, e1, e2, e3 = transposed(w[1], w[3], w[5], w[7], t, T)
    d4, d5, d6, d7 = transposed(w[8], w[10], w[12], w[14], t, T)
    e4, e5, e6, e7 = transposed(w[9], w[11], w[13], w[15], t, T)
    return d0, e0, d1, e1, d2, e2, d3, e3, d4, e4, d5, e5, d6, e6, d7, e7, w[16], w[17]


@triton.jit
def _pair(w0, w1, w2, p: tl.constexpr, t, T: tl.constexpr):
    """Codes of block 2 p and of block 2 p + 1, the two scales of both, and these as they are packed in thread p of the quad."""
    first = t == p
    low = tl.where(t >= p, w0, w1)
    high = tl.where(t >= p, w1, w2)
    packed = (low & 0xFFFF) | (high & -65536)
    d0, d1 = _two_halfs(of_quad(packed, tl.full((T,), p, tl.int32), t, T))
    return _middle(low, high, first), tl.where(first, w2, high), d0, d1, packed


@triton.jit
def _two_halfs(word):
    """The two float16 in a word, as float32."""
    first = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    second = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _add_block(total, low, high, d, e, xs, B: tl.constexpr, magic, dtype: tl.constexpr, MT: tl.constexpr, T: tl.constexpr):
    """total + d * (codes of block B in the rows g) * x, and the same for the rows g + 8 with e."""
    a0, a2, a4, a6 = _codes(low, magic)
    a1, a3, a5, a7 = _codes(high, magic)
    zero = tl.zeros((T,), tl.float32)
    new = ()
    for m in tl.static_range(MT):
        p0, p1, p2, p3 = mma(a0, a1, a2, a3, xs[32 * m + 4 * B], xs[32 * m + 4 * B + 1], zero, zero, zero, zero, dtype, T)
        p0, p1, p2, p3 = mma(a4, a5, a6, a7, xs[32 * m + 4 * B + 2], xs[32 * m + 4 * B + 3], p0, p1, p2, p3, dtype, T)
        new = new + (total[4 * m] + d * p0, total[4 * m + 1] + d * p1, total[4 * m + 2] + e * p2, total[4 * m + 3] + e * p3)
    return new


@triton.jit
def _add_sums(total, own_d, own_e, sums, MT: tl.constexpr, T: tl.constexpr):
    """total + scales times sums: what the codes' numbers exceed the weights by, over the strip."""
    a0, a2 = _two_halfs(own_d)
    a1, a3 = _two_halfs(own_e)
    new = ()
    for m in tl.static_range(MT):
        c0, c1, c2, c3 = total[4 * m], total[4 * m + 1], total[4 * m + 2], total[4 * m + 3]
        for i in tl.static_range(3):
            c0, c1, c2, c3 = mma(a0, a1, a2, a3, sums[6 * m + i], sums[6 * m + 3 + i], c0, c1, c2, c3, tl.float32, T)
        new = new + (c0, c1, c2, c3)
    return new


@triton.jit
def _of_tile(w, total, xs, sums, magic, t, dtype: tl.constexpr, MT: tl.constexpr, T: tl.constexpr):
    """total + the strip's part of the product with a tile whose words are given."""
    own_d = tl.zeros((T,), tl.int32)
    own_e = own_d
    for p in tl.static_range(4):
        a0, a1, d0, d1, packed = _pair(w[4 * p], w[4 * p + 2], w[4 * p + 4], p, t, T)
        own_d = tl.where(t == p, packed, own_d)
        b0, b1, e0, e1, packed = _pair(w[4 * p + 1], w[4 * p + 3], w[4 * p + 5], p, t, T)
        own_e = tl.where(t == p, packed, own_e)
        total = _add_block(total, a0, b0, d0, e0, xs, 2 * p, magic, dtype, MT, T)
        total = _add_block(total, a1, b1, d1, e1, xs, 2 * p + 1, magic, dtype, MT, T)
    return _add_sums(total, own_d, own_e, sums, MT, T)


@triton.jit(do_not_specialize=["n_rows", "strips", "steps"])
def _fragments_kernel(
    x, raw, bias, y, n_rows, n_out, width, row_words, strips, steps, magic, excess, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    S: tl.constexpr, MT: tl.constexpr, W: tl.constexpr, AHEAD: tl.constexpr, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n] in steps of S tiles of 16 rows of W, for up to 8 MT rows of x.

    W: warps; AHEAD: tiles whose words are loaded before they are needed, 1 or 2; PARTS: y is float32 [parts, m, n], one part per W strips.
    """
    T: tl.constexpr = 32 * W
    V: tl.constexpr = 4 * MT * S
    tl.static_assert(V <= W)
    dtype = x.dtype.element_ty
    thread = tl.arange(0, T)
    t = thread % 4
    g = (thread // 4) % 8
    strip = tl.program_id(1) * W + thread // 32
    inside = strip < strips
    strip = tl.minimum(strip, strips - 1)
    words = raw.to(tl.pointer_type(tl.int32)) + strip * 36
    first = tl.program_id(0)
    stride = tl.num_programs(0)
    w = _words(_rows(words, first, g, n_out, row_words), t)
    after = w
    if AHEAD == 2:
        after = _words(_rows(words, first + stride, g, n_out, row_words), t)
    xs = ()
    for m in tl.static_range(MT):
        xs = xs + _x_of_strip(x + (tl.minimum(g + 8 * m, n_rows - 1) * width + strip * 256), inside, t)
    sums = ()
    for m in tl.static_range(MT):
        sums = sums + _sums_of_strip(xs, inside, excess, t, m, dtype, T)
    if PARTS:
        y += tl.program_id(1).to(tl.int64) * n_rows * n_out
    # What this thread stores: value v of the step's, in tile v / (4 MT), as mma has c.
    v = thread // 32
    column = 8 * ((v // 4) % MT) + 2 * t + v % 2
    row = g + 8 * ((v // 2) % 2)
    zero = tl.zeros((T,), tl.float32)
    for step in tl.range(0, steps, num_stages=1):
        tile = first + step * S * stride
        n = (tile + v // (4 * MT) * stride) * 16 + row
        stored = (v < V) & (column < n_rows) & (n < n_out)
        if HAS_BIAS:
            b = tl.load(bias + n, mask=stored & (tl.program_id(1) == 0), other=0.0).to(tl.float32)
        total = ()
        for s in tl.static_range(S):
            rows = _rows(words, tile + (s + AHEAD) * stride, g, n_out, row_words)
            start = (zero, zero, zero, zero)
            if MT == 2:
                start = start + start
            own = _own(w, t, T)
            if AHEAD == 2:
                w = after
                after = _words(rows, t)
            else:
                w = _words(rows, t)
            total = total + _of_tile(own, start, xs, sums, magic, t, dtype, MT, T)
        c = sum_over_warps(total, thread, TEXT, CONSTRAINTS, V, T)
        if HAS_BIAS:
            c += b
        tl.store(y + column * n_out + n, c.to(y.dtype.element_ty), mask=stored)


_fragments = Launcher(_fragments_kernel, enable_fp_fusion=True)


@lru_cache(maxsize=None)
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache(maxsize=None)
def runs_on(device):
    """Whether a device has the instructions, NVIDIA GPUs of compute capability 8.0 and newer (MMA on bfloat16 and TF32), and Triton is one that is known
    to compile the kernel."""
    return bool(PTX.value) and version() >= OLDEST_TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def takes(x, raw):
    """Whether the kernel runs where x is and can read x and raw: whole strips, x in 4 bytes, raw in 16."""
    return runs_on(x.device) and x.shape[1] % STRIP == 0 and x.data_ptr() % 4 == 0 and raw.data_ptr() % 16 == 0


def launch(x, raw, bias, y, tile):
    """x [M, K] contiguous float16 or bfloat16, raw uint8 [N, row_bytes] -> y [M, N], given and returned. M at most ``MOST_ROWS``.

    :func:`takes` says what it takes. tile: (most tiles of 16 output columns between sums over warps, warps: 8 or 16, how many tiles
    ahead words are loaded: 1 or 2) of a program
    """
    n_rows, width = x.shape
    n_out, strips = y.shape[1], width // STRIP
    most, warps, ahead = tile
    tiles, parts = cdiv(n_out, 16), cdiv(strips, warps)
    tall = cdiv(n_rows, 8)
    resident = 2 if warps * tall == 8 else 1  # programs per multiprocessor
    programs = min(tiles, max(1, _multiprocessors(x.device) * resident // parts))
    each = min(most, warps // (4 * tall))
    steps = cdiv(tiles, programs * each)
    magic, excess = MAGIC[x.dtype]
    out = y if parts == 1 else torch.empty((parts, n_rows, n_out), dtype=torch.float32, device=x.device)
    args = (x, raw, y if bias is None else bias, out, n_rows, n_out, width, strips * 36, strips, steps, magic, excess)
    constants = (bias is not None, parts > 1, each, tall, warps, ahead, *sum_text(4 * tall * each, warps))
    _fragments((programs, parts, 1), args, constants, warps)
    return y if parts == 1 else add_parts(out, None, y)
