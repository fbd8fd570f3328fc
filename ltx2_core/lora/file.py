"""One LoRA file: what it is for, what it does to each layer, and how it is rewritten in the standard spelling.

The spelling is ``lora.keys``' business; here are shapes, ranks, scales and bytes. ``scale = alpha / rank``; a layer without alpha
has scale 1, unless the header carries the settings of PEFT, whose alpha then counts.

Sources: huggingface/diffusers ``loaders/lora_base.py`` (``lora_adapter_metadata``); huggingface/peft ``tuners/lora/layer.py``
(``use_rslora``), ``utils/other.py`` (``get_pattern_key``); safetensors format (huggingface/safetensors README).
"""

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...quant.output import Output, check_output
from .keys import ALPHA, DOWN, LoraNames, UP, is_lora
from ..files.safetensors import SafetensorsFile
from ..files.weights import WeightFile, WeightFileError, open_weights

ADAPTER_METADATA = "lora_adapter_metadata"
PIECE = 2**24  # bytes copied at once

# Header entries in which trainers name the base model, and how its versions are written.
_BASE_MODEL = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "base_model", "model_version", "ltx_version")
_LTX2 = r"(?i)ltx[-_ ]?(?:video)?[-_ ]?v?2"
_VERSIONS = (("2.3", re.compile(_LTX2 + r"[._-]?3")), ("2.0", re.compile(_LTX2 + r"(?:[._-]?0\b|[-_ ]?19b)")))
_CONNECTOR_WIDTHS = {3840: "2.0", 4096: "2.3"}
_TABLE_ROWS = {6: "2.0", 9: "2.3"}

Progress = Callable[[int, str], None]  # (bytes done, key)


class LoraError(WeightFileError):
    """A LoRA file that cannot be used here; the message says what it is and what to do."""


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
        if shapes is None or any(key.matrix in ("reshape_weight", "lora_mid.weight") for key in self.names.by_layer[layer]):
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
        """"2.0" or "2.3" where layers, shapes or the header tell; self-attention is the same in both, so many files do not."""
        versions = self.names.versions()
        if len(versions) == 1:
            return next(iter(versions))
        for layer in self.names.layers("video"):
            shape = self.change_shape(layer)
            if shape and layer == "adaln_single.linear" and shape[0] % shape[1] == 0 and shape[0] // shape[1] in _TABLE_ROWS:
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
        alphas = {}
        for layer in self.names.layers("video") + self.names.layers("audio"):
            shapes = self.shapes(layer)
            if shapes is None:
                continue
            rank, spelled = shapes[1][0], self.names.by_layer[layer][0].spelled
            alpha = float(_by_pattern(settings.get("alpha_pattern"), spelled, settings["lora_alpha"]))
            if settings.get("use_rslora"):
                alpha *= math.sqrt(rank)
            if alpha != rank:
                alphas[layer] = alpha
        return alphas

    def standard(self, tensors: Mapping[str, torch.Tensor], skip: Callable = lambda key: False) -> dict[str, torch.Tensor]:
        """``tensors`` (raw key -> tensor) under standard keys, with PEFT's alphas; ``skip(key)``: whether to leave a Key out."""
        self.check()
        kept = [key for key in self.names.keys.values() if not skip(key)]
        result = {key.standard: _column(key, tensors[key.raw]) for key in kept}
        layers = {key.layer: key for key in kept}
        for layer, alpha in self.alphas().items():
            if layer in layers:
                result[_alpha_key(layers[layer])] = torch.tensor(alpha)
        return result

    def check(self) -> None:
        """Raise LoraError when two keys mean the same matrix."""
        for standard, raws in self.names.clashes.items():
            raise LoraError(
                f"{self.path.name} holds several adapters in one file ('{raws[0]}' and '{raws[1]}' are both '{standard}'); "
                "save them as one file each."
            )


def open_lora(path: str | Path) -> LoraFile:
    """Open a LoRA file, of whatever model. Raises LoraError, with what the file is and where it belongs, when it is no LoRA."""
    from ..loading.identify import identify

    file = open_weights(path)
    try:
        if not is_lora(file.names()):
            report = identify(file)
            place = f"; it belongs in {report.inputs[0]}." if report.inputs else "."
            raise LoraError(report.refusal or f"{file.path.name} is no LoRA but {report.title}{place}")
        if file.kind != "safetensors":
            raise LoraError(f"{file.path.name} is a LoRA in a {file.kind.upper()} file, which is not read here; use its safetensors file.")
        return LoraFile(file)
    except BaseException:
        file.close()
        raise


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
        return f"{name} is a LoRA for LTX-2's sound stream only ({count} layers); this pack makes video only, so it has no effect here."
    if names.layers("projection"):
        return f"{name} is a LoRA for LTX-2's text projection only; it has no layer of the video model and no effect here."
    first = ", ".join(list(names.keys)[:3])
    return f"{name} is a LoRA for a model that this pack does not know (first keys: {first}); use a LoRA made for LTX-2 or LTX-2.3."


def rewrite(
    source: str | Path, output: str | Path, *, keep_audio: bool = True, overwrite: bool = False, progress: Progress | None = None
) -> dict:
    """Copy a LoRA file under standard keys: the tensors' bytes and the header's metadata as they are. Returns counts and sizes.

    keep_audio: whether layers of the sound stream stay (the host's full model uses them). What cannot be read keeps its key. PEFT's alphas
    become tensors, and its settings leave the header, since they would count twice.
    Raises LoraError, OutputError, WeightFileError or OSError; then nothing was written.
    """
    source, output = Path(source), Path(output)
    lora = open_lora(source)
    lora.file.close()
    lora.check()
    if not lora.names.layers("video") and not (keep_audio and lora.names.layers("audio")):
        raise LoraError(nothing_fits(lora))
    check_output(output, suffixes=(".safetensors",), overwrite=overwrite, sources=[source], nbytes=source.stat().st_size)
    stored = SafetensorsFile(source)
    names = LoraNames(stored.entries)
    kept = [key for key in names.keys.values() if keep_audio or key.kind != "audio"]
    by_layer = {key.layer: key for key in kept}
    alphas = {_alpha_key(by_layer[layer]): struct.pack("<f", alpha) for layer, alpha in lora.alphas().items() if layer in by_layer}
    metadata = {name: value for name, value in stored.metadata.items() if not (alphas and name == ADAPTER_METADATA)}

    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for key in kept:
        entry = stored.entries[key.raw]
        shape = list(_column_shape(key, entry.shape))
        header[key.standard] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    for name in alphas:
        header[name] = {"dtype": "F32", "shape": [], "data_offsets": [end, end + 4]}
        end += 4
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)

    with Output(output, overwrite) as written, open(source, "rb") as reading:
        written.file.write(struct.pack("<Q", len(data)) + data)
        done = 0
        for key in kept:
            entry = stored.entries[key.raw]
            reading.seek(entry.offset)
            for start in range(0, entry.nbytes, PIECE):
                piece = reading.read(min(PIECE, entry.nbytes - start))
                written.file.write(piece)
                done += len(piece)
                if progress:
                    progress(done, key.raw)
        written.file.write(b"".join(alphas.values()))
    renamed = sum(key.standard != key.raw for key in kept)
    return {
        "source": source.name, "output": output.name, "spelling": lora.names.spelling,
        "tensors": len(kept), "renamed": renamed, "alphas_added": len(alphas),
        "layers": {kind: len(lora.names.layers(kind)) for kind in ("video", "audio", "projection", "text", "unknown")},
        "unknown": lora.names.layers("unknown"), "audio_kept": keep_audio, "output_bytes": end,
    }  # fmt: skip


def _alpha_key(key) -> str:
    return key.standard.removesuffix(key.matrix) + ALPHA


def _column_shape(key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """PEFT stores DoRA's magnitudes as [out]; the host wants [out, 1]."""
    return (*shape, 1) if key.matrix == "dora_scale" and len(shape) == 1 else tuple(shape)


def _column(key, value: torch.Tensor) -> torch.Tensor:
    shape = _column_shape(key, tuple(value.shape))
    return value if shape == tuple(value.shape) else value.reshape(shape)


def _peft_settings(metadata: Mapping) -> dict | None:
    """The LoraConfig that diffusers writes into the header, for the transformer."""
    try:
        settings = json.loads(metadata.get(ADAPTER_METADATA) or "{}")
    except (ValueError, TypeError):
        return None
    if not isinstance(settings, dict):
        return None
    prefixed = {name.removeprefix("transformer."): value for name, value in settings.items() if name.startswith("transformer.")}
    settings = prefixed or settings
    return settings if isinstance(settings.get("lora_alpha"), (int, float)) else None


def _by_pattern(patterns: Mapping | None, layer: str, default):
    """PEFT's look-up: the first pattern that the end of the layer's name matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", layer):
            return value
    return default
