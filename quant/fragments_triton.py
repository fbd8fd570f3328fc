"""Triton kernel of the product with up to sixteen rows of x on tensor cores, straight from Q4_0 blocks: y = x W^T + b.

Every tensor here has one element per thread, so the code reads as what one thread does, and MMA operands are built in registers from the
words a thread loads: nothing decoded passes through shared memory. A warp owns 256 columns of W (a *strip*: 8 blocks, 144 bytes,
36 words) and keeps x's values for it in registers, in the order in which the codes come. The warps of a program share the input width,
and programs run through W, sixteen rows of it at a time; one sum over warps per step adds the parts in a fixed order, so results do not
vary from run to run.

Four neighbouring threads (a quad) read a row of W, sixteen bytes at a time. Two blocks are nine words, s a scale and h two bytes of codes:

    word     0     1     2     3     4     5     6     7     8     (of pair p; the quad's thread p mod 4 has words 0, 4 and 8)
    holds   s h   h h   h h   h h   h s   h h   h h   h h   h h

so each thread of a quad has as many codes of each block as the others, which is what an MMA with one scale per row and block needs.

Codes are not converted to numbers one by one. OR-ed into the mantissa of 128.0 (bfloat16) or 1024.0 (float16) a code q *is* the number
128 + q, and one logical instruction does that for two weights. What that exceeds the weight by meets x once per program. The block's
scale is applied to the sum over the block in float32: no weight is rounded.

Importing this module imports triton.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .formats import FORMATS
from .launch import Launcher, cdiv, power_of_2

#: Whether MMA and shuffles are written as PTX. Elsewhere the same is said in Triton's own operations, for tests.
PTX = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)

#: Columns, and bytes, of a strip.
STRIP, STRIP_BYTES = 256, 144
#: Most warps of a program, each with a strip.
MOST_WARPS = 16
#: The bit pattern, twice, of the number whose mantissa takes the codes, and what a code's number exceeds the weight by.
MAGIC = {torch.bfloat16: (0x43004300, 136.0), torch.float16: (0x64006400, 1032.0)}


@triton.jit
def _numbers(word, dtype: tl.constexpr, T: tl.constexpr):
    """The two numbers in a word, as float32 [T/32, 8, 4, 2]."""
    first = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    second = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(first, second), (T // 32, 8, 4, 2))


@triton.jit
def _sum_of_products(a, b, c0, c1, c2, c3, T: tl.constexpr):
    """c + a b for a [T/32, 16, k] and b [T/32, k, 8], with c as :func:`_mma` has it in threads."""
    W: tl.constexpr = T // 32
    c = tl.join(tl.join(c0, c1), tl.join(c2, c3))  # thread, column's lowest bit, row's highest
    c = tl.reshape(tl.permute(tl.reshape(c, (W, 8, 4, 2, 2)), (0, 4, 1, 2, 3)), (W, 16, 8))
    c += tl.dot(a, b, input_precision="ieee")
    c = tl.reshape(tl.permute(tl.reshape(c, (W, 2, 8, 4, 2)), (0, 2, 3, 4, 1)), (T, 2, 2))
    upper, lower = tl.split(c)
    c0, c1 = tl.split(upper)
    c2, c3 = tl.split(lower)
    return c0, c1, c2, c3


@triton.jit
def _mma_in_triton(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr, T: tl.constexpr):
    """The MMA of :func:`_mma` in Triton's own operations."""
    W: tl.constexpr = T // 32
    a = tl.join(
        tl.join(_numbers(a0, dtype, T), _numbers(a2, dtype, T)), tl.join(_numbers(a1, dtype, T), _numbers(a3, dtype, T))
    )  # warp, g, t, k's lowest bit, k's highest, row's highest
    a = tl.reshape(tl.permute(a, (0, 5, 1, 4, 2, 3)), (W, 16, 16))
    b = tl.join(_numbers(b0, dtype, T), _numbers(b1, dtype, T))
    b = tl.reshape(tl.permute(b, (0, 4, 2, 3, 1)), (W, 16, 8))
    return _sum_of_products(a, b, c0, c1, c2, c3, T)


@triton.jit
def _mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr, T: tl.constexpr):
    """Per warp c [16, 8] + a [16, 16] b [16, 8]. g, t = thread / 4, thread % 4: a's rows are g, g + 8, b's column g, c's 2 t, 2 t + 1."""
    if PTX:
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
    else:
        return _mma_in_triton(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype, T)


@triton.jit
def _of_quad(value, thread, t, T: tl.constexpr):
    """The value that a quad's given thread has, for all four."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;", "=r,r,r", [value, thread], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        own = tl.reshape(tl.where(t == thread, value, 0), (T // 4, 4))
        return tl.reshape(tl.broadcast_to(tl.sum(own, axis=1)[:, None], (T // 4, 4)), (T,))


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
def _scale_mma_in_triton(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, T: tl.constexpr):
    """The MMA of :func:`_scale_mma` in Triton's own operations."""
    W: tl.constexpr = T // 32
    a = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (W, 8, 4, 2, 2))
    a = tl.reshape(tl.permute(a, (0, 4, 1, 3, 2)), (W, 16, 8))
    b = tl.reshape(tl.permute(tl.reshape(tl.join(b0, b1), (W, 8, 4, 2)), (0, 3, 2, 1)), (W, 8, 8))
    c = _sum_of_products(a, b, c0, c1, c2, c3, T)
    return c


@triton.jit
def _scale_mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, T: tl.constexpr):
    """Per warp c [16, 8] + a [16, 8] b [8, 8] of float32 with eleven significant bits, as TF32 has; threads and rows as in :func:`_mma`."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return _scale_mma_in_triton(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, T)


@triton.jit
def _eleven_bits(value):
    return (value.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _sums_of_strip(x, inside, excess, t, T: tl.constexpr):
    """-excess times the sums of x over blocks 2 t and 2 t + 1 of a strip, each in three parts that add up to it. x as in _x_of_strip."""
    values = ()
    for b in tl.static_range(2):
        columns = (x + (64 * t + 32 * b))[:, None] + tl.arange(0, 32)[None, :]
        total = tl.sum(tl.load(columns, mask=inside[:, None], other=0.0).to(tl.float32), axis=1) * -excess
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
def _bias(bias, step, inside, g, n_out, HAS_BIAS: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """bias of rows g and g + 8 of a step's tiles for threads ``inside``, 0 for the others."""
    values = ()
    for h in tl.static_range(2 * R):
        n = step * (16 * R) + 8 * h + g
        if HAS_BIAS:
            values = values + (tl.load(bias + n, mask=inside & (n < n_out), other=0.0),)
        else:
            values = values + (tl.zeros((T,), tl.float32),)
    return values


@triton.jit
def _four_words(row, t):
    """The quad's t-th sixteen bytes, at a pointer to the first of them."""
    at = row + 4 * t
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v4.b32 {$0,$1,$2,$3}, [$4];",
            "=r,=r,=r,=r,l",
            [at.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _exchange(a, b, t, D: tl.constexpr, T: tl.constexpr):
    """Transpose the matrix that two threads D apart have two words of each."""
    upper = (t & D) != 0
    send = tl.where(upper, a, b)
    if PTX:
        got = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 0x1c1f, 0xffffffff;",
            "=r,r,r",
            [send, tl.full((T,), D, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        v = tl.reshape(send, (T // (2 * D), 2, D))
        got = tl.reshape(tl.sum(v, axis=1)[:, None, :] - v, (T,))
    return tl.where(upper, got, a), tl.where(upper, b, got)


@triton.jit
def _transposed(w0, w1, w2, w3, t, T: tl.constexpr):
    """Four words of the t-th sixteen bytes -> the t-th words of four times sixteen bytes."""
    w0, w1 = _exchange(w0, w1, t, 1, T)
    w2, w3 = _exchange(w2, w3, t, 1, T)
    w0, w2 = _exchange(w0, w2, t, 2, T)
    w1, w3 = _exchange(w1, w3, t, 2, T)
    return w0, w1, w2, w3


@triton.jit
def _words(rows, t, FIRST: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Words FIRST to LAST - 1 of the strip's nine that this thread loads, of both rows in turn. WIDE: four at a time, for :func:`_own`."""
    values = ()
    if WIDE and FIRST < 8:
        for c in tl.static_range(FIRST, LAST, 4):
            d0, d1, d2, d3 = _four_words(rows[0] + 4 * c, t)
            e0, e1, e2, e3 = _four_words(rows[1] + 4 * c, t)
            values = values + (d0, e0, d1, e1, d2, e2, d3, e3)
    else:
        for c in tl.static_range(FIRST, LAST):
            values = values + (tl.load(rows[0] + (4 * c + t)), tl.load(rows[1] + (4 * c + t)))
    return values


@triton.jit
def _own(w, t, WIDE: tl.constexpr, T: tl.constexpr):
    """Loaded words -> for c up to 8 the t-th word of the c-th sixteen bytes, of both rows in turn."""
    if WIDE:
        d0, d1, d2, d3 = _transposed(w[0], w[2], w[4], w[6], t, T)
        e0, e1, e2, e3 = _transposed(w[1], w[3], w[5], w[7], t, T)
        d4, d5, d6, d7 = _transposed(w[8], w[10], w[12], w[14], t, T)
        e4, e5, e6, e7 = _transposed(w[9], w[11], w[13], w[15], t, T)
        return d0, e0, d1, e1, d2, e2, d3, e3, d4, e4, d5, e5, d6, e6, d7, e7, w[16], w[17]
    else:
        return w


@triton.jit
def _pair(w0, w1, w2, p: tl.constexpr, t, T: tl.constexpr):
    """Codes of block 2 p and of block 2 p + 1, the two scales of both, and these as they are packed in thread p of the quad."""
    first = t == p
    low = tl.where(t >= p, w0, w1)
    high = tl.where(t >= p, w1, w2)
    packed = (low & 0xFFFF) | (high & -65536)
    d0, d1 = _two_halfs(_of_quad(packed, tl.full((T,), p, tl.int32), t, T))
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
        p0, p1, p2, p3 = _mma(a0, a1, a2, a3, xs[32 * m + 4 * B], xs[32 * m + 4 * B + 1], zero, zero, zero, zero, dtype, T)
        p0, p1, p2, p3 = _mma(a4, a5, a6, a7, xs[32 * m + 4 * B + 2], xs[32 * m + 4 * B + 3], p0, p1, p2, p3, dtype, T)
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
            c0, c1, c2, c3 = _scale_mma(a0, a1, a2, a3, sums[6 * m + i], sums[6 * m + 3 + i], c0, c1, c2, c3, T)
        new = new + (c0, c1, c2, c3)
    return new


@triton.jit
def _prefetch(address, nbytes, where):
    """Have the L2 cache read nbytes, a multiple of 16, at addresses that are one as well, for threads ``where``. Compute capability 9.0."""
    if PTX:
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [address.to(tl.int64), nbytes, where.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _prefetch_tile(words, tile, nbytes, n_out, row_words, T: tl.constexpr):
    """Prefetch nbytes of each row of a tile, with the first thread of sixteen groups."""
    thread = tl.arange(0, T)
    row = tl.minimum(tile * 16 + thread // (T // 16), n_out - 1)
    _prefetch(words + row.to(tl.int64) * row_words, tl.zeros((T,), tl.int32) + nbytes, thread % (T // 16) == 0)


@triton.jit
def _of_tile(w, rows, total, xs, sums, magic, t, dtype: tl.constexpr, MT: tl.constexpr, WIDE: tl.constexpr, T: tl.constexpr):
    """total + the strip's part of the product with a tile, and the words of the next one at ``rows``, loaded as registers become free."""
    own_d = tl.zeros((T,), tl.int32)
    own_e = own_d
    new = ()
    w = _own(w, t, WIDE, T)
    if WIDE:
        new = _words(rows, t, 0, 8, True)
    for p in tl.static_range(4):
        a0, a1, d0, d1, packed = _pair(w[4 * p], w[4 * p + 2], w[4 * p + 4], p, t, T)
        own_d = tl.where(t == p, packed, own_d)
        b0, b1, e0, e1, packed = _pair(w[4 * p + 1], w[4 * p + 3], w[4 * p + 5], p, t, T)
        own_e = tl.where(t == p, packed, own_e)
        if not WIDE:
            new = new + _words(rows, t, 2 * p, 2 * p + 2, False)
        total = _add_block(total, a0, b0, d0, e0, xs, 2 * p, magic, dtype, MT, T)
        total = _add_block(total, a1, b1, d1, e1, xs, 2 * p + 1, magic, dtype, MT, T)
    return _add_sums(total, own_d, own_e, sums, MT, T), new + _words(rows, t, 8, 9, False)


@triton.jit
def _joined(total, Q: tl.constexpr):
    """Four values per thread, Q times -> [T, 2, 2, Q]."""
    c = tl.join(tl.join(total[0], total[1]), tl.join(total[2], total[3]))
    if Q == 2:
        c = tl.join(c, tl.join(tl.join(total[4], total[5]), tl.join(total[6], total[7])))
    return c


@triton.jit(do_not_specialize=["n_rows", "strips", "steps"])
def _fragments_kernel(
    x, raw, bias, y, n_rows, n_out, width, row_words, strips, steps, magic, excess, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    WIDE: tl.constexpr, AHEAD: tl.constexpr, R: tl.constexpr, MT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """y[m, n] = sum_k x[m, k] W[n, k] + bias[n] in steps of R tiles of 16 rows of W; PARTS: y float32 [parts, m, n], one per W strips."""
    tl.static_assert(R * MT <= 2)
    T: tl.constexpr = 32 * W
    Q: tl.constexpr = R * MT
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
    if AHEAD == 2:
        part = raw.to(tl.pointer_type(tl.int32)) + tl.program_id(1) * (W * 36)
        nbytes = tl.minimum(strips - tl.program_id(1) * W, W) * 144
        for r in tl.static_range(R):
            _prefetch_tile(part, first * R + r, nbytes, n_out, row_words, T)
            _prefetch_tile(part, (first + stride) * R + r, nbytes, n_out, row_words, T)
    w = ()
    for r in tl.static_range(R):
        w = w + _words(_rows(words, first * R + r, g, n_out, row_words), t, 0, 8, WIDE)
        w = w + _words(_rows(words, first * R + r, g, n_out, row_words), t, 8, 9, False)
    if AHEAD == 1:
        later = ()
        for r in tl.static_range(R):
            later = later + _words(_rows(words, (first + stride) * R + r, g, n_out, row_words), t, 0, 8, WIDE)
            later = later + _words(_rows(words, (first + stride) * R + r, g, n_out, row_words), t, 8, 9, False)
    xs = ()
    sums = ()
    for m in tl.static_range(MT):
        row = x + (tl.minimum(g + 8 * m, n_rows - 1) * width + strip * 256)
        xs = xs + _x_of_strip(row, inside, t)
        sums = sums + _sums_of_strip(row, inside, excess, t, T)
    if PARTS:
        y += tl.program_id(1).to(tl.int64) * n_rows * n_out
    adds = inside & (thread + tl.program_id(1) * T < 32)  # the first strip's
    now = _bias(bias, first, adds, g, n_out, HAS_BIAS, R, T)
    soon = _bias(bias, first + stride, adds, g, n_out, HAS_BIAS, R, T)
    for step in tl.range(first, steps, stride, num_stages=1):
        i = tl.arange(0, 128 * Q)
        q = i % Q
        j = i // Q
        n = (step * R + q // MT) * 16 + (j // 16 + 8 * (j % 2))
        column = 8 * (q % MT) + 2 * ((j // 4) % 4) + (j // 2) % 2
        if AHEAD == 1:
            next_step = step + 2 * stride
        else:
            next_step = step + stride
        if AHEAD == 2:
            if step + 2 * stride < steps:
                for r in tl.static_range(R):
                    _prefetch_tile(part, (step + 2 * stride) * R + r, nbytes, n_out, row_words, T)
        total = ()
        next_w = ()
        for r in tl.static_range(R):
            rows = _rows(words, next_step * R + r, g, n_out, row_words)
            upper = now[2 * r].to(tl.float32)
            lower = now[2 * r + 1].to(tl.float32)
            start = (upper, upper, lower, lower)
            if MT == 2:
                start = start + start
            if R == 1:
                of_tile, of_next = _of_tile(w, rows, start, xs, sums, magic, t, dtype, MT, WIDE, T)
            else:
                of_tile, of_next = _of_tile(w[18 * r : 18 * r + 18], rows, start, xs, sums, magic, t, dtype, MT, WIDE, T)
            total = total + of_tile
            next_w = next_w + of_next
        now = soon
        soon = _bias(bias, step + 2 * stride, adds, g, n_out, HAS_BIAS, R, T)
        if AHEAD == 1:
            w = later
            later = next_w
        else:
            w = next_w
        c = tl.sum(tl.reshape(_joined(total, Q), (W, 128 * Q)), axis=0)
        tl.store(y + column * n_out + n, c.to(y.dtype.element_ty), mask=(column < n_rows) & (n < n_out))


_fragments = Launcher(_fragments_kernel, enable_fp_fusion=True)


@lru_cache(maxsize=None)
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def takes(x, raw, fmt_name):
    """Whether the kernel can read x and raw: whole strips, x in 4 bytes, raw in 16."""
    return fmt_name == "Q4_0" and x.shape[1] % STRIP == 0 and x.data_ptr() % 4 == 0 and raw.data_ptr() % 16 == 0


def launch(x, raw, fmt_name, bias, y, tile):
    """x [M, K] contiguous float16 or bfloat16, raw uint8 [N, row_bytes] -> y [M, N], given and returned; see :func:`takes`. M at most 16.

    tile: (tiles of 16 output columns per step, 1 to load sixteen bytes per thread else 0, 1 to load two steps ahead or 2 to prefetch
    them into the L2 cache else 0, most warps)
    """
    n_rows, width = x.shape
    n_out, strips = y.shape[1], width // STRIP
    r, wide, ahead, warps = tile
    warps = min(warps, power_of_2(strips))
    parts, tall = cdiv(strips, warps), 2 if n_rows > 8 else 1
    steps = cdiv(n_out, 16 * r)
    programs = max(1, _multiprocessors(x.device) * (MOST_WARPS // warps) // parts)
    magic, excess = MAGIC[x.dtype]
    out = y if parts == 1 else torch.empty((parts, n_rows, n_out), dtype=torch.float32, device=x.device)
    args = (x, raw, y if bias is None else bias, out, n_rows, n_out, width, width // STRIP * 36, strips, steps, magic, excess)
    _fragments((min(steps, programs), parts, 1), args, (bias is not None, parts > 1, bool(wide), ahead, r, tall, warps), warps)
    if parts > 1:
        from .kernels_triton import _add_parts

        _add_parts((cdiv(n_out, 1024), n_rows, 1), (out, y, y, n_rows, n_out), (parts, False, 1024))
    return y
