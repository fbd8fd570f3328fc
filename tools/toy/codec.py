"""Whole clips through the pack's VAE modules, with or without gradients, in one piece (training never cuts a clip)."""

import torch

from ltx2_gguf.ltx2_core.vae.blocks import Rolling

from . import pack  # noqa: F401

WHOLE = 1 << 60  # bytes of one activation: never split


def encode_means(vae, pixels):
    """Pixels [B, 3, F, H, W] in [-1, 1] -> latent means [B, C, F', H', W'], not normalised, in the pixels' dtype."""
    with torch.enable_grad():  # the modules' plain path; nothing is recorded unless something requires gradients
        return torch.cat(list(vae.encoder.roll(pixels, Rolling(), False, WHOLE)), dim=2)


def decode_means(vae, means):
    """The inverse: latent means -> pixels [B, 3, F, H, W]."""
    with torch.enable_grad():
        return torch.cat(list(vae.decoder.roll(means, Rolling(), True, WHOLE)), dim=2)


def encode(vae, pixels):
    """Pixels -> normalised latents, float32, without gradients."""
    return vae.per_channel_statistics.normalize(encode_means(_frozen(vae), pixels).float())


def decode(vae, latents, dtype):
    """Normalised latents -> pixels, float32; the network runs in ``dtype``."""
    return decode_means(_frozen(vae), vae.per_channel_statistics.un_normalize(latents.float()).to(dtype)).float()


def _frozen(vae):
    for p in vae.parameters():
        p.requires_grad_(False)
    return vae
