"""Images into the latent: the first frame by replacement, any other frame as a guide, as the official pipelines do."""

from comfy_api.latest import io

from ..ltx2_core.sampling.conditioning import SPACE_FACTOR, TIME_FACTOR, latent_index, resolve_frame
from ..ltx2_core.sampling.finite import check_numbers
from .category import CONDITIONING
from .host import internals
from .sampling import check_latent

AUTO, REPLACE, GUIDE = "auto", "replace", "guide"


class LTX2GGUFImageCondition(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFImageCondition",
            display_name="LTX-2 Image Conditioning",
            category=CONDITIONING,
            description="Makes a frame of the video an image (or several frames a clip). Chain it to set several frames.",
            search_aliases=["ltx2", "ltx-2", "image to video", "i2v", "first frame", "last frame", "keyframe", "guide"],
            inputs=[
                io.Vae.Input("vae", tooltip="The video VAE of the model."),
                io.Latent.Input(
                    "latent",
                    tooltip="The video to condition: from 'EmptyLTXVLatentVideo' or another 'LTX-2 Image Conditioning'.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="An image, or the frames of a clip. Scaled to cover the video and cropped in the middle. A clip is cut to 8k+1 frames.",
                ),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Needed for guides only: an image for any frame but the first."
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Needed for guides only: an image for any frame but the first."
                ),
                io.Int.Input(
                    "frame_index",
                    default=0,
                    min=-9999,
                    max=9999,
                    tooltip="The frame this image is for, in video frames. 0 = the first, -1 = the last.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="1 = the frame is the image, 0 = the image is ignored; between, the frame may move away from it.",
                ),
                io.Int.Input(
                    "crf",
                    default=33,
                    min=0,
                    max=51,
                    tooltip="H.264 quality the image is compressed with first: the model was trained on video frames, and a too clean image tends to stand still. 33 is official, 0 = off, higher = more motion, less detail.",
                ),
                io.Combo.Input(
                    "method",
                    options=[AUTO, REPLACE, GUIDE],
                    default=AUTO,
                    advanced=True,
                    tooltip="'replace': the latent frame becomes the image. 'guide': the image is appended as extra tokens that the video looks at (needs positive and negative). 'auto': replace for frame 0, guide for others, as in the official pipelines; replace when positive and negative are not connected.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent_out", display_name="latent", tooltip="The conditioned latent, for the sampler."
                ),
                io.Conditioning.Output(
                    "positive_out",
                    display_name="positive",
                    tooltip="With the guide's position; connect it to the sampler when a guide was added.",
                ),
                io.Conditioning.Output(
                    "negative_out",
                    display_name="negative",
                    tooltip="With the guide's position; connect it to the sampler when a guide was added.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, latent, image, frame_index, strength, crf, method, positive=None, negative=None):
        from ..ltx2_core import media
        from .host import guides

        check_latent(latent)
        check_numbers(strength=strength)
        latent, joined = guides.video_part(latent)
        frame = resolve_frame(frame_index, guides.latent_frames(latent))
        connected = positive is not None and negative is not None
        if method == GUIDE and not connected:
            raise ValueError(
                "A guide needs both 'positive' and 'negative' connected, because its position travels in the conditioning."
            )
        as_guide = method == GUIDE or (method == AUTO and frame != 0 and connected)
        if strength == 0.0:
            return io.NodeOutput(joined(latent), positive, negative)

        if image.shape[0] > 1 and (image.shape[0] - 1) % TIME_FACTOR:
            kept = (image.shape[0] - 1) // TIME_FACTOR * TIME_FACTOR + 1
            internals.notice(cls, f"The clip has {image.shape[0]} frames; its first {kept} (8k+1) are used.")
            image = image[:kept]
        height, width = (size * SPACE_FACTOR for size in latent["samples"].shape[3:])
        image = media.prepare_frames(image, width, height, crf)
        if as_guide:
            positive, negative, latent = guides.append_guide(positive, negative, vae, latent, image, frame, strength)
            return io.NodeOutput(joined(latent), positive, negative)

        if frame != 0 and not connected and method == AUTO:
            internals.notice(
                cls,
                f"The image replaces the latent at frame {frame}; connect positive and negative to add it as a guide, the official way.",
            )
        latent = guides.replace_frames(latent, vae.encode(image), latent_index(frame), strength)
        return io.NodeOutput(joined(latent), positive, negative)
