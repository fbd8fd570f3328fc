"""Running a VAE by plan: steps through time, tiles in space, frames handed over as they are decided, one retry when memory runs out.

A tiled run visits every tile for each piece of the clip before it goes on in time, each tile with its own rolling state, so frames come out in
order here as well. States that do not fit on the device together wait in CPU memory between visits.
"""

import logging

import torch

from . import tiling
from .blocks import Rolling

logger = logging.getLogger(__name__)


def memory_format(device):
    """Layout of intermediate tensors and weights: channels last on CUDA, whose tensor-core convolutions read it without converting; not on ROCm."""
    return (
        torch.channels_last_3d
        if torch.device(device).type == "cuda" and torch.version.hip is None
        else torch.contiguous_format
    )


def run(roll, pieces, plan, device, scale_in, scale_out):
    """Feed pieces through ``roll`` tile by tile; yields outputs (B, C, n, H, W) in order.

    roll(piece, rolling, last, split_bytes) -> iterator of outputs. pieces: iterable of (tensor (B, C, n, H, W), last). scale_in, scale_out: samples
    per latent of the tensors going in and coming out. With one tile, outputs are on ``device``; with several they are blended on the CPU.
    """
    if plan.tiles == 1:
        rolling = Rolling(memory_format(device))
        for piece, last in pieces:
            yield from roll(piece.to(device), rolling, last, plan.split_bytes)
        return
    origins = [(top * scale_out, left * scale_out) for top, _ in plan.rows for left, _ in plan.columns]
    rollings = [Rolling(memory_format(device), origin) for origin in origins]
    row_weights = tiling.weights(plan.rows, scale_out, plan.exact)
    column_weights = tiling.weights(plan.columns, scale_out, plan.exact)
    size = plan.rows[-1][1] * scale_out, plan.columns[-1][1] * scale_out
    for piece, last in pieces:
        canvas = None
        for index, rolling in enumerate(rollings):
            row, column = divmod(index, len(plan.columns))
            (top, bottom), (left, right) = plan.rows[row], plan.columns[column]
            if plan.park:
                rolling.to(device)
            tile = piece[..., top * scale_in : bottom * scale_in, left * scale_in : right * scale_in].to(device)
            weight = (row_weights[row][:, None] * column_weights[column]).to(device)  # (h, w)
            outputs = [(y.float() * weight).cpu() for y in roll(tile, rolling, last, plan.split_bytes)]
            if plan.park:
                rolling.to("cpu")
            if not outputs:
                continue
            total = sum(y.shape[2] for y in outputs)
            if canvas is None:
                canvas = torch.zeros(*outputs[0].shape[:2], total, *size)
            start = 0
            for y in outputs:
                canvas[
                    :,
                    :,
                    start : start + y.shape[2],
                    top * scale_out : bottom * scale_out,
                    left * scale_out : right * scale_out,
                ].add_(y)
                start += y.shape[2]
            del outputs
        if canvas is not None:
            yield canvas


def with_retry(start, plan, replan, give_up):
    """Yield from start(plan); when an allocation fails, plan smaller once and go on after the frames already handed over.

    start(plan) -> generator of tensors with frames on axis 2. replan(plan) -> smaller plan. give_up(plan) -> the error for a second failure.
    """
    done = 0
    for retried in (False, True):
        skip, frames = done, start(plan)
        try:
            for output in frames:
                seen = min(skip, output.shape[2])
                skip -= seen
                output = output[:, :, seen:]
                done += output.shape[2]
                if output.shape[2]:
                    yield output
                del output
            return
        except torch.OutOfMemoryError:
            pass
        finally:
            frames.close()
        # Outside of the handler: the traceback no longer holds the failed step's tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if retried:
            raise give_up(plan)
        plan = replan(plan)
        logger.warning("The VAE ran out of memory; trying once more with %s.", plan.describe())


PINNED_BYTES = 256 * 2**20  # of one staging buffer


class FrameSink:
    """Copies finished chunks into one preallocated tensor while the device goes on computing.

    output: (B, C, F, H, W) of dtype uint8 (values 0..255) or a float dtype (values as they are), on any device. From CUDA to the CPU a chunk goes
    through one of two pinned buffers, so that the copy runs beside the next step.
    """

    def __init__(self, output):
        self.output = output
        self.frames = 0
        self._pinned = [None, None]
        self._landing = [None, None]  # (event, target view, source view) of copies under way
        self._turn = 0

    def put(self, chunk):
        """chunk (B, C, n, H, W) in [-1, 1]: the next frames."""
        if self.output.dtype == torch.uint8:
            chunk = to_uint8(chunk)
        n = chunk.shape[2]
        target = self.output[:, :, self.frames : self.frames + n]
        self.frames += n
        if chunk.device.type != "cuda" or self.output.device.type != "cpu":
            target.copy_(chunk)
            return
        fitting = max(1, PINNED_BYTES // chunk[:, :, :1].nbytes)
        for part, place in zip(chunk.split(fitting, dim=2), target.split(fitting, dim=2)):
            self._launch(part.contiguous(), place)

    def _launch(self, part, target):
        turn = self._turn
        self._turn ^= 1
        self._land(turn)
        buffer = self._pinned[turn]
        if buffer is None or buffer.dtype != part.dtype or buffer.numel() < part.numel():
            try:
                buffer = self._pinned[turn] = torch.empty(part.numel(), dtype=part.dtype, pin_memory=True)
            except RuntimeError:  # the system has no more pages to lock
                self._land(turn ^ 1)
                target.copy_(part)
                return
        staged = buffer[: part.numel()].view(part.shape)
        staged.copy_(part, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._landing[turn] = event, target, staged

    def _land(self, turn):
        if self._landing[turn] is not None:
            event, target, staged = self._landing[turn]
            event.synchronize()
            target.copy_(staged)
            self._landing[turn] = None

    def close(self):
        """Wait for copies under way; returns the output."""
        for turn in (self._turn, self._turn ^ 1):
            self._land(turn)
        if self.frames != self.output.shape[2]:
            raise ValueError(
                f"{self.frames} frames were decoded into an output for {self.output.shape[2]}; give an output of decode_output_shape(latent.shape)."
            )
        return self.output


def to_uint8(pixels):
    """[-1, 1] -> 0..255, rounded."""
    return (pixels.float() + 1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
