"""Latents, masks and guide frames in the host's form.

A guide is appended by the host's own ``LTXVAddGuide``, so that ``LTXVCropGuides``, context windows and guide attention strengths treat it as theirs.
How many guide frames are still attached is noted in the latent dict (``GUIDE_FRAMES``): ``LTXVCropGuides`` makes a new dict without the
note, every other node carries it on, so the decode node knows what to leave out.

Source: ComfyUI 0.30.0 ``comfy_extras/nodes_lt.py``.
"""

import torch

import comfy.utils

from ...ltx2_core.sampling.conditioning import TIME_FACTOR

GUIDE_FRAMES = "ltx2_gguf_guide_frames"


def noise_mask(latent):
    """The latent's mask as [B, 1, F, H or 1, W or 1] float32, ones where it has none; always a copy."""
    samples = latent["samples"]
    mask = latent.get("noise_mask")
    if mask is None:
        return torch.ones(samples.shape[0], 1, samples.shape[2], 1, 1, device=samples.device)
    if mask.ndim == 5 and mask.shape[2] == samples.shape[2]:
        return mask[:, :1].float().clone()
    return comfy.utils.reshape_mask(mask, samples.shape)[:, :1].float().clone()


def replace_frames(latent, clean, index, strength):
    """A copy of the latent dict in which ``clean`` stands at latent frames ``index ...`` with mask ``1 - strength``."""
    samples, mask = latent["samples"].clone(), noise_mask(latent)
    end = index + clean.shape[2]
    samples[:, :, index:end] = clean.to(samples)
    mask[:, :, index:end] = 1.0 - strength
    return {**latent, "samples": samples, "noise_mask": mask}


def append_guide(positive, negative, vae, latent, pixels, frame, strength):
    """``LTXVAddGuide``: (positive, negative, latent) with the image appended as guide frames that stand at pixel frame ``frame``."""
    from comfy_extras.nodes_lt import LTXVAddGuide

    before = latent["samples"].shape[2]
    guided = {**latent, "noise_mask": noise_mask(latent)}
    positive, negative, out = LTXVAddGuide.execute(positive, negative, vae, guided, pixels[..., :3], frame, strength).args
    added = out["samples"].shape[2] - before
    return positive, negative, {**latent, **out, GUIDE_FRAMES: latent.get(GUIDE_FRAMES, 0) + added}


def video_frames(latent):
    """Pixel frames of the video in this latent, guide frames not counted."""
    return (latent["samples"].shape[2] - latent.get(GUIDE_FRAMES, 0) - 1) * TIME_FACTOR + 1


def without_guides(latent):
    """The samples without guide frames that are still attached."""
    guides = latent.get(GUIDE_FRAMES, 0)
    return latent["samples"][:, :, :-guides] if guides else latent["samples"]
