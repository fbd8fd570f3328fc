"""How much memory a decode or encode takes, and how to cut it up so that it fits.

Time is never a reason to cut: the VAE rolls through it exactly (vae/model.py). A plan chooses how many bytes of activations a step may hold
(``split_bytes``) and, only when even the smallest step of a whole frame does not fit, spatial tiles: with a halo as wide as the network sees, so
that the result is exact, where that costs little; else with overlaps blended into each other.

Estimates count what the network's own tensors take: the rolling state, computed exactly from the block lists, plus ``WORKING_SETS`` times the step
size. That factor was measured with an allocation counter over the released geometries (2.0 and 2.3, 768x512x121 to 1280x704x241, steps of 16 to
256 MiB, and long clips in short steps: 5.6 to 8.4). Libraries' scratch comes on top and is covered by ``RESERVE_BYTES``.

Bytes throughout; H and W are latent height and width (1/32 of pixels).
"""

import logging
import math
from dataclasses import dataclass

import torch

from .config import VAEConfig

logger = logging.getLogger(__name__)

MIB = 2**20
WORKING_SETS = 9
RESERVE_BYTES = 192 * MIB
# Pixel frames of the widest level in one step. The first number fills a large GPU, and is what a host is asked to make room for; the second is taken where
# that much memory is free: every step reads and writes two frames per convolution more, and fewer steps do so less often.
GOOD_STEP_FRAMES, STEP_FRAMES = 20, 48
LARGEST_STEP, SMALLEST_STEP = 384 * MIB, 16 * MIB
BLEND_OVERLAP = 8  # latents shared by neighbouring blended tiles (256 pixels); the outer quarters, where a tile lacks context, get no weight
EXACT_AREA_LIMIT = 2.0  # an exact halo may cost up to this many times the frame's own area


class VAEMemoryError(RuntimeError):
    """A decode or encode does not fit into memory, however it is cut. The message names a size that would fit."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class VAEPlan:
    """How one decode or encode is cut.

    split_bytes: activations held per step. rows, columns: (start, stop) spans of the tiles along height and width, in latents. exact: the tiles'
    halo covers all that the network sees. park: the tiles' rolling states wait in CPU memory. bytes: estimated peak without the weights.
    """

    split_bytes: int
    rows: tuple[tuple[int, int], ...]
    columns: tuple[tuple[int, int], ...]
    exact: bool = True
    park: bool = False
    bytes: int = 0

    @property
    def tiles(self) -> int:
        return len(self.rows) * len(self.columns)

    def describe(self) -> str:
        step = f"steps of {self.split_bytes / MIB:.0f} MiB, about {self.bytes / 2**30:.1f} GiB"
        if self.tiles == 1:
            return f"whole frames, {step}"
        return f"{len(self.rows)}x{len(self.columns)} tiles with {'an exact halo' if self.exact else 'blended overlap'}, {step}"


def _convolutions(config: VAEConfig, side: str, H: int, W: int):
    """(channels in, channels out, height, width, skip elements waiting beside it) of every convolution of one side, in order."""
    if side == "decoder":
        width, blocks = config.decoder_width, config.decoder_blocks
        yield config.latent_channels, width, H, W, 0
        for block in blocks:
            if block.kind == "res":
                for _ in range(block.layers):
                    yield width, width, H, W, 0
                    yield width, width, H, W, 2 * width * H * W  # the main path is two frames late
            else:
                pt, ph, pw = block.stride
                out = width // block.multiplier
                yield width, out * pt * ph * pw, H, W, pt * out * H * ph * W * pw if block.residual else 0
                width, H, W = out, H * ph, W * pw
        yield width, config.pixel_channels * config.patch_size**2, H, W, 0
        return
    scale = config.spatial_scale // config.patch_size
    H, W, width = H * scale, W * scale, config.encoder_base_channels
    yield config.pixel_channels * config.patch_size**2, width, H, W, 0
    for block in config.encoder_blocks:
        if block.kind == "res":
            for _ in range(2 * block.layers):
                yield width, width, H, W, 0  # causal: nothing is late
        else:
            pt, ph, pw = block.stride
            yield width, width * block.multiplier // (pt * ph * pw), H, W, (pt - 1) * width * H * W
            width, H, W = width * block.multiplier, H // ph, W // pw
    yield width, config.latent_channels + 1, H, W, 0


def state_bytes(config: VAEConfig, side: str, batch: int, H: int, W: int, element_size: int) -> int:
    """Most that one clip's rolling state holds: two input frames per convolution and the skips that wait."""
    if _diffuses(config, side):
        return batch * element_size * config.diffusion.state_elements(H, W)
    edge = 2 if (config.decoder_padding if side == "decoder" else config.encoder_padding) == "reflect" else 0
    return (
        batch
        * element_size
        * sum(2 * c * (h + edge) * (w + edge) + skip for c, _, h, w, skip in _convolutions(config, side, H, W))
    )


def _diffuses(config: VAEConfig, side: str) -> bool:
    """Whether this side is the diffusion decoder, which counts its memory itself."""
    return side == "decoder" and config.diffusion is not None


def _frame_bytes(config, side, batch, H, W, element_size):
    """Bytes of the widest tensor of one frame anywhere in the network."""
    if _diffuses(config, side):
        return batch * element_size * config.diffusion.frame_elements(H, W)
    return (
        batch * element_size * max(max(cin, cout) * h * w for cin, cout, h, w, _ in _convolutions(config, side, H, W))
    )


def _step_bytes(config, side, batch, H, W, element_size, frames):
    """The step that holds this many frames of the level with most pixels."""
    if _diffuses(config, side):
        return min(LARGEST_STEP, frames * _frame_bytes(config, side, batch, H, W, element_size))
    cin, h, w = max(
        ((cin, h, w) for cin, _, h, w, _ in _convolutions(config, side, H, W)), key=lambda level: level[1] * level[2]
    )
    step = frames * batch * element_size * cin * h * w
    return min(LARGEST_STEP, max(4 * SMALLEST_STEP, step))


def peak_bytes(
    config: VAEConfig, side: str, batch: int, frames: int, H: int, W: int, element_size: int, split_bytes: int
) -> int:
    """Estimated peak of activations and state, without weights and without a library's scratch. frames: latent frames."""
    widest = _frame_bytes(config, side, batch, H, W, element_size)
    whole_clip = widest * max(1, config.temporal_scale * frames)
    rolling = state_bytes(config, side, batch, H, W, element_size) if frames > 1 else 0
    if _diffuses(config, side):
        step = max(1, min(config.temporal_scale * frames, split_bytes // widest))
        return rolling + batch * element_size * config.diffusion.step_elements(step, H, W)
    return rolling + WORKING_SETS * min(max(split_bytes, widest), whole_clip)


def estimate_bytes(config: VAEConfig, side: str, latent_shape, element_size: int) -> int:
    """What a decode to (or encode from) the whole frame wants at full speed; for hosts that make room before a call. latent_shape (B, C, F, H, W)."""
    batch, _, frames, H, W = latent_shape
    return RESERVE_BYTES + peak_bytes(
        config,
        side,
        batch,
        frames,
        H,
        W,
        element_size,
        _step_bytes(config, side, batch, H, W, element_size, GOOD_STEP_FRAMES),
    )


def free_bytes(device) -> int | None:
    """Memory that a new allocation on the device can use; None where that is not limited by a device (CPU)."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return None


def spatial_reach(config: VAEConfig) -> int:
    """Latents to each side that a decoded pixel depends on, rounded up (16 for 2.3, 22 for 2.0)."""
    if config.diffusion is not None:
        return config.diffusion.spatial_reach
    H = 1  # latent rows; a level with h rows of its own per latent row adds 1/h latents per convolution
    return math.ceil(sum(H / h for _, _, h, _, _ in _convolutions(config, "decoder", H, H)))


def spans(size: int, count: int, overlap: int) -> tuple[tuple[int, int], ...]:
    """count spans of one length that cover 0..size evenly, neighbours sharing at least ``overlap``."""
    if count == 1:
        return ((0, size),)
    length = min(size, math.ceil((size + (count - 1) * overlap) / count))
    starts = [round(i * (size - length) / (count - 1)) for i in range(count)]
    return tuple((start, start + length) for start in starts)


def weights(axis: tuple[tuple[int, int], ...], scale: int, exact: bool) -> list[torch.Tensor]:
    """One float32 weight vector per span, at ``scale`` output samples per unit; over all spans they add up to one everywhere.

    exact: a step in the middle of each overlap; else a ramp over its middle half.
    """
    size = axis[-1][1] * scale
    position = torch.arange(size, dtype=torch.float32) + 0.5
    rises = [torch.ones(size)]
    for (_, before), (after, _) in zip(axis, axis[1:]):
        middle, half = (before + after) * scale / 2, 0 if exact else (before - after) * scale / 4
        rises.append(
            (position >= middle).float() if half == 0 else ((position - middle + half) / (2 * half)).clamp(0, 1)
        )
    rises.append(torch.zeros(size))
    return [
        (rise * (1 - following))[start * scale : stop * scale]
        for (start, stop), rise, following in zip(axis, rises, rises[1:])
    ]


def _tilings(H, W, overlap, smallest):
    """(rows, columns) span lists for growing numbers of tiles, spans not shorter than ``smallest``."""
    for rows in range(1, H + 1):
        row_spans = spans(H, rows, overlap)
        if rows > 1 and row_spans[0][1] < smallest:
            return
        for columns in range(1, W + 1):
            column_spans = spans(W, columns, overlap)
            if columns > 1 and column_spans[0][1] < smallest:
                break
            yield row_spans, column_spans


def _area(rows, columns):
    return sum(b - a for a, b in rows) * sum(b - a for a, b in columns)


def plan(
    config: VAEConfig,
    side: str,
    latent_shape,
    element_size: int,
    free: int | None = None,
    tile: int | None = None,
    largest_step: int = LARGEST_STEP,
) -> VAEPlan:
    """Choose steps and tiles for a clip of latent_shape (B, C, F, H, W).

    free: bytes that may be used beside the weights; None: no limit is known. tile: force tiles of at most this many pixels a side. largest_step:
    upper limit of ``split_bytes``.
    Raises VAEMemoryError, naming a size that would fit, when no cut fits.
    """
    batch, _, frames, H, W = latent_shape
    usable = None if free is None else free - RESERVE_BYTES
    reach = spatial_reach(config) if side == "decoder" and config.has_decoder else None

    def fitted(rows, columns, exact):
        height, width = rows[0][1] - rows[0][0], columns[0][1] - columns[0][0]
        count = len(rows) * len(columns)
        state = state_bytes(config, side, batch, height, width, element_size) if frames > 1 else 0
        good, step = (
            min(largest_step, _step_bytes(config, side, batch, height, width, element_size, n))
            for n in (GOOD_STEP_FRAMES, STEP_FRAMES)
        )
        while True:
            peak = peak_bytes(config, side, batch, frames, height, width, element_size, step)
            together = peak + (count - 1) * state
            if usable is None or together <= usable:
                return VAEPlan(step, rows, columns, exact, False, together)
            if peak <= usable and (step <= SMALLEST_STEP or count > 1):
                return VAEPlan(step, rows, columns, exact, True, peak)
            if step <= SMALLEST_STEP:
                return None
            step = good if step > good else max(SMALLEST_STEP, step // 2)

    def best(overlap, exact, limit):
        """The fitting tiling with least area, no tile side above ``limit`` latents."""
        found = None
        for rows, columns in _tilings(H, W, overlap, overlap + 2 if exact else 2 * overlap):
            if max(rows[0][1], columns[0][1]) > limit:
                continue
            if found is not None and _area(rows, columns) >= _area(found.rows, found.columns):
                continue
            found = fitted(rows, columns, exact) or found
        return found

    whole = fitted(((0, H),), ((0, W),), True)
    limit = max(H, W) if tile is None else max(2, tile // config.spatial_scale)
    if whole is not None and limit >= max(H, W):
        return whole
    if reach is not None:
        exact = best(2 * reach, True, limit)
        if exact is not None and _area(exact.rows, exact.columns) <= EXACT_AREA_LIMIT * H * W:
            return exact
    for overlap in (BLEND_OVERLAP, BLEND_OVERLAP // 2, 2, *(() if tile is None else (1,))):
        blended = best(overlap, False, limit)
        if blended is not None:
            return blended
    raise VAEMemoryError(_does_not_fit(config, side, latent_shape, element_size, usable))


def _does_not_fit(config, side, latent_shape, element_size, usable):
    batch, _, frames, H, W = latent_shape
    needed = peak_bytes(config, side, batch, frames, min(4, H), min(4, W), element_size, SMALLEST_STEP) + RESERVE_BYTES
    fits = largest_that_fits(config, side, latent_shape, element_size, usable + RESERVE_BYTES)
    return (
        f"{'Decoding' if side == 'decoder' else 'Encoding'} {W * config.spatial_scale}x{H * config.spatial_scale} needs at least "
        f"{needed / 2**30:.1f} GiB of free memory beside the VAE's weights, in the smallest tiles; {max(0, usable + RESERVE_BYTES) / 2**30:.1f} GiB "
        f"are free{f', enough for about {fits[0]}x{fits[1]}' if fits else ''}. Unload other models or run the VAE on the CPU."
    )


def largest_that_fits(
    config: VAEConfig, side: str, latent_shape, element_size: int, free: int
) -> tuple[int, int] | None:
    """(width, height) in pixels of the largest frame of about this shape's aspect that fits whole into ``free`` bytes; None if none does."""
    batch, _, frames, H, W = latent_shape
    for w in range(W, 0, -1):
        h = max(1, round(H * w / W))
        if peak_bytes(config, side, batch, frames, h, w, element_size, SMALLEST_STEP) + RESERVE_BYTES <= free:
            return w * config.spatial_scale, h * config.spatial_scale
    return None


def smaller(
    before: VAEPlan, config: VAEConfig, side: str, latent_shape, element_size: int, free: int | None
) -> VAEPlan:
    """The plan for one more try after ``before`` should have fitted but did not: two thirds of its memory, a quarter of its steps."""
    batch, _, frames, H, W = latent_shape
    whole_clip = _frame_bytes(config, side, batch, H, W, element_size) * config.temporal_scale * frames
    step = max(MIB, min(before.split_bytes, whole_clip) // 4)
    target = 2 * before.bytes // 3 + RESERVE_BYTES
    return plan(
        config, side, latent_shape, element_size, target if free is None else min(free, target), largest_step=step
    )
