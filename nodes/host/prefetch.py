"""Weights under dynamic VRAM, on their way to the device while the block before runs.

The host's ``prefetch_queue_pop`` gives a block's copies out immediately before the block's own work and has that work wait for them: they are hidden
as long as this process is a whole block ahead of the device, and nothing that waits longer stands before them in the device's queues. ``Early`` calls
the same functions of the host one block earlier: copies are given out before the work they run beside, wait for the block before that one, and are
waited for by the next block alone. Buffers and pinned pages are the host's, two streams' worth as before.

Source: ComfyUI 0.30.0 ``comfy/model_prefetch.py`` (``prefetch_queue_pop``), ``comfy/ops.py`` (``cast_modules_with_vbar``).
"""

import contextlib

import comfy.cli_args
import comfy.memory_management
import comfy.model_management
import comfy.model_prefetch
import comfy.ops

from ...quant import tensor as packed

_PATCHES = ("weight_lowvram_function", "bias_lowvram_function")


def prefetch(blocks, device, transformer_options):
    """The way in which the host's weights come to ``device`` block by block; None where the host does not prefetch."""
    queue = comfy.model_prefetch.make_prefetch_queue(list(blocks), device, transformer_options)
    if queue is None:
        return None
    return (Early if _may_be_early(transformer_options) else InOrder)(queue, list(blocks), device)


def _may_be_early(transformer_options):
    """Whether nothing else can take the host's streams, and with them the buffers, between a block's copies and its end.

    Two streams: the one that is filled is never the one in use. A patch between layers may bring modules of its own, which would take the next stream.
    """
    patched = any(transformer_options.get("patches") or ()) or any((transformer_options.get("patches_replace") or {}).values())
    known = hasattr(comfy.ops, "cast_modules_with_vbar") and hasattr(comfy.model_prefetch, "cleanup_prefetched_modules")
    return known and not patched and comfy.model_management.NUM_STREAMS >= 2


def _shown(number):
    return contextlib.nullcontext()


class InOrder:
    """As the host does it: each block's weights when its turn has come."""

    def __init__(self, queue, blocks, device):
        self.queue, self.blocks, self.device = queue, blocks, device

    def start(self, number, hidden):
        """Nothing ahead of time."""

    def enter(self, number, hidden=_shown):
        """Before the work of block ``number`` is given out; hidden(number): a context in which the host stages what it should."""
        with hidden(number):
            comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, self.blocks[number])

    def finish(self):
        comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, None)


class Early(InOrder):
    """One block earlier. ``queue`` is the host's list, so that it clears away what a pass that fails leaves behind."""

    def __init__(self, queue, blocks, device):
        super().__init__(queue, blocks, device)
        queue[:] = [None] * len(blocks)

    def start(self, number, hidden):
        """Give the copies of block ``number`` out. hidden: a context in which the host stages what it should."""
        if self.queue[number] is not None:
            return
        block = self.blocks[number]
        modules = [module for module in _modules(block) if "_v" in module.__dict__]
        self.queue[number] = None, (block, modules)  # also what a failure in the middle leaves is known to the host
        with hidden:
            stream = comfy.ops.cast_modules_with_vbar(modules, None, self.device, None, True)
            if not comfy.cli_args.args.fast_disk:
                comfy.model_management.ensure_pin_registerable(sum(map(_pinned_bytes, modules)))
        self.queue[number] = stream, (block, modules)

    def enter(self, number, hidden=_shown):
        if number:
            self._leave(number - 1)
        self.start(number, hidden(number))
        comfy.model_management.sync_stream(self.device, self.queue[number][0])
        if number + 1 < len(self.blocks):
            self.start(number + 1, hidden(number + 1))

    def finish(self):
        self._leave(len(self.blocks) - 1)

    def _leave(self, number):
        stream, (_, modules) = self.queue[number]
        if stream is not None:
            stream.wait_stream(comfy.model_management.current_stream(self.device))  # its buffer is filled again only after this block's work
        comfy.model_prefetch.cleanup_prefetched_modules(modules)
        self.queue[number] = None


def _modules(block):
    """``block.modules()``: the same modules in the same order, a good deal faster (each pass asks for every block's)."""
    found, waiting = {}, [block]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting += reversed(module._modules.values())
    return found


def _pinned_bytes(module):
    """What the module's weights and visible patches take of page-locked memory, as ``prefetch_queue_pop`` counts it."""
    state = module.__dict__
    own = state["_parameters"]
    size = comfy.memory_management.vram_aligned_size([_bytes(own.get("weight")), _bytes(own.get("bias"))])
    for name in _PATCHES:
        patch = state.get(name)
        if patch is not None:
            size += patch.memory_required()
    return size


def _bytes(parameter):
    """What the host counts of a parameter: a packed weight's bytes themselves, which spares it asking the tensor for its parts."""
    return parameter._qdata if packed.is_packed(parameter) else parameter
