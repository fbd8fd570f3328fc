"""Conditioning strengths between 0 and 1 under the host's samplers, as the official loop treats them.

Officially a token with mask m is at noise level m sigma all the way: it starts at lerp(clean, noise, m), its x0 is x - m sigma v, and after each pass
x0 is mixed with the clean latent. The host's loop holds every token at sigma and mixes before and after each call, which ends elsewhere for 0 < m < 1
(for 0 and 1 both are the same). So for such masks the host's own mixing is switched off and done here, around whichever sampler runs. The
per-token velocity is the network's (``scale_velocity_by_mask``).

Sources: Lightricks ``ltx-pipelines`` (denoising loop, ``post_process_latent``); ComfyUI 0.30.0 ``comfy/samplers.py`` (``KSAMPLER``, ``KSamplerX0Inpaint``).
"""

import comfy.patcher_extension
import torch

KEY = "ltx2_gguf_masks"


class PerTokenNoise:
    """The host's guider with the official mixing around it; everything else is the guider's."""

    def __init__(self, guider, mask, clean):
        self._guider, self._mask, self._clean = guider, mask, clean

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, sigma, **options):
        x = torch.where(self._mask == 0, self._clean, x)  # samplers that add noise add it to given tokens too
        x0 = self._guider(x, sigma, **options)
        return torch.lerp(self._clean, x0, self._mask)


def sampler_wrapper(
    executor, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
):
    """A wrapper of the host's ``Sampler.sample``. Masks of zeros and ones, and masks another node changes per step, stay with the host."""
    fractional = denoise_mask is not None and bool(((denoise_mask > 0) & (denoise_mask < 1)).any())
    if not fractional or latent_image is None or "denoise_mask_function" in extra_args["model_options"]:
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar)
    mask = denoise_mask.clamp(0, 1)
    started = torch.lerp(
        latent_image, noise, mask
    )  # mixed with latent_image by sigma in the sampler: clean + m sigma (noise - clean)
    return executor(
        PerTokenNoise(guider, mask, latent_image),
        sigmas,
        extra_args,
        callback,
        started,
        latent_image,
        None,
        disable_pbar,
    )


def attach(patcher):
    """Put the wrapper on a model patcher; clones keep it."""
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, KEY, sampler_wrapper)
