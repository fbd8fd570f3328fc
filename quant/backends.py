"""Which implementation runs an operation, and why: one table of declared limits, checked before the call.

Operations
    dequantize(raw, fmt, out)                    packed rows -> ``out [rows, cols]``
    linear(x, raw, fmt, shape, bias)             product on the bytes for at most ``most_rows`` rows of x

A backend is picked by device and format; the first row of the table that fits wins. Where none does, or x has more rows,
``matmul.py`` decodes and multiplies. ``explain`` says for each row why it was or was not taken, ``force`` fixes the choice (for tests and
measurements), and the log tells once per device which one was taken and why not the better ones.
"""

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from . import decode
from .formats import BlockFormat
from .kernels import cpu, metal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation.

    op:        ``"dequantize"`` or ``"linear"``
    devices:   device types it runs on; empty means every device
    available: returns an empty string when it can run, otherwise the reason why not
    supports:  whether it handles a format
    run:       the function
    most_rows: rows of x up to which a product takes it
    """

    name: str
    op: str
    devices: tuple[str, ...]
    run: Callable
    supports: Callable[[str], bool] = lambda fmt_name: True
    available: Callable[[], str] = lambda: ""
    most_rows: float = float("inf")

    def refusal(self, device_type: str, fmt: BlockFormat) -> str:
        """Why this backend cannot take the call; empty when it can."""
        if self.devices and device_type not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device_type}"
        reason = self.available()
        if reason:
            return reason
        if not self.supports(fmt.name):
            return f"has no kernel for {fmt.name}"
        return ""


def _torch_dequantize(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> torch.Tensor:
    return decode.dequantize(raw, fmt, out=out)


def _triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "needs the triton package"


def _triton_supports(fmt_name: str) -> bool:
    from .kernels.triton_decode import LANES

    return fmt_name in LANES


def _triton_dequantize(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> torch.Tensor:
    from .kernels import triton_dequantize

    return triton_dequantize.dequantize(raw, fmt.name, out)


def _triton_gemv(
    x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None
) -> torch.Tensor:
    from .kernels import triton_gemv

    return triton_gemv.gemv(x, raw, fmt.name, *shape, bias)


def _metal_missing() -> str:
    return metal.unavailable()


_TRITON = {"devices": ("cuda", "xpu"), "supports": _triton_supports, "available": _triton_missing}

#: Rows of x up to which the matrix-vector kernel reads the bytes; from the next row on the tensor cores of a dense product are faster.
GEMV_ROWS = 4

BACKENDS: tuple[Backend, ...] = (
    Backend("triton gemv", "linear", run=_triton_gemv, most_rows=GEMV_ROWS, **_TRITON),
    Backend("triton", "dequantize", run=_triton_dequantize, **_TRITON),
    Backend("cpu tiles", "linear", ("cpu",), cpu.linear),
    Backend("cpu", "dequantize", ("cpu",), cpu.dequantize),
    Backend("metal", "dequantize", ("mps",), metal.dequantize, supports=metal.usable, available=_metal_missing),
    Backend("torch", "dequantize", (), _torch_dequantize),
)

_forced: dict[str, str] = {}
_picked: dict[
    tuple[str, str, str], Backend | None
] = {}  # what pick() answered since the last change (a format's hash takes longer)


def candidates(op: str) -> list[Backend]:
    """The table's rows for an operation, in order of preference."""
    return [backend for backend in BACKENDS if backend.op == op]


@cache
def _tell(op: str, device_type: str, name: str, reasons: tuple[str, ...]) -> None:
    log.info("%s on %s: %s (%s)", op, device_type, name, "; ".join(reasons) or "first choice")


@lru_cache(maxsize=4096)
def _choose(op: str, device_type: str, fmt: BlockFormat, forced: str | None) -> Backend | None:
    reasons = []
    for backend in candidates(op):
        if forced is not None and backend.name != forced:
            continue
        refusal = backend.refusal(device_type, fmt)
        if not refusal:
            _tell(op, device_type, backend.name, tuple(reasons))
            return backend
        if forced is not None:
            raise RuntimeError(f"Backend {forced!r} was forced for {op}, but it {refusal}.")
        reasons.append(f"{backend.name}: {refusal}")
    return None


def pick(op: str, device_type: str, fmt: BlockFormat) -> Backend | None:
    """The backend for a call, or None when the table has none (a product is then a decode and a dense product)."""
    key = op, device_type, fmt.name
    try:
        return _picked[key]
    except KeyError:
        found = _picked[key] = _choose(op, device_type, fmt, _forced.get(op))
        return found


def forget_choices() -> None:
    """Look at the table again at the next call (after a backend became available), and log the choice again."""
    _picked.clear()
    _choose.cache_clear()
    _tell.cache_clear()


def explain(op: str, device_type: str, fmt: BlockFormat) -> list[str]:
    """One line per row of the table: the backend and why it is or is not taken."""
    lines, taken = [], False
    for backend in candidates(op):
        refusal = backend.refusal(device_type, fmt)
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
    _picked.clear()
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before
        _picked.clear()
