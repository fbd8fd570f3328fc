"""Products with packed weights on a GPU: few rows straight from the bytes, many rows by way of one dense scratch buffer.

The scratch buffer belongs to a stream, because its content is overwritten by the next product on that stream, and is as large as
the largest weight seen. While a CUDA graph is captured or a program is traced, each product gets its own buffer from the allocator
instead: graph and compiler plan the reuse themselves.

A GELU that follows the product can ride in its epilogue (cuBLASLt computes the tanh form there); see :class:`following_gelu`.
"""

import contextlib
import threading

import torch

from .formats import BlockFormat
from .tracing import is_plain

_scratch: dict[tuple[torch.device, int], "_Scratch"] = {}
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


@contextlib.contextmanager
def no_gelu():
    """Within the block no product takes the GELU that was asked for: something else still has to be added to its result."""
    request, _pending.request = getattr(_pending, "request", None), None
    try:
        yield
    finally:
        _pending.request = request


def take_gelu() -> bool:
    """Whether a GELU was asked for; marks it as done."""
    request = getattr(_pending, "request", None)
    if request is None:
        return False
    request.applied, _pending.request = True, None
    return True


def _kernels():
    """The module of Triton kernels, imported on first use."""
    global _kernels
    from . import kernels_triton

    _kernels = lambda: kernels_triton  # noqa: E731 (an import statement takes longer than a launch)
    return kernels_triton


def can_fuse_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a dense product with this x and bias can have GELU in its epilogue: cuBLASLt, half precision."""
    return x.is_cuda and torch.version.cuda is not None and bias is not None and x.dtype in (torch.bfloat16, torch.float16) and bias.dtype == x.dtype


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b) for a dense weight, GELU in the epilogue. Needs :func:`can_fuse_gelu`."""
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        return _raw_stream(device.index)
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0  # Metal: torch has one stream


def _raw_stream(index: int | None) -> int:
    """The current CUDA stream's handle, without the objects that torch.cuda.current_stream makes."""
    index = torch.cuda.current_device() if index is None else index
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(index).cuda_stream if raw is None else raw(index)


class _Scratch:
    """One stream's buffer and the typed views of it that were asked for."""

    __slots__ = ("buffer", "views")

    def __init__(self, nbytes: int, device: torch.device):
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.views = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _scratch_of(nbytes: int, device: torch.device) -> _Scratch:
    key = (device, _stream_id(device))
    found = _scratch.get(key)
    if found is None or found.buffer.numel() < nbytes:
        _scratch.pop(key, None)
        found = None  # free the smaller one first
        found = _scratch[key] = _Scratch(nbytes, device)
    return found


def scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 buffer of at least ``nbytes`` for use on the current stream until the next call on it."""
    if _capturing(device):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return _scratch_of(nbytes, device).buffer


def scratch_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, row_scales: bool = False):
    """An uninitialised matrix in scratch memory; with ``row_scales`` the pair of it and float32 ``[rows]`` behind it."""
    count = shape[0] * shape[1] * dtype.itemsize
    total = count + (4 * shape[0] if row_scales else 0)
    found = None if _capturing(device) else _scratch_of(total, device)
    key = (shape, dtype, row_scales)
    if found is not None and key in found.views:
        return found.views[key]
    memory = torch.empty(total, dtype=torch.uint8, device=device) if found is None else found.buffer
    with torch.inference_mode(False):
        view = memory[:count].view(dtype).view(shape)
        if row_scales:
            view = view, memory[count:total].view(torch.float32)
    if found is not None:
        found.views[key] = view
    return view


def release_scratch() -> None:
    """Give all scratch buffers back to the allocator."""
    _scratch.clear()


def _dense(raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], dtype: torch.dtype, plain: bool) -> torch.Tensor:
    """The decoded weight, in scratch memory."""
    if not plain:
        return _kernels().dequantize(raw, fmt.name, torch.empty(shape, dtype=dtype, device=raw.device))
    return _kernels().dequantize_launch(raw, fmt.name, scratch_matrix(shape, dtype, raw.device))


def linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` for a packed W on a GPU; arguments as :func:`quant.linear.linear`."""
    kernels_triton = _kernels()
    if kernels_triton.is_skinny(x.numel() // shape[1], x.dtype):
        return kernels_triton.skinny_linear(x, raw, fmt.name, *shape, bias)
    plain = is_plain(x, raw, bias)
    weight = _dense(raw, fmt, shape, x.dtype, plain)
    if plain and can_fuse_gelu(x, bias) and take_gelu():
        return linear_gelu(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
