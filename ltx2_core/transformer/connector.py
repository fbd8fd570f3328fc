"""The embeddings connector: text features in, the DiT's context out.

The features of the real tokens come first, in order; every position p behind them, up to 1024 (or the next multiple of the
register count for longer texts), holds learnable register ``p mod R``, indexed by absolute position. A few transformer blocks
with one-dimensional RoPE then let tokens and registers see each other without any mask, and the DiT attends to all of them.

Source: Lightricks/LTX-2 ``ltx_core/text_encoders/gemma/embeddings_connector.py``.
"""

import torch
from torch import nn

from .layers import Attention, FeedForward, rms_norm
from .rope import rotary_table

CONTEXT_TOKENS = 1024


class TransformerBlock1D(nn.Module):
    """x + attn1(rms(x)), then x + ff(rms(x)); no modulation."""

    def __init__(self, config, dtype=None, device=None, operations=nn, attention=None):
        super().__init__()
        kw = {"dtype": dtype, "device": device, "operations": operations}
        self.eps = config.norm_eps
        self.attn1 = Attention(
            config.inner_dim, heads=config.num_attention_heads, dim_head=config.attention_head_dim,
            apply_gated_attention=config.apply_gated_attention, attention=attention, **kw,
        )  # fmt: skip
        self.ff = FeedForward(config.inner_dim, config.ff_dim, **kw)

    def forward(self, hidden_states, attention_mask=None, pe=None):
        """[B, S, Dc] -> [B, S, Dc]."""
        hidden_states = hidden_states + self.attn1(rms_norm(hidden_states, self.eps), mask=attention_mask, pe=pe)
        return hidden_states + self.ff(rms_norm(hidden_states, self.eps))


class Embeddings1DConnector(nn.Module):
    """Text features [B, n, Dc] -> context [B, S, Dc], S = max(1024, n rounded up to whole sets of registers)."""

    def __init__(self, config, dtype=None, device=None, operations=nn, attention=None):
        super().__init__()
        self.config = config
        self.num_learnable_registers = config.num_learnable_registers
        self.learnable_registers = nn.Parameter(
            torch.empty(config.num_learnable_registers, config.inner_dim, dtype=dtype, device=device)
        )
        self.transformer_1d_blocks = nn.ModuleList(
            TransformerBlock1D(config, dtype=dtype, device=device, operations=operations, attention=attention)
            for _ in range(config.num_layers)
        )
        self._table = (None, None)  # (tokens, device) and its RotaryTable

    def forward(self, features, attention_mask=None):
        """features [B, n, Dc] -> (context [B, S, Dc], mask).

        attention_mask [B, n], non-zero at real tokens (None: all are real), on whichever side the padding is; each row's real
        tokens are moved to the front. The returned mask is [B, S], all ones: registers take part like tokens.
        """
        x = self._fill_with_registers(features, attention_mask)  # (B, n, Dc) -> (B, S, Dc)
        table = self._rotary_table(x.shape[1], x.device)
        for block in self.transformer_1d_blocks:
            x = block(x, pe=table)
        return rms_norm(x, self.config.norm_eps), torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)

    def _fill_with_registers(self, features, attention_mask):
        batch, n, _ = features.shape
        registers = self.learnable_registers.to(features)  # (R, Dc)
        sets = -(-max(CONTEXT_TOKENS, n) // registers.shape[0])
        filled = registers.repeat(sets, 1).expand(batch, -1, -1)  # (R, Dc) -> (B, S, Dc)
        if attention_mask is None:
            return torch.cat((features, filled[:, n:]), dim=1)
        real = attention_mask.reshape(batch, n) != 0
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)  # real tokens first, their order kept
        front = features.gather(1, order.unsqueeze(-1).expand_as(features))
        is_text = torch.arange(n, device=features.device) < real.sum(dim=1, keepdim=True)  # (B, n)
        return torch.cat((torch.where(is_text.unsqueeze(-1), front, filled[:, :n]), filled[:, n:]), dim=1)

    def _rotary_table(self, tokens, device):
        key = (tokens, device)
        if self._table[0] != key:
            positions = torch.arange(tokens, dtype=torch.float32).view(1, 1, -1)
            config = self.config
            table = rotary_table(
                positions,
                (config.rope_max_pos,),
                config.inner_dim,
                config.num_attention_heads,
                config.rope_theta,
                device,
            )
            self._table = (key, table)
        return self._table[1]
