"""Packed weights as tensors that torch code and the host already understand: ``comfy_kitchen`` quantised tensors over raw GGUF bytes.

One layout is registered per block format (``GGUFQ4_0Layout``, ...; see ``layouts.py``). The data are the file's bytes, ``uint8 [rows,
row_bytes]``; there is nothing beside them, so that moving, pinning or sizing a weight concerns exactly the quantised bytes. The
tensor's dtype is the compute dtype and its shape the logical one, so ``torch.nn.functional.linear(x, W, b)`` and ``embedding(ids, W)``
work as on a dense weight and run on the bytes. Every other operation decodes the weight first (and in-place arithmetic has no effect:
the decoded copy is changed and dropped).

Create packed tensors inside ``torch.inference_mode()``, and use them there. ``comfy_kitchen`` is imported when the first one is made.
"""

import dataclasses
import importlib
import sys
from typing import TYPE_CHECKING

import torch

from .formats import BlockFormat, format_by_name
from .matmul import LAYOUT_NAME

if TYPE_CHECKING:
    from comfy_kitchen.tensor import QuantizedTensor

COMPUTE_MODES = ("exact", "fast", "fast int8")


_imported = None  # the module with the layouts, once something here has needed it


def _layouts():
    """The module with the layouts; imported on first use."""
    global _imported
    if _imported is None:
        _imported = importlib.import_module(".layouts", __package__)
    return _imported


def __getattr__(name: str):
    """``GGUFLayout``, ``GGUFParams`` and ``QuantizedTensor`` are in ``layouts.py`` and come from here too."""
    if name in ("GGUFLayout", "GGUFParams", "QuantizedTensor"):
        return getattr(_layouts(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def pack(
    raw: torch.Tensor, fmt: BlockFormat | str, shape: tuple[int, int], compute_dtype: torch.dtype
) -> "QuantizedTensor":
    """Raw bytes -> a weight. Nothing is copied.

    raw:           ``uint8 [rows, row_bytes]``, contiguous
    shape:         logical ``(out_features, in_features)``
    compute_dtype: dtype of the activations that will meet the weight; decoding yields it
    Raises ValueError when the bytes do not fit format and shape.
    """
    fmt = format_by_name(fmt) if isinstance(fmt, str) else fmt
    shape = tuple(int(n) for n in shape)
    if not fmt.is_quantized or len(shape) != 2:
        raise ValueError(
            f"A packed weight is block-quantised and two-dimensional; found {fmt.name} of shape {shape}. Load this tensor dense."
        )
    expected = fmt.packed_shape(shape)
    if raw.dtype != torch.uint8 or tuple(raw.shape) != expected:
        raise ValueError(
            f"{fmt.name} bytes of a {shape} weight are uint8 {expected}; found {raw.dtype} {tuple(raw.shape)}. Wrong format or shape."
        )
    layouts = _layouts()
    params = layouts.GGUFParams(scale=None, orig_dtype=compute_dtype, orig_shape=shape)
    return layouts.QuantizedTensor(raw, LAYOUT_NAME.format(fmt.name), params)


def is_packed(tensor) -> bool:
    """Whether this is a packed GGUF weight (a quantised tensor of another layout is not)."""
    layouts = _imported  # asked for several times per layer of a step
    if layouts is None:
        if f"{__package__}.layouts" not in sys.modules:
            return False  # nothing was packed yet
        layouts = _layouts()
    return layouts.is_packed(tensor)


def format_of(tensor: "QuantizedTensor") -> BlockFormat:
    """The block format of a packed weight. Raises TypeError for anything else."""
    if not is_packed(tensor):
        raise TypeError(f"Expected a packed GGUF weight, found {type(tensor).__name__} of dtype {tensor.dtype}.")
    return _layouts().FORMAT_OF_LAYOUT[tensor._layout_cls]


def unpack(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor of ``dtype`` (default: the compute dtype). A dense tensor is converted at most."""
    if not is_packed(tensor):
        return tensor if dtype is None else tensor.to(dtype)
    return (tensor if dtype is None else with_compute_dtype(tensor, dtype)).dequantize()


def _with(tensor: "QuantizedTensor", **changes) -> "QuantizedTensor":
    """The same bytes under changed parameters. Nothing is copied."""
    if all(getattr(tensor._params, name) == value for name, value in changes.items()):
        return tensor
    return _layouts().QuantizedTensor(tensor._qdata, tensor._layout_cls, dataclasses.replace(tensor._params, **changes))


def with_compute_dtype(tensor: "QuantizedTensor", dtype: torch.dtype) -> "QuantizedTensor":
    """The same bytes, decoding to another dtype. Nothing is copied."""
    return _with(tensor, orig_dtype=dtype)


def with_compute(tensor: "QuantizedTensor", compute: str) -> "QuantizedTensor":
    """The same bytes, multiplied in another compute mode (``COMPUTE_MODES``). Nothing is copied. Raises ValueError for another mode."""
    if compute not in COMPUTE_MODES:
        raise ValueError(f"Compute mode {compute!r} is not known; expected one of {', '.join(COMPUTE_MODES)}.")
    return _with(tensor, compute=compute)
