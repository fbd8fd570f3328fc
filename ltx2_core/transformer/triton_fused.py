"""The element-wise passes of ``transformer/fused.py`` as Triton kernels: every tensor read once and written once, float32 inside.

Three kernels. The *stream* kernel does all that happens to the residual stream between two matrix products: add the gated output
of the last one, normalise, modulate. A program takes up to ``ROWS`` consecutive tokens of one modulation row, so that gate, scale
and shift are read once for all of them. The *norm-rope* kernel handles a token's q and k together, because both use the same
cosines. The head gate is a plain map.

A value that is stored and used again (the residual stream before its norm) is rounded to its type first, so fused and separate
calls agree. Importing this module imports triton; ``transformer/fused.py`` does so on first use and documents the functions.
"""

import torch
import triton
import triton.language as tl

from ...quant import eight_bit
from ...quant.kernels.triton_eight_bit import store_row
from ...quant.kernels.triton_launch import Launcher, power_of_2
from ...quant.tracing import is_plain
from .rope import RotaryTable

#: Tokens per program of the stream kernel where the modulation rows allow it.
ROWS = 4

_RMS, _LAYER = 1, 2


@triton.jit
def _stream_kernel(
    x, y, gate, scale, shift, h, h_scales, tokens, run, width, eps, gate_b, gate_r, mod_b, mod_r,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr, HAS_MOD: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
    QUANT: tl.constexpr,
):  # fmt: skip
    """x += y * gate, stored in place (HAS_Y); h = norm(x) * (1 + scale) + shift (NORM), in 8 bits with a scale per token if QUANT is not 0.
    TOKENS rows that share their modulation."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    column = tl.arange(0, D)
    inside = (column < width) | EVEN
    batch = first // tokens
    r = (first % tokens) // run
    if HAS_GATE:
        g = tl.load(gate + batch * gate_b + r * gate_r + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_MOD:
        factor = tl.load(scale + batch * mod_b + r * mod_r + column, mask=inside, other=0.0).to(tl.float32) + 1.0
        offset = tl.load(shift + batch * mod_b + r * mod_r + column, mask=inside, other=0.0).to(tl.float32)
    for i in range(TOKENS):
        at = (first + i) * width + column
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_Y:
            update = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_GATE:
                update = update * g
            stored = (value + update).to(x.dtype.element_ty)
            tl.store(x + at, stored, mask=inside)
            value = stored.to(tl.float32)
        if NORM:
            if NORM == 2:
                value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
            value = value * tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
            if HAS_MOD:
                value = value * factor + offset
            if QUANT:
                store_row(h + at, h_scales + first + i, value.to(x.dtype.element_ty).to(tl.float32), inside, QUANT == 1)
            else:
                tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


_stream_launch = Launcher(_stream_kernel)


def _stream(x, y, gate, scale, shift, h, eps, norm, token_limit=ROWS, num_warps=None, h_scales=None):
    """Launch the stream kernel. x [B, T, D]; gate, scale, shift [B or 1, n, D] with unit last stride, or None; h like x, or None, or in 8 bits
    with ``h_scales`` float32 [B * T]."""
    batch, tokens, width = x.shape
    mod_rows = {value.shape[1] for value in (gate, scale) if value is not None}
    if len(mod_rows) == 2:  # gate and scale by different rows: the finer one rules, the coarser is repeated
        n = max(mod_rows)
        gate, scale, shift = (value.repeat_interleave(n // value.shape[1], dim=1) for value in (gate, scale, shift))
    run = tokens // max(mod_rows, default=1)
    size = token_limit
    while run % size:
        size //= 2
    block = power_of_2(width)
    gate_b, gate_r = _row_strides(gate, batch)
    mod_b, mod_r = _row_strides(scale, batch)
    _stream_launch(
        (batch * tokens // size, 1, 1),
        (x, x if y is None else y, x if gate is None else gate, x if scale is None else scale, x if shift is None else shift, x if h is None else h,
         x if h_scales is None else h_scales, tokens, run, width, eps, gate_b, gate_r, mod_b, mod_r),
        (y is not None, gate is not None, norm, scale is not None, size, block, block == width, _quant(h, h_scales)),
        num_warps or max(1, min(8, block // 512)),
    )  # fmt: skip
    return h


def _quant(target, scales):
    """The kernels' QUANT: 0 nothing is quantised, 1 int8, 2 float8."""
    return 0 if scales is None else 2 if target.is_floating_point() else 1


def _row_strides(value, batch):
    """(batch stride, row stride) of a modulation value; a single batch entry serves all."""
    if value is None:
        return 0, 0
    return (value.stride(0) if value.shape[0] == batch and batch > 1 else 0), value.stride(1)


@triton.jit
def _norm_rotate(
    x, weight, at, column, inside, cos, sin, width, eps, ROPE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """RMS norm with weight over a row, given as two half-head tiles [nh, hd/2], then the rotation; stored where it was read."""
    a = tl.load(x + at + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + column + HALF, mask=inside, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(tl.reshape(a * a + b * b, (HEADS * HALF,), can_reorder=True), axis=0) / width + eps)
    a = a * norm * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = b * norm * tl.load(weight + column + HALF, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        turned = a * cos - b * sin
        b = b * cos + a * sin
        a = turned
    tl.store(x + at + column, a.to(x.dtype.element_ty), mask=inside)
    tl.store(x + at + column + HALF, b.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, index, tokens, width, eps, pe_b, pe_h, pe_t, heads, pad,
    BOTH: tl.constexpr, ROPE: tl.constexpr, AXES: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: q, and k too when it has q's shape (BOTH), in place. Tiles are [heads, hd/2], heads padded to a power of two.

    cos, sin: with AXES = 0 one entry per token and slot, at strides pe_b, pe_h, pe_t; else the rows of a RotaryTable, index [.., AXES],
    pe_b and pe_t the index's strides, pe_h the rows' stride.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    slot = tl.arange(0, HALF)[None, :]
    inside = head < heads
    column = head * (2 * HALF) + slot
    c = 1.0
    s = 0.0
    if ROPE:
        pe = (token // tokens) * pe_b + (token % tokens) * pe_t
        if AXES == 0:
            at = pe + head * pe_h + slot
            c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        else:
            turning = head * HALF + slot - pad  # number among the slots that turn: axis fast, frequency slow
            axis = turning % AXES
            row = tl.load(index + pe)
            if AXES > 1:
                row = tl.where(axis == 1, tl.load(index + pe + 1), row)
            if AXES > 2:
                row = tl.where(axis == 2, tl.load(index + pe + 2), row)
            at = row * pe_h + turning // AXES
            turns = inside & (turning >= 0)
            c = tl.load(cos + at, mask=turns, other=1.0)
            s = tl.load(sin + at, mask=turns, other=0.0)
    _norm_rotate(q, q_weight, token * width, column, inside, c, s, width, eps, ROPE, HEADS, HALF)
    if BOTH:
        _norm_rotate(k, k_weight, token * width, column, inside, c, s, width, eps, ROPE, HEADS, HALF)


@triton.jit
def _head_gate_kernel(
    x, logits, out, out_scales, width, heads, HEADS: tl.constexpr, HD: tl.constexpr, QUANT: tl.constexpr
):
    """One token: out = x * 2 sigmoid(logit of the head), in 8 bits with a scale if QUANT is not 0. Tile [heads, hd]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    at = token * width + head * HD + tl.arange(0, HD)[None, :]
    gate = 2.0 * tl.sigmoid(tl.load(logits + token * heads + head, mask=inside, other=0.0).to(tl.float32))
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if QUANT:
        store_row(
            out + at, out_scales + token, (value * gate).to(x.dtype.element_ty).to(tl.float32), inside, QUANT == 1
        )
    else:
        tl.store(out + at, (value * gate).to(out.dtype.element_ty), mask=inside)


_norm_rope_launch = Launcher(_norm_rope_kernel)
_head_gate_launch = Launcher(_head_gate_kernel)


def _norm_rope(q, k, q_weight, k_weight, cos, sin, index, pad, heads, eps):
    """q [B, T, D] in place, and k of the same shape unless it is None. cos, sin, index and pad as :func:`_rotation` gives them."""
    batch, tokens, width = q.shape
    half = width // heads // 2
    rope = cos is not None
    strides, axes = (0, 0, 0), 0
    if index is not None:
        axes = index.shape[2]
        strides = (tokens * axes if index.shape[0] == batch and batch > 1 else 0), cos.shape[1], axes
    elif rope:
        strides = (cos.stride(0) if cos.shape[0] == batch and batch > 1 else 0, cos.stride(1), cos.stride(2))
    block = power_of_2(heads)
    _norm_rope_launch(
        (batch * tokens, 1, 1),
        (q, q if k is None else k, q_weight, q_weight if k is None else k_weight, cos if rope else q, sin if rope else q, q if index is None else index,
         tokens, width, eps, *strides, heads, pad),
        (k is not None, rope, axes, block, half),
        max(1, min(8, block * half // 256)),
    )  # fmt: skip


def _rotation(pe):
    """(cos, sin, index, pad): the rows of a RotaryTable with their index, or a full pair without one."""
    if pe is None:
        return None, None, None, 0
    if isinstance(pe, RotaryTable):
        return *pe.rows, pe.index, pe.pad
    return *pe, None, 0


def can_norm_rope(q, heads, *rotations):
    """Whether the norm-rope kernel takes this geometry: power-of-two half heads, at most three axes, tables with unit last stride."""
    half = q.shape[-1] // heads // 2
    return half & (half - 1) == 0 and half >= 4 and all(_readable(*_rotation(pe)[:3]) for pe in rotations)


def _readable(cos, sin, index):
    if index is not None:
        return index.shape[2] <= 3 and index.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    return cos is None or (cos.stride(-1) == 1 and cos.stride() == sin.stride())


def can_head_gate(out, logits):
    """Whether the head-gate kernel takes this geometry: power-of-two heads' width, rows of logits with unit stride."""
    hd = out.shape[-1] // logits.shape[-1]
    return hd & (hd - 1) == 0 and logits.is_contiguous()


@torch.library.custom_op("ltx2_gguf::stream", mutates_args={"x"})
def _stream_op(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    norm: int,
) -> torch.Tensor:
    h = torch.empty_like(x) if norm else x.new_empty(0)
    _stream(x, y, gate, scale, shift, h, eps, norm)
    return h


@_stream_op.register_fake
def _(x, y, gate, scale, shift, eps, norm):
    return torch.empty_like(x) if norm else x.new_empty(0)


@torch.library.custom_op("ltx2_gguf::norm", mutates_args=())
def _norm_op(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, norm: int
) -> torch.Tensor:
    return _stream(x, None, None, scale, shift, torch.empty_like(x), eps, norm)


@_norm_op.register_fake
def _(x, scale, shift, eps, norm):
    return torch.empty_like(x)


@torch.library.custom_op("ltx2_gguf::norm_rope", mutates_args={"q", "k"})
def _norm_rope_op(
    q: torch.Tensor, k: torch.Tensor | None, q_weight: torch.Tensor, k_weight: torch.Tensor | None,
    cos: torch.Tensor | None, sin: torch.Tensor | None, index: torch.Tensor | None, pad: int, heads: int, eps: float,
) -> None:  # fmt: skip
    _norm_rope(q, k, q_weight, k_weight, cos, sin, index, pad, heads, eps)


@torch.library.custom_op("ltx2_gguf::head_gate", mutates_args=())
def _head_gate_op(out: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return _head_gate(out, logits)


@_head_gate_op.register_fake
def _(out, logits):
    return torch.empty_like(out)


def _head_gate(x, logits, out=None, out_scales=None):
    heads, width, out = logits.shape[-1], x.shape[-1], torch.empty_like(x) if out is None else out
    block = power_of_2(heads)
    warps = max(1, min(8, block * (width // heads) // 512))
    _head_gate_launch((x.numel() // width, 1, 1), (x, logits, out, x if out_scales is None else out_scales, width, heads),
                      (block, width // heads, _quant(out, out_scales)), warps)  # fmt: skip
    return out


def rms_modulate(x, scale, shift, eps):
    """See ``fused.rms_modulate``."""
    if is_plain(x, scale, shift):
        return _stream(x, None, None, scale, shift, torch.empty_like(x), eps, _RMS)
    return torch.ops.ltx2_gguf.norm(x, scale, shift, eps, _RMS)


def layer_norm_modulate(x, scale, shift, eps):
    """See ``fused.layer_norm_modulate``."""
    if is_plain(x, scale, shift):
        return _stream(x, None, None, scale, shift, torch.empty_like(x), eps, _LAYER)
    return torch.ops.ltx2_gguf.norm(x, scale, shift, eps, _LAYER)


def gate_residual_(x, y, gate):
    """See ``fused.gate_residual_``."""
    if is_plain(x, y, gate):
        _stream(x, y, gate, None, None, None, 0.0, 0)
    else:
        torch.ops.ltx2_gguf.stream(x, y, gate, None, None, 0.0, 0)
    return x


def gate_residual_rms_modulate_(x, y, gate, scale, shift, eps, quantize=None):
    """See ``fused.gate_residual_rms_modulate_``."""
    if quantize:
        h = eight_bit.empty(x, quantize)
        _stream(x, y, gate, scale, shift, h.q, eps, _RMS, h_scales=h.scales)
        return x, h
    if is_plain(x, y, gate, scale, shift):
        return x, _stream(x, y, gate, scale, shift, torch.empty_like(x), eps, _RMS)
    return x, torch.ops.ltx2_gguf.stream(x, y, gate, scale, shift, eps, _RMS)


def qk_norm_rope(q, k, q_weight, k_weight, pe, heads, eps, k_pe=None):
    """See ``fused.qk_norm_rope``. Overwrites q and k."""
    rotation = _rotation(pe)
    k_rotation = rotation if pe is None or k_pe is None else _rotation(k_pe)
    launch = (
        _norm_rope
        if is_plain(q, k, q_weight, k_weight, *rotation[:3], *k_rotation[:3])
        else torch.ops.ltx2_gguf.norm_rope
    )
    if q.shape == k.shape and k_rotation[0] is rotation[0]:
        launch(q, k, q_weight, k_weight, *rotation, heads, eps)
    else:
        launch(q, None, q_weight, None, *rotation, heads, eps)
        launch(k, None, k_weight, None, *k_rotation, heads, eps)
    return q, k


def head_gate(out, logits, quantize=None):
    """See ``fused.head_gate``."""
    if quantize:
        gated = eight_bit.empty(out, quantize)
        _head_gate(out, logits, gated.q, gated.scales)
        return gated
    return _head_gate(out, logits) if is_plain(out, logits) else torch.ops.ltx2_gguf.head_gate(out, logits)
