"""Numbers and shapes from headers, checked where they are used, so that a stranger's header ends in a sentence and nothing else."""

import math
from collections.abc import Iterable

from .errors import WeightFileError
from .text import visible

LARGEST = 1 << 40  # of any number that a header says about a model
MAX_LAYER_DIGITS = 6


def number(
    value: object, what: str, kind: type = int, error: type[WeightFileError] = WeightFileError, least: float | None = 1
):
    """``value`` as a whole number (kind int) or a number (float), at least ``least``. Texts that spell one count. Raises ``error`` otherwise."""
    found = value
    if isinstance(value, str) and len(value) <= 30:
        try:
            found = float(value)
        except ValueError:
            found = None
    fits = isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) <= LARGEST
    if (
        not fits
        or (kind is int and found != int(found))
        or (least is not None and found < least)
        or not math.isfinite(found)
    ):
        expected = "a whole number" if kind is int else "a number"
        above = "" if least is None else f" from {least} on"
        raise error(
            f"{what} is {visible(repr(value))}; expected {expected}{above}. The header is damaged or another model's."
        )
    return kind(found)


def sizes(shapes, name: str, dimensions: int, error: type[WeightFileError] = WeightFileError) -> tuple[int, ...]:
    """The shape of a tensor that must be there with so many dimensions. Raises ``error`` otherwise."""
    shape = shapes.get(name)
    if shape is None:
        raise error(f"Tensor '{visible(name)}' is missing; the file is incomplete or another model's.")
    if len(shape) != dimensions:
        raise error(
            f"Tensor '{visible(name)}' has the shape {tuple(shape)}; expected {dimensions} dimensions. The file is another model's."
        )
    return tuple(shape)


def count_layers(names: Iterable[str], stem: str, error: type[WeightFileError] = WeightFileError) -> int:
    """Number of layers ``stem.0.…``, ``stem.1.…`` in these names, 0 when there are none.

    Raises ``error`` when numbers are left out, or when the layers lack most of their tensors: nothing is built for what a file does not hold.
    """
    tensors: dict[int, int] = {}
    for name in names:
        if not name.startswith(stem + "."):
            continue
        digits, dot, _ = name[len(stem) + 1 :].partition(".")
        if not (dot and digits.isascii() and digits.isdigit()):
            continue
        if len(digits) > MAX_LAYER_DIGITS:
            raise error(
                f"'{stem}' has a layer numbered {visible(digits, 40)}; no model has so many. The file is damaged."
            )
        tensors[int(digits)] = tensors.get(int(digits), 0) + 1
    count = len(tensors)
    lacking = [number for number in range(count + 5) if number not in tensors and number < max(tensors, default=0)]
    if lacking:
        raise error(
            f"'{stem}' has layers up to {max(tensors)} but lacks {lacking[:5]}; the file is incomplete, download it again."
        )
    if count * max(tensors.values(), default=0) > 2 * sum(tensors.values()):
        raise error(
            f"most tensors of the {count} layers of '{stem}' are missing; the file is incomplete, download it again."
        )
    return count
