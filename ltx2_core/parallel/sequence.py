"""Ulysses sequence parallelism: every rank has a run of the video's tokens, and attention swaps heads for tokens.

Norms, projections, feed-forward and modulation work on a token alone, so a rank computes them for its own tokens. Self-attention needs all tokens, but its heads do not need each
other: one all-to-all turns [own tokens, all heads] of q, k and v into [all tokens, own heads], attention runs as always, and a second one turns the result back. Text
cross-attention needs no exchange: the text is whole on every rank. Tokens that do not divide are padded behind the last one; the padding is cut off before attention, so
results are those of one process.

Source of the method: Jacobs et al., "DeepSpeed Ulysses" (arXiv 2309.14509).
"""

import torch
import torch.distributed as dist

from ..transformer.guides import grouped_attention
from ..transformer.modulation import Modulation
from ..transformer.rope import RotaryTable


class SequenceParallel:
    """One group of ranks that compute a pass together.

    group: a torch.distributed process group, every rank of which runs the same calls. ``sent`` counts the bytes this rank has sent to others in all-to-alls, ``gathered``
    those it has sent when results were put together.
    """

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.tokens = 0
        self.sent = self.gathered = 0

    def begin(self, tokens: int) -> None:
        """A pass over this many tokens begins."""
        self.tokens = tokens

    @property
    def count(self) -> int:
        """Tokens per rank, padding included."""
        return -(-self.tokens // self.size)

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's tokens of a tensor whose axis ``dim`` has all of them; zeros where the padding is."""
        first = min(self.rank * self.count, self.tokens)
        own = x.narrow(dim, first, min(self.count, self.tokens - first))
        missing = self.count - own.shape[dim]
        if missing:
            own = torch.cat((own, own.new_zeros(*own.shape[:dim], missing, *own.shape[dim + 1 :])), dim=dim)
        return own.contiguous()

    def shard_rotary(self, table: RotaryTable) -> RotaryTable:
        """The table of this rank's tokens."""
        return RotaryTable(table.rows, self.shard(table.index), table.pad, table.heads)

    def shard_modulation(self, m: Modulation) -> Modulation:
        """The rows of this rank's tokens: one row for all stays one row, rows per frame become an index per token."""
        if m.index is not None:
            return Modulation(m.data, self.count, self.shard(m.index))
        batch, rows = m.data.shape[:2]
        if rows == 1:
            return Modulation(m.data, self.count)
        frame = torch.arange(self.tokens, device=m.data.device) // (self.tokens // rows)
        index = frame + rows * torch.arange(batch, device=m.data.device)[:, None]  # (B, T)
        return Modulation(m.data.flatten(0, 1).unsqueeze(0), self.count, self.shard(index))

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[B, own tokens, C] of every rank -> [B, T, C], the same on every rank."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        self.gathered += x.nbytes * (self.size - 1)
        return torch.cat(parts, dim=1)[:, : self.tokens]

    def to_heads(self, tensors) -> list[torch.Tensor]:
        """Each [B, own tokens, nh*hd] -> [B, T, own heads * hd], all in one exchange."""
        batch, count, width = tensors[0].shape
        x = torch.stack([t.unflatten(-1, (self.size, -1)) for t in tensors])  # (K, B, t, N, nh*hd/N)
        x = self._exchange(x.permute(3, 0, 1, 2, 4))  # (N, K, B, t, nh*hd/N): rank r's tokens in row r
        x = x.permute(1, 2, 0, 3, 4).reshape(len(tensors), batch, self.size * count, width // self.size)
        return [t[:, : self.tokens] for t in x]

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, own heads * hd] -> [B, own tokens, nh*hd]."""
        missing = self.size * self.count - x.shape[1]
        if missing:
            x = torch.cat((x, x.new_zeros(x.shape[0], missing, x.shape[2])), dim=1)
        x = self._exchange(
            x.unflatten(1, (self.size, self.count)).transpose(0, 1)
        )  # (N, B, t, nh*hd/N): heads of rank r in row r
        return x.permute(1, 2, 0, 3).flatten(2)

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        """Row r of x goes to rank r; row r of the result came from it."""
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=self.group)
        self.sent += x.nbytes // self.size * (self.size - 1)
        return out


class ParallelAttention:
    """Self-attention over the tokens of all ranks, in the place of an ``Attention``'s function (see ``transformer.layers.sdpa``)."""

    takes_guides = True  # a GuideAttentionMask speaks of all tokens, which are together only after the exchange

    def __init__(self, parallel: SequenceParallel, attention):
        self.parallel, self.attention = parallel, attention

    def __call__(self, q, k, v, heads, mask=None, transformer_options=None):
        """q, k, v [B, own tokens, nh*hd] -> [B, own tokens, nh*hd]."""
        q, k, v = self.parallel.to_heads((q, k, v))
        out = grouped_attention(self.attention, q, k, v, heads // self.parallel.size, mask, transformer_options)
        return self.parallel.to_tokens(out)


def split_tokens(model, parallel: SequenceParallel | None) -> SequenceParallel | None:
    """From now on every pass of ``model`` is computed by all ranks of the group together (None: by this process alone); returns ``parallel``.

    Raises ValueError when the heads can't be dealt out.
    """
    heads = model.num_attention_heads
    if parallel is not None and heads % parallel.size:
        raise ValueError(
            f"{parallel.size} processes can't share {heads} attention heads; use a number of processes that divides {heads}."
        )
    model.sequence_parallel = parallel
    for block in model.transformer_blocks:
        attention = block.attn1.attention
        if isinstance(attention, ParallelAttention):
            attention = attention.attention
        block.attn1.attention = attention if parallel is None else ParallelAttention(parallel, attention)
    return parallel
