"""The DiT's fused ops, one function per group of element-wise operations that a kernel can do in one sweep, and its linear layers.

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

from ...quant import matmul
from ...quant.eight_bit import Quantized
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
        if (
            not t.is_contiguous()
            or t.dtype not in _TRITON_DTYPES
            or (width_limit is not None and t.shape[-1] > width_limit)
        ):
            return None
    return _module()


def _module():
    """``transformer.triton_fused``, imported on first use."""
    global _module
    from . import triton_fused

    _module = lambda: triton_fused
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


def gate_residual_rms_modulate_(x, y, gate, scale, shift, eps, quantize=None):
    """x' = x + y * gate, then h = rms(x') * (1 + scale) + shift. Returns (x', h).

    gate, scale and shift may be None as in :func:`gate_residual_` and :func:`rms_modulate`. x' is x itself, overwritten,
    unless gradients are recorded. quantize: the kind (:func:`eight_bit_kind`) in which h is made, as ``Quantized``.
    """
    kernels = _kernels(x, y)
    if kernels and _unit_stride(gate, scale, shift):
        return kernels.gate_residual_rms_modulate_(x, y, gate, scale, shift, eps, quantize)
    x = gate_residual_(x, y, gate)
    return x, rms_modulate(x, scale, shift, eps)


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


def head_gate(out, logits, quantize=None):
    """out * 2 * sigmoid(logits), one gate per head. out [B, T, nh*hd], logits [B, T, nh]. A new tensor of out's shape.

    quantize: as for :func:`gate_residual_rms_modulate_`.
    """
    kernels = _kernels(out)
    if kernels and kernels.can_head_gate(out, logits):
        return kernels.head_gate(out, logits, quantize)
    gate = 2.0 * torch.sigmoid(logits)  # zero logits leave the head as it is
    return (out.unflatten(-1, (logits.shape[-1], -1)) * gate.unsqueeze(-1)).flatten(-2)


def is_replaced(module):
    """Whether calling the module may do more than its own forward: hooks, or a forward put on it."""
    state = module.__dict__
    return bool("forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"])


def untouched(module):
    """Whether calling the module is the same as computing with its weight: nothing hooks, replaces or patches it.

    The host's offloading and LoRA hang ``weight_function`` and others on a module; with its dynamic memory (``_v``) a weight comes to
    the device inside the call.
    """
    state = module.__dict__
    return not (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state.get("weight_function")
        or state.get("bias_function")
        or state.get("weight_lowvram_function")
        or "_v" in state
    )


def _ready(module, x):
    """(weight, bias) of a linear layer whose call would do no more than multiply x with them where they lie; else None.

    The call itself, the tensor's dispatch and the table of backends take some fifty microseconds of Python per layer, more than a product
    of a thousand tokens takes. A class other than ``torch.nn.Linear`` takes part when it sets ``plain_product = True``.
    """
    if (
        torch.compiler.is_compiling() or torch.is_grad_enabled()
    ):  # first: a compiler cannot follow the attributes read below
        return None
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    kind = type(module)
    if (
        weight is None
        or (kind is not torch.nn.Linear and not getattr(kind, "plain_product", False))
        or not untouched(module)
    ):
        return None
    return (weight, bias) if matmul.meets(x, weight, bias) else None


def eight_bit_kind(module, x):
    """The kind of 8-bit product of a linear layer with an x like this, which the operation that makes x may then quantise; None for an exact one."""
    if (
        torch.compiler.is_compiling() or torch.is_grad_enabled()
    ):  # first: a compiler cannot follow the attributes read below
        return None
    params = getattr(module._parameters.get("weight"), "__dict__", {}).get("_params")
    if getattr(params, "compute", "exact") == "exact" or not _kernels(x) or not is_plain(x):
        return None
    ready = _ready(module, x)
    return None if ready is None else matmul.eight_bit_kind(x, *ready)


def linear(module, x):
    """module(x) for a linear layer; a weight that is ready is multiplied without the module's and the tensor's detours. x may be ``Quantized``."""
    if type(x) is Quantized:
        return matmul.linear_quantized(x, module.weight, module.bias)
    ready = _ready(module, x)
    return module(x) if ready is None else matmul.linear(x, *ready)


def linears(modules, x):
    """[module(x) for each linear layer], all on the same x; in fast mode x is quantised once."""
    ready = [_ready(module, x) for module in modules]
    if None in ready:
        return [module(x) if layer is None else matmul.linear(x, *layer) for module, layer in zip(modules, ready)]
    return matmul.linears(x, ready)


def linear_gelu(module, x):
    """gelu_tanh(module(x)) for a linear layer (its hooks, LoRA and offloading stay in effect).

    A layer class whose forward takes ``gelu=True`` says so by ``takes_gelu = True``.
    """
    if type(x) is Quantized:
        return matmul.linear_quantized(x, module.weight, module.bias, gelu=True)
    ready = _ready(module, x)
    if ready is not None:
        return matmul.linear(x, *ready, gelu=True)
    if getattr(type(module), "takes_gelu", False) and not is_replaced(module):
        return module(x, gelu=True)
    return F.gelu(module(x), approximate="tanh")
