"""Latent to frames: the streaming decoder of this pack's VAE behind one node."""

from comfy_api.latest import io

from .category import SAMPLING
from .sampling import check_latent


class LTX2GGUFDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFDecode",
            display_name="LTX-2 VAE Decode",
            category=SAMPLING,
            description="Decodes a video latent frame group by frame group: exact, with memory that does not grow with the length of the video.",
            search_aliases=["ltx2", "ltx-2", "vae decode", "tiled decode", "latent to video"],
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="A denoised video latent, or one of video and audio, whose video is decoded. Guide frames added by 'LTX-2 Image Conditioning' are left out.",
                ),
                io.Vae.Input("vae", tooltip="The video VAE of the model."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    advanced=True,
                    tooltip="Tile side in pixels. 0 = decide from free memory: no tiles unless a frame does not fit. Tiles are never needed for long videos, only for large frames.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="The video's frames, for 'Create Video'.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, tile_size):
        from .host import guides
        from .host import vae as host_vae

        check_latent(samples)
        samples, _ = guides.video_part(samples)
        return io.NodeOutput(host_vae.decode_images(vae, guides.without_guides(samples), tile_size))
