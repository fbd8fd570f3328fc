"""Official guidance on the host's sampling machinery: its guider, samplers, progress, preview and cancel.

Source: ComfyUI 0.30.0 ``comfy/samplers.py`` (``CFGGuider``, ``sampling_function``, ``cfg_function``); guidance: ``ltx2_core/sampling/guidance.py``.
"""

import math
import uuid

import comfy.conds
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
import tqdm.auto

from ...ltx2_core.sampling import samplers as sampling
from ...ltx2_core.sampling.guidance import Guidance, JointGuidance, combine
from ...ltx2_core.transformer.audio_video import AUDIO_STG_BLOCKS
from ...ltx2_core.transformer.model import STG_BLOCKS
from . import preview, retry
from .guides import GUIDE_FRAMES, is_joint
from .model import PASS_OPTIONS

OWN_SAMPLERS = ("res_2s",)


class LTX2Guider(comfy.samplers.CFGGuider):
    """The host's CFG guider with the other official terms, on x0: STG, modality guidance (video with audio) and rescale.

    Their passes are further conditionings in the host's own batch of a step, so that they are run where the host runs the others (several
    GPUs, context windows, caches). The terms are added through ``sampler_cfg_function``, so that pre- and post-CFG functions of other
    nodes still run. A CFG function the user has put on the model takes precedence, and the other terms are left out.
    """

    def set_guidance(self, guidance: Guidance | JointGuidance, parts=None):
        """parts: lengths of video and audio in the row the host packs them into, for a JointGuidance."""
        self.guidance, self.parts = guidance, parts
        streams = (guidance.video, guidance.audio) if parts else (guidance,)
        self.set_cfg(
            next((g.cfg for g in streams if g.needs_negative), 1.0)
        )  # other than 1: the host runs the negative prompt

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        g = self.guidance
        rescales = any(part.rescale != 0.0 for part in ((g.video, g.audio) if self.parts else (g,)))
        special = self._special_passes()
        if "sampler_cfg_function" in model_options or not (special or rescales or (self.parts and g.needs_negative)):
            return super().predict_noise(x, timestep, model_options, seed)
        found = []

        def batch(args):
            options = {name: value for name, value in args["model_options"].items() if value is not batch}
            conds = [
                *args["conds"],
                *([_special(cond, *entry) for cond in args["conds"][0]] for entry in special.items()),
            ]
            before = model_options.get("sampler_calc_cond_batch_function")
            if before is not None:
                out = before(
                    {**args, "conds": conds, "model_options": {**options, "sampler_calc_cond_batch_function": before}}
                )
            else:
                out = comfy.samplers.calc_cond_batch(args["model"], conds, args["input"], args["sigma"], options)
            found.extend(out[2:])
            return out[:2]

        def combined(args):
            negative = args["uncond_denoised"] if g.needs_negative else None
            return args["input"] - self._combined(args["cond_denoised"], negative, **dict(zip(special, found)))

        options = {**model_options, "sampler_cfg_function": combined, "sampler_calc_cond_batch_function": batch}
        return super().predict_noise(x, timestep, options, seed)

    def _special_passes(self):
        """{name: transformer_options of the pass} beyond the two prompts'."""
        g, passes = self.guidance, {}
        if g.needs_perturbed:
            video, audio = g.stg_blocks if self.parts else (g.stg_blocks, ())
            passes["perturbed"] = {STG_BLOCKS: tuple(video)} | ({AUDIO_STG_BLOCKS: tuple(audio)} if self.parts else {})
        if self.parts and g.needs_isolated:
            passes["isolated"] = {"a2v_cross_attn": False, "v2a_cross_attn": False}
        return passes

    def _combined(self, positive, negative, perturbed=None, isolated=None):
        """x0 of all terms."""
        g = self.guidance
        if not self.parts:
            stg = g.stg if g.needs_perturbed else 0.0
            return combine(positive, negative, perturbed, cfg=g.cfg, stg=stg, rescale=g.rescale)
        split = [
            None if x0 is None else x0.split(self.parts, dim=-1) for x0 in (positive, negative, perturbed, isolated)
        ]
        return torch.cat(g.combine(*split), dim=-1)


def _special(cond, name, options):
    """A processed conditioning whose pass has transformer_options of its own. Its id differs, for nodes that cache by id."""
    conds = {**cond["model_conds"], PASS_OPTIONS: comfy.conds.CONDConstant(options)}
    return {**cond, "model_conds": conds, "uuid": uuid.uuid5(cond["uuid"], name)}


def sampler_object(name, parts=()):
    """The host's sampler of this name, or one of this pack's own (``res_2s``, which the host does not have) in the host's form.

    parts: lengths of video and audio in the packed latent.
    """
    if name not in OWN_SAMPLERS:
        return comfy.samplers.sampler_object(name)
    steps = sampling.SAMPLERS[name]

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones = x.new_ones([x.shape[0]])
        progress = tqdm.auto.tqdm(total=len(sigmas) - 1, disable=disable)
        for step in steps(
            lambda x, sigma: model(x, sigma * ones, **extra_args),
            x,
            sigmas,
            seed=extra_args.get("seed") or 0,
            parts=parts,
        ):
            if callback is not None:
                callback(
                    {
                        "x": step.latent,
                        "i": step.index,
                        "sigma": sigmas[step.index],
                        "sigma_hat": sigmas[step.index],
                        "denoised": step.x0,
                    }
                )
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
    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    )
    guider = LTX2Guider(model)
    guider.set_conds(positive, negative)
    parts = [math.prod(part.shape[1:]) for part in samples.unbind()] if is_joint(samples) else None
    guider.set_guidance(guidance, parts)
    result = guider.sample(
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        samples,
        sampler_object(sampler_name, parts or ()),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=preview.callback(model, len(sigmas) - 1, latent.get(GUIDE_FRAMES, 0)),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = {
        key: value
        for key, value in latent.items()
        if key not in ("downscale_ratio_spacial", "downscale_ratio_temporal")
    }
    out["samples"] = result.to(
        device=comfy.model_management.intermediate_device(), dtype=comfy.model_management.intermediate_dtype()
    )
    return out
