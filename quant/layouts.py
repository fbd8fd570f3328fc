"""The layouts behind ``tensor.py``: one ``comfy_kitchen`` layout per block format, and the operations that run on packed weights.

Importing this module imports ``comfy_kitchen`` (and, where it exists, triton with it), so ``tensor.py`` does it on first use.

Sources: ``comfy_kitchen/tensor/base.py`` (layout protocol, dispatch).
"""

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedTensor
from comfy_kitchen.tensor.base import (
    BaseLayoutParams,
    QuantizedLayout,
    dequantize_args,
    register_layout_class,
    register_layout_op,
)

from . import matmul
from .formats import QUANTIZED, BlockFormat
from .matmul import LAYOUT_NAME

_aten = torch.ops.aten


@dataclass(frozen=True)
class GGUFParams(BaseLayoutParams):
    """Parameters of a packed tensor. ``scale`` is always None: block scales are inside the bytes.

    transposed: the logical tensor is the transpose of what the bytes hold; ``orig_shape`` is the logical shape then too
    compute:    "exact" (decode, then multiply in the dtype of x) "fast" or "fast int8" (8-bit products where the device has them, see ``eight_bit.py``)
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
            f"Apply the change after decoding, or use quant.decode.quantize to convert weights."
        )

    @classmethod
    def dequantize(cls, qdata: torch.Tensor, params: GGUFParams) -> torch.Tensor:
        shape = tuple(reversed(params.orig_shape)) if params.transposed else tuple(params.orig_shape)
        return matmul.dequantize(qdata, cls.format, params.orig_dtype).view(shape)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[torch.Tensor, ...]:
        return (qtensor._qdata,)

    @classmethod
    def state_dict_tensors(cls, qdata: torch.Tensor, params: GGUFParams) -> dict[str, torch.Tensor]:
        return {"": qdata}


#: Layout name -> block format.
FORMAT_OF_LAYOUT: dict[str, BlockFormat] = {}
for _fmt in QUANTIZED.values():
    _layout_name = LAYOUT_NAME.format(_fmt.name)
    _attributes = {"format": _fmt, "__doc__": f"Raw {_fmt.name} blocks.", "__module__": __name__}
    register_layout_class(_layout_name, type(_layout_name, (GGUFLayout,), _attributes))
    FORMAT_OF_LAYOUT[_layout_name] = _fmt


def is_packed(tensor) -> bool:
    """Whether this is a packed GGUF weight."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls in FORMAT_OF_LAYOUT


def _dense(tensor):
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def _product(x, weight, bias, shape) -> torch.Tensor:
    fmt, compute = FORMAT_OF_LAYOUT[weight._layout_cls], weight._params.compute
    return matmul.linear_raw(_dense(x), weight._qdata, fmt, shape, _dense(bias), compute)


@register_layout_op(_aten.linear.default, GGUFLayout)
def _linear_op(qt, args, kwargs):
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not is_packed(weight) or weight._params.transposed:
        return _aten.linear.default(*dequantize_args(args), **dequantize_args(kwargs))
    return _product(x, weight, bias, weight._params.orig_shape)


@register_layout_op(_aten.t.default, GGUFLayout)
def _t_op(qt, args, kwargs):
    """Outside inference mode a linear layer arrives here as ``addmm(bias, x, W.t())``: keep the bytes and note the transposition."""
    params = dataclasses.replace(
        qt._params, orig_shape=tuple(reversed(qt._params.orig_shape)), transposed=not qt._params.transposed
    )
    return QuantizedTensor(qt._qdata, qt._layout_cls, params)


def _is_transposed(tensor) -> bool:
    return is_packed(tensor) and tensor._params.transposed


@register_layout_op(_aten.mm.default, GGUFLayout)
def _mm_op(qt, args, kwargs):
    x, weight = args
    if not _is_transposed(weight):
        return _aten.mm.default(_dense(x), _dense(weight))
    return _product(x, weight, None, tuple(reversed(weight._params.orig_shape)))


@register_layout_op(_aten.addmm.default, GGUFLayout)
def _addmm_op(qt, args, kwargs):
    bias, x, weight = args
    if not _is_transposed(weight) or kwargs or bias.dim() != 1:
        return _aten.addmm.default(*dequantize_args(args), **dequantize_args(kwargs))
    return _product(x, weight, bias, tuple(reversed(weight._params.orig_shape)))


@register_layout_op(_aten.embedding.default, GGUFLayout)
def _embedding_op(qt, args, kwargs):
    weight, ids = args[0], args[1]
    if not is_packed(weight) or weight._params.transposed:
        return _aten.embedding.default(*dequantize_args(args), **dequantize_args(kwargs))
    return matmul.embedding(ids, weight)
