"""Gemma's element-wise passes (``text/gemma_fused.py``) as Triton kernels: every tensor read once and written once, float32 inside.

Importing this module imports triton.
"""

import torch
import triton
import triton.language as tl

from ...quant.kernels.triton_int8 import gelu_tanh
from ...quant.kernels.triton_launch import Launcher, cdiv, power_of_2


@triton.jit
def _add_norm_kernel(
    x, h, post, following, total, normed, width, post_eps, eps,
    ADD: tl.constexpr, NORM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token: total = x + rms(h) * post (ADD, else x is the total); normed = rms(total) * following (NORM)."""
    at = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, D)
    inside = column < width
    value = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        update = tl.load(h + at + column, mask=inside, other=0.0).to(tl.float32)
        update = update * tl.rsqrt(tl.sum(update * update, axis=0) / width + post_eps)
        value += update * tl.load(post + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at + column, value, mask=inside)
    if NORM:
        value = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
        value = value * tl.load(following + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at + column, value.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _heads_norm_rotate(x, weight, cos, sin, heads, eps, HEADS: tl.constexpr, HALF: tl.constexpr):
    """RMS norm with weight of each head of one token, given as two half-head tiles [heads, hd/2], then the rotation; in place."""
    head = tl.arange(0, HEADS)[:, None]
    slot = tl.arange(0, HALF)[None, :]
    inside = head < heads
    at = head * (2 * HALF) + slot
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
    a = a * norm * tl.load(weight + slot).to(tl.float32)
    b = b * norm * tl.load(weight + HALF + slot).to(tl.float32)
    tl.store(x + at, (a * cos - b * sin).to(x.dtype.element_ty), mask=inside)
    tl.store(x + at + HALF, (b * cos + a * sin).to(x.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, tokens, q_stride, k_stride, q_heads, k_heads, q_eps, k_eps,
    Q: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token's query and key heads. q_stride, k_stride: elements from token to token; Q, K: heads, padded to powers of two."""
    row = tl.program_id(0).to(tl.int64)
    at = (row % tokens) * HALF + tl.arange(0, HALF)[None, :]
    c = tl.load(cos + at)
    s = tl.load(sin + at)
    _heads_norm_rotate(q + row * q_stride, q_weight, c, s, q_heads, q_eps, Q, HALF)
    _heads_norm_rotate(k + row * k_stride, k_weight, c, s, k_heads, k_eps, K, HALF)


@triton.jit
def _geglu_kernel(gate, up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = gelu_tanh(tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)) * tl.load(
        up + at, mask=inside, other=0.0
    ).to(tl.float32)
    tl.store(gate + at, value.to(gate.dtype.element_ty), mask=inside)


_add_norm_launch = Launcher(_add_norm_kernel)
_norm_rope_launch = Launcher(_norm_rope_kernel)
_geglu_launch = Launcher(_geglu_kernel)


def add_norm(x, h, post, following, dtype, total):
    """See ``text.gemma_fused.add_norm``; without h, ``total`` is x and only ``following`` is applied. Returns (total, normed)."""
    width = x.shape[-1]
    normed = None if following is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    block = power_of_2(width)
    last = post if following is None else following
    first = last if post is None else post
    _add_norm_launch(
        (x.numel() // width, 1, 1),
        (x, x if h is None else h, first.weight, last.weight, x if total is None else total, x if normed is None else normed,
         width, float(first.eps), float(last.eps)),
        (h is not None, normed is not None, block),
        max(1, min(8, block // 512)),
    )  # fmt: skip
    return x if total is None else total, normed


def can_norm_rope(q, k, rope):
    """Whether the kernel takes this geometry: power-of-two half heads, rows of unit stride at equal distances, contiguous tables."""
    cos, sin = rope
    half = cos.shape[-1]
    if half & (half - 1) or half < 4 or not cos.is_contiguous() or not sin.is_contiguous() or cos.device != q.device:
        return False
    return (
        all(y.stride(2) == 1 and (y.shape[0] == 1 or y.stride(0) == y.shape[1] * y.stride(1)) for y in (q, k))
        and k.dtype == q.dtype
    )


def norm_rope_(q, k, q_norm, k_norm, rope):
    """See ``text.gemma_fused.norm_rope``; q and k are overwritten."""
    cos, sin = rope
    batch, tokens, q_width = q.shape
    half = cos.shape[-1]
    q_heads, k_heads = q_width // (2 * half), k.shape[2] // (2 * half)
    _norm_rope_launch(
        (batch * tokens, 1, 1),
        (
            q,
            k,
            q_norm.weight,
            k_norm.weight,
            cos,
            sin,
            tokens,
            q.stride(1),
            k.stride(1),
            q_heads,
            k_heads,
            float(q_norm.eps),
            float(k_norm.eps),
        ),
        (power_of_2(q_heads), power_of_2(k_heads), half),
        max(1, min(8, power_of_2(q_heads) * half // 256)),
    )


def geglu_(gate, up):
    """See ``text.gemma_fused.geglu``; written into ``gate``."""
    _geglu_launch((cdiv(gate.numel(), 4096), 1, 1), (gate, up, gate.numel()), (4096,), 8)
    return gate
