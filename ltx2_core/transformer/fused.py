"""The DiT's element-wise passes, one function per group of operations that a kernel can do in one sweep.

Everything between the matrix products of an LTX-2 block is memory traffic: norms, modulation, gates, residuals, RoPE. Each
function here is one such group. The torch code below is the definition; a faster backend may stand in for it, with the same
arguments and results.

Shapes: ``x`` is ``[B, T, D]``. A modulation value (scale, shift, gate) is ``[B, n, D]`` with n dividing T: row r covers the
T//n consecutive tokens from r*T//n on (n = 1: the whole clip, n = frames: one row per latent frame, n = T: one per token).

Functions whose name ends in ``_`` write into ``x`` when gradients are not recorded, and return the result in either case:
callers always use what is returned. On a GPU that Triton reaches, contiguous tensors go to ``transformer/triton_fused.py`` unless gradients
are recorded.

Source of the formulas: Lightricks/LTX-2 ``ltx_core/model/transformer/{transformer,attention,rope}.py``.
"""

import importlib.util

import torch
import torch.nn.functional as F

from ...quant import direct, linear_gpu
from ...quant.tracing import is_plain
from .rope import RotaryTable

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DEVICES = ("cuda", "xpu")
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _kernels(*tensors, width_limit=8192):
    """The module of Triton kernels if all of these activations [B, T, D] can go to it, else None. width_limit: largest D."""
    x = tensors[0]
    if not _HAS_TRITON or x.device.type not in _TRITON_DEVICES or torch.is_grad_enabled() or not x.numel():
        return None
    for t in tensors:
        if not t.is_contiguous() or t.dtype not in _TRITON_DTYPES or (width_limit is not None and t.shape[-1] > width_limit):
            return None
    return _module()


def _module():
    """``transformer.triton_fused``, imported on first use."""
    global _module
    from . import triton_fused

    _module = lambda: triton_fused  # noqa: E731 (an import statement takes longer than a launch)
    return triton_fused


def _unit_stride(*values):
    """Whether the kernels can read these modulation values: unit stride along the last axis."""
    return all(value is None or value.stride(-1) == 1 for value in values)


def _rows(x, value):
    """View x [B, T, D] as [B, n, T/n, D] and value [B, n, D] as [B, n, 1, D], so that they broadcast."""
    n = value.shape[1]
    return x.unflatten(1, (n, x.shape[1] // n)), value.unsqueeze(2)


def _modulate(h, scale, shift):
    """h * (1 + scale) + shift."""
    rows, scale = _rows(h, scale)  # (B, T, D) -> (B, n, T/n, D)
    return torch.addcmul(shift.unsqueeze(2), rows, scale + 1).flatten(1, 2)


def rms_modulate(x, scale, shift, eps):
    """rms(x) * (1 + scale) + shift; plain rms(x) when scale is None.

    rms(x) = x / sqrt(mean(x^2) + eps) over the last axis. x [B, T, D]; scale, shift [B, n, D]. A new tensor of x's shape and dtype.
    """
    kernels = _kernels(x)
    if kernels and _unit_stride(scale, shift):
        return kernels.rms_modulate(x, scale, shift, eps)
    h = F.rms_norm(x, (x.shape[-1],), eps=eps)
    return h if scale is None else _modulate(h, scale, shift)


def layer_norm_modulate(x, scale, shift, eps):
    """layer_norm(x) * (1 + scale) + shift, mean subtracted, no weight. x [B, T, D]; scale, shift [B, n, D]."""
    kernels = _kernels(x)
    if kernels and _unit_stride(scale, shift):
        return kernels.layer_norm_modulate(x, scale, shift, eps)
    return _modulate(F.layer_norm(x, (x.shape[-1],), eps=eps), scale, shift)


def gate_residual_(x, y, gate):
    """x + y * gate; x + y when gate is None.

    x, y [B, T, D]; gate [B, n, D]. Writes into x unless gradients are recorded; returns the sum.
    """
    kernels = _kernels(x, y)
    if kernels and _unit_stride(gate):
        return kernels.gate_residual_(x, y, gate)
    if gate is None:
        return x + y if torch.is_grad_enabled() else x.add_(y)
    rows, gate = _rows(y, gate)
    if torch.is_grad_enabled():
        return torch.addcmul(x, y, gate.expand_as(rows).flatten(1, 2))
    x.unflatten(1, rows.shape[1:3]).addcmul_(rows, gate)
    return x


def gate_residual_rms_modulate_(x, y, gate, scale, shift, eps):
    """x' = x + y * gate, then h = rms(x') * (1 + scale) + shift. Returns (x', h).

    gate, scale and shift may be None as in :func:`gate_residual_` and :func:`rms_modulate`. x' is x itself, overwritten,
    unless gradients are recorded.
    """
    kernels = _kernels(x, y)
    if kernels and _unit_stride(gate, scale, shift):
        return kernels.gate_residual_rms_modulate_(x, y, gate, scale, shift, eps)
    x = gate_residual_(x, y, gate)
    return x, rms_modulate(x, scale, shift, eps)


def gate_residual_rms_modulate_tokens_(x, y, gate, scale, shift, eps, kind):
    """:func:`gate_residual_rms_modulate_` with h in 8 bits: (x', (q [B*T, D], float32 scales [B*T])), or None where no kernel does it.

    kind: "fp8" or "int8". What the next product quantises is written once, and nothing else is.
    """
    kernels = _kernels(x, y)
    if not kernels or not _unit_stride(gate, scale, shift) or not is_plain(x, y, gate, scale, shift):
        return None
    return kernels.gate_residual_rms_modulate_tokens_(x, y, gate, scale, shift, eps, kind)


def rope(x, pe, heads):
    """Rotate the two halves of every head: (x1 cos - x2 sin, x2 cos + x1 sin).

    x [B, T, nh*hd]; pe = (cos, sin), each [B or 1, nh, T, hd/2] float32. Computed in float32, returned in x's dtype.
    """
    cos, sin = (table.transpose(1, 2) for table in pe)  # (B, nh, T, hd/2) -> (B, T, nh, hd/2)
    x1, x2 = x.unflatten(-1, (heads, 2, -1)).unbind(-2)  # (B, T, nh*hd) -> 2 x (B, T, nh, hd/2)
    rotated = torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-2)  # (B, T, nh, 2, hd/2)
    return rotated.flatten(2).to(x.dtype)


def qk_norm_rope(q, k, q_weight, k_weight, pe, heads, eps, k_pe=None):
    """RMS norm with weight over the whole width (all heads together), then RoPE. Returns (q, k).

    q [B, T, nh*hd], k [B, S, nh*hd], weights [nh*hd]; pe: RotaryTable, (cos, sin) or None for no rotation; k_pe is k's own table where it
    differs from q's. The norm comes before the split into heads and before the rotation. q and k belong to this function: it may
    overwrite them and return them.
    """
    kernels = _kernels(q, k)
    if kernels and kernels.can_norm_rope(q, heads, pe, k_pe):
        return kernels.qk_norm_rope(q, k, q_weight, k_weight, pe, heads, eps, k_pe)
    q = F.rms_norm(q, (q.shape[-1],), q_weight, eps)
    k = F.rms_norm(k, (k.shape[-1],), k_weight, eps)
    if pe is None:
        return q, k
    return rope(q, full_tables(pe), heads), rope(k, full_tables(pe if k_pe is None else k_pe), heads)


def full_tables(pe):
    """(cos, sin), each [B or 1, nh, T, hd/2], of a RotaryTable or of the pair itself."""
    return pe.tables if isinstance(pe, RotaryTable) else pe


def head_gate(out, logits):
    """out * 2 * sigmoid(logits), one gate per head. out [B, T, nh*hd], logits [B, T, nh]. A new tensor of out's shape."""
    kernels = _kernels(out)
    if kernels and kernels.can_head_gate(out, logits):
        return kernels.head_gate(out, logits)
    gate = 2.0 * torch.sigmoid(logits)  # zero logits leave the head as it is
    return (out.unflatten(-1, (logits.shape[-1], -1)) * gate.unsqueeze(-1)).flatten(-2)


def gated_linear(module, out, logits):
    """module(head_gate(out, logits)); in fast mode the gate's pass quantises as well."""
    ready = direct.ready(module, out) if direct.is_fast(module) else None
    if ready is not None and ready.kind and is_plain(out, logits):
        kernels = _kernels(out)
        if kernels and kernels.can_head_gate(out, logits):
            return direct.fast_product(ready, kernels.head_gate_tokens(out, logits, ready.kind), out)
    return linear(module, head_gate(out, logits))


def linear(module, x):
    """module(x) for a linear layer; a packed weight on the GPU is multiplied without the module's and the tensor's detours."""
    ready = direct.ready(module, x)
    return module(x) if ready is None else direct.product(ready, x)


def linears(modules, x):
    """[module(x) for each linear layer], all on the same x; in fast mode x is quantised once."""
    ready = [direct.ready(module, x) for module in modules]
    first = ready[0]
    if first is not None and first.kind and all(r is not None and r.kind == first.kind for r in ready):
        return direct.fast_products(ready, x)
    return [module(x) if r is None else direct.product(r, x) for module, r in zip(modules, ready)]


def linear_gelu(module, x):
    """gelu_tanh(module(x)) for a linear layer (its hooks, LoRA and offloading stay in effect).

    On NVIDIA GPUs the GELU rides in the product's epilogue when the module is a plain product with its own weight.
    """
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(module(x), approximate="tanh")
    ready = direct.ready(module, x)
    y = None if ready is None else direct.product_gelu(ready, x)
    if y is not None:
        return y
    if _is_dense(module, x):
        return linear_gpu.linear_gelu(x, module.weight, module.bias)
    if not direct.is_patched(module) or (getattr(module, "changes_only_its_weight", False) and not direct.is_replaced(module)):
        with linear_gpu.following_gelu() as gelu:
            y = linear(module, x)
        if gelu.applied:
            return y
    else:
        y = module(x)
    kernels = _kernels(y, width_limit=None)
    return kernels.gelu_(y) if kernels else F.gelu(y, approximate="tanh")


def fast_pair(inner, outer, x):
    """The products of two linear layers that follow each other, both in fast mode and of one kind; else None."""
    first = direct.ready(inner, x) if direct.is_fast(inner) else None
    if first is None or not first.kind:
        return None
    second = direct.ready(outer, x, first.shape[0])
    return (first, second) if second is not None and second.kind == first.kind else None


def feed_forward(inner, outer, x):
    """outer(gelu_tanh(inner(x))) for two linear layers. x [B, T, D]. In fast mode GELU and quantisation are one pass."""
    pair = fast_pair(inner, outer, x)
    return linear(outer, linear_gelu(inner, x)) if pair is None else direct.fast_feed_forward(*pair, x)


def _is_dense(linear, x):
    """Whether the module is x W^T + b with ordinary tensors, ready on x's device in x's type."""
    weight, bias = linear.weight, linear.bias
    ready = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device == x.device and weight.dtype == x.dtype
    return ready and linear_gpu.can_fuse_gelu(x, bias) and bias.device == x.device and x.numel() > x.shape[-1] and not direct.is_patched(linear)
