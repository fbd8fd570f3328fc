"""The matrices of LoRAs on the transformer's blocks, on the device when their block runs: ``offload.streamer`` under
the host.

They stay on the device for a run, block by block, as long as activations have room beside them. The others wait in
pinned memory and pass through a double buffer. The host would copy them at every product, or before every block from
where they lie: a rank-384 LoRA is several GB. Weights are the host's own business, in every memory mode.

A compiled block fetches for itself: its graph must not hold addresses of passing buffers.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py`` (``LowVramPatch``), ``comfy/model_management.py`` (how memory is
counted).
"""

import contextlib
import logging

import comfy.cli_args
import comfy.model_management
import torch

from ...ltx2_core.offload.copiers import DirectCopier, StreamCopier
from ...ltx2_core.offload.pinned import PinnedMemory, PinnedParts
from ...ltx2_core.offload.streamer import RING, BlockStreamer, DeviceMemory
from .internals import LORA_STREAMING
from .lora import Staged

logger = logging.getLogger(__name__)

ROOM_FOR_RAM = 2 << 30  # bytes of main memory that pinned copies leave free, as the host does


class Matrices:
    """What one block's LoRAs need on the device, as a part of ``BlockStreamer``. loras: list of ``lora.Lora``."""

    def __init__(self, loras):
        self.loras = loras
        self.sizes = [lora.patch.memory_required() for lora in loras]
        self.nbytes = sum(self.sizes)

    def _pieces(self, buffer):
        return zip(self.loras, buffer[: self.nbytes].split(self.sizes) if self.sizes else ())

    def gather(self, buffer, upload=None):
        """Copy the matrices into ``buffer`` (uint8, on any device)."""
        for lora, piece in self._pieces(buffer):
            lora.patch.prepare(piece, None, copy=True, commit=False)

    def bind(self, buffer):
        """The patches' entries with their matrices as views of ``buffer``."""
        return [
            Staged(lora.patch.prepare(piece, None, copy=False, commit=False), buffer.device)
            for lora, piece in self._pieces(buffer)
        ]

    def attach(self, staged):
        for lora, entries in zip(self.loras, staged):
            lora.staged = entries

    def detach(self):
        for lora in self.loras:
            lora.staged = None


class LoraStream:
    """What a network's LoRAs have on the device (for a run) and in pinned memory (until another LoRA or model takes
    over)."""

    def __init__(self, network):
        self.network = network
        self.layers = {}  # block -> its layers that can have a LoRA
        self.streamer, self.plan = None, None  # plan: what the streamer was made for
        self.pinned, self.adapters = None, []  # PinnedParts, and the objects whose matrices they hold

    def runner(self, device):
        """run(number, call) for one pass over the blocks; None where nothing is to be brought to ``device``."""
        loras = [self._loras(block) for block in self.network.transformer_blocks]
        plan = (device, [lora for block in loras for lora in block])
        if self.plan is None or self.plan[0] != device or not _are_the_same(self.plan[1], plan[1]):
            self.release()
            self.plan = plan
            if LORA_STREAMING and copier_kind(device) is not None:
                with LORA_STREAMING.guard(self.release):
                    self._make(device, loras)
        return None if self.streamer is None else self._run

    @property
    def any(self):
        """Whether there is a LoRA on a block."""
        return any(self._loras(block) for block in self.network.transformer_blocks)

    def _loras(self, block):
        """The LoRAs of a block that fetches nothing for itself."""
        if "_orig_mod" in block._modules or getattr(block, "_compiled_call_impl", None) is not None:
            return ()
        layers = self.layers.get(block)
        if layers is None:
            layers = self.layers[block] = [module for module in block.modules() if hasattr(module, "lora")]
        return [layer.lora for layer in layers if layer.lora is not None]

    def _make(self, device, loras):
        parts = [Matrices(block) for block in loras]
        largest = max(part.nbytes for part in parts)
        if not largest:
            self.unpin()
            return
        room = (
            0 if self.network.low_memory else room_on(device, self.network.needed_bytes) - weights_to_come(self.network)
        )
        try:
            self.streamer = BlockStreamer(parts, DeviceMemory(device), max(room, RING * largest), copier=self._copier)
        except torch.OutOfMemoryError:
            logger.info(
                "No room for two buffers of %.0f MB; the LoRA's matrices are copied to the GPU layer by layer.",
                largest / 2**20,
            )

    def _copier(self, device, parts, streamed):
        kind = copier_kind(device)
        if kind is not StreamCopier:
            return kind(parts)
        adapters = [entry[1] for part in parts for lora in part.loras for entry in lora.own]
        if self.pinned is None or not _are_the_same(self.adapters, adapters):
            self.unpin()
            self.pinned, self.adapters = PinnedParts(parts, pin_limit), adapters
        self.pinned.want(streamed)
        return StreamCopier(device, parts, self.pinned)

    def _run(self, number, call):
        streamer = self.streamer
        if call is None or streamer is None:
            return None if call is None else call()
        scope = streamer.scope(number)
        with LORA_STREAMING.guard(self.release) as entered:
            scope.__enter__()
        try:
            return call()
        finally:
            if entered.ok:
                with LORA_STREAMING.guard(self.release):
                    scope.__exit__(None, None, None)

    def release(self):
        """Give back the device memory that a run used; before the next pass it is looked anew what is needed."""
        streamer, self.streamer, self.plan = self.streamer, None, None
        if self.pinned is not None:
            self.pinned.pause()
        if streamer is not None:
            with contextlib.suppress(Exception):  # what a thread could not read was said to the pass that asked for it
                streamer.release()

    def unpin(self):
        """Give back pinned copies of LoRAs."""
        if self.pinned is not None:
            comfy.model_management.synchronize()  # copies out of them may still be under way
            self.pinned.close()
        self.pinned, self.adapters = None, []


def _are_the_same(some, others):
    return len(some) == len(others) and all(a is b for a, b in zip(some, others))


def copier_kind(device):
    """The kind of copier for ``device``; None where matrices are used where they are."""
    if device.type == "cpu":
        return None
    asynchronous = comfy.model_management.NUM_STREAMS > 0 and not comfy.cli_args.args.disable_pinned_memory
    return StreamCopier if device.type == "cuda" and asynchronous else DirectCopier


def room_on(device, needed=0):
    """Bytes that nothing needs: free, more than the host keeps free for activations, and more than the ``needed`` ones
    of this pass."""
    kept_free = max(
        comfy.model_management.minimum_inference_memory(), needed + comfy.model_management.extra_reserved_memory()
    )
    return comfy.model_management.get_free_memory(device) - kept_free


def weights_to_come(network):
    """Bytes of the model's weights that dynamic VRAM would still bring to the device if there were room: they come
    before a LoRA, which passes through its double buffer at less cost than they through the host's buffers."""
    for entry in comfy.model_management.current_loaded_models:
        patcher = entry.model
        if patcher is not None and patcher.is_dynamic() and getattr(patcher.model, "diffusion_model", None) is network:
            return max(0, patcher.model_size() - patcher.loaded_size())
    return 0


def pin_limit():
    """Bytes that this pack may have pinned altogether: what the host allows itself and has not pinned, as main memory
    has room for it."""
    free = comfy.model_management.get_free_memory(torch.device("cpu")) - ROOM_FOR_RAM
    return min(
        comfy.model_management.MAX_PINNED_MEMORY - comfy.model_management.TOTAL_PINNED_MEMORY, PinnedMemory.total + free
    )
