"""Gemma's element-wise passes, one function per group of operations that a kernel can do in one sweep.

The torch code below is the definition. On a GPU that Triton reaches, ordinary tensors go to ``text/triton_gemma.py``, with the same
arguments and results, where the norms are plain weights on the activations' device; everything in them is float32, as it is here.

Letters: n tokens, D width, nh query heads, nkv key/value heads, hd head width.

Source of the formulas: transformers ``models/gemma3/modeling_gemma3.py``.
"""

import functools

import torch
import torch.nn.functional as F

from ...quant.tracing import is_plain
from ..transformer import fused


def _kernels(x, *norms):
    """The module of Triton kernels if x and the weights of these norms can go to it, else None."""
    if (
        not fused._HAS_TRITON
        or x.device.type not in fused._TRITON_DEVICES
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
    ):
        return None
    if type(x) is not torch.Tensor or not x.numel() or x.dtype not in fused._TRITON_DTYPES:
        return None
    for norm in norms:
        weight = norm.weight
        if not fused.untouched(norm) or weight.device != x.device or not is_plain(weight) or not weight.is_contiguous():
            return None
    return _module()


@functools.cache
def _module():
    """``text.triton_gemma``, imported on first use."""
    from . import triton_gemma

    return triton_gemma


def norm(module, x, dtype):
    """module(x) in ``dtype`` for an RMS norm with weight. x [B, n, D] float32."""
    kernels = _kernels(x, module)
    if kernels and x.is_contiguous():
        return kernels.add_norm(x, None, None, module, dtype, None)[1]
    return module(x).to(dtype)


def add_norm(x, h, post, following, dtype, overwrite=False):
    """x' = x + post(h), then following(x') in ``dtype`` (None without ``following``). Returns (x', that).

    x [B, n, D] float32, h [B, n, D]; post, following: RMS norms with weight. overwrite: x' may be x itself.
    """
    norms = (post,) if following is None else (post, following)
    kernels = _kernels(x, *norms)
    if kernels and x.is_contiguous() and h.is_contiguous() and h.device == x.device:
        return kernels.add_norm(x, h, post, following, dtype, x if overwrite else torch.empty_like(x))
    x = x + post(h.float())
    return x, None if following is None else following(x).to(dtype)


def rotate(x, cos, sin):
    """Rotate the pairs (x_j, x_{j + hd/2}) of x [B, heads, n, hd] by the angles of ``gemma.rope_table``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def heads(y, head_dim):
    """[B, n, heads*hd] -> [B, heads, n, hd], a view."""
    return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def norm_rope(q, k, q_norm, k_norm, rope):
    """RMS norm of every head, then rotation: q [B, n, nh*hd], k [B, n, nkv*hd] -> [B, nh, n, hd], [B, nkv, n, hd], dtype kept.

    rope: (cos, sin), each [n, hd/2] float32. q and k belong to this function: it may overwrite them and return views of them.
    """
    head_dim = 2 * rope[0].shape[-1]
    kernels = _kernels(q, q_norm, k_norm)
    if kernels and kernels.can_norm_rope(q, k, rope):
        kernels.norm_rope_(q, k, q_norm, k_norm, rope)
        return heads(q, head_dim), heads(k, head_dim)
    q, k = (rotate(norm(heads(y, head_dim).float()), *rope).to(y.dtype) for y, norm in ((q, q_norm), (k, k_norm)))
    return q, k


def value_norm(v, eps):
    """RMS norm without weight of every head of v [B, nkv, n, hd], dtype kept. A new tensor."""
    return F.rms_norm(v.float(), (v.shape[-1],), eps=eps).to(v.dtype)


def attention(q, k, v, mask, scale):
    """softmax(q k^T scale) v. q [B, nh, n, hd], k and v [B, nkv, keys, hd] -> [B, n, nh*hd].

    mask: [n, keys] bool; None is causal attention with n = keys.
    """
    groups, n = q.shape[1] // k.shape[1], q.shape[2]
    if n == 1:  # the queries of a group are rows that look at the same keys
        out = F.scaled_dot_product_attention(q.unflatten(1, (-1, groups)).squeeze(3), k, v, attn_mask=mask, scale=scale)
        return out.flatten(1).unsqueeze(1)  # (B, nkv, groups, hd) -> (B, 1, nh*hd)
    grouped = groups > 1 and mask is None and q.is_cuda and torch.version.cuda is not None and q.dtype != torch.float32
    if groups > 1 and not grouped:  # spelled out: not every device's attention takes grouped queries
        k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))  # (B, nkv, n, hd) -> (B, nh, n, hd)
    more = {"enable_gqa": True} if grouped else {}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, **more)
    return out.transpose(1, 2).flatten(2)


def geglu(gate, up):
    """gelu_tanh(gate) * up. Both [B, n, F]; ``gate`` belongs to this function."""
    kernels = _kernels(gate)
    if kernels and gate.is_contiguous() and up.is_contiguous() and up.dtype == gate.dtype and type(up) is torch.Tensor:
        return kernels.geglu_(gate, up)
    return F.gelu(gate, approximate="tanh") * up
