"""Official guidance on the host's sampling machinery: its guider, samplers, progress, preview and cancel.

Source: ComfyUI 0.30.0 ``comfy/samplers.py`` (``CFGGuider``, ``sampling_function``, ``cfg_function``); guidance: ``ltx2_core/sampling/guidance.py``.
"""

import tqdm.auto

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils

from ...ltx2_core.sampling import samplers as sampling
from ...ltx2_core.sampling.guidance import Guidance, combine
from ...ltx2_core.transformer.model import STG_BLOCKS
from . import preview, retry
from .guides import GUIDE_FRAMES

OWN_SAMPLERS = ("res_2s",)


class LTX2Guider(comfy.samplers.CFGGuider):
    """The host's CFG guider with the two other official terms: STG and rescale, both on x0.

    The terms are added through the host's ``sampler_cfg_function`` hook, so that pre- and post-CFG functions of other nodes still run.
    A CFG function the user has put on the model takes precedence, and STG and rescale are left out.
    """

    def set_guidance(self, guidance: Guidance):
        self.guidance = guidance
        self.set_cfg(guidance.cfg)

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        g = self.guidance
        if (g.needs_perturbed or g.rescale != 0.0) and "sampler_cfg_function" not in model_options:
            model_options = {**model_options, "sampler_cfg_function": self._combine}
        return super().predict_noise(x, timestep, model_options, seed)

    def _combine(self, args):
        g = self.guidance
        perturbed = None
        if g.needs_perturbed:
            options = {**args["model_options"]}
            options["transformer_options"] = {**options.get("transformer_options", {}), STG_BLOCKS: g.stg_blocks}
            perturbed = comfy.samplers.calc_cond_batch(args["model"], [args["input_cond"]], args["input"], args["sigma"], options)[0]
        x0 = combine(
            args["cond_denoised"],
            args["uncond_denoised"] if g.needs_negative else None,
            perturbed,
            cfg=g.cfg,
            stg=g.stg if g.needs_perturbed else 0.0,
            rescale=g.rescale,
        )
        return args["input"] - x0


def sampler_object(name):
    """The host's sampler of this name, or one of this pack's own (``res_2s``, which the host does not have) in the host's form."""
    if name not in OWN_SAMPLERS:
        return comfy.samplers.sampler_object(name)
    steps = sampling.SAMPLERS[name]

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        progress = tqdm.auto.tqdm(total=len(sigmas) - 1, disable=disable)
        for step in steps(lambda x, sigma: model(x, sigma * ones, **extra_args), x, sigmas, seed=extra_args.get("seed") or 0):
            if callback is not None:
                callback({"x": step.latent, "i": step.index, "sigma": sigmas[step.index], "sigma_hat": sigmas[step.index], "denoised": step.x0})
            progress.update()
        progress.close()
        return step.latent

    return comfy.samplers.KSAMPLER(run)


def sample(model, positive, negative, latent, *, sigmas, guidance, sampler_name, seed):
    """Denoise ``latent`` (the host's dict) with host samplers; returns the dict with new ``samples``.

    Noise: float32, drawn on the CPU from ``seed`` as every host sampler does, so a seed means the same here and in KSampler. When the GPU runs out of
    memory outside of the model (whose forward pass tries again by itself), the run is repeated once with a smaller footprint: ``host.retry``.
    """
    shape = latent["samples"].shape
    try:
        return retry.twice(
            model.model,
            lambda: _sample(model, positive, negative, latent, sigmas, guidance, sampler_name, seed),
            "sampling",
            lambda: model.model.memory_required([1, *shape[1:]]),
            lambda: retry.what_would_fit(model.model, model, shape),
        )
    finally:
        retry.usual_size(model.model)


def _sample(model, positive, negative, latent, sigmas, guidance, sampler_name, seed):
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    guider = LTX2Guider(model)
    guider.set_conds(positive, negative)
    guider.set_guidance(guidance)
    result = guider.sample(
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        samples,
        sampler_object(sampler_name),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=preview.callback(model, len(sigmas) - 1, latent.get(GUIDE_FRAMES, 0)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {key: value for key, value in latent.items() if key not in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    out["samples"] = result.to(device=comfy.model_management.intermediate_device(), dtype=comfy.model_management.intermediate_dtype())
    return out
