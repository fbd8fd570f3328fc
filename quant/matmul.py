"""Products with weights, packed or dense: THE place where the way to a product is chosen.

    linear(x, weight, bias, gelu)          any weight; asks once whether it is packed
    linear_raw(x, raw, fmt, shape, ...)    the same for the bytes of a packed weight, which is where every packed product ends

A packed product takes the first of these that applies:

1. 8-bit tensor cores, for a weight in fast mode (``eight_bit.py`` says where that is faster);
2. a kernel that reads the bytes, for as many rows as the table in ``backends.py`` declares;
3. dequantise into scratch memory that every product of this thread and stream reuses, then the dense product.

GELU is an argument, because on NVIDIA GPUs it costs nothing in a product's epilogue (cuBLASLt computes the tanh form there).
"""

from collections.abc import Sequence

import torch

from . import backends, eight_bit, scratch
from .formats import QUANTIZED, BlockFormat
from .tracing import is_plain

LAYOUT_NAME = "GGUF{}Layout"
_FORMATS = {LAYOUT_NAME.format(name): fmt for name, fmt in QUANTIZED.items()}
_HALF = (torch.bfloat16, torch.float16)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False) -> torch.Tensor:
    """``x W^T + bias``, then GELU (tanh form) if asked. x [..., in_features], weight [out_features, in_features], packed or dense."""
    if (
        torch.compiler.is_compiling() or torch.is_grad_enabled()
    ):  # first: a compiler cannot follow the attributes read below
        return _then_gelu(torch.nn.functional.linear(x, weight, bias), gelu)
    state = weight.__dict__
    fmt = _FORMATS.get(state.get("_layout_cls"))
    if fmt is None:
        return _dense_linear(x, weight, bias, gelu)
    raw, params = state["_qdata"], state["_params"]
    if not meets(x, weight, bias) or not is_plain(x, raw, bias):  # the tensor's own dispatch converts, or refuses
        return _then_gelu(torch.nn.functional.linear(x, weight, bias), gelu)
    return linear_raw(x, raw, fmt, params.orig_shape, bias, params.compute, gelu)


def linears(x: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[torch.Tensor]:
    """:func:`linear` of the same x with several (weight, bias). Where all are in one 8-bit kind, x is quantised once."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and is_plain(x):
        kinds = [eight_bit_kind(x, weight, bias) for weight, bias in layers]
        if kinds[0] and all(kind == kinds[0] for kind in kinds):
            quantized = eight_bit.quantize(x.reshape(-1, x.shape[-1]).contiguous(), kinds[0])
            return [
                eight_bit.product(
                    *quantized, w._qdata, _FORMATS[w._layout_cls], w._params.orig_shape, b, kinds[0], x.dtype
                ).view(*x.shape[:-1], -1)
                for w, b in layers
            ]
    return [linear(x, weight, bias) for weight, bias in layers]


def linear_quantized(
    x: eight_bit.Quantized, weight: torch.Tensor, bias: torch.Tensor | None = None, gelu: bool = False
) -> torch.Tensor:
    """:func:`linear` of activations that an operation before it has quantised, for the kind that :func:`eight_bit_kind` named."""
    fmt, in_epilogue = _FORMATS[weight._layout_cls], gelu and x.kind == "int8"
    y = eight_bit.product(
        x.q, x.scales, weight._qdata, fmt, weight._params.orig_shape, bias, x.kind, x.dtype, in_epilogue
    )
    return _then_gelu(y.view(*x.shape[:-1], -1), gelu and not in_epilogue)


def is_packed(weight: torch.Tensor) -> bool:
    """Whether this is a packed GGUF weight."""
    return weight.__dict__.get("_layout_cls") in _FORMATS


def eight_bit_kind(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    """The kind of 8-bit product that :func:`linear` would take ("fp8" or "int8"); None for an exact one."""
    params = weight.__dict__.get("_params")
    if getattr(params, "compute", "exact") == "exact" or not is_packed(weight) or not meets(x, weight, bias):
        return None
    return eight_bit.kind_for(x.device, x.numel() // x.shape[-1], params.orig_shape, x.dtype, params.compute)


def meets(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether weight and bias lie on x's device in x's type, so that a product takes them as they are."""
    state, device, dtype = weight.__dict__, x.device, x.dtype
    if bias is not None and (bias.dtype is not dtype or bias.device != device):
        return False
    params = state.get("_params")
    if params is None:
        return weight.dtype is dtype and weight.device == device
    # A packed tensor's own properties go through its dispatch, which takes longer than a launch.
    return params.orig_dtype is dtype and state["_qdata"].device == device and not getattr(params, "transposed", False)


def linear_raw(
    x: torch.Tensor,
    raw: torch.Tensor,
    fmt: BlockFormat,
    shape: tuple[int, int],
    bias: torch.Tensor | None = None,
    compute: str = "exact",
    gelu: bool = False,
) -> torch.Tensor:
    """:func:`linear` for the bytes of a packed weight.

    x: ``[..., in_features]`` float32, bfloat16 or float16; raw: ``uint8 [out_features, row_bytes]`` on the same device
    shape: ``(out_features, in_features)``; compute: see ``eight_bit.py``. Returns ``[..., out_features]`` in the dtype of x.
    """
    rows = x.numel() // shape[1]
    if compute != "exact":
        kind = eight_bit.kind_for(x.device, rows, shape, x.dtype, compute)
        if kind:
            in_epilogue = gelu and kind == "int8" and is_plain(x, raw, bias)
            return _then_gelu(eight_bit.linear(x, raw, fmt, shape, bias, kind, in_epilogue), gelu and not in_epilogue)
    backend = backends.pick("linear", x.device.type, fmt)
    if backend is not None and rows <= backend.most_rows:
        return _then_gelu(backend.run(x, raw, fmt, shape, bias), gelu)
    plain = is_plain(x, raw, bias)
    weight = dequantize(raw, fmt, x.dtype, _scratch(shape, x.dtype, raw) if plain else None)
    return _dense_linear(x, weight, bias, gelu, plain)


def dequantize(
    raw: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed rows ``uint8 [rows, row_bytes]`` -> ``[rows, cols]``, by the best backend of the device."""
    if out is None:
        n_cols = raw.shape[1] // fmt.type_size * fmt.block_size
        out = torch.empty(raw.shape[0], n_cols, dtype=dtype, device=raw.device)
    return backends.pick("dequantize", raw.device.type, fmt).run(raw, fmt, out)


def dense_for_one_product(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A packed weight, dequantised for the product that follows and free to be changed: the next packed product may overwrite it."""
    fmt, raw, params = _FORMATS.get(weight._layout_cls), weight._qdata, weight._params
    if fmt is None or params.transposed or not is_plain(raw):
        return weight.dequantize().to(dtype)
    return dequantize(raw, fmt, dtype, _scratch(tuple(params.orig_shape), dtype, raw))


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``ids`` of a weight, decoding only these rows. ``ids [...]`` -> ``[..., D]`` in ``dtype`` (default: the weight's)."""
    fmt = _FORMATS.get(weight.__dict__.get("_layout_cls"))
    if fmt is None:
        rows = torch.nn.functional.embedding(ids, weight)
        return rows if dtype is None else rows.to(dtype)
    rows = dequantize(weight._qdata.index_select(0, ids.reshape(-1)), fmt, dtype or weight._params.orig_dtype)
    return rows.view(*ids.shape, rows.shape[-1])


def _scratch(shape: tuple[int, int], dtype: torch.dtype, raw: torch.Tensor) -> torch.Tensor | None:
    """Memory for a decoded weight that the next product may overwrite; None on a device whose order of work is not known here."""
    return scratch.matrix(tuple(shape), dtype, raw.device) if raw.device.type in scratch.DEVICES else None


def _dense_linear(x, weight, bias, gelu, plain=True):
    fused = gelu and plain and x.is_cuda and torch.version.cuda is not None and bias is not None and x.dtype in _HALF
    if not fused or not meets(x, weight, bias) or not is_plain(x, weight, bias) or not x.numel():
        return _then_gelu(torch.nn.functional.linear(x, weight, bias), gelu)
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


def _then_gelu(y: torch.Tensor, gelu: bool) -> torch.Tensor:
    return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y
