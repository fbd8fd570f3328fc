"""Previews while sampling: a frame from the middle of the video, by the host's factors or by the tiny decoder of the model's version.

The host's own preview shows the first latent frame, which under image conditioning is the given image from the start, and knows no tiny
decoder for this latent.

Source: ComfyUI 0.30.0 ``latent_preview.py``.
"""

import logging

import comfy.sd
import comfy.utils

# Version -> how the file of its tiny decoder in models/vae_approx begins.
TINY_DECODERS = {"2.0": "taeltx_2", "2.3": "taeltx2_3"}

logger = logging.getLogger(__name__)


def callback(model, steps, guide_frames=0):
    """The host's sampling callback for ``model``; guide_frames: latent frames at the end of the video that are guides."""
    import latent_preview  # the host's module; imported here because it needs the running host's folders

    previewer = _tiny_decoder(latent_preview, model)
    if previewer is None:
        show = latent_preview.prepare_callback(model, steps)
    else:
        bar = comfy.utils.ProgressBar(steps)

        def show(step, x0, x, total_steps):
            bar.update_absolute(step + 1, total_steps, previewer.decode_latent_to_preview_image("JPEG", x0))

    def middle(step, x0, x, total_steps):
        video = x0.tensors[0] if getattr(x0, "is_nested", False) else x0
        frame = (video.shape[2] - guide_frames) // 2
        show(step, video[:, :, frame : frame + 1], x, total_steps)

    return middle


def _tiny_decoder(latent_preview, model):
    """The host's previewer with the tiny decoder of this model's version, None when another method is chosen or no such file is there."""
    import folder_paths

    if latent_preview.args.preview_method != latent_preview.LatentPreviewMethod.TAESD:
        return None
    beginning = TINY_DECODERS.get(getattr(getattr(model.model.diffusion_model, "config", None), "version", None))
    name = next(
        (name for name in folder_paths.get_filename_list("vae_approx") if beginning and name.startswith(beginning)),
        None,
    )
    if name is None:
        return None
    try:
        decoder = comfy.sd.VAE(
            comfy.utils.load_torch_file(folder_paths.get_full_path("vae_approx", name), safe_load=True)
        )
        decoder.first_stage_model.show_progress_bar = False
        return latent_preview.TAEHVPreviewerImpl(decoder)
    except Exception as error:  # a preview must not stop the sampling
        logger.warning("%s in vae_approx is not used for previews: %s", name, error)
        return None
