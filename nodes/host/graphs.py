"""The blocks of small clips as CUDA graphs, recorded and replayed by the host (dynamic VRAM, ComfyUI 0.33 on).

Giving out the kernels of a block takes longer than the device takes for a thousand tokens. The host's
``prefetch_queue_pop`` records a block whose weights all stay on the device, and replays it from the next pass on. A
graph reads and writes where it did when it was recorded: what the blocks are given lies in buffers of ``BlockGraphs``,
filled anew before each pass.

Only the plain case is recorded: no LoRA, no guides, no patches or hooks, no options that this module does not know.
Each block's graph keeps memory of its own, so there must be room for it.

Source: ComfyUI 0.33.0 ``comfy/model_prefetch.py`` (``prefetch_queue_pop``), ``comfy/model_patcher.py``
(``get_dynamic_vram__units``).
"""

import comfy.model_management
import comfy.model_prefetch
import torch

from ...ltx2_core.transformer.model import TransformerBlock
from ...ltx2_core.transformer.modulation import Modulation
from . import stream
from .internals import GRAPHS

MOST_TOKENS = 2048  # beyond, the device is the slower one
# transformer_options that say nothing to a block.
KNOWN_OPTIONS = {
    "callbacks",
    "cond_or_uncond",
    "multigpu_thread_device",
    "prefetch_dynamic_vbars",
    "sample_sigmas",
    "sigmas",
    "uuids",
    "wrappers",
}
EMPTY_OPTIONS = {"patches", "patches_replace", "ltx2_stg_blocks", "stg_self_attn_blocks"}
TENSORS = (
    "v_context",
    "v_prompt_timestep",
)  # arguments of a block that change from pass to pass, beside its modulation


def can_record(device):
    """Whether there are CUDA graphs."""
    return device.type == "cuda"


class BlockGraphs:
    """The buffers of one network's recorded blocks, from the first pass of a run to its end."""

    def __init__(self, network):
        self.network = network
        self.key, self.kept, self.buffers = (
            None,
            None,
            {},
        )  # key: what the buffers were made for; kept: tables that graphs read
        self.active = False  # in the pass under way
        self.audio = None  # of a pass: the second of the blocks' pair, without length

    def arguments(self, pair, options, shared):
        """(pair, shared) of the blocks in buffers that stay where they are, where this pass may be recorded; else as
        they came."""
        self.active = False
        if (
            torch.compiler.is_compiling()
            or not GRAPHS
            or not can_record(pair[0].device)
            or not self._is_plain(pair, options, shared)
        ):
            return pair, shared
        given = {
            "x": pair[0],
            "modulation": shared["v_timestep"].data,
            **{name: shared[name] for name in TENSORS if shared.get(name) is not None},
        }
        key = tuple(
            (name, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for name, tensor in given.items()
        )
        if self.key is None and self._may_begin():
            self.key, self.kept = key, shared["v_pe"]
            self.buffers = {name: torch.empty_like(tensor) for name, tensor in given.items()}
        if self.key != key or self.kept is not shared["v_pe"]:
            return pair, shared  # another size in the same run
        for name, tensor in given.items():
            self.buffers[name].copy_(tensor)
        self.active, self.audio = True, pair[1]
        fixed = {name: self.buffers[name] for name in TENSORS if name in given}
        modulation = Modulation(self.buffers["modulation"], shared["v_timestep"].tokens)
        return (self.buffers["x"], pair[1]), {**shared, **fixed, "v_timestep": modulation}

    def _is_plain(self, pair, options, shared):
        modulation = shared.get("v_timestep")
        if (
            self.network.streamer is not None
            or self.network.loras.any
            or pair[0].shape[0] * pair[0].shape[1] > MOST_TOKENS
        ):
            return False
        if pair[1].numel() or not isinstance(modulation, Modulation) or modulation.index is not None:
            return False
        if any(value is not None for name, value in shared.items() if name not in (*TENSORS, "v_timestep", "v_pe")):
            return False
        return all(
            name in KNOWN_OPTIONS or (name in EMPTY_OPTIONS and not _holds_anything(value))
            for name, value in options.items()
        )

    def _may_begin(self):
        """Whether the host can record the blocks, nothing hangs on them, and every one's memory has room beside the
        weights."""
        network = self.network
        blocks = network.transformer_blocks
        if (
            not all(
                type(block) is TransformerBlock and getattr(block, "_v_block", None) is not None for block in blocks
            )
            or getattr(network, "sequence_parallel", None) is not None
        ):
            return False
        if any(block._compiled_call_impl is not None for block in blocks) or not all(
            map(_is_unhooked, blocks.modules())
        ):
            return False
        device = comfy.model_management.get_torch_device()
        each = network.needed_bytes + network.largest_layer * network.dtype.itemsize
        return stream.room_on(device, network.needed_bytes) - stream.weights_to_come(network) > each * len(blocks)

    def run(self, prefetch, number, call):
        """Block ``number`` with its weights: ``call()``, or its graph. Returns the blocks' pair."""
        if not self.active or not prefetch:
            prefetch.enter(number)
            return call()
        x, begun, done = self.buffers["x"], [], []

        def core():
            begun.append(x.is_cuda and torch.cuda.is_current_stream_capturing())
            out = call()
            if out[0] is not x:
                x.copy_(out[0])
            done.append(out)

        try:
            comfy.model_prefetch.prefetch_queue_pop(
                prefetch.queue,
                prefetch.device,
                prefetch.blocks[number],
                self.network.dtype,
                core=core,
                enable_graph=True,
            )
        except Exception as error:
            recording = bool(begun) and begun[-1]
            if begun and not done and not (recording and isinstance(error, RuntimeError)):
                raise  # the block's own error: memory that ran out, a cancelled run
            GRAPHS.failed(error)
            self.active = False
            prefetch.abandon()
            if not done or recording:  # nothing of what was recorded has run
                return call()
        return x, self.audio

    def release(self):
        """Forget the graphs and give their memory back."""
        if self.key is not None:
            self.key, self.kept, self.buffers, self.active = None, None, {}, False
            comfy.model_prefetch.cleanup_prefetch_queues()


def _holds_anything(value):
    return any(map(_holds_anything, value.values())) if isinstance(value, dict) else bool(value)


def _is_unhooked(module):
    state = module.__dict__
    return not (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state.get("weight_function")
        or state.get("bias_function")
    )
