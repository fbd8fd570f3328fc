"""Safetensors files, plain or quantised by the host (FP8, NVFP4, MXFP8, INT8), with their matrices kept packed where that is exact.

The host's files mark a quantised layer by ``<layer>.comfy_quant`` (JSON bytes) or by ``_quantization_metadata`` in the header, and
keep scales beside the weight; older FP8 files only have ``<layer>.scale_weight`` or no scale at all. Scales and markers have no name of their own here.
The same comfy-kitchen layouts that the host uses decode the weights, one matrix at a time while it is used, so a 13 GB file takes 13 GB.

Sources: ComfyUI ``comfy/ops.py`` (mixed precision loading), ``comfy/utils.py`` (older FP8 forms: ``scaled_fp8``, ``scale_weight``); comfy-kitchen
``tensor/*.py``.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .errors import WeightFileError
from .safetensors import SafetensorsFile
from .text import TABLE_LENGTH, table, visible
from .values import number
from .weight_file import WeightFile


@dataclass(frozen=True)
class _Format:
    """layout: comfy-kitchen's name; storage: torch's name of the data's dtype; scales: parameter of the layout -> (suffix in the file, dtype it is viewed as).

    exact: whether products with a packed weight use it as it is; comfy-kitchen's INT8 products round the activations too.
    """

    layout: str
    storage: str
    scales: dict
    columns_per_item: int = 1
    exact: bool = True


_TENSOR_SCALE = {"scale": ("weight_scale", None)}
FORMATS = {
    "float8_e4m3fn": _Format("TensorCoreFP8Layout", "float8_e4m3fn", _TENSOR_SCALE),
    "float8_e5m2": _Format("TensorCoreFP8Layout", "float8_e5m2", _TENSOR_SCALE),
    "nvfp4": _Format(
        "TensorCoreNVFP4Layout",
        "uint8",
        {"scale": ("weight_scale_2", None), "block_scale": ("weight_scale", "float8_e4m3fn")},
        2,
    ),
    "mxfp8": _Format("TensorCoreMXFP8Layout", "float8_e4m3fn", {"scale": ("weight_scale", "float8_e8m0fnu")}),
    "int8_tensorwise": _Format("TensorWiseINT8Layout", "int8", _TENSOR_SCALE, exact=False),
}
_FP8_ENTRIES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

# Names that belong to a quantised weight, after the layer's name.
_SCALES = (".weight_scale", ".scale_weight")
_COMPANIONS = (*_SCALES, ".weight_scale_2", ".input_scale", ".scale_input", ".comfy_quant", ".pre_quant_scale")
_MARKER_BYTES = 4096


def is_companion(name: str) -> bool:
    """Whether a tensor of this name is a scale or a marker, if there is a weight that it belongs to."""
    return name.endswith((*_COMPANIONS, "scaled_fp8"))


class SafetensorsWeights(WeightFile):
    """A safetensors file. Shapes are logical, ``load_packed`` gives comfy-kitchen tensors, ``load`` decodes and multiplies by scales.

    Call inside ``torch.inference_mode()`` where weights are quantised, as for packed GGUF weights.
    """

    kind = "safetensors"

    def __init__(self, path):
        self.path = Path(path)
        self._file = SafetensorsFile(path)
        self.metadata = self._file.metadata
        entries = self._file.entries
        self._names = [name for name in entries if not (is_companion(name) and _belongs(name, entries))]
        self._visible = frozenset(self._names)
        empty = next((name for name in self._names if 0 in entries[name].shape), None)
        if empty is not None:
            raise WeightFileError(
                f"{self.path.name}: tensor {visible(empty)} has the shape {entries[empty].shape} and no numbers; the file is damaged."
            )

    def _index(self):
        return self._visible

    def names(self):
        return list(self._names)

    def _entry(self, name):
        if name not in self._visible:
            raise KeyError(f"{self.path.name} has no tensor {name!r}.")
        return self._file.entries[name]

    def format(self, name):
        stored, settings = self._entry(name).dtype, self._quantised(name)
        return stored if settings is None or stored in _FP8_ENTRIES else settings["format"]

    def nbytes(self, name):
        return self._entry(name).nbytes

    def shape(self, name):
        shape, settings = self._entry(name).shape, self._quantised(name)
        return (
            (*shape[:-1], shape[-1] * FORMATS[settings["format"]].columns_per_item)
            if settings and settings["format"] in FORMATS
            else shape
        )

    def load(self, name, dtype=None):
        import torch

        self._entry(name)
        self.require_readable([name])
        settings = self._quantised(name)
        if settings is None or settings["format"] in _FP8_ENTRIES.values():
            value = self._scaled(self._file.tensor(name), self._scale(name))
            value = value if dtype is None or not value.is_floating_point() else value.to(dtype)
        else:
            value = self._pack(name, dtype or torch.float32).dequantize()
        smoothing = self._companion(name, "pre_quant_scale")
        return (
            value if smoothing is None else value * smoothing.to(value.dtype)
        )  # the activations' factors, moved into the columns

    def load_packed(self, name, compute_dtype):
        self.require_readable([name])
        settings = self._quantised(name)
        if (
            settings is None
            or not FORMATS[settings["format"]].exact
            or self._companion(name, "pre_quant_scale") is not None
        ):
            return self.load(name, compute_dtype)
        return self._pack(name, compute_dtype)

    def load_rows(self, name, start, stop):
        settings = self._quantised(name)
        if settings is not None and settings["format"] not in _FP8_ENTRIES.values():
            raise WeightFileError(
                f"{self.path.name}: '{visible(name)}' is stored as {settings['format']}; convert from a BF16, F16 or FP8 version of the file."
            )
        scale = self._scale(name)
        if scale is not None and scale.numel() > 1:
            scale = scale.reshape(-1)[start:stop]
        return self._scaled(self._file.tensor(name).reshape(self.stored_matrix(name))[start:stop], scale)

    def require_readable(self, names):
        for name in names:
            settings = self._quantised(name)
            if settings is not None and settings["format"] not in FORMATS:
                raise WeightFileError(
                    f"{self.path.name}: '{visible(name)}' is stored as {visible(settings['format'])}, which this pack does not read; "
                    "use a GGUF, BF16, FP8, NVFP4 or INT8 version of the file."
                )

    def close(self):
        self._file.close()

    @cached_property
    def _settings(self) -> dict[str, dict]:
        """{layer: {"format": ..., further settings}} of every quantised two-dimensional layer."""
        entries, settings = self._file.entries, {}
        for name, entry in entries.items():
            if name.endswith(".weight") and len(entry.shape) == 2 and entry.dtype in _FP8_ENTRIES:
                settings[name.removesuffix(".weight")] = {"format": _FP8_ENTRIES[entry.dtype]}
        for layer, said in self._marked().items():
            stored = settings.get(layer, {}).get("format")
            plain_fp8 = stored is not None and said["format"] in _FP8_ENTRIES.values()
            settings[layer] = (
                {**said, "format": stored} if plain_fp8 else said
            )  # the numbers are of the type they are stored as
        return {
            layer: said
            for layer, said in settings.items()
            if f"{layer}.weight" in entries and not self._one_scale_per_row(layer, said)
        }

    def _marked(self) -> dict[str, dict]:
        """What markers and header say about layers. Raises WeightFileError for what is no table."""
        marked, total = {}, 0
        try:
            if self.metadata.get("_quantization_metadata"):
                header = table(self.metadata["_quantization_metadata"], "the header's '_quantization_metadata'")
                marked = dict(table(header.get("layers", {}), "the header's '_quantization_metadata.layers'"))
            for name, entry in self._file.entries.items():
                if name.endswith(".comfy_quant"):
                    total += entry.nbytes
                    if entry.nbytes > _MARKER_BYTES or total > TABLE_LENGTH:
                        raise ValueError(
                            f"'{visible(name)}' has {entry.nbytes} bytes; expected a short JSON text. Download the file again."
                        )
                    marked[name.removesuffix(".comfy_quant")] = bytes(self._file.raw(name))
            settings = {}
            for layer, said in marked.items():
                said = table(said, f"the marker of '{visible(layer)}'")
                nested = said.get("params")
                settings[layer] = {**(nested if isinstance(nested, dict) else {}), **said}
                if not isinstance(said.get("format"), str):
                    raise ValueError(f"the marker of '{visible(layer)}' names no format; download the file again.")
        except ValueError as error:
            raise WeightFileError(f"{self.path.name}: {error}") from error
        return settings

    def _quantised(self, name):
        return self._settings.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _one_scale_per_row(self, layer: str, said: dict) -> bool:
        """FP8 with a scale per row is decoded when loaded; comfy-kitchen's layout has one scale per matrix."""
        scale = next(
            (self._file.entries[layer + suffix] for suffix in _SCALES if layer + suffix in self._file.entries), None
        )
        return said["format"] in _FP8_ENTRIES.values() and scale is not None and math.prod(scale.shape) > 1

    def _scale(self, name):
        layer = name.removesuffix(".weight")
        if layer == name:
            return None
        scale = next(
            (self._file.tensor(layer + suffix) for suffix in _SCALES if layer + suffix in self._file.entries), None
        )
        rows = self._file.entries[name].shape[:1]
        if scale is not None and scale.numel() != 1 and (scale.numel(),) != rows:
            raise WeightFileError(
                f"{self.path.name}: '{visible(name)}' has {scale.numel()} scales; expected one, or one per row. The file is damaged."
            )
        return scale

    def _scaled(self, value, scale):
        """An FP8 weight as float32, times its scale (one, or one per output row); anything else as it is."""
        import torch

        if scale is not None:
            scale = scale.float()
            return value.float() * (scale.reshape(-1, *(1,) * (value.ndim - 1)) if scale.numel() > 1 else scale)
        return value.float() if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else value

    def _companion(self, name, suffix):
        key = f"{name.removesuffix('.weight')}.{suffix}"
        return self._file.tensor(key) if key in self._file.entries else None

    def _pack(self, name, compute_dtype):
        import torch
        from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

        settings = self._quantised(name)
        form = FORMATS[settings["format"]]
        group = number(settings.get("convrot_groupsize", 256), f"'convrot_groupsize' of '{visible(name)}'")
        scales = {}
        for parameter, (suffix, view) in form.scales.items():
            scale = self._companion(name, suffix)
            if scale is None and suffix == "weight_scale":
                scale = self._companion(name, "scale_weight")
            if scale is None and settings["format"] not in _FP8_ENTRIES.values():
                raise WeightFileError(
                    f"{self.path.name}: '{visible(name)}' is stored as {settings['format']} but its '{suffix}' is missing; download the file again."
                )
            scale = torch.ones((), dtype=torch.float32) if scale is None else scale
            view = None if view is None else getattr(torch, view, None)
            if view is not None and scale.element_size() != view.itemsize:
                raise WeightFileError(
                    f"{self.path.name}: the '{suffix}' of '{visible(name)}' is stored as {scale.dtype}; the file is damaged."
                )
            scales[parameter] = scale if view is None else scale.view(view)
        if settings.get("convrot"):
            scales |= {"convrot": True, "convrot_groupsize": group}
        data, storage = self._file.tensor(name), getattr(torch, form.storage)
        if data.element_size() != storage.itemsize:
            raise WeightFileError(
                f"{self.path.name}: '{visible(name)}' is stored as {data.dtype}, which is not {settings['format']}; the file is damaged."
            )
        data = data if data.dtype == storage else data.view(storage)
        params = get_layout_class(form.layout).Params(
            **scales, orig_dtype=compute_dtype, orig_shape=tuple(self.shape(name))
        )
        return QuantizedTensor(data, form.layout, params)


def _belongs(name: str, entries) -> bool:
    """Whether a scale or marker has its weight in the file."""
    if name.endswith("scaled_fp8"):
        return True
    return any(name.endswith(suffix) and name.removesuffix(suffix) + ".weight" in entries for suffix in _COMPANIONS)
