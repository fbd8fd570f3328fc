"""Products with packed weights on a GPU: few rows straight from the bytes, many rows by way of one dense scratch buffer.

The scratch buffer belongs to a stream, because its content is overwritten by the next product on that stream, and is as large as
the largest weight seen. While a CUDA graph is captured or a program is traced, each product gets its own buffer from the allocator
instead: graph and compiler plan the reuse themselves.

A GELU that follows the product can ride in its epilogue (cuBLASLt computes the tanh form there); see :class:`following_gelu`.
"""

import threading

import torch

from .formats import BlockFormat

_scratch: dict[tuple[torch.device, int], torch.Tensor] = {}
_pending = threading.local()


class following_gelu:
    """Within the block, the next product with a packed weight may apply tanh-GELU to its result; ``applied`` tells whether it did.

    >>> with following_gelu() as gelu:
    ...     y = linear(x)
    >>> y = y if gelu.applied else F.gelu(y, approximate="tanh")

    The caller makes sure that what it calls is one linear layer and nothing else.
    """

    applied = False

    def __enter__(self):
        _pending.request = self
        return self

    def __exit__(self, *exception):
        _pending.request = None


def take_gelu() -> bool:
    """Whether a GELU was asked for; marks it as done."""
    request = getattr(_pending, "request", None)
    if request is None:
        return False
    request.applied, _pending.request = True, None
    return True


def can_fuse_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a dense product with this x and bias can have GELU in its epilogue: cuBLASLt, half precision."""
    return x.is_cuda and torch.version.cuda is not None and bias is not None and x.dtype in (torch.bfloat16, torch.float16) and bias.dtype == x.dtype


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b) for a dense weight, GELU in the epilogue. Needs :func:`can_fuse_gelu`."""
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0  # Metal: torch has one stream


def scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 buffer of at least ``nbytes`` for use on the current stream until the next call on it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    key = (device, _stream_id(device))
    buffer = _scratch.get(key)
    if buffer is None or buffer.numel() < nbytes:
        _scratch.pop(key, None)  # free the smaller one first
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            buffer = _scratch[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return buffer


def release_scratch() -> None:
    """Give all scratch buffers back to the allocator."""
    _scratch.clear()


def _dense(raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], dtype: torch.dtype, plain: bool) -> torch.Tensor:
    """The decoded weight, in scratch memory."""
    from . import kernels_triton

    if not plain:
        return kernels_triton.dequantize(raw, fmt.name, torch.empty(shape, dtype=dtype, device=raw.device))
    count = shape[0] * shape[1]
    out = scratch(count * dtype.itemsize, raw.device)[: count * dtype.itemsize].view(dtype).view(shape)
    return kernels_triton.dequantize_launch(raw, fmt.name, out)


def linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` for a packed W on a GPU; arguments as :func:`quant.linear.linear`."""
    from . import kernels_triton

    if kernels_triton.is_skinny(x.numel() // shape[1], x.dtype):
        return kernels_triton.skinny_linear(x, raw, fmt.name, *shape, bias)
    plain = kernels_triton.is_plain(x, raw, bias)
    weight = _dense(raw, fmt, shape, x.dtype, plain)
    if plain and can_fuse_gelu(x, bias) and take_gelu():
        return linear_gelu(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
