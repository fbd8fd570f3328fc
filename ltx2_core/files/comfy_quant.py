"""Safetensors that the host has quantised (FP8, NVFP4, MXFP8, INT8), with their matrices kept packed where that is exact.

The host's files mark a quantised layer by ``<layer>.comfy_quant`` (JSON bytes) or by ``_quantization_metadata`` in the header, and
keep scales beside the weight; older FP8 files only have ``<layer>.scale_weight`` or no scale at all. The same comfy-kitchen layouts
that the host uses decode them here, one matrix at a time while it is used, so a 13 GB file takes 13 GB.

Sources: ComfyUI ``comfy/ops.py`` (mixed precision loading), ``comfy/utils.py`` (older FP8 forms); comfy-kitchen ``tensor/*.py``.
"""

import json
import math
from dataclasses import dataclass

import torch

from .safetensors import SafetensorsFile
from .weights import SafetensorsWeights, WeightFile, WeightFileError


@dataclass(frozen=True)
class _Format:
    """layout: comfy-kitchen's name; storage: dtype of the data; scales: parameter of the layout -> (suffix in the file, dtype it is viewed as).

    exact: whether products with a packed weight use it as it is; comfy-kitchen's INT8 products round the activations too.
    """

    layout: str
    storage: torch.dtype
    scales: dict
    columns_per_item: int = 1
    exact: bool = True


_TENSOR_SCALE = {"scale": ("weight_scale", None)}
FORMATS = {
    "float8_e4m3fn": _Format("TensorCoreFP8Layout", torch.float8_e4m3fn, _TENSOR_SCALE),
    "float8_e5m2": _Format("TensorCoreFP8Layout", torch.float8_e5m2, _TENSOR_SCALE),
    "nvfp4": _Format("TensorCoreNVFP4Layout", torch.uint8, {"scale": ("weight_scale_2", None), "block_scale": ("weight_scale", torch.float8_e4m3fn)}, 2),
    "mxfp8": _Format("TensorCoreMXFP8Layout", torch.float8_e4m3fn, {"scale": ("weight_scale", getattr(torch, "float8_e8m0fnu", None))}),
    "int8_tensorwise": _Format("TensorWiseINT8Layout", torch.int8, _TENSOR_SCALE, exact=False),
}
_FP8_ENTRIES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


class HostQuantised(WeightFile):
    """A safetensors file with quantised layers: shapes are logical, ``load_packed`` gives comfy-kitchen tensors, ``load`` decodes.

    Call inside ``torch.inference_mode()``, as for packed GGUF weights.
    """

    kind = "safetensors"

    def __init__(self, weights: SafetensorsWeights):
        self.path, self.metadata = weights.path, weights.metadata
        self._plain = weights
        self._file = SafetensorsFile(weights.path)  # scales and markers have no names of their own in ``weights``
        self._settings = _layer_settings(self._file)

    def _index(self):
        return self._plain._index()

    def names(self):
        return self._plain.names()

    def format(self, name):
        settings = self._of(name)
        return settings["format"] if settings else self._plain.format(name)

    def nbytes(self, name):
        return self._plain.nbytes(name)

    def shape(self, name):
        shape, settings = self._plain.shape(name), self._of(name)
        return (*shape[:-1], shape[-1] * FORMATS[settings["format"]].columns_per_item) if settings else shape

    def load(self, name, dtype=None):
        if self._of(name) is None:
            return self._plain.load(name, dtype)
        value = self._pack(name, dtype or torch.float32).dequantize()
        smoothing = self._companion(name, "pre_quant_scale")
        return value if smoothing is None else value * smoothing.to(value.dtype)  # the activations' factors, moved into the columns

    def load_packed(self, name, compute_dtype):
        settings = self._of(name)
        if settings is None or not FORMATS[settings["format"]].exact or self._companion(name, "pre_quant_scale") is not None:
            return self.load(name, compute_dtype)
        return self._pack(name, compute_dtype)

    def close(self):
        self._plain.close()

    def _of(self, name):
        return self._settings.get(name.removesuffix(".weight")) if name.endswith(".weight") else None

    def _companion(self, name, suffix):
        key = f"{name.removesuffix('.weight')}.{suffix}"
        return self._file.tensor(key) if key in self._file.entries else None

    def _pack(self, name, compute_dtype):
        from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

        settings = self._of(name)
        form = FORMATS[settings["format"]]
        scales = {}
        for parameter, (suffix, view) in form.scales.items():
            scale = self._companion(name, suffix)
            if scale is None and suffix == "weight_scale":
                scale = self._companion(name, "scale_weight")
            if scale is None and settings["format"] not in _FP8_ENTRIES.values():
                raise WeightFileError(f"{self.path.name}: '{name}' is stored as {settings['format']} but its '{suffix}' is missing; download the file again.")
            scale = torch.ones((), dtype=torch.float32) if scale is None else scale
            scales[parameter] = scale if view is None else scale.view(view)
        if settings.get("convrot"):
            scales |= {"convrot": True, "convrot_groupsize": int(settings.get("convrot_groupsize", 256))}
        data = self._file.tensor(name)
        data = data if data.dtype == form.storage else data.view(form.storage)
        params = get_layout_class(form.layout).Params(**scales, orig_dtype=compute_dtype, orig_shape=tuple(self.shape(name)))
        return QuantizedTensor(data, form.layout, params)


def open_quantised(weights: WeightFile) -> WeightFile:
    """``weights`` with its quantised layers readable as packed tensors; the file itself when it has none.

    Raises WeightFileError for a quantisation that comfy-kitchen's layouts do not cover.
    """
    if not isinstance(weights, SafetensorsWeights):
        return weights
    quantised = HostQuantised(weights)
    return quantised if quantised._settings else weights


def _layer_settings(file: SafetensorsFile) -> dict[str, dict]:
    """{layer: {"format": ..., further settings}} of every quantised two-dimensional layer."""
    settings = {}
    for name, entry in file.entries.items():
        if not name.endswith(".weight") or len(entry.shape) != 2:
            continue
        layer = name.removesuffix(".weight")
        if entry.dtype in _FP8_ENTRIES:
            settings[layer] = {"format": _FP8_ENTRIES[entry.dtype]}
    header = file.metadata.get("_quantization_metadata")
    marked = dict(json.loads(header).get("layers", {})) if header else {}
    for name in file.entries:
        if name.endswith(".comfy_quant"):
            marked[name.removesuffix(".comfy_quant")] = json.loads(bytes(file.tensor(name).tolist()))
    for layer, said in marked.items():
        kind = said.get("format")
        if kind not in FORMATS:
            raise WeightFileError(
                f"{file.name}: '{layer}' is stored as {kind}, which this pack does not read; use a GGUF, BF16, FP8, NVFP4 or INT8 version of the file."
            )
        nested = said.get("params")
        settings[layer] = {**(nested if isinstance(nested, dict) else {}), **said}
    return {layer: said for layer, said in settings.items() if f"{layer}.weight" in file.entries and not _one_scale_per_row(file, layer, said)}


def _one_scale_per_row(file: SafetensorsFile, layer: str, said: dict) -> bool:
    """FP8 with a scale per row is decoded when loaded (``SafetensorsWeights.load``); comfy-kitchen's layout has one scale per matrix."""
    scale = file.entries.get(f"{layer}.weight_scale") or file.entries.get(f"{layer}.scale_weight")
    return said["format"] in _FP8_ENTRIES.values() and scale is not None and math.prod(scale.shape) > 1
