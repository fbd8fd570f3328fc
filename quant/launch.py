"""Launch Triton kernels with little work per call.

``kernel[grid](...)`` binds arguments by name, classifies each one and builds a cache key of all options on every call, 20 to 60
microseconds of Python depending on the processor. A denoise step has some two thousand launches, so at few tokens that is what it
takes. :class:`Launcher` keeps the compiled kernel that such a call returns and calls it directly the next time. Its own key is as
fine as Triton's: type and 16-byte alignment of every pointer; whether an integer is 1, a multiple of 16, or wider than 32 bits; all
constants.

Direct calls are made on NVIDIA GPUs with Triton 3.3 or newer, where a compiled kernel takes constants among its arguments. Elsewhere,
and in Triton's interpreter, every call is an ordinary one. Importing this module imports triton.

Source: triton ``python/triton/runtime/jit.py`` (``JITFunction.run``), ``compiler/compiler.py`` (``CompiledKernel.__getitem__``).
"""

import torch
import triton

_INT32 = 1 << 31


def _version() -> tuple[int, int]:
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _trait(value):
    """What Triton may compile differently for."""
    kind = type(value)
    if kind is int:
        return value if value == 1 else (2 if value & 15 == 0 else 3) if -_INT32 <= value < _INT32 else (4 if value & 15 == 0 else 5)
    if kind is float:
        return kind
    return value.dtype, value.data_ptr() & 15 == 0


class Launcher:
    """A kernel and the compiled forms it was launched in.

    kernel: a ``triton.jit`` function whose constants come last in its signature
    options: compile options that do not change (``enable_fp_fusion``)
    """

    def __init__(self, kernel, **options):
        self.kernel, self.options = kernel, options
        self.compiled = {}
        self.direct = hasattr(kernel, "device_caches") and torch.version.cuda is not None and _version() >= (3, 3)

    def __call__(self, grid: tuple[int, int, int], args: tuple, constants: tuple, num_warps: int = 4):
        """Run the kernel. args: tensors and numbers; constants: the rest of the signature, in order."""
        if not self.direct:
            self.kernel[grid](*args, *constants, num_warps=num_warps, **self.options)
            return
        key = (torch.cuda.current_device(), num_warps, constants, tuple(map(_trait, args)))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*args, *constants, num_warps=num_warps, **self.options)
        else:
            compiled[grid](*args, *constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own helpers are traced functions, slow to call from Python.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
