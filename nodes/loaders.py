"""The loader nodes: a model file, a text encoder with its projection, a video VAE."""

import os

from comfy_api.latest import io

from . import folders
from .category import LOADERS

COMPUTE = ["exact", "fast"]


def stamp(*named):
    """What changes when a file is replaced on disk: (path, size, modification time) for each (key, name); ``auto`` counts as itself."""
    stamps = []
    for key, name in named:
        if name == folders.AUTO:
            stamps.append(name)
            continue
        info = os.stat(folders.path(key, name))
        stamps.append((name, info.st_size, info.st_mtime_ns))
    return stamps


class LTX2GGUFLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFLoader",
            display_name="LTX-2 GGUF Loader",
            category=LOADERS,
            description="Loads the video model of LTX-2 or LTX-2.3 from a GGUF or safetensors file, and the VAE that belongs to it.",
            search_aliases=["ltx2", "ltx-2", "ltx 2.3", "ltxv", "gguf", "unet loader", "load diffusion model", "low vram"],
            inputs=[
                io.Combo.Input("model_file", options=folders.files("ltx2_gguf_models"), tooltip="From models/diffusion_models, models/unet or models/checkpoints. The file's header decides what it is; its name does not matter."),
                io.Combo.Input("compute", options=COMPUTE, default="exact", tooltip="'exact': 16-bit matrix products. 'fast': 8-bit ones where the GPU has them, a little less precise."),
                io.Combo.Input("connector_file", options=folders.choices("ltx2_gguf_connectors"), default=folders.AUTO, advanced=True, tooltip="File with the embeddings connectors. 'auto': from the model file, else the file in your folders that fits."),
                io.Combo.Input("vae_file", options=folders.choices("ltx2_gguf_vaes"), default=folders.AUTO, advanced=True, tooltip="File with the video VAE. 'auto': from the model file, else the file in your folders that fits."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For the sampler, LoRA loaders and other model nodes."),
                io.Vae.Output("vae", display_name="vae", tooltip="The video VAE, to encode images and decode videos."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_file, compute, connector_file, vae_file):
        from . import companions
        from .host import model as host_model, vae as host_vae

        with companions.Load() as load:
            model = load.model(folders.path("ltx2_gguf_models", model_file))
            connector, vae = load.connector(model, connector_file), load.vae(model, vae_file)
            patcher = host_model.load_model(model, connector, compute)
            return io.NodeOutput(patcher, host_vae.load_vae(vae) if vae else host_vae.MissingVAE(model.name))

    @classmethod
    def fingerprint_inputs(cls, model_file, compute, connector_file, vae_file):
        return stamp(("ltx2_gguf_models", model_file), ("ltx2_gguf_connectors", connector_file), ("ltx2_gguf_vaes", vae_file))


class LTX2GGUFTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFTextEncoder",
            display_name="LTX-2 Gemma Text Encoder (GGUF)",
            category=LOADERS,
            description="Loads Gemma 3 from a GGUF or safetensors file, with the projection that turns its states into LTX-2's text features.",
            search_aliases=["ltx2", "ltx-2", "gemma", "gemma 3", "gguf", "clip loader", "dual clip", "text projection"],
            inputs=[
                io.Combo.Input("gemma_file", options=folders.files("ltx2_gguf_text_encoders"), tooltip="Gemma 3 12B for the released models, from models/text_encoders or models/clip. An 'mmproj' file is the vision part and is not needed."),
                io.Combo.Input("projection_file", options=folders.choices("ltx2_gguf_projections"), default=folders.AUTO, tooltip="File with the text projection: your model's GGUF, or a 'text_projection' / 'embeddings_connectors' file. 'auto': the file in your folders that fits this Gemma."),
                io.Combo.Input("device", options=["default", "cpu"], default="default", advanced=True, tooltip="'cpu' keeps the text encoder out of video memory; encoding a prompt then takes longer."),
            ],
            outputs=[io.Clip.Output("clip", display_name="clip", tooltip="For 'CLIP Text Encode (Prompt)'.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, gemma_file, projection_file, device):
        from . import companions
        from .host import clip

        with companions.Load() as load:
            gemma = load.open(folders.path("ltx2_gguf_text_encoders", gemma_file))
            return io.NodeOutput(clip.load_clip(gemma, load.projection(gemma, projection_file), device))

    @classmethod
    def fingerprint_inputs(cls, gemma_file, projection_file, device):
        return stamp(("ltx2_gguf_text_encoders", gemma_file), ("ltx2_gguf_projections", projection_file))


class LTX2GGUFVideoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFVideoVAE",
            display_name="LTX-2 Video VAE Loader",
            category=LOADERS,
            description="Loads the video VAE alone, from its own file or from any file that contains it.",
            search_aliases=["ltx2", "ltx-2", "vae loader", "gguf", "video vae"],
            inputs=[io.Combo.Input("vae_file", options=folders.files("ltx2_gguf_vaes"), tooltip="From models/vae, models/diffusion_models or models/checkpoints: a video VAE, or a model file that contains one.")],
            outputs=[io.Vae.Output("vae", display_name="vae", tooltip="The video VAE, to encode images and decode videos.")],
        )

    @classmethod
    def execute(cls, vae_file):
        from .host import vae as host_vae

        return io.NodeOutput(host_vae.load_vae(folders.path("ltx2_gguf_vaes", vae_file)))

    @classmethod
    def fingerprint_inputs(cls, vae_file):
        return stamp(("ltx2_gguf_vaes", vae_file))
