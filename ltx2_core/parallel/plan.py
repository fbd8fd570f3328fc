"""How the ranks of a run are used: groups of ranks for the passes of guidance, and sequence parallelism within a group.

Every rank holds the whole model. A step has P passes (conditional, negative, perturbed, ...), each over T tokens. With g groups of n = N / g ranks, a group runs ceil(P / g)
passes one after the other, each split over its n ranks. Splitting a pass costs communication, running passes side by side does not, but leaves ranks idle when g does not
divide P. The plan is the g with the least estimated time. Standard library only.
"""

import math
from dataclasses import dataclass, replace

MATMUL_FLOPS = 600e12  # of a rank, half precision; only its ratio to LINK_BYTES matters
LINK_BYTES = 150e9  # a rank sends per second: NVLink with some loss; PCIe is 20e9


@dataclass(frozen=True)
class Work:
    """One pass of a network: ``tokens`` of ``width``, ``heads`` per attention, ``layers`` blocks, ``parameters`` in the blocks, ``element`` bytes per number."""

    tokens: int
    width: int
    heads: int
    layers: int
    parameters: int
    element: int = 2

    def flops(self) -> float:
        """Multiplications and additions of the blocks' products and self-attention."""
        return 2.0 * self.tokens * self.parameters + 4.0 * self.layers * self.tokens**2 * self.width


def work_of(model, tokens: int) -> Work:
    """The work of one pass of an ``LTX2Model`` over so many video tokens."""
    parameters = sum(p.numel() for p in model.transformer_blocks.parameters())
    return Work(
        tokens,
        model.inner_dim,
        model.num_attention_heads,
        len(model.transformer_blocks),
        parameters,
        model.dtype.itemsize,
    )


@dataclass(frozen=True)
class Plan:
    """``groups`` groups of ``ranks`` ranks; ``seconds``: the estimate of a step's time on MATMUL_FLOPS and LINK_BYTES."""

    work: Work
    passes: int
    groups: int
    ranks: int
    seconds: float

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a rank, the padding of the last one included."""
        return -(-self.work.tokens // self.ranks)

    def bytes_per_block(self) -> int:
        """Bytes that one rank sends to the others of its group for one block of one pass: q, k, v there and the result back."""
        per_pair = 4 * self.tokens_per_rank * (self.work.width // self.ranks) * self.work.element
        return per_pair * (self.ranks - 1)

    def text(self) -> str:
        """The plan in words, a fact a line."""
        w, total = self.work, self.groups * self.ranks
        lines = [f"{total} ranks, {self.passes} pass{'es' if self.passes > 1 else ''} per step over {w.tokens} tokens."]
        if self.groups > 1:
            lines.append(
                f"{self.groups} groups of {self.ranks}: each group runs {-(-self.passes // self.groups)} of the passes."
            )
        if self.ranks > 1:
            padding = self.tokens_per_rank * self.ranks - w.tokens
            lines.append(
                f"Each pass is split over {self.ranks} ranks, {self.tokens_per_rank} tokens each ({padding} of padding in all)."
            )
            lines.append(
                f"A rank sends {self.bytes_per_block() / 2**20:.1f} MiB per block and pass (limit 4 x tokens x width x {w.element} bytes = "
                f"{4 * w.tokens * w.width * w.element / 2**20:.1f} MiB), {w.layers * self.bytes_per_block() / 2**30:.2f} GiB per pass."
            )
        lines.append(f"Estimated {single(w, self.passes) / self.seconds:.2f} times one rank.")
        return "\n".join(lines)


def single(work: Work, passes: int) -> float:
    """Seconds of a step on one rank."""
    return passes * work.flops() / MATMUL_FLOPS


def planned(work: Work, passes: int, groups: int, ranks: int, link_bytes: float = LINK_BYTES) -> Plan:
    """The plan of ``groups`` groups of ``ranks`` ranks, with its estimate."""
    found = Plan(work, passes, groups, ranks, 0.0)
    compute = work.flops() * found.tokens_per_rank / work.tokens / MATMUL_FLOPS
    seconds = math.ceil(passes / groups) * (compute + work.layers * found.bytes_per_block() / link_bytes)
    return replace(found, seconds=seconds)


def plan(work: Work, passes: int, ranks: int, link_bytes: float = LINK_BYTES) -> Plan:
    """The fastest use of ``ranks`` ranks for a step of ``passes`` passes. Raises ValueError when the heads can't be dealt to any split.

    Ties go to more groups: they send less.
    """
    groups = [
        g for g in range(1, ranks + 1) if ranks % g == 0 and g <= max(1, passes) and work.heads % (ranks // g) == 0
    ]
    if not groups:
        raise ValueError(
            f"{ranks} processes can't share {work.heads} attention heads; use a number of processes that divides {work.heads}."
        )
    found = [planned(work, passes, g, ranks // g, link_bytes) for g in groups]
    return min(found, key=lambda p: (round(p.seconds, 12), -p.groups))
