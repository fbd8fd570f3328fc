"""A whole denoising run: our network, sampler and guidance, and diffusers' network in a loop written from the formulas."""

import torch

import reference_dit as ref
from ltx2_gguf.ltx2_core.sampling import guidance, samplers

FPS = 24.0


def reference_loop(version, sigmas, x, context, negative, mask, clean, cfg, stg, rescale, stg_blocks):
    """x after all steps, in float64 except for the network: x0 = x - tau v per token, the guider's sum, Euler."""
    x = x.double()
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        level = torch.full((x.shape[0],), sigma)

        def x0(text, blocks=()):
            v = ref.reference_velocity(
                "diffusers", version, 0, x.float(), level, text, FPS, mask=mask, stg_blocks=blocks
            )
            return x - sigma * (1.0 if mask is None else mask.double()) * v.double()

        c = x0(context)
        guided = c
        if cfg != 1:
            guided = guided + (cfg - 1) * (c - x0(negative))
        if stg:
            guided = guided + stg * (c - x0(context, stg_blocks))
        if cfg != 1 or stg:
            guided = guided * (rescale * c.std() / guided.std() + 1 - rescale)
        if mask is not None:
            guided = mask.double() * guided + (1 - mask.double()) * clean.double()
        x = x + (x - guided) / sigma * (following - sigma)
    return x


def our_loop(model, sigmas, x, context, negative, mask, clean, cfg, stg, rescale, stg_blocks):
    def x0(x, sigma, text, blocks=()):
        return samplers.x0_from_velocity(
            x, model.velocity(x, sigma, text, FPS, denoise_mask=mask, stg_blocks=blocks), sigma, mask
        )

    def denoise(x, sigma):
        perturbed = x0(x, sigma, context, stg_blocks) if stg else None
        return guidance.combine(
            x0(x, sigma, context),
            x0(x, sigma, negative) if cfg != 1 else None,
            perturbed,
            cfg=cfg,
            stg=stg,
            rescale=rescale,
        )

    *_, last = samplers.euler(denoise, x, sigmas, mask=mask, clean=clean)
    return last.latent
