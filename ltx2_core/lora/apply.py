"""LoRA files on a transformer: which of their layers fit it, and how it computes with them outside the host.

:func:`attach` puts layers with low-rank changes (``quant/low_rank.py``) in the place of plain ones. The weights stay packed and as they are; the
LoRA's matrices stay in the memory map of their file and move with their block.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ...quant.low_rank import LowRank, LowRankLinear
from ..transformer.config import MODEL_NAMES
from .file import LoraError, LoraFile, nothing_fits
from .keys import ALPHA, DOWN, UP

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """Which layers of a LoRA file a model takes. misfits: the model's weight has another shape; absent: the model has no such layer."""

    applied: tuple[str, ...]
    misfits: tuple[str, ...]
    absent: tuple[str, ...]


def fit(lora: LoraFile, shape_of: Callable[[str], tuple[int, ...] | None]) -> Fit:
    """Compare a file with a model. shape_of(layer): its weight's shape, () where that does not matter, None for a layer the model lacks.

    Layers of the sound stream that the model lacks are no news, and not among ``absent``.
    """
    applied, misfits, absent = [], [], []
    for kind in ("video", "audio", "unknown"):
        for layer in lora.names.layers(kind):
            found = shape_of(layer)
            if found is None:
                absent += [layer] if kind != "audio" else []
                continue
            made_for = lora.change_shape(layer) if len(found) == 2 else None
            (misfits if made_for not in (None, tuple(found)) else applied).append(layer)
    return Fit(tuple(applied), tuple(misfits), tuple(absent))


def why_nothing(lora: LoraFile, fit: Fit, width: int | None) -> str:
    """The sentence for a file of which nothing fits a model that is ``width`` wide."""
    name = lora.path.name
    if fit.misfits:
        theirs = f"of width {lora.width()}" if lora.width() not in (None, width) else "of another shape"
        mine = f", this model is {width} wide" if width else ""
        return f"{name} was made for a transformer {theirs}{mine}; use a LoRA of this model's version."
    if not lora.names.layers("video"):
        return nothing_fits(lora)
    count = len(lora.names.layers("video"))
    return f"{name} is a LoRA for LTX-2, but this model has none of its {count} layers; use it with the LTX-2 model it was made for."


def warnings(lora: LoraFile, fit: Fit, version: str | None) -> list[str]:
    """What a user should know of a file that fits in part, or was made for another ``version``."""
    name, found = lora.path.name, []
    if fit.misfits:
        what = f"{_listed(fit.misfits)} of another shape than in this model and left out"
        found.append(f"{name}: {what}; the LoRA was made for another version.")
    if fit.absent:
        found.append(f"{name}: {_listed(fit.absent)} not in this model and left out.")
    theirs = lora.version()
    if version and theirs and version != theirs:
        found.append(
            f"{name} was made for {MODEL_NAMES[theirs]}, this model is {MODEL_NAMES[version]}; expect a poor effect."
        )
    return found


def _listed(layers: Sequence[str]) -> str:
    shown = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
    return f"{len(layers)} {'layer is' if len(layers) == 1 else 'layers are'} ({shown})"


# -- outside the host --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of one file. text: "name: 480 of 1344 layers applied, …"; warnings: sentences for the user."""

    path: Path
    strength: float
    fit: Fit
    text: str
    warnings: tuple[str, ...]


def attach(model: nn.Module, loras: Iterable[tuple[LoraFile, float]]) -> list[Report]:
    """Have ``model`` (LTX2Model with ``torch.nn`` layers) compute with these files, (LoraFile, strength) each, in place of those it has.

    Files add up, one may be given twice, and an empty list takes all away. Raises LoraError for a file of which nothing fits or that
    changes weights in another way than by low-rank products, then the model is as before.
    """
    changes: dict[str, list[LowRank]] = {}
    reports = []
    for lora, strength in loras:
        reports.append(_read(lora, model, float(strength), changes))
    detach(model)
    for layer, found in changes.items():
        _replace(model, layer, LowRankLinear(model.get_submodule(layer), found))
    for report in reports:
        log.info("%s", report.text)
        for text in report.warnings:
            log.warning("%s", text)
    return reports


def detach(model: nn.Module) -> None:
    """Take every LoRA away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LowRankLinear):
            _replace(model, name, module.plain())


def is_attached(model: nn.Module) -> bool:
    """Whether any layer computes with a LoRA."""
    return any(isinstance(module, LowRankLinear) for module in model.modules())


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, layer)


def _read(lora: LoraFile, model: nn.Module, strength: float, changes: dict[str, list[LowRank]]) -> Report:
    """Add what the file changes to ``changes``."""
    lora.check()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = fit(lora, lambda layer: tuple(linears[layer].weight.shape) if layer in linears else None)
    if not found.applied:
        raise LoraError(why_nothing(lora, found, model.config.inner_dim))
    alphas = lora.alphas()
    for layer in found.applied:
        tensors = {key.matrix: key.raw for key in lora.names.by_layer[layer]}
        others = [matrix for matrix in tensors if matrix not in (*UP, *DOWN, ALPHA)]
        if others or lora.shapes(layer) is None:
            what, first = ", ".join(lora.names.methods) or "unknown", ".".join([layer, *others[:1]])
            raise LoraError(
                f"{lora.path.name} holds more than plain low-rank products ({what}; first: {first}), which only ComfyUI applies here; "
                "use it there with 'LTX-2 GGUF LoRA Loader (Model)'."
            )
        up, down = (
            lora.file.load(next(tensors[name] for name in names if name in tensors)).flatten(1) for names in (UP, DOWN)
        )
        alpha = float(lora.file.load(tensors[ALPHA])) if ALPHA in tensors else alphas.get(layer)
        if strength:  # a product with zeros may still round differently than none
            changes.setdefault(layer, []).append(
                LowRank(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]))
            )
    text = f"{lora.path.name}: {lora.names.counted(len(found.applied))}"
    return Report(lora.path, strength, found, text, tuple(warnings(lora, found, model.config.version)))
