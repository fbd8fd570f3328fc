"""Products with packed weights on a GPU: few rows straight from the bytes, many rows by way of one dense scratch buffer.

The scratch buffer belongs to a thread and a stream, because its content is overwritten by the next product there, and is as large as
the largest weight seen. While a CUDA graph is captured or a program is traced, each product gets its own buffer from the allocator
instead: graph and compiler plan the reuse themselves.

A GELU that follows the product can ride in its epilogue (cuBLASLt computes the tanh form there); see :class:`following_gelu`.
"""

import contextlib
import threading
import weakref

import torch

from .formats import BlockFormat
from .tracing import is_plain

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
    from .kernels import triton_matmul

    _kernels = lambda: triton_matmul  # noqa: E731 (an import statement takes longer than a launch)
    return triton_matmul


def can_fuse_gelu(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a dense product with this x and bias can have GELU in its epilogue: cuBLASLt, half precision."""
    return x.is_cuda and torch.version.cuda is not None and bias is not None and x.dtype in (torch.bfloat16, torch.float16) and bias.dtype == x.dtype


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu_tanh(x W^T + b) for a dense weight, GELU in the epilogue. Needs :func:`can_fuse_gelu`."""
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        return _raw_stream(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0  # Metal: torch has one stream


#: The current CUDA stream's handle, and whether a graph is being captured, without the objects and checks of torch.cuda.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (lambda index: torch.cuda.current_stream(index).cuda_stream)
_is_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None) or torch.cuda.is_current_stream_capturing


class _Scratch:
    """One stream's buffer and the typed views of it that were asked for."""

    __slots__ = ("buffer", "views")

    def __init__(self, nbytes: int, device: torch.device):
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.views = {}


class _Buffers:
    """A thread's scratch buffers by device and stream; they go with the thread."""

    __slots__ = ("of", "__weakref__")

    def __init__(self):
        self.of: dict[tuple[torch.device, int], _Scratch] = {}
        _all_buffers.add(self)


class _Thread(threading.local):
    """Threads that share a stream have buffers of their own: one could overwrite what the other is about to multiply with."""

    def __init__(self):
        self.buffers = _Buffers()


_all_buffers: "weakref.WeakSet[_Buffers]" = weakref.WeakSet()
_thread = _Thread()


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and _is_capturing()


def _scratch_of(nbytes: int, device: torch.device) -> _Scratch:
    buffers, key = _thread.buffers.of, (device, _stream_id(device))
    found = buffers.get(key)
    if found is None or found.buffer.numel() < nbytes:
        buffers.pop(key, None)
        found = None  # free the smaller one first
        found = buffers[key] = _Scratch(nbytes, device)
    return found


def scratch(nbytes: int, device: torch.device) -> torch.Tensor:
    """A uint8 buffer of at least ``nbytes`` for use by this thread on the current stream until its next call there."""
    if _capturing(device):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return _scratch_of(nbytes, device).buffer


def scratch_matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, row_scales: bool = False):
    """An uninitialised matrix in scratch memory; with ``row_scales`` the pair of it and float32 ``[rows]`` behind it."""
    cuda = device.type == "cuda"
    capturing = cuda and _is_capturing()
    key = (shape, dtype, row_scales)
    if not capturing:
        found = _thread.buffers.of.get((device, _raw_stream(device.index) if cuda and device.index is not None else _stream_id(device)))
        if found is not None:
            view = found.views.get(key)
            if view is not None:
                return view
    count = shape[0] * shape[1] * dtype.itemsize
    total = count + (4 * shape[0] if row_scales else 0)
    found = None if capturing else _scratch_of(total, device)
    memory = torch.empty(total, dtype=torch.uint8, device=device) if found is None else found.buffer
    with torch.inference_mode(False):
        view = memory[:count].view(dtype).view(shape)
        if row_scales:
            view = view, memory[count:total].view(torch.float32)
    if found is not None:
        found.views[key] = view
    return view


def release_scratch() -> None:
    """Give all threads' scratch buffers back to the allocator."""
    for buffers in list(_all_buffers):
        buffers.of.clear()


def linear(
    x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None = None, plain: bool | None = None
) -> torch.Tensor:
    """``x @ W.T + bias`` for a packed W on a GPU; arguments as :func:`quant.linear.linear`. plain: ``is_plain`` of the tensors, where it is known."""
    triton_matmul = _kernels()
    if triton_matmul.is_skinny(x.numel() // shape[1], x.dtype, fmt.name):
        return triton_matmul.skinny_linear(x, raw, fmt.name, *shape, bias)
    if plain is None:
        plain = is_plain(x, raw, bias)
    if not plain:
        weight = triton_matmul.dequantize(raw, fmt.name, torch.empty(shape, dtype=x.dtype, device=raw.device))
        return torch.nn.functional.linear(x, weight, bias)
    weight = triton_matmul.dequantize_launch(raw, fmt.name, scratch_matrix(shape, x.dtype, raw.device))
    if bias is not None and getattr(_pending, "request", None) is not None and can_fuse_gelu(x, bias) and take_gelu():
        return linear_gelu(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
