"""Batched sampling for training and evaluation: Euler steps with classifier-free guidance on x0, and a first-frame latent that stays.

The pipeline of the pack generates one clip at a time; this is the same arithmetic for many clips at once.
"""

import torch

from ltx2_gguf.ltx2_core.sampling.schedules import ltx2_sigmas

from . import pack  # noqa: F401
from .model import GRID


def sample(
    dit,
    context,
    empty,
    noise,
    steps: int = 20,
    cfg: float = 3.0,
    rescale: float = 0.7,
    first=None,
    fps: float = 24.0,
    progress=None,
):
    """context [B, S, D], empty [1, S, D] (the empty prompt's), noise [B, C, F, H, W] float32 -> clean latents, float32.

    first: [B, C, 1, H, W] clean latents that latent frame 0 keeps, or None. Spread is restored per clip (``rescale``).
    """
    x = noise.float()
    batch = len(x)
    mask = torch.ones(batch, 1, *GRID, device=x.device)
    clean = torch.zeros_like(x)
    if first is not None:
        mask[:, :, :1] = 0
        clean[:, :, :1] = first
        x = x * mask + clean * (1 - mask)
    guided = cfg != 1.0
    both = torch.cat([context, empty.expand(batch, -1, -1)]) if guided else context
    sigmas = ltx2_sigmas(steps).tolist()
    for i, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        many = 2 if guided else 1
        v = dit.velocity(
            x.repeat(many, 1, 1, 1, 1), sigma, both, fps, denoise_mask=mask.repeat(many, 1, 1, 1, 1)
        ).float()
        x0 = x.repeat(many, 1, 1, 1, 1) - sigma * mask.repeat(many, 1, 1, 1, 1) * v
        if guided:
            c, u = x0.chunk(2)
            x0 = c + (cfg - 1) * (c - u)
            if rescale:
                ratio = c.flatten(1).std(1) / x0.flatten(1).std(1)
                x0 = x0 * (rescale * ratio + 1 - rescale).view(-1, 1, 1, 1, 1)
        x0 = x0 * mask + clean * (1 - mask)
        x = x + (x - x0) / sigma * (following - sigma)
        if progress:
            progress(i + 1, steps)
    return x


def noise_for(count: int, seed: int, channels: int = 128) -> torch.Tensor:
    """[count, C, F, H, W] float32 on the CPU; clip i depends on seed + i alone."""
    return torch.stack(
        [torch.randn(channels, *GRID, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
    )
