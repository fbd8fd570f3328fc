"""Guidance: several predictions of the clean latent, combined into one.

All of it works on x0, the predicted clean latent, not on velocities: rescaling is not linear, so the space matters. Video and audio are
guided each by its own settings. The modality term compares with a pass in which the two do not see each other; for video alone that pass
equals the conditional one, and there is no such term.

Sources: Lightricks ``ltx-core`` (``MultiModalGuider``) and ``ltx-pipelines`` (constants: defaults per version).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the presets are read where there is no torch
    import torch


@dataclass(frozen=True)
class Guidance:
    """How strongly to guide. The defaults guide nothing: one pass per step.

    cfg      1 = off; x0 moves away from the negative prompt's prediction by ``cfg - 1``
    stg      0 = off; x0 moves away from a pass whose ``stg_blocks`` skip self-attention (the value projection passes through)
    rescale  0 = off, 1 = bring the spread (std) of the result back to that of the conditional prediction
    modality 1 = off; x0 moves away from a pass in which video and audio do not see each other by ``modality - 1`` (joint models)
    """

    cfg: float = 1.0
    stg: float = 0.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()
    modality: float = 1.0

    @property
    def needs_negative(self) -> bool:
        return self.cfg != 1.0

    @property
    def needs_perturbed(self) -> bool:
        return self.stg != 0.0 and bool(self.stg_blocks)

    @property
    def needs_isolated(self) -> bool:
        return self.modality != 1.0

    @property
    def passes(self) -> int:
        """Forward passes of the network per step."""
        return 1 + self.needs_negative + self.needs_perturbed + self.needs_isolated


def combine(
    positive: torch.Tensor,
    negative: torch.Tensor | None = None,
    perturbed: torch.Tensor | None = None,
    isolated: torch.Tensor | None = None,
    *,
    cfg: float = 1.0,
    stg: float = 0.0,
    rescale: float = 0.0,
    modality: float = 1.0,
) -> torch.Tensor:
    """``x0 = c + (cfg - 1)(c - u) + stg (c - p) + (modality - 1)(c - m)``, then rescaled. All tensors are x0 predictions of one shape, any dtype.

    The sum and the spreads are computed in float32; the result is float32. The spread is taken over the whole tensor, batch
    included, as the official guider does. Raises ValueError when a pass that the settings need is missing.
    """
    if cfg != 1.0 and negative is None:
        raise ValueError(f"cfg is {cfg:g} but there is no prediction for the negative prompt; set cfg to 1 or run it.")
    if stg != 0.0 and perturbed is None:
        raise ValueError(
            f"stg is {stg:g} but there is no prediction with skipped self-attention; set stg to 0 or run it."
        )
    if modality != 1.0 and isolated is None:
        raise ValueError(
            f"modality is {modality:g} but there is no prediction with isolated streams; set it to 1 or run it."
        )

    c = positive.float()
    x0 = c
    if cfg != 1.0:
        x0 = x0 + (cfg - 1.0) * (c - negative.float())
    if stg != 0.0:
        x0 = x0 + stg * (c - perturbed.float())
    if modality != 1.0:
        x0 = x0 + (modality - 1.0) * (c - isolated.float())
    return rescaled(x0, c, rescale)


def rescaled(x0: torch.Tensor, reference: torch.Tensor, amount: float) -> torch.Tensor:
    """Pull the spread of ``x0`` towards that of ``reference``: ``x0 * (amount * std(ref) / std(x0) + 1 - amount)``."""
    if amount == 0.0 or x0 is reference:
        return x0
    factor = reference.std() / x0.std()
    return x0 * (amount * factor + (1.0 - amount))


@dataclass(frozen=True)
class JointGuidance:
    """Guidance of a joint model, each stream with its own. A pass is run when either needs it."""

    video: Guidance = Guidance()
    audio: Guidance = Guidance()

    @property
    def needs_negative(self) -> bool:
        return self.video.needs_negative or self.audio.needs_negative

    @property
    def needs_perturbed(self) -> bool:
        return self.video.needs_perturbed or self.audio.needs_perturbed

    @property
    def needs_isolated(self) -> bool:
        return self.video.needs_isolated or self.audio.needs_isolated

    @property
    def passes(self) -> int:
        """Forward passes of the network per step."""
        return 1 + self.needs_negative + self.needs_perturbed + self.needs_isolated

    @property
    def stg_blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Blocks whose self-attention is skipped in the perturbed pass, of video and of audio."""
        return tuple(g.stg_blocks if g.needs_perturbed else () for g in (self.video, self.audio))

    def combine(self, positive, negative=None, perturbed=None, isolated=None):
        """[video x0, audio x0] from the passes' pairs (None: not run)."""
        streams = []
        for n, g in enumerate((self.video, self.audio)):
            passes = [None if found is None else found[n] for found in (positive, negative, perturbed, isolated)]
            stg = g.stg if g.needs_perturbed else 0.0
            streams.append(combine(*passes, cfg=g.cfg, stg=stg, rescale=g.rescale, modality=g.modality))
        return streams


@dataclass(frozen=True)
class Preset:
    """The official settings for one kind of weights. Sizes in pixels, fps in frames per second."""

    steps: int
    schedule: str
    sampler: str
    cfg: float
    stg: float
    rescale: float
    stg_block: int | None
    width: int = 768
    height: int = 512
    frames: int = 121
    fps: float = 24.0
    image_crf: int = 33
    seed: int = 10
    audio_cfg: float = 7.0
    audio_rescale: float = 0.7
    modality: float = 3.0  # of both streams

    def guidance(self, num_layers: int) -> Guidance:
        """The preset's guidance of video alone, for a network of ``num_layers`` blocks."""
        return Guidance(self.cfg, self.stg, self.rescale, stg_blocks_for(self.stg_block, num_layers))

    def joint_guidance(self, num_layers: int) -> JointGuidance:
        """The preset's guidance of video with audio."""
        blocks = stg_blocks_for(self.stg_block, num_layers)
        audio = Guidance(self.audio_cfg, self.stg, self.audio_rescale, blocks, self.modality)
        return JointGuidance(Guidance(self.cfg, self.stg, self.rescale, blocks, self.modality), audio)


OFFICIAL_LAYERS = 48

PRESETS: dict[str, Preset] = {
    "2.0": Preset(steps=40, schedule="ltx2", sampler="euler", cfg=3.0, stg=1.0, rescale=0.7, stg_block=29),
    "2.3": Preset(steps=30, schedule="ltx2", sampler="euler", cfg=3.0, stg=1.0, rescale=0.7, stg_block=28),
    "2.3 HQ": Preset(
        steps=15,
        schedule="ltx2",
        sampler="res_2s",
        cfg=3.0,
        stg=0.0,
        rescale=0.45,
        stg_block=None,
        width=1920,
        height=1088,
        audio_rescale=1.0,
    ),
    "distilled": Preset(
        steps=8,
        schedule="distilled",
        sampler="euler",
        cfg=1.0,
        stg=0.0,
        rescale=0.0,
        stg_block=None,
        audio_cfg=1.0,
        audio_rescale=0.0,
        modality=1.0,
    ),
}


def stg_blocks_for(block: int | None, num_layers: int) -> tuple[int, ...]:
    """The block that STG perturbs. The official index holds for 48 blocks; a shallower network takes the one at the same depth."""
    if block is None:
        return ()
    if num_layers >= OFFICIAL_LAYERS:
        return (block,)
    return (min(num_layers - 1, round(block * num_layers / OFFICIAL_LAYERS)),)


_UNWANTED = (
    "soft focus, blur, smeared motion, heavy noise, film grain, flicker, blown highlights, crushed shadows, flat contrast, faded or oversaturated "
    "colour, banding, dim or uneven light, hard shadows, light that changes direction, warped bodies, odd skin colour, misshapen or lopsided face, "
    "lost facial features, surplus limbs, malformed hands, wrong number of hands, wrong sex or ethnicity, overacted expression, eyes looking the "
    "wrong way, lips out of step with the words, garbled lettering, bent perspective, wrong depth of field, background sharper than the subject, "
    "cluttered background, stray reflections, shaking or tilted camera, uneven framing, jerky movement, stalled moments, bad timing, unnatural cuts, "
    "cartoon look, computer graphics, fake materials, uncanny faces, filter effects, generated artefacts, no sound, distorted or robotic voice, "
    "echo, hiss, sound out of sync, wrong, invented or repeated speech"
)

# Version -> what a video must not show or sound like: the meaning of the official default in words of this pack.
# LTX-2.3's default names subtitles, blurred boxes, fades from and to black and speech that breaks off as well.
NEGATIVE_PROMPTS = {
    "2.0": _UNWANTED,
    "2.3": "burned-in subtitles, blurred boxes over the picture, fading in from black, fading out to black, speech that breaks off, "
    + _UNWANTED,
}
