"""What is checked around sampling, whichever node and sampler run: that the guider fits the latent, and that no NaN becomes a black video.

Source: ComfyUI 0.30.0 ``comfy/samplers.py`` (``CFGGuider.inner_sample``, ``KSAMPLER.sample``).
"""

import comfy.patcher_extension

from ...ltx2_core.sampling.finite import check_latent

KEY = "ltx2_gguf_watch"


def sampler_wrapper(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
):
    """A wrapper of the host's ``Sampler.sample``."""
    network = guider.inner_model.diffusion_model
    if hasattr(guider, "unpack_latents") and not _has_audio(guider.conds):
        raise ValueError(
            f"The guider {type(guider).__name__} takes a latent of video and audio, and this one holds video only; "
            "use 'CFGGuider' or the node 'LTX-2 Sampler', which guides as the official pipelines do."
        )

    def watched(step, x0, x, total_steps):
        if step == 0:

            def again():
                guider(
                    x,
                    sigmas[0] * x.new_ones(x.shape[0]),
                    model_options=extra_args["model_options"],
                    seed=extra_args.get("seed"),
                )

            check_latent(x0, "after the first step", network, again)
        if callback is not None:
            callback(step, x0, x, total_steps)

    result = executor(guider, sigmas, extra_args, watched, noise, latent_image, denoise_mask, disable_pbar)
    check_latent(result, "at the end of sampling", network)
    return result


def _has_audio(conds):
    shapes = [
        cond["model_conds"]["latent_shapes"].cond
        for entries in conds.values()
        for cond in entries
        if "latent_shapes" in cond.get("model_conds", {})
    ]
    return any(len(shape) > 1 for shape in shapes)


def attach(patcher):
    """Put the wrapper on a model patcher; clones keep it."""
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, KEY, sampler_wrapper)
