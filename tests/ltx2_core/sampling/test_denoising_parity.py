"""Eight denoising steps end to end: our network, sampler and guidance against diffusers' network in a loop written from the formulas."""

import pytest
import reference_dit as ref
import torch
from ltx2_gguf.ltx2_core.sampling import guidance, samplers, schedules
from reference_dit import one_thread  # noqa: F401  (applies to every test here)

FPS = 24.0
versions = pytest.mark.parametrize("version", ["2.0", "2.3"])


def reference_loop(version, sigmas, x, context, negative, mask, clean, cfg, stg, rescale, stg_blocks):
    """x after all steps, in float64 except for the network: x0 = x - tau v per token, the guider's sum, Euler."""
    x = x.double()
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        level = torch.full((x.shape[0],), sigma)

        def x0(text, blocks=()):
            v = ref.reference_velocity("diffusers", version, 0, x.float(), level, text, FPS, mask=mask, stg_blocks=blocks)
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
        return samplers.x0_from_velocity(x, model.velocity(x, sigma, text, FPS, denoise_mask=mask, stg_blocks=blocks), sigma, mask)

    def denoise(x, sigma):
        perturbed = x0(x, sigma, context, stg_blocks) if stg else None
        return guidance.combine(x0(x, sigma, context), x0(x, sigma, negative) if cfg != 1 else None, perturbed, cfg=cfg, stg=stg, rescale=rescale)

    *_, last = samplers.euler(denoise, x, sigmas, mask=mask, clean=clean)
    return last.latent


@versions
@pytest.mark.parametrize("given", [None, 1.0, 0.7], ids=["text to video", "first frame given", "first frame at strength 0.7"])
@pytest.mark.parametrize("settings", ["distilled", "guided"])
def test_eight_steps_end_where_the_reference_ends(version, given, settings):
    config, model = ref.ours(version)
    noise, context = ref.inputs(config, 1, 3, 3, 4, text=16)
    _, negative = ref.inputs(config, 1, 3, 3, 4, text=16, seed=9)
    x, mask, clean = noise, None, None
    if given is not None:
        mask = torch.ones(1, 1, *noise.shape[2:])
        mask[:, :, 0] = 1 - given
        clean = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
        x = torch.lerp(clean, noise, mask)
    if settings == "distilled":
        sigmas, guide = schedules.distilled_sigmas(), (1.0, 0.0, 0.0, ())
    else:
        sigmas, guide = schedules.ltx2_sigmas(8), (3.0, 1.0, 0.7, (1,))
    with torch.inference_mode():
        ours = our_loop(model, sigmas, x, context, negative, mask, clean, *guide)
    theirs = reference_loop(version, sigmas, x, context, negative, mask, clean, *guide)
    assert ref.relative_error(ours, theirs) < 2e-5
    if given == 1.0:
        assert torch.equal(ours[:, :, 0], clean[:, :, 0])
