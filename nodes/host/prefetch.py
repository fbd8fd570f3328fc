"""The host's prefetching under dynamic VRAM: a block's weights come to the device together, beside the work of the
blocks before.

Source: ComfyUI 0.30.0 and 0.33.0 ``comfy/model_prefetch.py`` (``make_prefetch_queue``, ``prefetch_queue_pop``).
"""

import comfy.model_prefetch

from .internals import PREFETCH


class Prefetch:
    """One pass over ``blocks``. False where the host does not prefetch: each layer then fetches its own weights."""

    def __init__(self, blocks, device, transformer_options):
        self.blocks, self.device, self.queue = list(blocks), device, None
        if PREFETCH:
            with PREFETCH.guard():
                self.queue = comfy.model_prefetch.make_prefetch_queue(list(blocks), device, transformer_options)

    def __bool__(self):
        return self.queue is not None

    def enter(self, number):
        """Bring the weights of block ``number``; None: behind the last block. What the block before has taken is given
        back."""
        if self.queue is not None:
            with PREFETCH.guard(self.abandon):
                comfy.model_prefetch.prefetch_queue_pop(
                    self.queue, self.device, None if number is None else self.blocks[number]
                )

    def abandon(self):
        """The rest of the pass without prefetching."""
        self.queue = None
        comfy.model_prefetch.cleanup_prefetch_queues()  # weights that are marked as on their way would not be fetched by their layers
