"""Which implementation runs an operation, and why: one table of declared limits, checked before the call.

Operations
    dequantize(raw, fmt, out)                    packed rows -> ``out [rows, cols]``
    linear(x, raw, fmt, shape, bias)             product on the bytes, for the row counts a backend declares

A backend is picked by device, format, dtype and number of rows; the first row of the table that fits wins. ``explain`` says for each
row why it was or was not taken, ``force`` fixes the choice (for tests and measurements).
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import kernels_cpu, reference
from .formats import BlockFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    op:        ``"dequantize"`` or ``"linear"``
    devices:   device types it runs on; empty means every device
    max_rows:  for ``linear``: the most rows of x it is used for (None: any number), a measured crossover
    available: returns an empty string when it can run, otherwise the reason why not
    supports:  whether it handles a format
    run:       the function
    """

    name: str
    op: str
    devices: tuple[str, ...]
    run: Callable
    supports: Callable[[str], bool] = lambda fmt_name: True
    available: Callable[[], str] = lambda: ""
    max_rows: int | None = None

    def refusal(self, device_type: str, fmt: BlockFormat, rows: int | None) -> str:
        """Why this backend cannot take the call; empty when it can."""
        if self.devices and device_type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device_type}"
        reason = self.available()
        if reason:
            return reason
        if not self.supports(fmt.name):
            return f"has no kernel for {fmt.name}"
        if rows is not None and self.max_rows is not None and rows > self.max_rows:
            return f"is for up to {self.max_rows} rows, not {rows}"
        return ""


def _torch_dequantize(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> torch.Tensor:
    return reference.dequantize(raw, fmt, out=out)


BACKENDS: tuple[Backend, ...] = (
    Backend("cpu tiles", "linear", ("cpu",), kernels_cpu.linear),
    Backend("torch", "dequantize", (), _torch_dequantize),
)

_forced: dict[str, str] = {}


def candidates(op: str) -> list[Backend]:
    """The table's rows for an operation, in order of preference."""
    return [backend for backend in BACKENDS if backend.op == op]


@lru_cache(maxsize=4096)
def _choose(op: str, device_type: str, fmt: BlockFormat, rows: int | None, forced: str | None) -> Backend | None:
    for backend in candidates(op):
        if forced is not None and backend.name != forced:
            continue
        refusal = backend.refusal(device_type, fmt, rows)
        if not refusal:
            return backend
        if forced is not None:
            raise RuntimeError(f"Backend {forced!r} was forced for {op}, but it {refusal}.")
    return None


def pick(op: str, device_type: str, fmt: BlockFormat, rows: int | None = None) -> Backend | None:
    """The backend for a call, or None when the table has none (a product is then a decode and a dense product)."""
    return _choose(op, device_type, fmt, rows, _forced.get(op))


def explain(op: str, device_type: str, fmt: BlockFormat, rows: int | None = None) -> list[str]:
    """One line per row of the table: the backend and why it is or is not taken."""
    lines, taken = [], False
    for backend in candidates(op):
        refusal = backend.refusal(device_type, fmt, rows)
        lines.append(f"{backend.name}: {refusal or ('taken' if not taken else 'could run, a better one is taken')}")
        taken = taken or not refusal
    return lines


@contextlib.contextmanager
def force(op: str, name: str) -> Iterator[None]:
    """Use exactly this backend for an operation inside the block; calls it cannot take raise RuntimeError with the reason."""
    known = [backend.name for backend in candidates(op)]
    if name not in known:
        raise ValueError(f"No backend {name!r} for {op}; expected one of {', '.join(known)}.")
    before = _forced.get(op)
    _forced[op] = name
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before
