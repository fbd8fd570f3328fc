"""Memory for decoded weights: one buffer per thread and stream that every product reuses.

The buffer belongs to a thread and a stream, because its content is overwritten by the next product there, and is as large as the
largest weight seen. While a CUDA graph is captured each product gets its own buffer from the allocator instead: the graph plans
the reuse itself.
"""

import threading
import weakref

import torch

#: Device types whose order of work is known here: one stream, or streams that can be told apart.
DEVICES = ("cuda", "xpu", "mps")


def _stream_id(device: torch.device) -> int:
    if device.type == "cuda":
        return _raw_stream(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return 0  # Metal: torch has one stream


#: The current CUDA stream's handle, and whether a graph is being captured, without the objects and checks of torch.cuda.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
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

    __slots__ = ("__weakref__", "of")

    def __init__(self):
        self.of: dict[tuple[torch.device, int], _Scratch] = {}
        _all_buffers.add(self)


class _Thread(threading.local):
    """Threads that share a stream have buffers of their own: one could overwrite what the other is about to multiply with."""

    def __init__(self):
        self.buffers = _Buffers()


_all_buffers: "weakref.WeakSet[_Buffers]" = weakref.WeakSet()
_thread = _Thread()


def _scratch_of(nbytes: int, device: torch.device) -> _Scratch:
    buffers, key = _thread.buffers.of, (device, _stream_id(device))
    found = buffers.get(key)
    if found is None or found.buffer.numel() < nbytes:
        buffers.pop(key, None)
        found = None  # free the smaller one first
        found = buffers[key] = _Scratch(nbytes, device)
    return found


def matrix(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, row_scales: bool = False):
    """An uninitialised matrix for this thread and stream, until its next one there.

    row_scales: return the pair of it and float32 ``[rows]`` behind it
    """
    cuda = device.type == "cuda"
    capturing = cuda and _is_capturing()
    key = (shape, dtype, row_scales)
    if not capturing:
        found = _thread.buffers.of.get(
            (device, _raw_stream(device.index) if cuda and device.index is not None else _stream_id(device))
        )
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


def release() -> None:
    """Give all threads' scratch buffers back to the allocator."""
    for buffers in list(_all_buffers):
        buffers.of.clear()
