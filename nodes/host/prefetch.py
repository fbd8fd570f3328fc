"""The host's prefetching under dynamic VRAM: a block's weights are brought to the device together, beside the work of the blocks before.

Source: ComfyUI 0.30.0 and 0.33.0 ``comfy/model_prefetch.py`` (``make_prefetch_queue``, ``prefetch_queue_pop``).
"""

import comfy.model_prefetch


class Prefetch:
    """One pass over ``blocks``. Falsy where the host does not prefetch."""

    def __init__(self, blocks, device, transformer_options):
        self.queue = comfy.model_prefetch.make_prefetch_queue(list(blocks), device, transformer_options)
        self.device = device

    def __bool__(self):
        return self.queue is not None

    def enter(self, block):
        """Bring the weights of ``block``; None after the last block. What the block before has taken is given back."""
        if self.queue is not None:
            comfy.model_prefetch.prefetch_queue_pop(self.queue, self.device, block)
