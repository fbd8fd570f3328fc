"""Launch Triton kernels with little work per call.

``kernel[grid](...)`` binds arguments by name, classifies each one and builds a cache key of all options on every call, 20 to 60
microseconds of Python depending on the processor. A denoise step has some two thousand launches, so at few tokens that is what it
takes. :class:`Launcher` keeps the compiled kernel that such a call returns and calls its launcher directly the next time, with
addresses instead of tensors. Its own key is finer than Triton's: type and 16-byte alignment of every pointer, every number, all
constants.

Direct calls are made on NVIDIA GPUs with Triton 3.3 or newer. With versions whose launcher is not known to take addresses, while a
profiler has hung hooks on launches, and after a launcher refused them, the compiled kernel gets tensors. Elsewhere, and in Triton's
interpreter, every call is an ordinary one. Importing this module imports triton.

A kernel runs on the device and current stream of its first argument, whatever the current device is.

Source: triton 3.3 to 3.8 ``runtime/jit.py`` (``JITFunction.run``), ``compiler/compiler.py`` (``CompiledKernel.__getitem__``),
``backends/nvidia/driver.py`` (``CudaLauncher.__call__``; its C part takes an integer as an address).
"""

import logging

import torch
import triton

log = logging.getLogger(__name__)

#: Compiled forms kept per kernel; after more (a server that has seen many sizes) they are looked up anew.
KEPT = 1024
#: First and last Triton version whose launcher was read and takes what :meth:`Launcher.__call__` gives it.
KNOWN_VERSIONS = ((3, 3), (3, 8))


def version() -> tuple[int, int]:
    """Triton's (major, minor)."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def _hook_holder():
    """Where Triton keeps ``launch_enter_hook`` and ``launch_exit_hook``."""
    knobs = getattr(triton, "knobs", None)
    return triton.compiler.CompiledKernel if knobs is None else knobs.runtime


def _hooked(holder) -> bool:
    """Whether something listens to launches. A hook is a chain with its ``calls`` (Triton 3.4 and newer), a function, or None."""
    enter, leave = holder.launch_enter_hook, holder.launch_exit_hook
    try:
        return bool(enter.calls or leave.calls)
    except AttributeError:
        return any(hook is not None and getattr(hook, "calls", True) for hook in (enter, leave))


_current_device = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def _entry(made):
    """(compiled kernel, what launches it, what that takes between the stream and the kernel's own arguments)."""
    run = made.run
    if (
        version() in ((3, 5), (3, 6))
        and getattr(run, "global_scratch_size", None) == getattr(run, "profile_scratch_size", None) == 0
    ):
        # The C function behind the launcher, which would only add that there is no scratch memory.
        return (
            made,
            run.launch,
            (
                made.function,
                run.launch_cooperative_grid,
                run.launch_pdl,
                None,
                None,
                made.packed_metadata,
                None,
                None,
                None,
            ),
        )
    return made, run, (made.function, made.packed_metadata, None, None, None)


class Launcher:
    """A kernel and the compiled forms it was launched in.

    kernel: a ``triton.jit`` function whose constants come last in its signature, and whose first argument is a tensor
    options: compile options that do not change (``enable_fp_fusion``)
    """

    def __init__(self, kernel, **options):
        self.kernel, self.options = kernel, options
        self.compiled = {}  # key -> what _entry says about the compiled kernel
        self.direct = (
            hasattr(kernel, "device_caches") and torch.version.cuda is not None and version() >= KNOWN_VERSIONS[0]
        )
        self.by_address = version() <= KNOWN_VERSIONS[1]
        self.hooks = _hook_holder() if self.direct else None

    def __call__(self, grid: tuple[int, int, int], args: tuple, constants: tuple, num_warps: int = 4):
        """Run the kernel. args: tensors and numbers; constants: the rest of the signature, in order."""
        if not self.direct:
            self.kernel[grid](*args, *constants, num_warps=num_warps, **self.options)
            return
        device = args[0].get_device()
        if device != _current_device():
            with torch.cuda.device(device):
                self(grid, args, constants, num_warps)
            return
        key, values = [device, num_warps, constants], []
        for value in args:
            kind = type(value)
            if kind is int or kind is float:
                key.append(value)
            else:
                key.append(value.dtype)
                value = value.data_ptr()
                if value & 15:
                    key.append("unaligned")
            values.append(value)
        key = tuple(key)
        compiled = self.compiled.get(key)
        if compiled is None:
            made = self.kernel[grid](*args, *constants, num_warps=num_warps, **self.options)
            if made is not None:
                if len(self.compiled) >= KEPT:
                    self.compiled.clear()
                self.compiled[key] = _entry(made)
            return
        made, run, between = compiled
        if self.by_address and not _hooked(self.hooks):
            try:
                run(*grid, _raw_stream(device), *between, *values, *constants)
                return
            except (
                Exception
            ) as error:  # not the launcher it was taken for; what is wrong with the call itself is raised below
                self.by_address = False
                log.warning(
                    "Triton kernels are launched by way of tensors from now on: %s: %s", type(error).__name__, error
                )
        made[grid](*args, *constants)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own helpers are traced functions, slow to call from Python.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
