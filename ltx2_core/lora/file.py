"""One LoRA file: what it is for and what it does to each layer. Its header is read with the standard library alone.

The spelling is ``lora.keys``' business; here are shapes, ranks, scales and bytes. ``scale = alpha / rank``; a layer without alpha
has scale 1, unless the header carries the settings of PEFT, whose alpha then counts.

Sources: huggingface/diffusers ``loaders/lora_base.py`` (``lora_adapter_metadata``); huggingface/peft ``tuners/lora/layer.py``
(``use_rslora``), ``utils/other.py`` (``get_pattern_key``); safetensors format (huggingface/safetensors README).
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..files.errors import WeightFileError
from ..files.text import table, visible
from ..files.weight_file import WeightFile
from .keys import ALPHA, DOWN, UP, LoraNames

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ADAPTER_METADATA = "lora_adapter_metadata"

# Header entries in which trainers name the base model, and how its versions are written.
_BASE_MODEL = (
    "modelspec.architecture",
    "ss_base_model_version",
    "ss_sd_model_name",
    "base_model",
    "model_version",
    "ltx_version",
)
_LTX2 = r"(?i)ltx[-_ ]?(?:video)?[-_ ]?v?2"
_VERSIONS = (("2.3", re.compile(_LTX2 + r"[._-]?3")), ("2.0", re.compile(_LTX2 + r"(?:[._-]?0\b|[-_ ]?19b)")))
_CONNECTOR_WIDTHS = {3840: "2.0", 4096: "2.3"}
_TABLE_ROWS = {6: "2.0", 9: "2.3"}


class LoraError(WeightFileError):
    """A LoRA file that cannot be used here; the message says what it is and what to do."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


class LoraFile:
    """The names, shapes and header of an open LoRA file.

    file: an open WeightFile. names: LoraNames.
    """

    def __init__(self, file: WeightFile):
        self.file, self.path = file, file.path
        self.names = LoraNames(file.names())

    def shapes(self, layer: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of (up [out, r], down [r, in]) of a layer's plain low-rank product, None when it has none."""
        found = {key.matrix: self.file.shape(key.raw) for key in self.names.by_layer[layer]}
        up, down = (next((found[name] for name in names if name in found), None) for names in (UP, DOWN))
        return (up, down) if up is not None and down is not None and len(up) >= 2 and len(down) >= 2 else None

    def change_shape(self, layer: str) -> tuple[int, int] | None:
        """(out, in) of the weight a layer's low-rank product is for; None when it is of another kind or may change the shape."""
        shapes = self.shapes(layer)
        if shapes is None or any(
            key.matrix in ("reshape_weight", "lora_mid.weight") for key in self.names.by_layer[layer]
        ):
            return None
        return shapes[0][0], math.prod(shapes[1][1:])

    def ranks(self) -> tuple[int, ...]:
        """Every rank among the video and audio layers, ascending."""
        layers = self.names.layers("video") + self.names.layers("audio")
        return tuple(sorted({shapes[1][0] for shapes in map(self.shapes, layers) if shapes}))

    def width(self) -> int | None:
        """Width of the transformer, by the inputs of its self-attention; None when the file has none of it."""
        queries = [layer for layer in self.names.layers("video") if ".attn1.to_q" in layer and "connector" not in layer]
        widths = Counter(shape[1] for shape in map(self.change_shape, queries) if shape)
        return widths.most_common(1)[0][0] if widths else None

    def version(self) -> str | None:
        """ "2.0" or "2.3" where layers, shapes or the header tell; self-attention is the same in both, so many files do not."""
        versions = self.names.versions()
        if len(versions) == 1:
            return next(iter(versions))
        for layer in self.names.layers("video"):
            shape = self.change_shape(layer)
            if (
                shape
                and layer == "adaln_single.linear"
                and shape[0] % shape[1] == 0
                and shape[0] // shape[1] in _TABLE_ROWS
            ):
                return _TABLE_ROWS[shape[0] // shape[1]]
            if shape and "connector." in layer and layer.endswith("attn1.to_q") and shape[1] in _CONNECTOR_WIDTHS:
                return _CONNECTOR_WIDTHS[shape[1]]
        for entry in _BASE_MODEL:
            for version, pattern in _VERSIONS:
                if pattern.search(str(self.file.metadata.get(entry, ""))):
                    return version
        return None

    def alphas(self) -> dict[str, float]:
        """Layer -> alpha that PEFT's settings in the header give it, where it is not the layer's rank.

        Empty when the file has alphas of its own.
        """
        settings = _peft_settings(self.file.metadata)
        if settings is None or any(key.matrix == ALPHA for key in self.names.keys.values()):
            return {}
        alphas, patterns = {}, _Patterns(settings.get("alpha_pattern"))
        for layer in self.names.layers("video") + self.names.layers("audio"):
            shapes = self.shapes(layer)
            if shapes is None:
                continue
            rank, spelled = shapes[1][0], self.names.by_layer[layer][0].spelled
            alpha = float(patterns.find(spelled, settings["lora_alpha"]))
            if settings.get("use_rslora"):
                alpha *= math.sqrt(rank)
            if alpha != rank:
                alphas[layer] = alpha
        if patterns.unused:
            log.warning(
                "%s: 'alpha_pattern' names layers that the file does not have (first: %s)",
                visible(self.path.name),
                visible(patterns.unused[0]),
            )
        return alphas

    def standard(
        self, tensors: "Mapping[str, torch.Tensor]", skip: Callable = lambda key: False
    ) -> "dict[str, torch.Tensor]":
        """``tensors`` (raw key -> tensor) under standard keys, with PEFT's alphas; ``skip(key)``: whether to leave a Key out."""
        import torch

        self.check()
        kept = [key for key in self.names.keys.values() if not skip(key)]
        result = {key.standard: _column(key, tensors[key.raw]) for key in kept}
        layers = {key.layer: key for key in kept}
        for layer, alpha in self.alphas().items():
            if layer in layers:
                result[alpha_key(layers[layer])] = torch.tensor(alpha)
        return result

    def check(self) -> None:
        """Raise LoraError when two keys mean the same matrix."""
        for standard, raws in self.names.clashes.items():
            raise LoraError(
                f"{self.path.name} holds several adapters in one file ('{raws[0]}' and '{raws[1]}' are both '{standard}'); "
                "save them as one file each."
            )


def nothing_fits(lora: LoraFile) -> str:
    """The sentence for a LoRA without a layer of the video model: what it is instead."""
    names, name = lora.names, lora.path.name
    if names.foreign:
        return f"{name} is a LoRA for {names.foreign}; use a LoRA made for LTX-2 or LTX-2.3."
    if names.layers("text") and not names.layers("unknown"):
        place = "between the text encoder and 'CLIP Text Encode (Prompt)'"
        return f"{name} is a LoRA for a text encoder; load it with 'Load LoRA' of ComfyUI, {place}."
    if names.layers("audio"):
        count = len(names.layers("audio"))
        return f"{name} is a LoRA for LTX-2's sound stream only ({count} layers); it has an effect only on a model that is loaded with sound."
    if names.layers("projection"):
        return (
            f"{name} is a LoRA for LTX-2's text projection only; it has no layer of the video model and no effect here."
        )
    first = ", ".join(list(names.keys)[:3])
    return f"{name} is a LoRA for a model that this pack does not know (first keys: {first}); use a LoRA made for LTX-2 or LTX-2.3."


def alpha_key(key) -> str:
    return key.standard.removesuffix(key.matrix) + ALPHA


def column_shape(key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT stores DoRA's magnitudes as [out]; the host wants [out, 1]."""
    return (*shape, 1) if key.matrix == "dora_scale" and len(shape) == 1 else tuple(shape)


def _column(key, value: "torch.Tensor") -> "torch.Tensor":
    shape = column_shape(key, tuple(value.shape))
    return value if shape == tuple(value.shape) else value.reshape(shape)


def _peft_settings(metadata: Mapping) -> Mapping | None:
    """The LoraConfig that diffusers writes into the header, for the transformer; None when there is none that can be read."""
    if not metadata.get(ADAPTER_METADATA):
        return None
    try:
        settings = table(metadata[ADAPTER_METADATA], f"the header's '{ADAPTER_METADATA}'")
    except ValueError as error:
        log.warning("%s", error)
        return None
    prefixed = {
        name.removeprefix("transformer."): value for name, value in settings.items() if name.startswith("transformer.")
    }
    settings = prefixed or settings
    return settings if _finite(settings.get("lora_alpha")) else None


def _finite(value) -> bool:
    """Whether a value from a header is a number that can be computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


class _Patterns:
    """PEFT's ``alpha_pattern``: names of layers, or ends of them, with their alpha. The first that fits counts.

    PEFT takes a name for a regular expression; here it is text and nothing else, since an expression from a file can run for ever.
    """

    def __init__(self, patterns):
        patterns = patterns if isinstance(patterns, Mapping) else {}
        self.ranked = {name: (rank, value) for rank, (name, value) in enumerate(patterns.items()) if _finite(value)}
        self.used = set()

    def find(self, layer: str, default):
        """The alpha of a layer, ``default`` when no pattern is its name or the end of it."""
        parts = layer.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = min((self.ranked[end] for end in ends if end in self.ranked), default=None)
        if found is None:
            return default
        self.used.add(found[0])
        return found[1]

    @property
    def unused(self) -> list[str]:
        return [name for name, (rank, _) in self.ranked.items() if rank not in self.used]
