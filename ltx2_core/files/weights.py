"""One interface over the files weights come in: GGUF, safetensors, sharded safetensors, FP8-scaled safetensors.

Opening a file reads its header. Loading touches one tensor; where nothing has to be decoded or cast, the result is a view of the
memory map. Scales and markers that belong to an FP8 weight are folded into it and have no name of their own here.

Sources: safetensors format (huggingface/safetensors README); FP8 conventions of Comfy-Org/ComfyUI ``comfy/utils.py``
(``scaled_fp8``, ``scale_weight``) and ``comfy/ops.py`` (``files.comfy_quant``, ``weight_scale``).
"""

import json
import logging
import math
import os
import re
from pathlib import Path

import torch
from torch import nn

from ...quant.gguf import reader
from ...quant.formats import UnsupportedFormatError, require_decodable
from ...quant.decode import dequantize
from .safetensors import SafetensorsFile

logger = logging.getLogger(__name__)

ORIG_SHAPE = "comfy.gguf.orig_shape."  # GGUF entry: the true shape of a tensor with more dimensions than GGUF has
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.safetensors)$")

# Names that belong to a quantised safetensors weight, after the layer's name.
_SCALES = (".weight_scale", ".scale_weight")
_COMPANIONS = (*_SCALES, ".weight_scale_2", ".input_scale", ".scale_input", ".comfy_quant", ".pre_quant_scale")
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class WeightFileError(ValueError):
    """A weight file is missing, truncated, foreign or holds weights in a form this pack does not read."""


class WeightsMismatch(WeightFileError):
    """A module and the tensors for it do not fit; ``missing``, ``unexpected`` and ``misshapen`` list the names."""

    def __init__(self, message, missing=(), unexpected=(), misshapen=()):
        super().__init__(message)
        self.missing, self.unexpected, self.misshapen = tuple(missing), tuple(unexpected), tuple(misshapen)


class WeightFile:
    """What every kind of weight file offers; see :func:`open_weights`.

    path: Path; kind: "gguf" or "safetensors"; metadata: mapping of the header's entries.
    """

    path: Path
    kind: str

    def names(self):
        """Tensor names in file order."""
        raise NotImplementedError

    def shape(self, name):
        """Logical shape in torch order."""
        raise NotImplementedError

    def format(self, name):
        """Name of the storage format: "Q8_0", "BF16", "F8_E4M3", …"""
        raise NotImplementedError

    def nbytes(self, name):
        """Bytes in the file."""
        raise NotImplementedError

    def load(self, name, dtype=None):
        """The tensor, dense. dtype None: as stored, quantised ones as float32."""
        raise NotImplementedError

    def load_packed(self, name, compute_dtype):
        """A packed QuantizedTensor for a 2-D block-quantised tensor, else dense in compute_dtype."""
        return self.load(name, compute_dtype)

    def stored_matrix(self, name):
        """(rows, columns) of the tensor as it lies in the file: all dimensions but the last are rows."""
        shape = self.shape(name) or (1,)
        return math.prod(shape[:-1]), shape[-1]

    def load_rows(self, name, start, stop):
        """Rows start..stop of the stored matrix, dense as by ``load(name)``, without decoding the others."""
        return self.load(name).reshape(self.stored_matrix(name))[start:stop]

    def close(self):
        """Let go of the map (views of it stay valid)."""

    def __contains__(self, name):
        return name in self._index()

    def shapes(self):
        """{name: shape} of all tensors."""
        return {name: self.shape(name) for name in self.names()}

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.names())} tensors)"


class GGUFWeights(WeightFile):
    """A GGUF file. ``gguf`` is the underlying GGUFFile."""

    kind = "gguf"

    def __init__(self, path):
        self.path = Path(path)
        self.gguf = reader.GGUFFile(path)
        self.metadata = self.gguf.metadata

    def _index(self):
        return self.gguf.tensors

    def names(self):
        return list(self.gguf.tensors)

    def shape(self, name):
        original = self.metadata.get(ORIG_SHAPE + name)
        return tuple(int(n) for n in original) if original is not None else tuple(self.gguf.info(name).shape)

    def format(self, name):
        return self.gguf.info(name).format.name

    def nbytes(self, name):
        return self.gguf.info(name).nbytes

    def load(self, name, dtype=None):
        return self.gguf.load(name, dtype).reshape(self.shape(name))

    def load_packed(self, name, compute_dtype):
        info = self.gguf.info(name)
        shape = self.shape(name)
        if not info.format.is_quantized or len(shape) != 2:
            return self.load(name, compute_dtype)
        from ...quant import tensor

        require_decodable(info.format, f"{self.path.name}: tensor {name}")
        return tensor.pack(self.gguf.raw(name), info.format, shape, compute_dtype)

    def stored_matrix(self, name):
        shape = self.gguf.info(name).shape or (1,)
        return math.prod(shape[:-1]), shape[-1]

    def load_rows(self, name, start, stop):
        fmt = self.gguf.info(name).format
        if not fmt.is_quantized:
            return super().load_rows(name, start, stop)
        return dequantize(self.gguf.raw(name)[start:stop], require_decodable(fmt, f"{self.path.name}: tensor {name}"))

    def close(self):
        self.gguf.close()


class SafetensorsWeights(WeightFile):
    """A safetensors file. FP8 weights with scales are multiplied out when loaded."""

    kind = "safetensors"

    def __init__(self, path):
        self.path = Path(path)
        self._file = SafetensorsFile(path)
        self.metadata = self._file.metadata
        self._names = [name for name in self._file.entries if not _is_companion(name, self._file.entries)]
        self._visible = frozenset(self._names)
        self._layer_formats = _layer_formats(self.metadata)

    def _index(self):
        return self._visible

    def names(self):
        return list(self._names)

    def _entry(self, name):
        if name not in self._visible:
            raise KeyError(f"{self.path.name} has no tensor {name!r}.")
        return self._file.entries[name]

    def shape(self, name):
        return self._entry(name).shape

    def format(self, name):
        return self._entry(name).dtype

    def nbytes(self, name):
        return self._entry(name).nbytes

    def load(self, name, dtype=None):
        self._entry(name)
        self._refuse_foreign_quantisation(name)
        value = self._scaled(self._file.tensor(name), self._scale(name))
        return value if dtype is None or not value.is_floating_point() else value.to(dtype)

    def load_rows(self, name, start, stop):
        self._entry(name)
        self._refuse_foreign_quantisation(name)
        scale = self._scale(name)
        if scale is not None and scale.numel() > 1:
            scale = scale.reshape(-1)[start:stop]
        return self._scaled(self._file.tensor(name).reshape(self.stored_matrix(name))[start:stop], scale)

    def _scaled(self, value, scale):
        """An FP8 weight as float32, times its scale (one, or one per output row); anything else as it is."""
        if scale is not None:
            scale = scale.float()
            return value.float() * (scale.reshape(-1, *(1,) * (value.ndim - 1)) if scale.numel() > 1 else scale)
        return value.float() if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else value

    def _scale(self, name):
        layer = name.removesuffix(".weight")
        if layer == name:
            return None
        for suffix in _SCALES:
            if layer + suffix in self._file.entries:
                return self._file.tensor(layer + suffix)
        return None

    def _refuse_foreign_quantisation(self, name):
        """Raise for weights that only look like numbers (4-bit floats, block scales, rotated integers)."""
        layer = name.removesuffix(".weight")
        kind = self._layer_formats.get(layer)
        if layer + ".comfy_quant" in self._file.entries:
            kind = json.loads(bytes(self._file.tensor(layer + ".comfy_quant").tolist())).get("format")
        if kind is not None and kind not in _FP8_FORMATS:
            raise WeightFileError(
                f"{self.path.name}: '{name}' is stored as {kind}, which this pack does not read; it reads GGUF, BF16/F16/F32 and FP8-scaled safetensors. "
                "Use such a file, or load this one with the host's own loader."
            )


class ShardedWeights(WeightFile):
    """Several files that hold one model's tensors between them."""

    def __init__(self, path, files):
        self.path = Path(path)
        self.files = files
        self.kind = files[0].kind
        self.metadata = {key: value for file in reversed(files) for key, value in file.metadata.items()}
        self._owner = {}
        for file in files:
            for name in file.names():
                if name in self._owner:
                    raise WeightFileError(f"'{name}' is in both {self._owner[name].path.name} and {file.path.name}; the shards belong to different models.")
                self._owner[name] = file

    def _index(self):
        return self._owner

    def _of(self, name):
        if name not in self._owner:
            raise KeyError(f"{self.path.name} has no tensor {name!r}.")
        return self._owner[name]

    def names(self):
        return list(self._owner)

    def shape(self, name):
        return self._of(name).shape(name)

    def format(self, name):
        return self._of(name).format(name)

    def nbytes(self, name):
        return self._of(name).nbytes(name)

    def load(self, name, dtype=None):
        return self._of(name).load(name, dtype)

    def load_packed(self, name, compute_dtype):
        return self._of(name).load_packed(name, compute_dtype)

    def stored_matrix(self, name):
        return self._of(name).stored_matrix(name)

    def load_rows(self, name, start, stop):
        return self._of(name).load_rows(name, start, stop)

    def close(self):
        for file in self.files:
            file.close()


def _is_companion(name, entries):
    if name.endswith("scaled_fp8"):
        return True
    for suffix in _COMPANIONS:
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".weight" in entries
    return False


def _layer_formats(metadata):
    """{layer: format} from the header's ``_quantization_metadata``; empty when there is none."""
    text = metadata.get("_quantization_metadata")
    if not text:
        return {}
    try:
        layers = json.loads(text).get("layers", {})
    except ValueError as error:
        raise WeightFileError(f"The header's '_quantization_metadata' is not JSON ({error}); download the file again.") from error
    return {layer: settings.get("format") for layer, settings in layers.items()}


def open_weights(path):
    """Open a weight file of any kind; the content decides, not the name. Returns a WeightFile.

    path: a ``.gguf`` or ``.safetensors`` file, one shard of several, a ``.safetensors.index.json``, or a folder that holds one.
    Raises WeightFileError, in one sentence, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise WeightFileError(f"{path} is a folder with {len(found)} sets of weights; name one file.")
        path = found[0]
    if not path.is_file():
        raise WeightFileError(f"{path} does not exist; check the name and the folder.")
    if path.name.endswith(".safetensors.index.json"):
        return _open_index(path)
    shard = _SHARD.match(path.name)
    if shard:
        count = int(shard["count"])
        return _open_shards(path, [f"{shard['stem']}-{part:05d}-of-{count:05d}{shard['suffix']}" for part in range(1, count + 1)])
    return _open_one(path)


def _open_one(path):
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        # The GGUF reader also knows what other beginnings mean and says so.
        return SafetensorsWeights(path) if head[8:9] == b"{" else GGUFWeights(path)
    except (reader.GGUFFormatError, UnsupportedFormatError) as error:
        raise WeightFileError(str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, WeightFileError) else WeightFileError(str(error)) from error
    except OSError as error:
        raise WeightFileError(f"{path} cannot be opened ({error.strerror}); check its permissions and whether the disk is full.") from error


def _open_index(path):
    try:
        index = json.loads(path.read_text("utf-8"))
        names = sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightFileError(f"{path.name} is not a safetensors index (no 'weight_map'); download it again.") from error
    weights = _open_shards(path, names)
    absent = [name for name in index["weight_map"] if name not in weights and not name.endswith((*_COMPANIONS, "scaled_fp8"))]
    if absent:
        raise WeightFileError(f"{path.name} lists {len(absent)} tensors that no shard holds (first: {absent[0]}); download the shards again.")
    return weights


def _open_shards(path, names):
    missing = [name for name in names if not (path.parent / os.path.basename(name)).is_file()]
    if missing:
        raise WeightFileError(f"{path.name} is one of {len(names)} parts, and {len(missing)} are missing beside it (first: {missing[0]}); download them into the same folder.")
    return ShardedWeights(path, [_open_one(path.parent / os.path.basename(name)) for name in names])


def assign(module, tensors, reason=None):
    """Make ``tensors`` the parameters and buffers of ``module`` by name, without copying (the module may be on meta).

    tensors: mapping name -> tensor (dense or packed); a lazy one may have a method ``shape(name)``. Parameters do not require gradients afterwards. reason: function
    (missing names, unexpected names) -> likely cause as a sentence, for the error. Raises WeightsMismatch when names or shapes
    do not fit; then nothing was assigned.
    """
    slots = {}
    for prefix, child in module.named_modules():
        stem = prefix + "." if prefix else ""
        slots.update({stem + name: (child, name) for name in child._parameters if child._parameters[name] is not None})
        slots.update({stem + name: (child, name) for name in child._buffers if name not in child._non_persistent_buffers_set and child._buffers[name] is not None})
    missing = [name for name in slots if name not in tensors]
    unexpected = [name for name in tensors if name not in slots]
    shape = tensors.shape if hasattr(tensors, "shape") else lambda name: tensors[name].shape  # a lazy mapping knows shapes without loading
    misshapen = {name: shape(name) for name in slots if name in tensors and getattr(*slots[name]).shape != shape(name)}
    if missing or unexpected or misshapen:
        raise WeightsMismatch(_mismatch(module, slots, missing, unexpected, misshapen, reason), missing, unexpected, misshapen)
    for name, (child, attribute) in slots.items():
        if attribute in child._parameters:
            child._parameters[attribute] = nn.Parameter(tensors[name], requires_grad=False)
        else:
            child._buffers[attribute] = tensors[name]


def _tensors(count):
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _mismatch(module, slots, missing, unexpected, misshapen, reason):
    parts = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            parts.append(f"{_tensors(len(names))} {what} (first: {', '.join(names[:5])})")
    if misshapen:
        shown = ", ".join(f"{name} is {tuple(found)}, expected {tuple(getattr(*slots[name]).shape)}" for name, found in list(misshapen.items())[:5])
        parts.append(f"{_tensors(len(misshapen))} of another shape (first: {shown})")
    cause = reason(missing, unexpected) if reason else ""
    return f"{type(module).__name__}: " + "; ".join(parts) + "." + (f" {cause}" if cause else "")
