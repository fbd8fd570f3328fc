"""What the threads of a warp do together, for Triton kernels that say what one thread does: MMA, shuffles, wide loads, sums over warps.

Every tensor has T elements, one per thread of the program. On NVIDIA GPUs these are PTX instructions; elsewhere, and in Triton's
interpreter, the same is said in Triton's own operations, for tests. Importing this module imports triton.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "shfl.sync".
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

#: Whether MMA and shuffles are written as PTX. Elsewhere the same is said in Triton's own operations, for tests.
PTX = tl.constexpr(torch.version.cuda is not None and os.environ.get("TRITON_INTERPRET") != "1")
_OPERANDS = " {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
MMA_BFLOAT16 = tl.constexpr("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" + _OPERANDS)
MMA_FLOAT16 = tl.constexpr("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" + _OPERANDS)
MMA_TF32 = tl.constexpr("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" + _OPERANDS)


@triton.jit
def _numbers(word, dtype: tl.constexpr, T: tl.constexpr):
    """The two numbers in a word, as float32 [T/32, 8, 4, 2]."""
    first = word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    second = (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(first, second), (T // 32, 8, 4, 2))


@triton.jit
def _sum_of_products(a, b, c0, c1, c2, c3, T: tl.constexpr):
    """c + a b for a [T/32, 16, k] and b [T/32, k, 8], with c as :func:`mma` has it in threads."""
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
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, dtype: tl.constexpr, T: tl.constexpr):
    """Per warp c [16, 8] + a [16, k] b [k, 8], k = 16 for float16 and bfloat16, two in a word; k = 8 for float32 with eleven bits (TF32).

    g, t = thread / 4, thread % 4: a's rows are g, g + 8, b's column is g, c's are 2 t, 2 t + 1.
    """
    if PTX:
        TEXT: tl.constexpr = MMA_BFLOAT16 if dtype == tl.bfloat16 else MMA_FLOAT16 if dtype == tl.float16 else MMA_TF32
        operands = [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3]
        # The types stand in the call: Triton 3.8 takes no tuple of them that has a name.
        return tl.inline_asm_elementwise(
            TEXT,
            "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            operands,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        W: tl.constexpr = T // 32
        if dtype == tl.float32:
            a = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (W, 8, 4, 2, 2))
            a = tl.reshape(tl.permute(a, (0, 4, 1, 3, 2)), (W, 16, 8))
            b = tl.reshape(tl.permute(tl.reshape(tl.join(b0, b1), (W, 8, 4, 2)), (0, 3, 2, 1)), (W, 8, 8))
        else:
            low = tl.join(_numbers(a0, dtype, T), _numbers(a2, dtype, T))
            a = tl.join(low, tl.join(_numbers(a1, dtype, T), _numbers(a3, dtype, T)))  # warp, g, t, k's lowest bit, k's highest, row's
            a = tl.reshape(tl.permute(a, (0, 5, 1, 4, 2, 3)), (W, 16, 16))
            b = tl.join(_numbers(b0, dtype, T), _numbers(b1, dtype, T))
            b = tl.reshape(tl.permute(b, (0, 4, 2, 3, 1)), (W, 16, 8))
        return _sum_of_products(a, b, c0, c1, c2, c3, T)


@triton.jit
def of_quad(value, thread, t, T: tl.constexpr):
    """The value that a quad's given thread has, for all four."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;", "=r,r,r", [value, thread], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        own = tl.reshape(tl.where(t == thread, value, 0), (T // 4, 4))
        return tl.reshape(tl.broadcast_to(tl.sum(own, axis=1)[:, None], (T // 4, 4)), (T,))


@triton.jit
def butterfly(value, D: tl.constexpr, T: tl.constexpr):
    """What the thread D away in the quad has."""
    if PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 0x1c1f, 0xffffffff;",
            "=r,r,r",
            [value, tl.full((T,), D, tl.int32)],
            dtype=value.dtype,
            is_pure=True,
            pack=1,
        )
    else:
        v = tl.reshape(value, (T // (2 * D), 2, D))
        return tl.reshape(tl.flip(v, 1), (T,))


@triton.jit
def four_words(row, t):
    """The quad's t-th sixteen bytes, at a pointer to the first of them."""
    at = row + 4 * t
    if PTX:  # relaxed: the load is not moved beyond a barrier, to where its values are needed
        text: tl.constexpr = "ld.relaxed.cta.global.v4.b32 {$0,$1,$2,$3}, [$4];"
        return tl.inline_asm_elementwise(
            text, "=r,=r,=r,=r,l", [at.to(tl.int64)], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1
        )
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _exchange(a, b, t, D: tl.constexpr, T: tl.constexpr):
    """Transpose the matrix that two threads D apart have two words of each."""
    upper = (t & D) != 0
    got = butterfly(tl.where(upper, a, b), D, T)
    return tl.where(upper, got, a), tl.where(upper, b, got)


@triton.jit
def transposed(w0, w1, w2, w3, t, T: tl.constexpr):
    """Four words of the t-th sixteen bytes -> the t-th words of four times sixteen bytes."""
    w0, w1 = _exchange(w0, w1, t, 1, T)
    w2, w3 = _exchange(w2, w3, t, 1, T)
    w0, w2 = _exchange(w0, w2, t, 2, T)
    w1, w3 = _exchange(w1, w3, t, 2, T)
    return w0, w1, w2, w3


@lru_cache(maxsize=None)
def sum_text(values, warps):
    """(PTX, its constraints) for :func:`sum_over_warps`."""
    warp, all_warps = 128, 128 * warps  # bytes
    lines = [f".shared .align 16 .b32 parts[{values * all_warps // 4}];", ".reg .b32 a, b; .reg .f32 v;"]
    lines += ["bar.sync 0;", "mov.u32 a, parts;", f"shl.b32 b, ${values + 1}, 2;", "add.u32 b, a, b;"]
    lines += [f"st.shared.f32 [b + {i * all_warps}], ${i + 1};" for i in range(values)]
    lines += [f"add.u32 b, a, ${values + 2};", "bar.sync 0;", "ld.shared.f32 $0, [b];"]
    lines += [f"ld.shared.f32 v, [b + {w * warp}]; add.f32 $0, $0, v;" for w in range(1, warps)]
    return "{ " + " ".join(lines) + " }", "=&f," + "f," * values + "r,r"


@triton.jit
def sum_over_warps(total, thread, TEXT: tl.constexpr, CONSTRAINTS: tl.constexpr, V: tl.constexpr, T: tl.constexpr):
    """Thread l of warp v gets the sum over warps, in order, of the v-th of V values that their threads l have.

    In PTX for the sake of shared memory: a value of all threads lies in a row there, so that neither side has two threads at one bank.
    """
    W: tl.constexpr = T // 32
    which = tl.minimum(thread // 32, V - 1)
    if PTX:
        at = which * (128 * W) + 4 * (thread % 32)
        return tl.inline_asm_elementwise(TEXT, CONSTRAINTS, total + (thread, at), dtype=tl.float32, is_pure=False, pack=1)
    else:
        found = tl.zeros((T,), tl.float32)
        for i in tl.static_range(V):
            s = tl.sum(tl.reshape(total[i], (W, 32)), axis=0)
            found = tl.where(which == i, tl.reshape(tl.broadcast_to(s[None, :], (W, 32)), (T,)), found)
        return found
