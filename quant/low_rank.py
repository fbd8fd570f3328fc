"""Products with a low-rank change of the weight, ``x (W + s B A)^T``, exact on packed weights and without a changed copy of them.

Two ways to the same product. On the weight: the decoded weight of the call changed in place, 2 in out r operations and one more pass over
it, whatever the number of rows. Beside it: ``x W^T + s (x A^T) B^T``, 2 M r (in + out) operations for M rows, with W's product on the
packed bytes as without a change. :func:`beside_is_cheaper` chooses by the sizes of the product alone, so that a result does not depend on
where the weights lie.

:class:`LowRankLinear` stands in for a ``torch.nn.Linear``. The matrices are buffers of the module: they move, are counted and are
streamed with its weight.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import matmul
from .tracing import is_plain

# Operations a GPU does in the time it moves one byte of its memory, in half precision: about 220 on an H100, 165 on an RTX 4090.
OPERATIONS_PER_BYTE = 200

# What the two ways cost beyond the product, in bytes moved, fitted to measurements on an H100 (benchmarks/host_memory.py, task ``lora``: 4096x4096,
# 16384x4096 and 4096x16384 at 1024 to 14080 rows and rank 16 to 384): per element of a weight that is changed and no longer in the scratch memory that
# other products reuse, and per element of the input read once more and of the output read and written once more.
WEIGHT_BYTES, INPUT_BYTES, OUTPUT_BYTES = 7.5, 2.4, 7.4

ALIGNMENT = 64  # bytes: torch's own on the CPU, and what its products are written for


class LowRank(NamedTuple):
    """A change ``scale * up @ down`` of a weight: up [out, r], down [r, in], of any float dtype."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


class Staying(LowRank):
    """A change whose matrices are the same tensors for many products (their contents may change). What a product needs of them is made once."""

    @functools.cached_property
    def _meets(self) -> tuple[torch.dtype | None, torch.device]:
        """The dtype and device of products that take the matrices as they are; no dtype where they are converted or copied for each."""
        up, down = self.up, self.down
        same = up.dtype == down.dtype and up.device == down.device
        return (up.dtype if same and _ready(up, up) is up and _ready(down, down) is down else None), up.device

    def is_ready(self, like: torch.Tensor) -> bool:
        """Whether a product in ``like``'s dtype on its device takes the matrices as they are."""
        dtype, device = self._meets
        return dtype is like.dtype and device == like.device

    @functools.cached_property
    def transposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(up [r, out], down [in, r]), views."""
        return self.up.t(), self.down.t()


def beside_is_cheaper(rows: int, out_features: int, in_features: int, rank: int, itemsize: int = 2) -> bool:
    """Whether the low-rank product beside the weight takes less time than the one on it, for ``rows`` rows.

    Both counted in bytes moved: what each way reads and writes more (scaled from two bytes per element), or its operations where they take longer.
    """
    operations, scale = 2 * rank / OPERATIONS_PER_BYTE, itemsize / 2
    on_weight = out_features * in_features * (scale * WEIGHT_BYTES + max(0.0, operations - 2 * itemsize))
    beside = rows * max(
        scale * (INPUT_BYTES * in_features + OUTPUT_BYTES * out_features), operations * (in_features + out_features)
    )
    return beside < on_weight


def belongs_beside(x: torch.Tensor, weight: torch.Tensor, rank: int) -> bool:
    """Whether to add to the product of ``x`` [..., in] rather than to ``weight`` (packed or dense): the cheaper, or the only one in 8 bits."""
    if matmul.eight_bit_kind(x, weight):
        return True  # 8-bit products need the packed weight
    params = getattr(weight, "_params", None)
    shape = weight.shape if params is None else params.orig_shape  # a packed tensor's own properties take their time
    return beside_is_cheaper(x.numel() // x.shape[-1], *shape, rank, x.dtype.itemsize)


def add_to_weight_(weight: torch.Tensor, change: LowRank, keep: float = 1.0) -> torch.Tensor:
    """``keep * weight + change`` in place; weight [out, in] is dense and nobody else's."""
    if type(change) is Staying and change.is_ready(weight):
        return weight.addmm_(change.up, change.down, beta=keep, alpha=change.scale)
    return weight.addmm_(_ready(change.up, weight), _ready(change.down, weight), beta=keep, alpha=change.scale)


def add_beside_(y: torch.Tensor, x: torch.Tensor, changes: Sequence[LowRank]) -> torch.Tensor:
    """``y`` [..., out], the product of ``x`` [..., in] with the unchanged weight, plus what the changes add. In place."""
    rows, sums = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    for change in changes:
        if type(change) is Staying and change.is_ready(x):
            up, down = change.transposed
            sums.addmm_(rows @ down, up, alpha=change.scale)  # (M, r) x (r, out) onto (M, out)
        else:
            sums.addmm_(rows @ _ready(change.down, x).t(), _ready(change.up, x).t(), alpha=change.scale)
    return y


def _ready(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The matrix in ``like``'s dtype, on its device. On the CPU also where products round the same wherever its bytes lie in a file."""
    matrix = matrix.to(like)
    if matrix.device.type == "cpu" and is_plain(matrix) and matrix.data_ptr() % ALIGNMENT:
        matrix = matrix.clone()
    return matrix


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, changes: Sequence[LowRank], gelu: bool = False
) -> torch.Tensor:
    """``x`` [..., in] times ``weight`` [out, in] (packed or dense) with ``changes``, plus ``bias``, then GELU (tanh form) if asked.

    The weight stays as it is.
    """
    rank = sum(change.down.shape[0] for change in changes)
    if belongs_beside(x, weight, rank):
        y = add_beside_(matmul.linear(x, weight, bias), x, changes)
        return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
    dense = matmul.dense_for_one_product(weight, x.dtype) if matmul.is_packed(weight) else weight.to(x.dtype, copy=True)
    for change in changes:
        add_to_weight_(dense, change)
    return matmul.linear(x, dense, bias, gelu)


class LowRankLinear(torch.nn.Linear):
    """A linear layer with changes, in place of a plain one whose weight and bias it takes over."""

    takes_gelu = True

    def __init__(self, linear: torch.nn.Linear, changes: Sequence[LowRank]):
        """Raises ValueError for matrices that do not fit the layer's weight."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for number, (up, down, _) in enumerate(changes):
            if (up.shape[0], down.shape[1]) != (self.out_features, self.in_features) or up.shape[1] != down.shape[0]:
                raise ValueError(
                    f"A low-rank change of {tuple(up.shape)} x {tuple(down.shape)} does not fit a weight of {tuple(self.weight.shape)}; "
                    "it was made for another layer or model."
                )
            self.register_buffer(f"low_rank_up_{number}", up, persistent=False)
            self.register_buffer(f"low_rank_down_{number}", down, persistent=False)
        self.scales = tuple(change.scale for change in changes)

    @property
    def changes(self) -> list[LowRank]:
        """The changes, with the matrices where they are now."""
        buffers = self._buffers
        return [
            LowRank(buffers[f"low_rank_up_{n}"], buffers[f"low_rank_down_{n}"], scale)
            for n, scale in enumerate(self.scales)
        ]

    def plain(self) -> torch.nn.Linear:
        """The layer without its changes."""
        made = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        made.weight, made.bias = self.weight, self.bias
        return made

    def forward(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """x [..., in] -> [..., out], then GELU (tanh form) if asked."""
        return linear(x, self.weight, self.bias, self.changes, gelu)
