"""Building blocks of the transformer: attention, feed-forward, timestep embedding, text projection.

Names of parameters and call signatures are those of the checkpoint and of the host's own LTX classes, so that weights load by
name and code that replaces ``attn2.forward`` or ``ff.forward`` on a module finds what it expects. Every class takes
``operations``, a namespace with ``Linear`` and ``RMSNorm`` (``torch.nn``, or the host's).

Source: Lightricks/LTX-2 ``ltx_core/model/transformer/{attention,feed_forward,adaln,timestep_embedding,text_projection}.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from . import fused
from .config import NORM_EPS, QK_NORM_EPS
from .fused import untouched
from .guides import grouped_attention

TIMESTEP_CHANNELS = 256
VALUES_ONLY = "stg_skip_self_attn"  # the host's transformer_options key: self-attention returns its values (spatio-temporal guidance)
FF_CHUNK_TOKENS = 16384  # rows of the feed-forward's inner activation held at once


def sdpa(q, k, v, heads, mask=None, transformer_options=None):
    """Scaled dot-product attention. q [B, T, nh*hd], k and v [B, S, nh*hd] -> [B, T, nh*hd]; mask is added to the logits.

    ``transformer_options`` is accepted because the host's attention functions take it; plain SDPA has no options.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, T, nh*hd) -> (B, nh, T, hd)
    if mask is not None:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(hd)) v with q, k RMS-normed over the full width, optional RoPE and optional per-head output gates.

    ``attention`` is the function that computes softmax(q k^T) v (see :func:`sdpa` for its signature).
    """

    def __init__(self, query_dim, context_dim=None, heads=32, dim_head=128, apply_gated_attention=False, eps=QK_NORM_EPS,
                 dtype=None, device=None, operations=nn, attention=None):  # fmt: skip
        super().__init__()
        inner = heads * dim_head
        kw = {"dtype": dtype, "device": device}
        self.heads, self.dim_head, self.eps = heads, dim_head, eps
        self.attn_precision = None  # read by code written for the host's class
        self.attention = attention or sdpa
        self.q_norm = operations.RMSNorm(inner, eps=eps, **kw)
        self.k_norm = operations.RMSNorm(inner, eps=eps, **kw)
        self.to_q = operations.Linear(query_dim, inner, bias=True, **kw)
        self.to_k = operations.Linear(context_dim or query_dim, inner, bias=True, **kw)
        self.to_v = operations.Linear(context_dim or query_dim, inner, bias=True, **kw)
        self.to_gate_logits = operations.Linear(query_dim, heads, bias=True, **kw) if apply_gated_attention else None
        self.to_out = nn.Sequential(operations.Linear(inner, query_dim, bias=True, **kw))

    def forward(self, x, context=None, mask=None, pe=None, k_pe=None, transformer_options=None):
        """x [B, T, query_dim], context [B, S, context_dim] (None: x itself) -> [B, T, query_dim].

        mask: additive bias broadcastable to [B, nh, T, S], or a GuideAttentionMask. pe, k_pe: RotaryTable or (cos, sin) pair;
        k_pe defaults to pe.
        """
        if context is None and transformer_options and transformer_options.get(VALUES_ONLY):
            out = self.to_v(x)  # each token keeps its own value; queries, keys and softmax do not matter
        else:
            if context is None:
                q, k, v = fused.linears((self.to_q, self.to_k, self.to_v), x)  # (B, T, Dq) -> 3 x (B, T, nh*hd)
            else:
                q = fused.linear(self.to_q, x)
                k, v = fused.linears((self.to_k, self.to_v), context)  # (B, S, Dc) -> 2 x (B, S, nh*hd)
            q, k = self._normed_rotated(q, k, pe, k_pe)
            out = self._attend(q, k, v, mask, transformer_options)  # (B, T, nh*hd)
        direct = untouched(self.to_out)
        if self.to_gate_logits is not None:
            quantize = fused.eight_bit_kind(self.to_out[0], out) if direct else None
            out = fused.head_gate(out, self.to_gate_logits(x), quantize)  # (B, T, nh*hd), logits (B, T, nh)
        return fused.linear(self.to_out[0], out) if direct else self.to_out(out)

    def _normed_rotated(self, q, k, pe, k_pe):
        """RMS norms and rotation, in one pass where the norms are plain weights on q's device."""
        norms = (self.q_norm, self.k_norm)
        if all(untouched(norm) and norm.weight.device == q.device for norm in norms):
            weights = (norm.weight.to(q.dtype) for norm in norms)
            return fused.qk_norm_rope(q, k, *weights, pe, self.heads, self.eps, k_pe)
        q, k = self.q_norm(q), self.k_norm(k)
        if pe is None:
            return q, k
        return fused.rope(q, fused.full_tables(pe), self.heads), fused.rope(
            k, fused.full_tables(pe if k_pe is None else k_pe), self.heads
        )

    def _attend(self, q, k, v, mask, transformer_options):
        if getattr(self.attention, "takes_guides", False):
            return self.attention(q, k, v, self.heads, mask=mask, transformer_options=transformer_options)
        return grouped_attention(self.attention, q, k, v, self.heads, mask, transformer_options)


class GELUProjection(nn.Module):
    """gelu_tanh(proj(x))."""

    def __init__(self, dim_in, dim_out, dtype=None, device=None, operations=nn):
        super().__init__()
        self.proj = operations.Linear(dim_in, dim_out, bias=True, dtype=dtype, device=device)

    def forward(self, x):
        """[B, T, dim_in] -> [B, T, dim_out]."""
        return fused.linear_gelu(self.proj, x)


class FeedForward(nn.Module):
    """net.2(gelu_tanh(net.0.proj(x))), in chunks of ``chunk_tokens`` tokens."""

    def __init__(self, dim, inner_dim, dtype=None, device=None, operations=nn):
        super().__init__()
        kw = {"dtype": dtype, "device": device, "operations": operations}
        # The middle entry keeps the checkpoint's numbering (a dropout stood there in training).
        self.net = nn.Sequential(
            GELUProjection(dim, inner_dim, **kw),
            nn.Identity(),
            operations.Linear(inner_dim, dim, bias=True, dtype=dtype, device=device),
        )
        self.chunk_tokens = FF_CHUNK_TOKENS

    def quantizes(self, x):
        """The kind of 8-bit values in which :meth:`forward` takes an x like this [B, T, D], or None: then it takes x itself."""
        if x.shape[1] > self.chunk_tokens or not all(map(untouched, (self, self.net, self.net[0]))):
            return None
        return fused.eight_bit_kind(self.net[0].proj, x)

    def forward(self, x):
        """[B, T, D], or what :meth:`quantizes` names -> [B, T, D]."""
        if x.shape[1] <= self.chunk_tokens:
            return self._chunk(x)
        return torch.cat([self._chunk(part) for part in x.split(self.chunk_tokens, dim=1)], dim=1)

    def _chunk(self, x):
        if untouched(self.net) and untouched(self.net[0]):
            return fused.linear(self.net[2], fused.linear_gelu(self.net[0].proj, x))
        return self.net(x)


def quantizes(ff, x):
    """:meth:`FeedForward.quantizes` where ff is this pack's own class; something else takes x itself."""
    return ff.quantizes(x) if type(ff) is FeedForward else None


def timestep_sinusoid(timesteps, channels=TIMESTEP_CHANNELS):
    """[cos(t f), sin(t f)] with f_i = 10000^(-i / (channels/2)). timesteps [N] float32 (0 … 1000) -> [N, channels] float32."""
    half = channels // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """linear_2(silu(linear_1(x)))."""

    def __init__(self, channels, dim, dtype=None, device=None, operations=nn):
        super().__init__()
        self.linear_1 = operations.Linear(channels, dim, bias=True, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(dim, dim, bias=True, dtype=dtype, device=device)

    def forward(self, x):
        """[N, channels] -> [N, D]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class CombinedTimestepEmbedding(nn.Module):
    """Holds ``timestep_embedder`` one level down, where the checkpoint has it (``emb.timestep_embedder``)."""

    def __init__(self, dim, dtype=None, device=None, operations=nn):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(
            TIMESTEP_CHANNELS, dim, dtype=dtype, device=device, operations=operations
        )

    def forward(self, timestep, hidden_dtype):
        """Scaled timesteps [N] float32 -> [N, D] in hidden_dtype. The sinusoid is float32: 993.75 has no bfloat16."""
        return self.timestep_embedder(timestep_sinusoid(timestep).to(hidden_dtype))


class AdaLayerNormSingle(nn.Module):
    """Timestep -> modulation rows shared by all blocks: linear(silu(emb(t)))."""

    def __init__(self, dim, rows, dtype=None, device=None, operations=nn):
        super().__init__()
        self.emb = CombinedTimestepEmbedding(dim, dtype=dtype, device=device, operations=operations)
        self.linear = operations.Linear(dim, rows * dim, bias=True, dtype=dtype, device=device)

    def forward(self, timestep, hidden_dtype):
        """Scaled timesteps [N] float32 -> (modulation [N, rows*D], embedding [N, D] before the SiLU)."""
        embedded = self.emb(timestep, hidden_dtype)
        return self.linear(F.silu(embedded)), embedded


class CaptionProjection(nn.Module):
    """linear_2(gelu_tanh(linear_1(x))): context width to DiT width, inside the DiT (2.0 only)."""

    def __init__(self, in_features, hidden_size, dtype=None, device=None, operations=nn):
        super().__init__()
        self.linear_1 = operations.Linear(in_features, hidden_size, bias=True, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(hidden_size, hidden_size, bias=True, dtype=dtype, device=device)

    def forward(self, caption):
        """[B, S, in_features] -> [B, S, D]."""
        return self.linear_2(fused.linear_gelu(self.linear_1, caption))


def rms_norm(x, eps=NORM_EPS):
    """x / sqrt(mean(x^2) + eps) over the last axis, without weight."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)
