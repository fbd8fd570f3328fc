"""What the next block needs and does not have on the device is copied there while a block runs, on a stream of its own.

Two kinds of bytes: the matrices of LoRAs (in every memory mode), and the weights that the host has left in main memory outside of dynamic VRAM,
where it would bring them in layer by layer, each waited for. (Under dynamic VRAM the host's own code brings weights by block: see ``host.prefetch``.)

LoRA matrices stay on the device for a run, block by block, as long as activations have room beside them; a byte of a LoRA that stays saves the
same traffic as a byte of a weight. The others wait in page-locked memory and pass through two buffers, each as large as the largest block's needs:
one is read by the block that runs, the other is being filled for the next.

Nothing is staged, and layers fetch what they need when they run, where there is no second stream (other devices, ``--disable-async-offload``), no
room for the buffers, no page-locked memory for a LoRA, or where blocks are compiled (a graph must not hold addresses of passing buffers).

Source: ComfyUI 0.30.0 ``comfy/model_prefetch.py``, ``comfy/ops.py`` (``cast_bias_weight``), ``comfy/model_patcher.py`` (``LowVramPatch``).
"""

import contextlib
import logging

import torch

import comfy.memory_management
import comfy.model_management

from ...quant import tensor as packed
from .lane import lane_of

logger = logging.getLogger(__name__)

SPARING = "_ltx2_sparing"  # of a network that ran out of memory, for the rest of the run: no LoRA stays on the device, twice the room for activations
NEEDED = "_ltx2_needed"  # of a network: bytes that the pass under way takes beside the weights
KEY = "_ltx2_stream"  # of a network's ``Stream``
LOCKED = "_ltx2_locked"  # of a network's page-locked LoRAs: block number -> (adapters, LockedMemory)
WEIGHT = "_ltx2_staged"  # of a layer: (weight, bias) on the device
ENTRIES = "_ltx2_entries"  # of a patch: its entries, matrices on the device


class Entries(list):
    """A patch's entries with matrices at a place of their own, which stays the same until a run ends."""

    __slots__ = ("changes",)  # what ``host.lora`` made of them for a weight's shape: (shape, changes)

    def __init__(self, entries):
        super().__init__(entries)
        self.changes = None


def room_on(device, needed=0):
    """Bytes that nothing needs: free, more than the host keeps free for activations, and more than the ``needed`` ones of this pass."""
    kept_free = max(comfy.model_management.minimum_inference_memory(), needed + comfy.model_management.extra_reserved_memory())
    return comfy.model_management.get_free_memory(device) - kept_free


def weights_to_come(network):
    """Bytes of the model's weights that dynamic VRAM would still bring to the device if there were room: they come before a LoRA, which passes
    through the ring at less cost than they through the host's buffers."""
    for entry in comfy.model_management.current_loaded_models:
        patcher = entry.model
        if patcher is not None and patcher.is_dynamic() and getattr(patcher.model, "diffusion_model", None) is network:
            return max(0, patcher.model_size() - patcher.loaded_size())
    return 0


def staged(layer, x):
    """(weight, bias) of a layer that were brought to x's device for this block, in x's type; None: it has to fetch them."""
    found = layer.__dict__.get(WEIGHT)
    if found is None or torch.compiler.is_compiling():
        return None
    if found[0].dtype != x.dtype or found[0].device != x.device or (found[1] is not None and found[1].dtype != x.dtype):
        return None
    return found


def entries(patch, device):
    """Entries of a host patch with their matrices on ``device``, if its block brought them there; else None."""
    found = patch.__dict__.get(ENTRIES)
    return found[1] if found is not None and found[0] == device and not torch.compiler.is_compiling() else None


def blocks(network, device, prefetch=None):
    """Yield (number, block) of ``network.transformer_blocks``, each with what it needs on ``device`` as far as it could be brought there.

    prefetch: a ``host.prefetch.Prefetch``, by which the host brings weights (dynamic VRAM).
    """
    stream = None if torch.compiler.is_compiling() else _stream_of(network, device)
    modules = network.transformer_blocks
    if stream is None:
        for number, block in enumerate(modules):
            if prefetch is not None:
                prefetch.enter(block)
            yield number, block
        if prefetch is not None:
            prefetch.enter(None)
        return
    yield from stream.blocks(modules, prefetch)


def release(network):
    """Give back the device memory that a run used."""
    stream = network.__dict__.pop(KEY, None)
    if stream is not None:
        stream.close()


def release_locked(network):
    """Give back page-locked copies of LoRAs."""
    release(network)
    _unlock([memory for _, memory in network.__dict__.pop(LOCKED, {}).values()])


def _unlock(memories):
    if memories:
        comfy.model_management.synchronize()  # copies out of them may still be under way
    for memory in memories:
        memory.unlock()


def _stream_of(network, device):
    signature = _signature(network, device)
    stream = network.__dict__.get(KEY)
    if stream is not None and stream.signature == signature:
        return stream if stream.useful else None
    release(network)
    if not any(patches for part in signature for _, patches, _ in part):
        release_locked(network)
    lane = lane_of(device) if any(part for part in signature) else None
    if lane is None:
        return None
    stream = network.__dict__[KEY] = Stream(network, device, lane, signature)
    return stream if stream.useful else None


def _signature(network, device):
    """What a plan is made for: every block's patches, and which weights lie elsewhere."""
    return [_needs(block, device, network.dtype) for block in network.transformer_blocks]


def _needs(block, device, dtype):
    """(layer, its LoRA patches, whether its weight has to be fetched from main memory) of every layer of a block that needs something."""
    found = []
    if "_orig_mod" in block.__dict__.get("_modules", ()) or getattr(block, "_compiled_call_impl", None) is not None:
        return found
    for layer in _layers(block):  # every layer before every pass: what most of them do not have is asked for first
        state = layer.__dict__
        weight, patch, functions = state["_parameters"]["weight"], state.get("weight_lowvram_function"), layer.weight_function
        patches = []
        if (patch is not None or functions) and packed.is_packed(weight):
            patches = [f for f in (patch, *functions) if getattr(f, "is_lowvram_patch", False)]
        away = "_v" not in state and _lies_elsewhere(layer, weight, device) and weight.dtype == dtype
        away = away and all(function in patches for function in functions)
        if patches or away:
            found.append((layer, patches, away))
    return found


def _layers(block):
    """The block's layers that can take staged weights; looked up once."""
    layers = block.__dict__.get("_ltx2_layers")
    if layers is None:
        layers = block.__dict__["_ltx2_layers"] = [m for m in block.modules() if getattr(m, "takes_staged_weights", False)]
    return layers


def _lies_elsewhere(layer, weight, device):
    return weight.device != device and weight.device.type == "cpu"


class _Part:
    """What one block needs: pieces of a buffer, and how they become weights and patches."""

    def __init__(self, number, needs):
        self.number = number
        self.patches = [(layer, patch) for layer, patches, _ in needs for patch in patches]
        self.weights = [layer for layer, _, away in needs if away]
        self.lora_bytes = sum(patch.memory_required() for _, patch in self.patches)
        self.weight_bytes = sum(_size(layer) for layer in self.weights)
        self.kept = None  # the LoRA's bytes on the device, for the run
        self.locked = None  # the LoRA's bytes in page-locked memory
        self.locking = None  # a future of it, while threads are at work
        self.bound = {}  # buffer number -> (entries of each patch, (weight, bias) of each layer)

    @property
    def passing(self):
        """Bytes that come through the ring."""
        return self.weight_bytes + (self.lora_bytes if self.locked is not None or self.locking is not None else 0)

    def adapters(self):
        """The objects that hold the matrices: the same for every clone of a model with this LoRA."""
        return [entry[1] for _, patch in self.patches for entry in patch.patches[patch.key]]

    def gather(self, buffer, stream=None):
        """Copy the LoRA's matrices into ``buffer``."""
        at = 0
        for _, patch in self.patches:
            size = patch.memory_required()
            patch.prepare(buffer[at : at + size], stream, copy=True, commit=False)
            at += size

    def lora_views(self, buffer):
        views, at = [], 0
        for _, patch in self.patches:
            size = patch.memory_required()
            views.append(Entries(patch.prepare(buffer[at : at + size], None, copy=False, commit=False)))
            at += size
        return views

    def weight_views(self, buffer):
        views, at = [], 0
        for layer in self.weights:
            size = _size(layer)
            views.append(tuple(comfy.memory_management.interpret_gathered_like([layer.weight, layer.bias], buffer[at : at + size])))
            at += size
        return views


def _size(layer):
    return comfy.memory_management.vram_aligned_size([layer.weight, layer.bias])


def _raw(tensor):
    return tensor._qdata if packed.is_packed(tensor) else tensor.detach()


class Stream:
    """One run's staging for one network: what stays, what passes, and the ring."""

    def __init__(self, network, device, lane, signature):
        self.device, self.lane, self.signature, self.network = device, lane, signature, network
        self.parts = [_Part(number, needs) for number, needs in enumerate(signature)]
        self.useful, self.ring, self.idle_after, self.coming = False, [], [None, None], {}
        self.turn, self.inside = 0, None  # how many passes have begun; the block that has its weights now
        try:
            with torch.inference_mode():
                self._place_loras()
                self._make_ring()
        except BaseException:
            self.close()
            raise
        self.useful = bool(self.ring) or any(part.kept is not None for part in self.parts)

    def _place_loras(self):
        before = self.network.__dict__.setdefault(LOCKED, {})
        _unlock([before.pop(part.number)[1] for part in self.parts if not part.patches and part.number in before])
        spoken_for = weights_to_come(self.network)
        for part in self.parts:
            if not part.patches:
                continue
            adapters = part.adapters()
            held = before.get(part.number)
            if held is not None and [id(a) for a in held[0]] == [id(a) for a in adapters]:
                part.locked = held[1]
            elif held is not None:
                _unlock([before.pop(part.number)[1]])
            if self._keep(part, spoken_for):
                part.locked = None
                continue
            if part.locked is None:
                part.locking = self.lane.lock(part.lora_bytes, part.gather)

    def _settled(self, part):
        """The part, with the threads done that page-lock its LoRA. Kept under the network, where the next run finds it."""
        if part.locking is not None:
            locking, part.locking = part.locking, None
            part.locked = locking.result()
            if part.locked is not None:
                self.network.__dict__.setdefault(LOCKED, {})[part.number] = part.adapters(), part.locked
        return part

    def _keep(self, part, spoken_for):
        """Whether the part's LoRA now stays on the device. ``spoken_for``: free bytes that something else will take."""
        room = room_on(self.device, self.network.__dict__.get(NEEDED, 0)) - spoken_for
        if SPARING in self.network.__dict__ or part.lora_bytes > room:
            return False
        try:
            part.kept = torch.empty(part.lora_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return False
        if part.locked is not None:
            part.kept.copy_(part.locked.bytes, non_blocking=True)
        else:
            part.gather(part.kept)
        for (_, patch), views in zip(part.patches, part.lora_views(part.kept)):
            patch.__dict__[ENTRIES] = self.device, views
        return True

    def _make_ring(self):
        size = max(part.passing for part in self.parts)
        if not size:
            return
        try:
            self.ring = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        except torch.OutOfMemoryError:
            logger.info("No room for two buffers of %.0f MB; what is not on the GPU is fetched layer by layer.", size / 2**20)
            return
        # The allocator hands out memory that earlier work on the caller's stream may still use.
        self.idle_after = [self.lane.mark()] * 2
        logger.debug("Up to %.0f MB of each block pass through two buffers on %s.", size / 2**20, self.device)

    def blocks(self, modules, prefetch=None):
        """Yield (number, block). What the host prefetches goes first, as it is waited for by the same block."""
        self._begin()
        turn, last = self.turn, len(self.parts) - 1
        self._start(0)
        for number in range(last + 1):
            self._arrive(number)
            if prefetch is not None:
                with self.hidden(number):
                    prefetch.enter(modules[number])
            early = number < last and self._is_locked(number + 1)
            if early:
                self._start(number + 1)
            elif number == last and self._is_unchanging(0):
                self._start(0)  # of the next pass: its first block does not wait
            try:
                yield number, modules[number]
            finally:
                if self.turn == turn:  # else this pass was broken off and is only now being cleared away
                    self._leave(number)
            if number < last and not early:  # copies from ordinary memory hold this thread up: after the block's work has been given out
                self._start(number + 1)
        if prefetch is not None:
            prefetch.enter(None)

    def hidden(self, number):
        """A context in which the host does not see the block's LoRA patches that are on the device already, or on their way there in time."""
        part = self._settled(self.parts[number])
        return _hidden(part) if part.kept is not None or (self.ring and part.locked is not None) else contextlib.nullcontext()

    def _begin(self):
        """A new pass. What one that was broken off (an error, a cancelled run) has left is put in order."""
        self.turn += 1
        if self.inside is not None:
            self._leave(self.inside)
        for number in list(self.coming):
            if number or not self._is_unchanging(0):
                self.lane.wait(self.coming.pop(number))
                self.idle_after[number % 2] = self.lane.mark()

    def _is_locked(self, number):
        weights = self.parts[number].weights
        return not weights or _raw(weights[0].weight).is_pinned()

    def _is_unchanging(self, number):
        """Whether the block's bytes come from this object's own memory alone: they may be on their way while the host is at work between two passes."""
        return bool(self.ring) and bool(self.parts[number].passing) and not self.parts[number].weights and len(self.parts) % 2 == 0

    def _start(self, number):
        part, slot = self._settled(self.parts[number]), number % 2
        if number in self.coming:
            return
        if not self.ring or not part.passing or any(layer.weight.device.type != "cpu" for layer in part.weights if self.device.type != "cpu"):
            return  # nothing to bring, or somebody has moved the weights since this pass began
        if slot not in part.bound:
            buffer = self.ring[slot]
            part.bound[slot] = part.lora_views(buffer[part.weight_bytes :]) if part.locked is not None else [], part.weight_views(buffer)
        pairs = []
        for layer, views in zip(part.weights, part.bound[slot][1]):
            pairs += [(_raw(view), _raw(own)) for view, own in zip(views, (layer.weight, layer.bias)) if own is not None]
        if part.locked is not None:
            pairs.append((self.ring[slot][part.weight_bytes : part.weight_bytes + part.lora_bytes], part.locked.bytes))
        self.coming[number] = self.lane.copy(pairs, self.idle_after[slot])

    def _arrive(self, number):
        if number not in self.coming:
            return
        part = self.parts[number]
        self.lane.wait(self.coming.pop(number))
        entries, weights = part.bound[number % 2]
        if part.locked is not None:
            for (_, patch), views in zip(part.patches, entries):
                patch.__dict__[ENTRIES] = self.device, views
        for layer, views in zip(part.weights, weights):
            layer.__dict__[WEIGHT] = views
        self.inside = number

    def _leave(self, number):
        part, slot = self.parts[number], number % 2
        self.inside = None
        if not self.ring or not part.passing:
            return
        for layer in part.weights:
            layer.__dict__.pop(WEIGHT, None)
        if part.locked is not None:
            for _, patch in part.patches:
                patch.__dict__.pop(ENTRIES, None)
        self.idle_after[slot] = self.lane.mark()

    def close(self):
        """Give everything on the device back; nothing is read from main memory any more afterwards."""
        self.turn, self.inside = self.turn + 1, None
        for arrival in self.coming.values():
            self.lane.wait(arrival)  # the buffers are used again by what the caller's stream does next
        self.coming.clear()
        for part in self.parts:
            if part.locking is not None and part.locking.cancel():  # no thread has begun
                part.locking = None
            with contextlib.suppress(Exception):  # what a thread could not read is said to the pass that asks for it
                self._settled(part)
        self.lane.finish()
        for part in self.parts:
            for _, patch in part.patches:
                patch.__dict__.pop(ENTRIES, None)
            for layer in part.weights:
                layer.__dict__.pop(WEIGHT, None)
            part.kept, part.bound = None, {}
        self.ring = []


@contextlib.contextmanager
def _hidden(part):
    """While the host stages a block's weights it must not copy a LoRA that comes by itself."""
    shown = [(layer.__dict__, patch) for layer, patch in part.patches if layer.__dict__.get("weight_lowvram_function") is patch]
    for state, _ in shown:
        state["weight_lowvram_function"] = None
    try:
        yield
    finally:
        for state, patch in shown:
            state["weight_lowvram_function"] = patch
