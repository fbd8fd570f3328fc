"""The ranks of a run: who computes which pass, and how results meet.

Started by ``torchrun`` (or ``launch.py``), which sets RANK, WORLD_SIZE, LOCAL_RANK and the meeting point. Every rank runs the same pipeline with the same seed; what differs is the
share of the work, and only rank 0 decodes and writes.
"""

import datetime
import os

import torch
import torch.distributed as dist

from .plan import Plan, plan, work_of
from .sequence import SequenceParallel, split_tokens

TIMEOUT = datetime.timedelta(
    minutes=10
)  # a rank that waits longer than this for another gives up; a dead one is noticed by the launcher in seconds


def started_by_torchrun() -> bool:
    """Whether this process is one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


class Ranks:
    """All ranks of a run; leave with ``close`` or use as a context.

    device_type: "cuda" gives every local rank its own GPU and NCCL, anything else computes on the CPU with gloo.
    Raises RuntimeError with one sentence when there are fewer GPUs than local ranks.
    """

    def __init__(self, device_type: str):
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if device_type == "cuda":
            if local >= torch.cuda.device_count():
                raise RuntimeError(
                    f"Rank {os.environ.get('RANK', 0)} found {torch.cuda.device_count()} GPUs on its machine and needs GPU number {local}; start as many processes as there are GPUs."
                )
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device(device_type)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=TIMEOUT)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._groups = {}  # ranks per group -> (own sequence group, groups)
        self.plan: Plan | None = None
        self.parallel: SequenceParallel | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank decodes, writes and prints."""
        return self.rank == 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self) -> None:
        """Leave the other ranks."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def share(self, model, tokens: int, passes: int) -> Plan:
        """Split the passes of ``model`` over the ranks for a clip of ``tokens`` tokens and ``passes`` passes per step; returns the plan."""
        return self.use(model, plan(work_of(model, tokens), passes, self.size))

    def use(self, model, chosen: Plan) -> Plan:
        """Follow this plan from now on; returns it."""
        self.plan = chosen
        self.parallel = split_tokens(model, self._sequence(chosen.ranks) if chosen.ranks > 1 else None)
        return chosen

    def _sequence(self, ranks: int) -> SequenceParallel:
        if ranks not in self._groups:
            groups = [list(range(first, first + ranks)) for first in range(0, self.size, ranks)]
            made = [dist.new_group(members, timeout=TIMEOUT) for members in groups]  # every rank makes every group
            self._groups[ranks] = SequenceParallel(made[self.rank // ranks])
        return self._groups[ranks]

    def passes(self, calls) -> list[torch.Tensor]:
        """Results of ``calls``, functions without arguments that return tensors of one shape and type, the same on every rank.

        Call i runs on group i % groups.
        """
        if self.plan is None or self.plan.groups == 1:
            return [call() for call in calls]
        own, ranks, groups = self.rank // self.plan.ranks, self.plan.ranks, self.plan.groups
        results = [None] * len(calls)
        for first in range(0, len(calls), groups):
            part = calls[first : first + groups]
            mine = part[own]() if own < len(part) else part[0]()  # an idle group computes along: its result is not used
            gathered = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(gathered, mine.contiguous())
            for place in range(len(part)):
                results[first + place] = gathered[place * ranks]
        return results

    def shared(self, keys, make, dtype: torch.dtype) -> dict:
        """{key: a tensor on the CPU} for all ``keys``, of which each rank makes every size-th: ``make(keys) -> {key: tensor}``."""
        own = make(keys[self.rank :: self.size])
        found = {}
        for place, key in enumerate(keys):
            owner = place % self.size
            x = own[key].to(self.device, dtype) if owner == self.rank else None
            shape = torch.tensor(x.shape if x is not None else (0, 0, 0), device=self.device)
            dist.broadcast(shape, owner)
            x = x if x is not None else torch.empty(*shape.tolist(), dtype=dtype, device=self.device)
            found[key] = self.from_rank(x, owner).cpu()
        return found

    def from_first(self, x: torch.Tensor) -> torch.Tensor:
        """x of rank 0, on every rank (all have the same shape and type)."""
        return self.from_rank(x, 0)

    def from_rank(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """x of the given rank, on every rank."""
        x = x.to(self.device).contiguous()
        dist.broadcast(x, rank)
        return x
