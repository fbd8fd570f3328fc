"""Products of linear layers whose packed weight is ready on the GPU, without the module's and the tensor's detours.

``module(x)`` on a packed weight passes through the module's call, torch's dispatcher, the tensor subclass and the table of backends:
some fifty microseconds of Python per layer, which is more than a product of a thousand tokens takes. :func:`ready` checks once whether the
call would end in a plain product here, and the other functions do it. Everything else (hooks, LoRA, offloaded weights, traced code) goes
the normal way.

A layer class other than ``torch.nn.Linear`` takes part when it sets ``plain_product = True``: its forward is x W^T + b whenever nothing
is hung on the module and the weight lies on x's device in x's type.
"""

from typing import NamedTuple

import torch

from . import backends, eight_bit, linear_gpu
from .formats import BlockFormat, QUANTIZED

_FORMATS = {f"GGUF{name}Layout": fmt for name, fmt in QUANTIZED.items()}  # as layouts.py names them
DEVICES = ("cuda", "xpu")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Ready(NamedTuple):
    """A product that can be called straight: what :func:`quant.linear.linear` takes, and "fp8" or "int8" in fast mode."""

    raw: torch.Tensor
    fmt: BlockFormat
    shape: tuple[int, int]
    bias: torch.Tensor | None
    kind: str | None


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether calling the module may do more than its own forward: hooks, or a forward put on it."""
    state = module.__dict__
    return bool("forward" in state or state["_forward_hooks"] or state["_forward_pre_hooks"])


def is_patched(module: torch.nn.Module) -> bool:
    """:func:`is_replaced`, or its forward may do more than use its weight: patches that the host hung on it."""
    state = module.__dict__
    return bool(
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state.get("weight_function")
        or state.get("bias_function")
        or state.get("weight_lowvram_function")
        or "_v" in state  # the host's dynamic memory: the weight comes to the device inside the call
    )


def ready(module: torch.nn.Module, x: torch.Tensor, width: int | None = None) -> Ready | None:
    """The product behind a linear layer, or None when it has to be called as a module.

    width: size of the last axis of what will be multiplied, where that is not x itself but something computed from it.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # first: a compiler cannot follow the attributes read below
        return None
    weight = module._parameters.get("weight")
    fmt = None if weight is None else _FORMATS.get(weight.__dict__.get("_layout_cls"))
    if fmt is None or is_patched(module):  # dense weights end here
        return None
    kind = type(module)
    if kind is not torch.nn.Linear and not getattr(kind, "plain_product", False):
        return None
    return _ready(fmt, weight, module._parameters.get("bias"), x, width)


def ready_with(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> Ready | None:
    """:func:`ready` for a weight that a layer has at hand; None for a dense one and where torch's own way is to be taken."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    fmt = _FORMATS.get(weight.__dict__.get("_layout_cls"))
    return None if fmt is None else _ready(fmt, weight, bias, x)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b like torch's function of this name; a packed weight that is ready on the GPU without the tensor's detours."""
    found = ready_with(weight, bias, x)
    return torch.nn.functional.linear(x, weight, bias) if found is None else product(found, x)


def _ready(fmt, weight, bias, x, width=None):
    state, device, dtype = weight.__dict__, x.device, x.dtype
    device_type = device.type
    if device_type not in DEVICES or type(x) not in _PLAIN:
        return None
    raw, params = state["_qdata"], state["_params"]
    shape = params.orig_shape
    if params.orig_dtype is not dtype or params.transposed or raw.device != device or type(raw) not in _PLAIN or (width or x.shape[-1]) != shape[1]:
        return None
    if bias is not None and (type(bias) not in _PLAIN or bias.dtype is not dtype or bias.device != device):
        return None
    if getattr(backends.pick("linear", device_type, fmt), "run", None) is not linear_gpu.linear:
        return None
    compute = params.compute
    eight_bits = compute != "exact" and eight_bit.supports(device, x.numel() // x.shape[-1], shape, dtype, compute)
    return Ready(raw, fmt, shape, bias, eight_bit.kind_for(device, compute) if eight_bits else None)


def is_fast(module: torch.nn.Module) -> bool:
    """Whether the layer's weight is packed and set to fast products; cheaper than :func:`ready`, which then says whether it takes part."""
    if torch.compiler.is_compiling():
        return False
    return getattr(getattr(module._parameters.get("weight"), "_params", None), "compute", "exact") != "exact"


def product(ready: Ready, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] -> [..., N]."""
    if ready.kind:
        return eight_bit.linear(x, ready.raw, ready.fmt, ready.shape, ready.bias, ready.kind)
    return linear_gpu.linear(x, ready.raw, ready.fmt, ready.shape, ready.bias, True)


def product_gelu(ready: Ready, x: torch.Tensor) -> torch.Tensor | None:
    """gelu_tanh of an exact product with GELU in its epilogue, or None where there is no such thing."""
    if ready.kind or not linear_gpu.can_fuse_gelu(x, ready.bias):
        return None
    with linear_gpu.following_gelu() as gelu:
        y = product(ready, x)
    return y if gelu.applied else torch.nn.functional.gelu(y, approximate="tanh")


def _fast(ready: Ready, tokens, dtype: torch.dtype, gelu: bool = False) -> torch.Tensor:
    return eight_bit.product(*tokens, ready.raw, ready.fmt, ready.shape, ready.bias, ready.kind, dtype, gelu)


def fast_products(layers: list[Ready], x: torch.Tensor) -> list[torch.Tensor]:
    """Several fast products of one kind with the same x [..., K], which is quantised once."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens = eight_bit.tokens(rows, layers[0].kind)
    return [fast_product(layer, tokens, x) for layer in layers]


def fast_product(layer: Ready, tokens, x: torch.Tensor) -> torch.Tensor:
    """A fast product with tokens that are quantised already, in the shape and type of x [..., K] that they came from."""
    return _fast(layer, tokens, x.dtype).view(*x.shape[:-1], layer.shape[0])


def fast_feed_forward(inner: Ready, outer: Ready, x: torch.Tensor, tokens=None) -> torch.Tensor:
    """outer(gelu(inner(x))) of one fast kind; the GELU is in int8's epilogue, with float8 in the pass that quantises. x [..., K].

    tokens: x quantised; then only x's shape and type are used.
    """
    if tokens is None:
        tokens = eight_bit.tokens(x.reshape(-1, x.shape[-1]).contiguous(), inner.kind)
    in_epilogue = inner.kind == "int8"
    middle = _fast(inner, tokens, x.dtype, in_epilogue)
    return fast_product(outer, eight_bit.tokens(middle, inner.kind, not in_epilogue), x)
