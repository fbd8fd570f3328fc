"""A copy stream whose copies arrive only when they are waited for, and pinned memory without a driver."""

import torch


class LateCopier:
    """Copies when it is told to wait: what is used too early has the wrong bytes. ``made``: all of them, newest last."""

    made = []

    def __init__(self, *arguments):
        self.parts = next(argument for argument in arguments if isinstance(argument, list))
        self.copied, self.open, self.closed = 0, {}, False
        self.now, self.filled = 0, {}  # a clock; memory -> when what it holds arrived and began to be used
        LateCopier.made.append(self)

    def mark(self):
        self.now += 1
        return self.now

    def start(self, number, target, idle_after):
        assert idle_after > self.filled.get(target.data_ptr(), 0), (
            "a buffer is filled only after what it held has been used"
        )
        self.open[number] = target
        return number

    @torch.inference_mode()
    def wait(self, number):
        self.now += 1
        target = self.open.pop(number)
        target.zero_()
        self.parts[number].gather(target)
        self.filled[target.data_ptr()] = self.now
        self.copied += self.parts[number].nbytes

    def close(self):
        self.closed = True
        self.open.clear()


class Memory:
    """What ``PinnedMemory`` is where a driver grants it. ``alive``: bytes of all of it."""

    alive = total = 0

    def __init__(self, nbytes, limit=None, fill=lambda buffer: None):
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
        fill(self.bytes)
        Memory.alive += nbytes

    def unpin(self):
        Memory.alive -= self.bytes.numel()
