"""What the sampler starts from: a latent whose frames are free, given, or something between, and guide frames appended to it.

A latent is ``[B, C, F, H, W]``, normalised, float32. Its mask ``[B, 1, F, H, W]`` says how much of each token is generated: 1 = all
of it, 0 = given exactly, between = starts and stays at ``mask * sigma``. Images can enter in two ways:

* replaced: the latent frame *is* the encoded image (``replace_frames``), as for a first frame;
* as a guide: the encoded image is appended after the last frame (``append_guide``) with the true pixel position of its tokens in
  ``keyframe_idxs``; the frames see it through attention, and ``crop_guides`` removes it after sampling.

``combined``, the official default, replaces frame 0 and appends every other image.

Sources: Lightricks ``ltx-core`` (``conditioning/types``, ``components/noisers.py``), host ``comfy_extras/nodes_lt.py``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from ..transformer.config import VAE_SCALE_FACTORS

TIME_FACTOR, SPACE_FACTOR, _ = (
    VAE_SCALE_FACTORS  # pixel frames per latent frame (the first stands for one), pixels per row and column
)
LATENT_CHANNELS = 128


@dataclass(frozen=True)
class Conditioned:
    """A latent with its mask, and the positions of the guide frames at its end.

    clean          [B, C, F, H, W] float32: the given content (zeros where nothing is given)
    mask           [B, 1, F, H, W] float32: how much of each token is generated
    keyframe_idxs  [B, 3, K, 2] int32: pixel intervals (t in frames, y, x) of the K guide tokens at the end, or None
    guide_frames   how many latent frames at the end are guides
    """

    clean: torch.Tensor
    mask: torch.Tensor
    keyframe_idxs: torch.Tensor | None = None
    guide_frames: int = 0

    @property
    def frames(self) -> int:
        """Latent frames of the video itself, guides not counted."""
        return self.clean.shape[2] - self.guide_frames

    @property
    def tokens(self) -> int:
        """Tokens of the video itself: F * H * W, guides not counted."""
        return self.frames * self.clean.shape[3] * self.clean.shape[4]

    @property
    def is_plain(self) -> bool:
        """True when every token is fully generated and there is no guide: the network then needs no mask."""
        return self.guide_frames == 0 and bool((self.mask == 1.0).all())


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """(F, H, W) of the latent of a video. Raises ValueError for a size the VAE does not have."""
    wrong = []
    if width < SPACE_FACTOR or width % SPACE_FACTOR:
        wrong.append(f"width {width} (nearest {_nearest(width, SPACE_FACTOR)})")
    if height < SPACE_FACTOR or height % SPACE_FACTOR:
        wrong.append(f"height {height} (nearest {_nearest(height, SPACE_FACTOR)})")
    if frames < 1 or (frames - 1) % TIME_FACTOR:
        wrong.append(f"{frames} frames (nearest {1 + max(0, round((frames - 1) / TIME_FACTOR)) * TIME_FACTOR})")
    if wrong:
        raise ValueError(
            f"Width and height must be multiples of {SPACE_FACTOR} and frames {TIME_FACTOR}k+1; got {', '.join(wrong)}."
        )
    return (frames - 1) // TIME_FACTOR + 1, height // SPACE_FACTOR, width // SPACE_FACTOR


def _nearest(value: int, step: int) -> int:
    return max(step, round(value / step) * step)


def empty(shape: tuple[int, int, int], batch: int = 1, channels: int = LATENT_CHANNELS, device="cpu") -> Conditioned:
    """Nothing given: every token is generated. ``shape`` is (F, H, W)."""
    frames, height, width = shape
    return Conditioned(
        torch.zeros(batch, channels, frames, height, width, device=device),
        torch.ones(batch, 1, frames, height, width, device=device),
    )


def latent_index(frame: int) -> int:
    """The latent frame that holds pixel frame ``frame`` (0 -> 0, 1..8 -> 1, 9..16 -> 2)."""
    return (frame + TIME_FACTOR - 1) // TIME_FACTOR


def resolve_frame(frame: int, latent_frames: int) -> int:
    """Pixel frame counted from the start; negative ones count from the end (-1 = the last). Raises ValueError outside the video."""
    total = (latent_frames - 1) * TIME_FACTOR + 1
    resolved = frame if frame >= 0 else total + frame
    if not 0 <= resolved < total:
        raise ValueError(
            f"Frame {frame} is outside the video, which has {total} frames: use 0 to {total - 1}, or -1 for the last."
        )
    return resolved


def replace_frames(state: Conditioned, latent: torch.Tensor, index: int = 0, strength: float = 1.0) -> Conditioned:
    """Put ``latent`` [1 or B, C, f, H, W] in place of latent frames ``index .. index + f``; their mask becomes ``1 - strength``."""
    check_strength(strength)
    _check_latent(state, latent)
    end = index + latent.shape[2]
    if index < 0 or end > state.frames:
        first, last = max(0, (index - 1) * TIME_FACTOR + 1), (end - 1) * TIME_FACTOR
        raise ValueError(
            f"The clip covers frames {first} to {last} of a video of {(state.frames - 1) * TIME_FACTOR + 1}; use a shorter clip."
        )
    clean, mask = state.clean.clone(), state.mask.clone()
    clean[:, :, index:end] = latent.to(clean)
    mask[:, :, index:end] = 1.0 - strength
    return replace(state, clean=clean, mask=mask)


def append_guide(state: Conditioned, latent: torch.Tensor, frame: int, strength: float = 1.0) -> Conditioned:
    """Append ``latent`` [1 or B, C, f, H, W] as guide frames that stand at pixel frame ``frame``.

    One guide frame covers the pixel frame [frame, frame + 1). A guide of several frames at 0 has the usual causal positions; at a
    later frame it covers 8 pixel frames per latent frame, so its own first latent (which stands for one pixel frame) must have been
    left out, and ``frame`` must be 8k+1.
    """
    check_strength(strength)
    _check_latent(state, latent)
    if latent.shape[2] > 1 and frame and (frame - 1) % TIME_FACTOR:
        raise ValueError(f"A guide of several frames can stand at frame 0 or at 8k+1; got {frame}.")
    batch = state.clean.shape[0]
    positions = (
        _guide_positions(latent.shape[2], *state.clean.shape[3:], frame)
        .to(state.clean.device)
        .expand(batch, -1, -1, -1)
    )
    known = state.keyframe_idxs
    mask = state.mask.new_full((batch, 1, *latent.shape[2:]), 1.0 - strength)
    return Conditioned(
        clean=torch.cat([state.clean, latent.to(state.clean).expand(batch, -1, -1, -1, -1)], dim=2),
        mask=torch.cat([state.mask, mask], dim=2),
        keyframe_idxs=positions if known is None else torch.cat([known, positions], dim=2),
        guide_frames=state.guide_frames + latent.shape[2],
    )


def combined(state: Conditioned, images: Iterable[tuple[torch.Tensor, int, float]]) -> Conditioned:
    """The official way: an image for frame 0 replaces it, every other image is appended as a guide.

    ``images``: (latent [1, C, f, H, W], pixel frame, strength); frames may count from the end.
    """
    for latent, frame, strength in images:
        frame = resolve_frame(frame, state.frames)
        state = (
            replace_frames(state, latent, 0, strength) if frame == 0 else append_guide(state, latent, frame, strength)
        )
    return state


def crop_guides(state: Conditioned, latent: torch.Tensor) -> torch.Tensor:
    """The video's own frames of a sampled latent."""
    return latent[:, :, : state.frames]


def gaussian_noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Standard normal float32 noise on the CPU, drawn in the order of the shape, so a seed means the same on every device."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def noised(state: Conditioned, noise: torch.Tensor, sigma: float, initial: torch.Tensor | None = None) -> torch.Tensor:
    """Where sampling starts: ``lerp(clean, lerp(initial, noise, sigma), mask)``.

    ``initial`` is a latent to start from (second stage, video to video); by default it is ``clean``. [B, C, F, H, W] float32.
    """
    start = state.clean if initial is None else initial.to(state.clean)
    return torch.lerp(state.clean, torch.lerp(start, noise.to(state.clean), sigma), state.mask)


def _guide_positions(frames: int, height: int, width: int, frame: int) -> torch.Tensor:
    """Pixel intervals [1, 3, f*H*W, 2] int32 of guide tokens, time in frames (not yet divided by the frame rate)."""
    t = torch.arange(frames, dtype=torch.int32) * TIME_FACTOR
    t = torch.stack([t, t + TIME_FACTOR], dim=-1)  # (f, 2)
    if frames == 1:
        t = torch.tensor([[0, 1]], dtype=torch.int32)
    elif frame == 0:
        t = (t + 1 - TIME_FACTOR).clamp(min=0)
    y = torch.arange(height, dtype=torch.int32) * SPACE_FACTOR
    x = torch.arange(width, dtype=torch.int32) * SPACE_FACTOR
    y, x = torch.stack([y, y + SPACE_FACTOR], -1), torch.stack([x, x + SPACE_FACTOR], -1)
    grid = (frames, height, width, 2)
    positions = torch.stack([
        (t + frame)[:, None, None].expand(grid), y[None, :, None].expand(grid), x[None, None, :].expand(grid),
    ])  # (3, f, H, W, 2)  # fmt: skip
    return positions.reshape(3, -1, 2)[None]  # (1, 3, f*H*W, 2)


def _check_latent(state: Conditioned, latent: torch.Tensor) -> None:
    batch, channels, _, height, width = state.clean.shape
    if (
        latent.dim() != 5
        or latent.shape[0] not in (1, batch)
        or (latent.shape[1], *latent.shape[3:]) != (channels, height, width)
    ):
        raise ValueError(
            f"The given latent is {tuple(latent.shape)}; the video needs (1 or {batch}, {channels}, frames, {height}, {width}). "
            f"Encode the image at the video's own width and height."
        )


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength outside 0 to 1 (NaN too)."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(
            f"The conditioning strength is {strength}; it must be between 0 (ignore) and 1 (keep exactly)."
        )
