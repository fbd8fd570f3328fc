"""The element-wise passes of ``fused.py`` as Triton kernels: every tensor read once and written once, float32 inside.

Three kernels. The *stream* kernel does all that happens to the residual stream between two matrix products: add the gated output
of the last one, normalise, modulate. A program takes up to ``ROWS`` consecutive tokens of one modulation row, so that gate, scale
and shift are read once for all of them. The *norm-rope* kernel handles a token's q and k together, because both use the same
cosines. Head gate and GELU are plain maps.

A value that is stored and used again (the residual stream before its norm) is rounded to its type first, so fused and separate
calls agree. Importing this module imports triton; ``fused.py`` does so on first use and documents the functions.
"""

import torch
import triton
import triton.language as tl

from ..quant.kernels_triton import is_plain

#: Tokens per program of the stream kernel where the modulation rows allow it.
ROWS = 4

_RMS, _LAYER = 1, 2


@triton.jit
def _stream_kernel(
    x, y, gate, scale, shift, h, tokens, run, width, eps, gate_b, gate_r, mod_b, mod_r,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, NORM: tl.constexpr, HAS_MOD: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """x += y * gate, stored in place (HAS_Y); h = norm(x) * (1 + scale) + shift (NORM). TOKENS rows that share their modulation."""
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
            tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


def _stream(x, y, gate, scale, shift, h, eps, norm, token_limit=ROWS, num_warps=None):
    """Launch the stream kernel. x [B, T, D]; gate, scale, shift [B or 1, n, D] with unit last stride, or None; h like x, or None."""
    batch, tokens, width = x.shape
    mod_rows = {value.shape[1] for value in (gate, scale) if value is not None}
    if len(mod_rows) == 2:  # gate and scale by different rows: the finer one rules, the coarser is repeated
        n = max(mod_rows)
        gate, scale, shift = (value.repeat_interleave(n // value.shape[1], dim=1) for value in (gate, scale, shift))
    run = tokens // max(mod_rows, default=1)
    size = token_limit
    while run % size:
        size //= 2
    block = triton.next_power_of_2(width)
    gate_b, gate_r = _row_strides(gate, batch)
    mod_b, mod_r = _row_strides(scale, batch)
    _stream_kernel[(batch * tokens // size,)](
        x, x if y is None else y, x if gate is None else gate, x if scale is None else scale, x if shift is None else shift, x if h is None else h,
        tokens, run, width, eps, gate_b, gate_r, mod_b, mod_r,
        HAS_Y=y is not None, HAS_GATE=gate is not None, NORM=norm, HAS_MOD=scale is not None, TOKENS=size, D=block, EVEN=block == width,
        num_warps=num_warps or max(1, min(8, block // 512)),
    )  # fmt: skip
    return h


def _row_strides(value, batch):
    """(batch stride, row stride) of a modulation value; a single batch entry serves all."""
    if value is None:
        return 0, 0
    return (value.stride(0) if value.shape[0] == batch and batch > 1 else 0), value.stride(1)


@triton.jit
def _norm_rotate(x, weight, at, column, inside, cos, sin, width, eps, ROPE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
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
    q, k, q_weight, k_weight, cos, sin, tokens, width, eps, pe_b, pe_h, pe_t, heads,
    BOTH: tl.constexpr, ROPE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One token: q, and k too when it has q's shape (BOTH), in place. Tiles are [heads, hd/2], heads padded to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    slot = tl.arange(0, HALF)[None, :]
    inside = head < heads
    column = head * (2 * HALF) + slot
    c = 1.0
    s = 0.0
    if ROPE:
        pe = (token // tokens) * pe_b + (token % tokens) * pe_t + head * pe_h + slot
        c = tl.load(cos + pe, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + pe, mask=inside, other=0.0).to(tl.float32)
    _norm_rotate(q, q_weight, token * width, column, inside, c, s, width, eps, ROPE, HEADS, HALF)
    if BOTH:
        _norm_rotate(k, k_weight, token * width, column, inside, c, s, width, eps, ROPE, HEADS, HALF)


@triton.jit
def _head_gate_kernel(x, logits, out, width, heads, logit_stride, HEADS: tl.constexpr, HD: tl.constexpr):
    """One token: out = x * 2 sigmoid(logit of the head). Tile [heads, hd]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    inside = head < heads
    at = token * width + head * HD + tl.arange(0, HD)[None, :]
    gate = 2.0 * tl.sigmoid(tl.load(logits + token * logit_stride + head, mask=inside, other=0.0).to(tl.float32))
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (value * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu(x):
    """GELU, tanh form: x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_kernel(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(x + at, gelu(tl.load(x + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype.element_ty), mask=inside)


def _norm_rope(q, k, q_weight, k_weight, cos, sin, heads, eps):
    """q [B, T, D] in place, and k of the same shape unless it is None."""
    batch, tokens, width = q.shape
    half = width // heads // 2
    rope = cos is not None
    strides = (cos.stride(0) if cos.shape[0] == batch and batch > 1 else 0, cos.stride(1), cos.stride(2)) if rope else (0, 0, 0)
    block = triton.next_power_of_2(heads)
    _norm_rope_kernel[(batch * tokens,)](
        q, q if k is None else k, q_weight, q_weight if k is None else k_weight, cos if rope else q, sin if rope else q,
        tokens, width, eps, *strides, heads, BOTH=k is not None, ROPE=rope, HEADS=block, HALF=half, num_warps=max(1, min(8, block * half // 256)),
    )  # fmt: skip


def can_norm_rope(q, heads, tables):
    """Whether the norm-rope kernel takes this geometry: power-of-two half heads, tables with unit last stride."""
    half = q.shape[-1] // heads // 2
    return half & (half - 1) == 0 and half >= 4 and all(t.stride(-1) == 1 and t.stride() == tables[0].stride() for t in tables)


def can_head_gate(out, logits):
    """Whether the head-gate kernel takes this geometry: power-of-two heads' width, rows of logits with unit stride."""
    hd = out.shape[-1] // logits.shape[-1]
    return hd & (hd - 1) == 0 and logits.is_contiguous()


@torch.library.custom_op("ltx2_gguf::stream", mutates_args={"x"})
def _stream_op(
    x: torch.Tensor, y: torch.Tensor | None, gate: torch.Tensor | None, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, norm: int
) -> torch.Tensor:
    h = torch.empty_like(x) if norm else x.new_empty(0)
    _stream(x, y, gate, scale, shift, h, eps, norm)
    return h


@_stream_op.register_fake
def _(x, y, gate, scale, shift, eps, norm):
    return torch.empty_like(x) if norm else x.new_empty(0)


@torch.library.custom_op("ltx2_gguf::norm", mutates_args=())
def _norm_op(x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, norm: int) -> torch.Tensor:
    return _stream(x, None, None, scale, shift, torch.empty_like(x), eps, norm)


@_norm_op.register_fake
def _(x, scale, shift, eps, norm):
    return torch.empty_like(x)


@torch.library.custom_op("ltx2_gguf::norm_rope", mutates_args={"q", "k"})
def _norm_rope_op(
    q: torch.Tensor, k: torch.Tensor | None, q_weight: torch.Tensor, k_weight: torch.Tensor | None,
    cos: torch.Tensor | None, sin: torch.Tensor | None, heads: int, eps: float,
) -> None:  # fmt: skip
    _norm_rope(q, k, q_weight, k_weight, cos, sin, heads, eps)


@torch.library.custom_op("ltx2_gguf::head_gate", mutates_args=())
def _head_gate_op(out: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return _head_gate(out, logits)


@_head_gate_op.register_fake
def _(out, logits):
    return torch.empty_like(out)


@torch.library.custom_op("ltx2_gguf::gelu_", mutates_args={"x"})
def _gelu_op(x: torch.Tensor) -> None:
    _gelu(x)


def _head_gate(x, logits):
    heads, width = logits.shape[-1], x.shape[-1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(heads)
    _head_gate_kernel[(x.numel() // width,)](
        x, logits, out, width, heads, heads, HEADS=block, HD=width // heads, num_warps=max(1, min(8, block * (width // heads) // 512))
    )
    return out


def _gelu(x):
    _gelu_kernel[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), BLOCK=4096, num_warps=8)
    return x


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


def gate_residual_rms_modulate_(x, y, gate, scale, shift, eps):
    """See ``fused.gate_residual_rms_modulate_``."""
    if is_plain(x, y, gate, scale, shift):
        return x, _stream(x, y, gate, scale, shift, torch.empty_like(x), eps, _RMS)
    return x, torch.ops.ltx2_gguf.stream(x, y, gate, scale, shift, eps, _RMS)


def qk_norm_rope(q, k, q_weight, k_weight, pe, heads, eps, k_pe=None):
    """See ``fused.qk_norm_rope``. Overwrites q and k."""
    cos, sin = (None, None) if pe is None else pe
    k_cos, k_sin = (cos, sin) if k_pe is None or pe is None else k_pe
    launch = _norm_rope if is_plain(q, k, q_weight, k_weight, cos, k_cos) else torch.ops.ltx2_gguf.norm_rope
    if q.shape == k.shape and k_cos is cos:
        launch(q, k, q_weight, k_weight, cos, sin, heads, eps)
    else:
        launch(q, None, q_weight, None, cos, sin, heads, eps)
        launch(k, None, k_weight, None, k_cos, k_sin, heads, eps)
    return q, k


def head_gate(out, logits):
    """See ``fused.head_gate``."""
    return _head_gate(out, logits) if is_plain(out, logits) else torch.ops.ltx2_gguf.head_gate(out, logits)


def gelu_(x):
    """GELU (tanh form) in place on a contiguous tensor."""
    if is_plain(x):
        return _gelu(x)
    torch.ops.ltx2_gguf.gelu_(x)
    return x
