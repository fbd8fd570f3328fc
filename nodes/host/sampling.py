"""Official guidance on the host's sampling machinery: its guider, samplers, progress, preview and cancel.

Source: ComfyUI 0.30.0 ``comfy/samplers.py`` (``CFGGuider``, ``sampling_function``, ``cfg_function``); guidance: ``ltx2_core/sampling/guidance.py``.
"""

import uuid

import tqdm.auto

import comfy.conds
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils

from ...ltx2_core.sampling import samplers as sampling
from ...ltx2_core.sampling.guidance import Guidance, combine
from . import preview, retry
from .guides import GUIDE_FRAMES
from .model import STG_CONDITION

OWN_SAMPLERS = ("res_2s",)


class LTX2Guider(comfy.samplers.CFGGuider):
    """The host's CFG guider with the two other official terms: STG and rescale, both on x0.

    STG's pass is one more conditioning in the host's own batch of a step, so that it is run where the host runs the others (several
    GPUs, context windows, caches). The terms are added through ``sampler_cfg_function``, so that pre- and post-CFG functions of other
    nodes still run. A CFG function the user has put on the model takes precedence, and STG and rescale are left out.
    """

    def set_guidance(self, guidance: Guidance):
        self.guidance = guidance
        self.set_cfg(guidance.cfg)

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        g = self.guidance
        if "sampler_cfg_function" in model_options or not (g.needs_perturbed or g.rescale != 0.0):
            return super().predict_noise(x, timestep, model_options, seed)
        perturbed = []

        def batch(args):
            options = {name: value for name, value in args["model_options"].items() if value is not batch}
            conds = args["conds"]
            if g.needs_perturbed:
                conds = [*conds, [_without_self_attention(cond, g.stg_blocks) for cond in conds[0]]]
            before = model_options.get("sampler_calc_cond_batch_function")
            if before is not None:
                out = before({**args, "conds": conds, "model_options": {**options, "sampler_calc_cond_batch_function": before}})
            else:
                out = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)
            perturbed.extend(out[2:])
            return out[:2]

        def combined(args):
            negative = args["uncond_denoised"] if g.needs_negative else None
            stg = g.stg if g.needs_perturbed else 0.0
            x0 = combine(args["cond_denoised"], negative, *perturbed, cfg=g.cfg, stg=stg, rescale=g.rescale)
            return args["input"] - x0

        options = {**model_options, "sampler_cfg_function": combined, "sampler_calc_cond_batch_function": batch}
        return super().predict_noise(x, timestep, options, seed)


def _without_self_attention(cond, blocks):
    """A processed conditioning whose pass returns the values in the self-attention of these blocks. Its id differs, for nodes that cache by id."""
    conds = {**cond["model_conds"], STG_CONDITION: comfy.conds.CONDConstant(tuple(blocks))}
    return {**cond, "model_conds": conds, "uuid": uuid.uuid5(cond["uuid"], "stg")}


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
