"""Weights on their way between main memory and the device, as the host loads and unloads models outside of dynamic
VRAM.

To the device: read by several threads through page-locked memory while ``uploading`` is in effect. Back: the tensors
that were there before are put back, so nothing is copied and the file's memory map stays the only copy in main memory.
"""

import contextlib
import functools
import weakref

import comfy.cli_args
import torch

from ...ltx2_core.offload.upload import uploader
from ...quant import tensor as packed
from ...quant.tensor import QuantizedTensor

_uploads = []  # what gives the Uploader in effect, if any


@contextlib.contextmanager
def uploading(device):
    """Within the context, packed weights that go to ``device`` are copied beside each other; leaving it, they have
    arrived."""
    if comfy.cli_args.args.disable_pinned_memory or torch.device(device).type != "cuda":
        yield
        return
    with contextlib.ExitStack() as stack:
        _uploads.append(
            functools.cache(lambda: stack.enter_context(uploader(device)))
        )  # made for the first weight that goes
        try:
            yield
        finally:
            _uploads.pop()


def moved(module, name, parameter, fn):
    """``module``: with a field ``at_home``, for what lies in main memory while it is away. ``fn(parameter)`` as a
    Parameter where ``fn`` only moves a packed weight and there is a better way than its copy; else None."""
    if not packed.is_packed(parameter):
        return None
    probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    goal = fn(probe)
    if goal is probe:  # it is there already: wrapped anew, it would not be known as the one that came from the file
        return parameter
    if goal.dtype != parameter.dtype or goal.device == parameter.device:
        return None
    if module.at_home is None:
        module.at_home = {}
    at_home = module.at_home
    if goal.device.type == "cpu":
        home, away = at_home.pop(name, (None, lambda: None))
        return home if away() is parameter else None
    if parameter.device.type != "cpu":
        return None
    there = torch.nn.Parameter(_sent(parameter, goal.device, fn), requires_grad=False)
    at_home[name] = parameter, weakref.ref(there)
    return there


def _sent(parameter, device, fn):
    upload = _uploads[-1]() if _uploads else None
    raw = parameter._qdata
    if upload is None or device != upload.device or not raw.is_contiguous():
        return fn(parameter)
    there = torch.empty_like(raw, device=device)
    upload.copy(raw.reshape(-1).view(torch.uint8), there.view(-1).view(torch.uint8))
    return QuantizedTensor(there, parameter._layout_cls, parameter._params)
