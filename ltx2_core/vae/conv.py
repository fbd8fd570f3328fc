"""The VAE's convolutions: torch's, except where a kernel of ours gives a frame the same bits however a clip is cut (``vae/triton_conv.py``).

On a CPU torch's own do so too. cuDNN picks a kernel by the number of frames, so that elsewhere a decode in steps and one in a piece round differently.
"""

import functools
import importlib.util
import logging

import torch
from torch import nn

logger = logging.getLogger(__name__)

#: The kernel was compiled and checked with this version of Triton and newer ones.
OLDEST_TRITON = (3, 6)
_usable = True  # until the kernel fails to compile


@functools.lru_cache(maxsize=16)
def _is_for(device) -> bool:
    """Whether the kernel was made for this device: a Hopper GPU."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    from ...quant.kernels.triton_launch import version

    return torch.cuda.get_device_capability(device)[0] == 9 and version() >= OLDEST_TRITON


def _takes(conv, x, weight, bias) -> bool:
    """Whether the kernel computes ``conv`` (a Conv3d) on x (B, C, F, H, W): size 3, stride 1, padded by zeros in space if at all."""
    if not _usable or not _is_for(x.device) or torch.compiler.is_compiling() or not x.numel():
        return False
    if x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype or bias is None or torch.is_grad_enabled():
        return False
    plain = conv.kernel_size == (3, 3, 3) and conv.stride == conv.dilation == (1, 1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    return plain and conv.padding in ((0, 0, 0), (0, 1, 1)) and x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0


class SameBits:
    """Placed before a class that computes by ``_conv_forward`` as torch's Conv3d does (a host's too): the kernel where it can be used."""

    def _conv_forward(self, input, weight, bias, *args, **kwargs):
        if not args and all(value is None for value in kwargs.values()) and _takes(self, input, weight, bias):
            try:
                from . import triton_conv

                input, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (input, weight))
                return triton_conv.conv3d(input, weight, bias, self.padding[1])
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton is there but cannot compile (no C compiler)
                global _usable
                _usable = False
                logger.warning("The VAE's convolutions run in cuDNN, which rounds by the length of a step: %s: %s", type(error).__name__, error)
        return super()._conv_forward(input, weight, bias, *args, **kwargs)


class Conv3d(SameBits, nn.Conv3d):
    """torch's, with the kernel."""
