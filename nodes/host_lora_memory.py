"""Where a LoRA's matrices are when a layer needs them: staged by the host, kept on the device for a run, or passing through.

The host stages the patches of weights that it streams in (dynamic VRAM). For all other layers its ``LowVramPatch`` would copy both matrices from
ordinary memory at each call; over a large LoRA (3.9 GB at rank 384) that costs more than the step. Here they are

* kept on the device from their first use to the end of the sampling run, as long as activations have room beside them;
* else sent through two small device buffers on a stream of their own, from page-locked memory, while earlier layers compute;
* else (no page-locked memory, or no streams) copied at each call.

``release`` gives device memory back when a run ends, so that what comes after it (the VAE's decode) has all of it.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/lora.py`` (``prefetch_prepared_value``), ``comfy/pinned_memory.py``.
"""

import contextlib
import logging

import torch

import comfy.cli_args
import comfy.model_management

logger = logging.getLogger(__name__)

ROOM_FOR_RAM = 2 << 30  # bytes of main memory that page-locked copies leave free, as the host does

_rings = {}  # device -> _Ring


@contextlib.contextmanager
def entries(patch, device):
    """The patch's entries (strength, adapter, strength of the model, offset, function), matrices on ``device`` wherever that was possible."""
    ready = patch.prepared_patches or _kept(patch, device)
    if ready:
        yield ready
        return
    locked = _page_locked(patch, device)
    if locked is None:
        yield patch.patches[patch.key]
        return
    if device not in _rings:
        _rings[device] = _Ring(device)
    with _rings[device].passing(locked) as buffer:
        yield patch.prepare(buffer, None, copy=False, commit=False)


def release(model, page_locked=False):
    """Drop what the patches of ``model``'s layers keep on the device; ``page_locked``: also their copies in page-locked memory."""
    for module in model.modules():
        for patch in (module.__dict__.get("weight_lowvram_function"), *getattr(module, "weight_function", ())):
            if getattr(patch, "is_lowvram_patch", False):
                patch.__dict__.pop("_ltx2_kept", None)
                if page_locked:
                    patch.__dict__.pop("_ltx2_locked", None)
    _rings.clear()


def _kept(patch, device):
    """Entries on the device that stay with the patch; None on the CPU or when the device has no room for them."""
    if device.type == "cpu":
        return None
    kept = patch.__dict__.get("_ltx2_kept")
    if kept is None:
        size = patch.memory_required()
        room = comfy.model_management.get_free_memory(device) - comfy.model_management.minimum_inference_memory()
        # The answer holds until the run ends: asking the device again for every layer and step costs more than it gains.
        kept = patch._ltx2_kept = patch.prepare(torch.empty(size, dtype=torch.uint8, device=device), None, copy=True, commit=False) if size <= room else ()
    return kept or None


def _page_locked(patch, device):
    """The matrices in one page-locked run of bytes, made at first need; None where there is no such memory to have."""
    if device.type != "cuda":
        return None
    locked = patch.__dict__.get("_ltx2_locked")
    if locked is None:
        locked = patch._ltx2_locked = _lock(patch)
    return locked if locked.numel() else None


def _lock(patch):
    size = patch.memory_required()
    allowed = not comfy.cli_args.args.disable_pinned_memory and comfy.model_management.MAX_PINNED_MEMORY > 0
    if allowed and comfy.model_management.get_free_memory(torch.device("cpu")) > size + ROOM_FOR_RAM:
        try:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # the system grants only so much
            logger.info("no page-locked memory for a LoRA (%s); copying it from ordinary memory at each call", error)
        else:
            patch.prepare(buffer, None, copy=True, commit=False)
            return buffer
    return torch.empty(0, dtype=torch.uint8)


class _Ring:
    """Two buffers on a device, filled on a stream of their own."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * 2
        self.idle_after = [None, None]  # what must have run before a buffer may be overwritten
        self.turn = 0

    @contextlib.contextmanager
    def passing(self, source):
        """uint8 buffer on the device with the bytes of ``source`` (page-locked), valid for work queued inside the block."""
        slot, self.turn = self.turn, 1 - self.turn
        current = torch.cuda.current_stream(self.device)
        if self.buffers[slot].numel() < source.numel():
            self.buffers[slot] = torch.empty(source.numel(), dtype=torch.uint8, device=self.device)
            self.idle_after[slot] = current.record_event()  # the allocator hands out memory that earlier work on this stream may still use
        buffer = self.buffers[slot][: source.numel()]
        if self.idle_after[slot] is not None:
            self.stream.wait_event(self.idle_after[slot])
        with torch.cuda.stream(self.stream):
            buffer.copy_(source, non_blocking=True)
            arrived = self.stream.record_event()
        current.wait_event(arrived)
        try:
            yield buffer
        finally:
            self.idle_after[slot] = current.record_event()
