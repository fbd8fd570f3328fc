"""Check a written file: that it is consistent in itself, and that it holds what the checkpoint it was made from holds.

Every tensor is read once. Numbers must be finite; beside a source, tensors of the same type must have the same bytes, and others must decode to
the source's values within what their type can lose.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...quant.formats import FORMATS
from ..files.names import classify
from ..files.weights import WeightFile, open_weights

CHUNK_WEIGHTS = 4 * 2**20  # weights handled at once

# The largest ||decoded - source|| / ||source|| of a tensor by bits per weight: about twice what normal weights give. Exchanged or damaged
# tensors are near 1.4.
LIMITS = {16: 4e-3, 8: 0.02, 6: 0.06, 5: 0.12, 4: 0.24, 3: 0.45, 2: 0.7}

Progress = Callable[[int, str], None]  # (bytes of the file done, tensor name)


@dataclass
class Verdict:
    """What was found. identical: tensors with the source's bytes; decoded: {name: relative error} of those of another type."""

    tensors: int
    identical: int = 0
    decoded: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float] | None:
        """(name, relative error) of the tensor that lost most."""
        return max(self.decoded.items(), key=lambda item: item[1]) if self.decoded else None


def verify(path: str | Path, against: Sequence[str | Path] = (), progress: Progress | None = None) -> Verdict:
    """Read a GGUF or safetensors file and say what is wrong with it. against: the checkpoint it was made from, and its companions.

    Raises WeightFileError for files that cannot be opened at all.
    """
    file, sources = open_weights(path), [open_weights(source) for source in against]
    try:
        verdict = Verdict(len(file.names()))
        origin = _origins(sources)
        mine = _canonical(file)
        if sources:
            _compare_names(mine, origin, verdict)
        done = 0
        for name, key in mine.items():
            _check_tensor(file, name, origin.get(key), verdict)
            done += file.nbytes(name)
            if progress:
                progress(done, name)
        return verdict
    finally:
        for opened in (file, *sources):
            opened.close()


def _canonical(file: WeightFile) -> dict[str, tuple[str, str]]:
    """name in the file -> (part, name that all files agree on)."""
    keys = {name: ("other", name) for name in file.names()}
    for part, names in classify(file.names()).parts.items():
        for canonical, name in names.items():
            keys[name] = (part, canonical)
    return keys


def _origins(sources: Sequence[WeightFile]) -> dict[tuple[str, str], tuple[WeightFile, str]]:
    found = {}
    for source in sources:
        for name, key in _canonical(source).items():
            found.setdefault(key, (source, name))
    return found


def _compare_names(mine: dict, origin: dict, verdict: Verdict) -> None:
    held = set(mine.values())
    lacking = [
        name
        for key, (_, name) in origin.items()
        if key not in held and key[0] in ("dit", "connector", "projection", "vae")
    ]
    lacking = [
        name
        for name in lacking
        if "per_channel_statistics" not in name or name.endswith(("mean-of-means", "std-of-means"))
    ]
    parts = {part for part, _ in held}
    absent = {part for part, _ in origin} - parts - {"other"}
    needed = [name for key, (_, name) in origin.items() if name in set(lacking) and key[0] in parts]
    extra = [name for name, key in mine.items() if key not in origin]
    if needed:
        verdict.problems.append(f"{len(needed)} tensors of the source are missing (first: {needed[0]}).")
    if extra:
        verdict.problems.append(f"{len(extra)} tensors are not in the source (first: {extra[0]}).")
    if absent:
        verdict.notes.append(f"left out on purpose or by mistake: {', '.join(sorted(absent))}")


def _check_tensor(file: WeightFile, name: str, origin: tuple[WeightFile, str] | None, verdict: Verdict) -> None:
    fmt = file.format(name)
    if origin is not None and origin[0].shape(origin[1]) != file.shape(name):
        theirs = tuple(origin[0].shape(origin[1]))
        verdict.problems.append(f"{name} is {tuple(file.shape(name))}; the source has {theirs}.")
        origin = None
    same_type = origin is not None and origin[0].format(origin[1]) == fmt
    identical, error, norm, finite = same_type, 0.0, 0.0, True
    for ours, theirs in _pieces(file, name, origin):
        finite = finite and bool(torch.isfinite(ours).all()) if ours.is_floating_point() else finite
        if theirs is None:
            continue
        if same_type:
            identical = identical and torch.equal(ours, theirs)
        else:
            difference, reference = ours.float() - theirs.float(), theirs.float()
            error += float(difference.square().sum())
            norm += float(reference.square().sum())
    if not finite:
        verdict.problems.append(f"{name} ({fmt}) holds NaN or infinity.")
    elif identical:
        verdict.identical += 1
    elif same_type:
        verdict.problems.append(f"{name} ({fmt}) differs from the source's bytes.")
    elif origin is not None:
        relative = math.sqrt(error / norm) if norm else (math.inf if error else 0.0)
        verdict.decoded[name] = relative
        bits = min(
            FORMATS[kind].bits_per_weight if kind in FORMATS else 8 for kind in (fmt, origin[0].format(origin[1]))
        )
        limit = LIMITS[max(level for level in LIMITS if level <= max(bits, 2))]
        if not relative <= limit:
            verdict.problems.append(
                f"{name} ({fmt}) is {relative:.2g} away from the source; such types lose at most {limit:g}."
            )


def _pieces(file: WeightFile, name: str, origin) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """A few rows at a time of the tensor and of its source, dense."""
    rows, columns = file.stored_matrix(name)
    step = max(1, CHUNK_WEIGHTS // max(1, columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        ours, theirs = file.load_rows(name, start, stop), None
        if origin is not None:
            source, other = origin
            if source.stored_matrix(other) == (rows, columns):
                theirs = source.load_rows(other, start, stop)
            else:  # one of the two stores it flattened
                theirs = source.load(other).reshape(rows, columns)[start:stop]
        yield ours, theirs
