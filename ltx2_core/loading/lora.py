"""Open a LoRA file, whatever model it is for; what is no LoRA is named."""

from collections.abc import Iterable

from torch import nn

from ..files.opened import Source, open_model
from ..lora import apply
from ..lora.file import LoraError, LoraFile
from ..lora.keys import is_lora
from .identify import identify


def open_lora(source: Source) -> LoraFile:
    """A LoRA file from a path or an open file. Raises LoraError, with what the file is and where it belongs, when it is no LoRA."""
    file = open_model(source)
    try:
        if not is_lora(file.weights.names()):
            report = identify(file)
            place = f"; it belongs in {report.inputs[0]}." if report.inputs else "."
            raise LoraError(report.refusal or f"{file.name} is no LoRA but {report.title}{place}")
        if file.weights.kind != "safetensors":
            raise LoraError(
                f"{file.name} is a LoRA in a {file.weights.kind.upper()} file, which is not read here; use its safetensors file."
            )
        return LoraFile(file.weights)
    except BaseException:
        file.close()
        raise


def attach_loras(model: nn.Module, loras: Iterable[tuple[Source, float]]) -> list[apply.Report]:
    """Have ``model`` compute with these LoRA files, (path or open file, strength) each, in place of those it has; see ``lora.apply.attach``."""
    return apply.attach(model, [(open_lora(source), float(strength)) for source, strength in loras])
