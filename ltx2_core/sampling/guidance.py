"""Guidance: several predictions of the clean latent, combined into one.

All of it works on x0, the predicted clean latent, not on velocities: rescaling is not linear, so the space matters.

Sources: Lightricks ``ltx-core`` (``MultiModalGuider``) and ``ltx-pipelines`` (constants: defaults per version). Their modality term
compares with a pass whose audio is isolated; without audio that pass equals the conditional one and the term is zero.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Guidance:
    """How strongly to guide. The defaults guide nothing: one pass per step.

    cfg      1 = off; x0 moves away from the negative prompt's prediction by ``cfg - 1``
    stg      0 = off; x0 moves away from a pass whose ``stg_blocks`` skip self-attention (the value projection passes through)
    rescale  0 = off, 1 = bring the spread (std) of the result back to that of the conditional prediction
    """

    cfg: float = 1.0
    stg: float = 0.0
    rescale: float = 0.0
    stg_blocks: tuple[int, ...] = ()

    @property
    def needs_negative(self) -> bool:
        return self.cfg != 1.0

    @property
    def needs_perturbed(self) -> bool:
        return self.stg != 0.0 and bool(self.stg_blocks)

    @property
    def passes(self) -> int:
        """Forward passes of the network per step."""
        return 1 + self.needs_negative + self.needs_perturbed


def combine(
    positive: torch.Tensor,
    negative: torch.Tensor | None = None,
    perturbed: torch.Tensor | None = None,
    *,
    cfg: float = 1.0,
    stg: float = 0.0,
    rescale: float = 0.0,
) -> torch.Tensor:
    """``x0 = c + (cfg - 1)(c - u) + stg (c - p)``, then rescaled. All tensors are x0 predictions of one shape, any dtype.

    The sum and the spreads are computed in float32; the result is float32. The spread is taken over the whole tensor, batch
    included, as the official guider does. Raises ValueError when a pass that the settings need is missing.
    """
    if cfg != 1.0 and negative is None:
        raise ValueError(f"cfg is {cfg:g} but there is no prediction for the negative prompt; set cfg to 1 or run it.")
    if stg != 0.0 and perturbed is None:
        raise ValueError(f"stg is {stg:g} but there is no prediction with skipped self-attention; set stg to 0 or run it.")

    c = positive.float()
    x0 = c
    if cfg != 1.0:
        x0 = x0 + (cfg - 1.0) * (c - negative.float())
    if stg != 0.0:
        x0 = x0 + stg * (c - perturbed.float())
    return rescaled(x0, c, rescale)


def rescaled(x0: torch.Tensor, reference: torch.Tensor, amount: float) -> torch.Tensor:
    """Pull the spread of ``x0`` towards that of ``reference``: ``x0 * (amount * std(ref) / std(x0) + 1 - amount)``."""
    if amount == 0.0 or x0 is reference:
        return x0
    factor = reference.std() / x0.std()
    return x0 * (amount * factor + (1.0 - amount))


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

    def guidance(self, num_layers: int) -> Guidance:
        """The preset's guidance for a network of ``num_layers`` blocks."""
        return Guidance(self.cfg, self.stg, self.rescale, stg_blocks_for(self.stg_block, num_layers))


OFFICIAL_LAYERS = 48

PRESETS: dict[str, Preset] = {
    "2.0": Preset(steps=40, schedule="ltx2", sampler="euler", cfg=3.0, stg=1.0, rescale=0.7, stg_block=29),
    "2.3": Preset(steps=30, schedule="ltx2", sampler="euler", cfg=3.0, stg=1.0, rescale=0.7, stg_block=28),
    "2.3 HQ": Preset(
        steps=15, schedule="ltx2", sampler="res_2s", cfg=3.0, stg=0.0, rescale=0.45, stg_block=None, width=1920, height=1088
    ),
    "distilled": Preset(steps=8, schedule="distilled", sampler="euler", cfg=1.0, stg=0.0, rescale=0.0, stg_block=None),
}


def stg_blocks_for(block: int | None, num_layers: int) -> tuple[int, ...]:
    """The block that STG perturbs. The official index holds for 48 blocks; a shallower network takes the one at the same depth."""
    if block is None:
        return ()
    if num_layers >= OFFICIAL_LAYERS:
        return (block,)
    return (min(num_layers - 1, round(block * num_layers / OFFICIAL_LAYERS)),)
