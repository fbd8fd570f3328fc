"""Latents, masks and guide frames in the host's form.

A guide is appended by the host's own ``LTXVAddGuide``, so that ``LTXVCropGuides``, context windows and guide attention strengths treat it as theirs.
How many guide frames are still attached is noted in the latent dict (``GUIDE_FRAMES``): ``LTXVCropGuides`` makes a new dict without the
note, every other node carries it on, so the decode node knows what to leave out.

Source: ComfyUI 0.30.0 ``comfy_extras/nodes_lt.py``.
"""

import comfy.nested_tensor
import comfy.utils
import torch

from ...ltx2_core.sampling import conditioning

GUIDE_FRAMES = "ltx2_gguf_guide_frames"


def is_joint(samples):
    """Whether samples are the host's pair of a video and an audio latent."""
    return getattr(samples, "is_nested", False)


def video_part(latent):
    """(the video's latent dict, function that puts the audio beside another video's dict); a video latent is its own video part."""
    if not is_joint(latent["samples"]):
        return latent, lambda video: video
    samples, audio = latent["samples"].unbind()
    masks = latent.get("noise_mask")
    masks = list(masks.unbind()) if is_joint(masks) else [masks]
    audio_mask = masks[1] if len(masks) > 1 else torch.ones_like(audio)
    video = {name: value for name, value in latent.items() if name != "noise_mask"} | {"samples": samples}
    if masks[0] is not None:
        video["noise_mask"] = masks[0]

    def joined(video):
        mask = video.get("noise_mask")
        mask = torch.ones_like(video["samples"][:, :1]) if mask is None else mask
        pair = comfy.nested_tensor.NestedTensor
        return {**video, "samples": pair((video["samples"], audio)), "noise_mask": pair((mask, audio_mask))}

    return video, joined


def audio_is_given(latent):
    """Whether the audio of a joint latent is masked as a whole: the video follows it, and it stays."""
    masks = latent.get("noise_mask")
    return is_joint(masks) and len(masks.unbind()) > 1 and not bool((masks.unbind()[1] > 0).any())


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
    state = conditioning.Conditioned(latent["samples"], noise_mask(latent), guide_frames=latent.get(GUIDE_FRAMES, 0))
    state = conditioning.replace_frames(state, clean, index, strength)
    return {**latent, "samples": state.clean, "noise_mask": state.mask}


def append_guide(positive, negative, vae, latent, pixels, frame, strength):
    """``LTXVAddGuide``: (positive, negative, latent) with the image appended as guide frames that stand at pixel frame ``frame``.

    The host's node takes the strength for the guide's noise level and again as a weight of attention between guide and video; in the
    official pipelines it is the noise level alone, so attention keeps its full weight here.
    """
    from comfy_extras.nodes_lt import LTXVAddGuide

    before = latent["samples"].shape[2]
    guided = {**latent, "noise_mask": noise_mask(latent)}
    positive, negative, out = LTXVAddGuide.execute(
        positive, negative, vae, guided, pixels[..., :3], frame, strength
    ).args
    added = out["samples"].shape[2] - before
    latent = {**latent, **out, GUIDE_FRAMES: latent.get(GUIDE_FRAMES, 0) + added}
    return _fully_attended(positive), _fully_attended(negative), latent


def _fully_attended(conditioning_entries):
    """The conditioning with attention strength 1 for the guide that was added last."""
    changed = []
    for features, options in conditioning_entries:
        *earlier, last = options["guide_attention_entries"]
        changed.append([features, {**options, "guide_attention_entries": [*earlier, {**last, "strength": 1.0}]}])
    return changed


def latent_frames(latent):
    """Latent frames of the video, guide frames not counted."""
    return latent["samples"].shape[2] - latent.get(GUIDE_FRAMES, 0)


def without_guides(latent):
    """The samples without guide frames that are still attached."""
    return latent["samples"][:, :, : latent_frames(latent)]
