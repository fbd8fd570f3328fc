"""A short stand-in for the connector's 1024 tokens, for most of the training.

A caption fills a dozen of the context's 1024 positions; the rest are eight copies of 128 registers that differ only in where they
stand. Training on one copy of each, drawn anew every step and counted eight times (log 8 added to its attention logits, in the
connector and in the DiT), costs a seventh and is an estimate of the same sums. The end of the training sees all 1024.
"""

import math

import torch

from . import pack  # noqa: F401
from ltx2_gguf.ltx2_core.connector import CONTEXT_TOKENS
from ltx2_gguf.ltx2_core.layers import rms_norm

HIDDEN = -1e4  # logit bias of a position without a token


def short_context(toy, z, real, copies=None):
    """Whitened features z [B, n, r], mask [B, n] (real tokens first) -> (context [B, n + R, D], bias [B, 1, 1, n + R]).

    copies: int64 [R], which copy of each register stands for all (drawn when None).
    """
    connector = toy.dit.video_embeddings_connector
    registers = connector.learnable_registers
    batch, n, _ = z.shape
    count, device = registers.shape[0], z.device
    sets = CONTEXT_TOKENS // count
    if copies is None:
        copies = torch.randint(1, sets, (count,), device=device)  # not the first: text stands there
    features = toy.projection(z.to(toy.projection.weight.dtype))
    x = torch.cat((features, registers.to(features).expand(batch, -1, -1)), dim=1)
    positions = torch.cat((torch.arange(n, device=device), torch.arange(count, device=device) + count * copies))
    table = tuple(t[:, :, positions] for t in connector._rotary_table(CONTEXT_TOKENS, device).tables)
    text_bias = torch.where(real, 0.0, HIDDEN)
    register_bias = torch.full((batch, count), math.log(sets), device=device)
    bias = torch.cat((text_bias, register_bias), dim=1).to(x.dtype)[:, None, None]
    for block in connector.transformer_1d_blocks:
        x = block(x, attention_mask=bias, pe=table)
    return rms_norm(x, connector.config.norm_eps), bias
