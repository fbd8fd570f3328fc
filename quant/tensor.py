"""Packed weights as tensors that torch code and the host already understand: ``comfy_kitchen`` quantised tensors over raw GGUF bytes.

One layout is registered per block format (``GGUFQ4_0Layout``, ...). The data are the file's bytes, ``uint8 [rows, row_bytes]``;
there is nothing beside them, so that moving, pinning or sizing a weight concerns exactly the quantised bytes. The tensor's dtype is
the compute dtype and its shape the logical one, so ``torch.nn.functional.linear(x, W, b)`` and ``embedding(ids, W)`` work as on a
dense weight and run on the bytes. Every other operation decodes the weight first (and in-place arithmetic has no effect: the
decoded copy is changed and dropped).

Create packed tensors inside ``torch.inference_mode()``, and use them there.

Sources: ``comfy_kitchen/tensor/base.py`` (layout protocol, dispatch).
"""

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import BaseLayoutParams, QuantizedLayout, dequantize_args, register_layout_class, register_layout_op

from . import fast
from . import linear as _linear
from .formats import QUANTIZED, BlockFormat, format_by_name

_NAME = "GGUF{}Layout"
_aten = torch.ops.aten


@dataclass(frozen=True)
class GGUFParams(BaseLayoutParams):
    """Parameters of a packed tensor. ``scale`` is always None: block scales are inside the bytes.

    transposed: the logical tensor is the transpose of what the bytes hold; ``orig_shape`` is the logical shape then too
    compute:    "exact" (decode, then multiply in the dtype of x) or "fast" (8-bit products where the device has them, see ``fast.py``)
    """

    transposed: bool = False
    compute: str = "exact"

    def _tensor_fields(self) -> list[str]:
        return []


class GGUFLayout(QuantizedLayout):
    """Base of the layouts, one subclass per block format."""

    Params = GGUFParams
    format: BlockFormat

    @classmethod
    def quantize(cls, tensor: torch.Tensor, **kwargs) -> tuple[torch.Tensor, GGUFParams]:
        """Refused: called when a caller wants changed weights stored back as quantised ones, which would lose what was changed."""
        raise NotImplementedError(
            f"A {cls.format.name} weight is not quantised again at run time: changes as small as a LoRA's would be rounded away. "
            f"Apply the change after decoding, or use quant.reference.quantize to convert weights."
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGUFParams) -> torch.Tensor:
        shape = tuple(reversed(params.orig_shape)) if params.transposed else tuple(params.orig_shape)
        return _linear.dequantize(qdata, cls.format, params.orig_dtype).view(shape)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGUFParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


_FORMAT_OF_LAYOUT: dict[str, BlockFormat] = {}
for _fmt in QUANTIZED.values():
    _layout_name = _NAME.format(_fmt.name)
    register_layout_class(_layout_name, type(_layout_name, (GGUFLayout,), {"format": _fmt, "__doc__": f"Raw {_fmt.name} blocks.", "__module__": __name__}))
    _FORMAT_OF_LAYOUT[_layout_name] = _fmt


def pack(raw: torch.Tensor, fmt: BlockFormat | str, shape: tuple[int, int], compute_dtype: torch.dtype) -> QuantizedTensor:
    """Raw bytes -> a weight. Nothing is copied.

    raw:           ``uint8 [rows, row_bytes]``, contiguous
    shape:         logical ``(out_features, in_features)``
    compute_dtype: dtype of the activations that will meet the weight; decoding yields it
    Raises ValueError when the bytes do not fit format and shape.
    """
    fmt = format_by_name(fmt) if isinstance(fmt, str) else fmt
    shape = tuple(int(n) for n in shape)
    if not fmt.is_quantized or len(shape) != 2:
        raise ValueError(f"A packed weight is block-quantised and two-dimensional; found {fmt.name} of shape {shape}. Load this tensor dense.")
    expected = fmt.packed_shape(shape)
    if raw.dtype != torch.uint8 or tuple(raw.shape) != expected:
        raise ValueError(f"{fmt.name} bytes of a {shape} weight are uint8 {expected}; found {raw.dtype} {tuple(raw.shape)}. Wrong format or shape.")
    return QuantizedTensor(raw, _NAME.format(fmt.name), GGUFParams(scale=None, orig_dtype=compute_dtype, orig_shape=shape))


def is_packed(tensor) -> bool:
    """Whether this is a packed GGUF weight (a quantised tensor of another layout is not)."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls in _FORMAT_OF_LAYOUT


def format_of(tensor: QuantizedTensor) -> BlockFormat:
    """The block format of a packed weight. Raises TypeError for anything else."""
    if not is_packed(tensor):
        raise TypeError(f"Expected a packed GGUF weight, found {type(tensor).__name__} of dtype {tensor.dtype}.")
    return _FORMAT_OF_LAYOUT[tensor._layout_cls]


def unpack(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A dense tensor of ``dtype`` (default: the compute dtype). A dense tensor is converted at most."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor if dtype is None else tensor.to(dtype)
    return (tensor if dtype is None else with_compute_dtype(tensor, dtype)).dequantize()


def with_compute_dtype(tensor: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """The same bytes, decoding to another dtype. Nothing is copied."""
    if tensor._params.orig_dtype == dtype:
        return tensor
    return QuantizedTensor(tensor._qdata, tensor._layout_cls, dataclasses.replace(tensor._params, orig_dtype=dtype))


def with_compute(tensor: QuantizedTensor, compute: str) -> QuantizedTensor:
    """The same bytes, multiplied in "exact" or "fast" mode. Nothing is copied. Raises ValueError for another mode."""
    if compute not in ("exact", "fast"):
        raise ValueError(f"Compute mode {compute!r} is not known; expected 'exact' or 'fast'.")
    if tensor._params.compute == compute:
        return tensor
    return QuantizedTensor(tensor._qdata, tensor._layout_cls, dataclasses.replace(tensor._params, compute=compute))


def _dense(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _apply_linear(x, weight, bias, out_features: int, in_features: int) -> torch.Tensor:
    x, bias, fmt, shape = _dense(x), _dense(bias), format_of(weight), (out_features, in_features)
    if weight._params.compute == "fast" and fast.supports(x.device, x.numel() // max(in_features, 1), shape, x.dtype):
        return fast.linear(x, weight._qdata, fmt, shape, bias)
    return _linear.linear(x, weight._qdata, fmt, shape, bias)


@register_layout_op(_aten.linear.default, GGUFLayout)
def _linear_op(qt, args, kwargs):
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not is_packed(weight) or weight._params.transposed:
        return _aten.linear.default(*dequantize_args(args), **dequantize_args(kwargs))
    return _apply_linear(x, weight, bias, *weight._params.orig_shape)


@register_layout_op(_aten.t.default, GGUFLayout)
def _t_op(qt, args, kwargs):
    """Outside inference mode a linear layer arrives here as ``addmm(bias, x, W.t())``: keep the bytes and note the transposition."""
    params = dataclasses.replace(qt._params, orig_shape=tuple(reversed(qt._params.orig_shape)), transposed=not qt._params.transposed)
    return QuantizedTensor(qt._qdata, qt._layout_cls, params)


def _is_transposed(tensor) -> bool:
    return is_packed(tensor) and tensor._params.transposed


@register_layout_op(_aten.mm.default, GGUFLayout)
def _mm_op(qt, args, kwargs):
    x, weight = args
    if not _is_transposed(weight):
        return _aten.mm.default(_dense(x), _dense(weight))
    return _apply_linear(x, weight, None, *reversed(weight._params.orig_shape))


@register_layout_op(_aten.addmm.default, GGUFLayout)
def _addmm_op(qt, args, kwargs):
    bias, x, weight = args
    if not _is_transposed(weight) or kwargs or bias.dim() != 1:
        return _aten.addmm.default(*dequantize_args(args), **dequantize_args(kwargs))
    return _apply_linear(x, weight, bias, *reversed(weight._params.orig_shape))


@register_layout_op(_aten.embedding.default, GGUFLayout)
def _embedding_op(qt, args, kwargs):
    weight, ids = args[0], args[1]
    if not is_packed(weight) or weight._params.transposed:
        return _aten.embedding.default(*dequantize_args(args), **dequantize_args(kwargs))
    return _linear.embedding_rows(ids, weight._qdata, format_of(weight), weight._params.orig_dtype)


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``ids`` of a weight, decoding only these rows. ``ids [...]`` -> ``[..., D]`` in ``dtype`` (default: the weight's)."""
    if not is_packed(weight):
        rows = torch.nn.functional.embedding(ids, _dense(weight))
        return rows if dtype is None else rows.to(dtype)
    return _linear.embedding_rows(ids, weight._qdata, format_of(weight), dtype or weight._params.orig_dtype)
