"""A copy stream whose copies arrive only when they are waited for."""

import torch


class Lane:
    """Copies when it is told to wait: what is used too early has the wrong bytes."""

    locked_memory = True

    def __init__(self):
        self.copied, self.open, self.log = 0, {}, []
        self.now, self.filled = 0, {}  # a clock; memory -> when what it holds arrived and began to be used

    def mark(self):
        self.now += 1
        return self.now

    def copy(self, pairs, after):
        for target, _ in pairs:
            assert after > self.filled.get(target.untyped_storage().data_ptr(), 0), "a buffer is filled only after what it held has been used"
        self.open[len(self.log)] = pairs
        self.log.append("copy")
        return len(self.log) - 1

    @torch.inference_mode()
    def wait(self, arrival):
        self.now += 1
        for target, source in self.open.pop(arrival):
            target.copy_(source)
            self.filled[target.untyped_storage().data_ptr()] = self.now
            self.copied += source.nbytes

    def finish(self):
        assert not self.open, "what was copied from may go now"

    def lock(self, nbytes, fill):
        return Locking(nbytes, fill) if self.locked_memory else None


class Locking:
    """A future of page-locked memory, filled when somebody waits for it: the latest moment."""

    def __init__(self, nbytes, fill):
        self.nbytes, self.fill = nbytes, fill

    def cancel(self):
        return True

    def result(self):
        memory = Memory(self.nbytes)
        self.fill(memory.bytes)
        return memory


class Memory:
    alive = 0

    def __init__(self, nbytes):
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)
        Memory.alive += nbytes

    def unlock(self):
        Memory.alive -= self.bytes.numel()
