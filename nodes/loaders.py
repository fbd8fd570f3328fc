"""The loader nodes: a model file, a text encoder with its projection, a video VAE."""

from comfy_api.latest import io

from . import folders
from .category import LOADERS

COMPUTE = ["exact", "fast"]
VAE_OUTPUT = 1  # place of the VAE among the model loader's outputs
SOUND = ["off", "on"]


def stamp(*named):
    """What changes when a file is replaced on disk: (name, size, modification time) for each (key, name)."""
    return [(name, *folders.stamp(folders.path(key, name))) for key, name in named]


def _is_connected(node, output):
    """Whether something in the running graph takes this output of the node; False without a graph (scripts, tests)."""
    if not node.hidden or not node.hidden.prompt:
        return False
    links = (
        value
        for other in node.hidden.prompt.values()
        for value in other.get("inputs", {}).values()
        if isinstance(value, list)
    )
    return any(link == [node.hidden.unique_id, output] for link in links)


class LTX2GGUFLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFLoader",
            display_name="LTX-2 GGUF Loader",
            category=LOADERS,
            description="Loads the video model of LTX-2 or LTX-2.3 from a GGUF or safetensors file, and the VAE that belongs to it.",
            search_aliases=[
                "ltx2",
                "ltx-2",
                "ltx 2.3",
                "ltxv",
                "gguf",
                "unet loader",
                "load diffusion model",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "model_file",
                    options=folders.files("ltx2_gguf_models"),
                    tooltip="From models/diffusion_models, models/unet or models/checkpoints. The file's header decides what it is; its name does not matter.",
                ),
                io.Combo.Input(
                    "compute",
                    options=COMPUTE,
                    default="exact",
                    tooltip="'exact': 16-bit matrix products. 'fast': 8-bit ones where the GPU has them, a little less precise.",
                ),
                io.Combo.Input(
                    "connector_file",
                    options=folders.choices("ltx2_gguf_connectors"),
                    default=folders.AUTO,
                    advanced=True,
                    tooltip="File with the embeddings connectors. 'auto': from the model file, else the file in your folders that fits.",
                ),
                io.Combo.Input(
                    "vae_file",
                    options=folders.choices("ltx2_gguf_vaes"),
                    default=folders.AUTO,
                    advanced=True,
                    tooltip="File with the video VAE. 'auto': from the model file, else the file in your folders that fits.",
                ),
                io.Combo.Input(
                    "sound",
                    options=SOUND,
                    default="off",
                    optional=True,
                    tooltip="'on': the joint model of video and audio, for latents from 'LTXVConcatAVLatent'; set 'sound' of the text encoder too. 'off': nothing of the audio is read.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "model", display_name="model", tooltip="For the sampler, LoRA loaders and other model nodes."
                ),
                io.Vae.Output("vae", display_name="vae", tooltip="The video VAE, to encode images and decode videos."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, model_file, compute, connector_file, vae_file, sound="off"):
        from . import companions
        from .host import model as host_model
        from .host import vae as host_vae

        with companions.Load() as load:
            model = load.model(folders.path("ltx2_gguf_models", model_file))
            connectors, vae = load.connectors(model, connector_file, sound == "on"), load.vae(model, vae_file)
            missing = None if vae else host_vae.MissingVAE(model.name)
            if missing and model.report.has("dit") and _is_connected(cls, VAE_OUTPUT):
                missing.throw_exception_if_invalid()  # now, not after the sampling
            patcher = host_model.load_model(model, connectors, compute, audio=sound == "on")
            return io.NodeOutput(patcher, missing or host_vae.load_vae(vae))

    @classmethod
    def fingerprint_inputs(cls, model_file, compute, connector_file, vae_file, sound="off"):
        from . import companions

        return companions.resolved(
            ("model", "ltx2_gguf_models", model_file), ("connectors", "ltx2_gguf_connectors", connector_file, sound == "on"),
            ("vae", "ltx2_gguf_vaes", vae_file),
        )  # fmt: skip


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
                io.Combo.Input(
                    "gemma_file",
                    options=folders.files("ltx2_gguf_text_encoders"),
                    tooltip="Gemma 3 12B for the released models, from models/text_encoders or models/clip. An 'mmproj' file is the vision part: 'vision_file'.",
                ),
                io.Combo.Input(
                    "projection_file",
                    options=folders.choices("ltx2_gguf_projections"),
                    default=folders.AUTO,
                    tooltip="File with the text projection: your model's GGUF, or a 'text_projection' / 'embeddings_connectors' file. 'auto': the file in your folders that fits this Gemma.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    advanced=True,
                    tooltip="'cpu' keeps the text encoder out of video memory; encoding a prompt then takes longer.",
                ),
                io.Combo.Input(
                    "sound",
                    options=SOUND,
                    default="off",
                    optional=True,
                    tooltip="'on': prompts are encoded for video and audio; needed when 'sound' of the model's loader is on. A projection file with 'audio_aggregate_embed' is then needed (LTX-2.3).",
                ),
                io.Combo.Input(
                    "vision_file",
                    options=folders.choices("ltx2_gguf_text_encoders"),
                    default=folders.AUTO,
                    optional=True,
                    advanced=True,
                    tooltip="Only for 'Generate LTX2 Prompt' with an image: Gemma's vision part, a file called 'mmproj'. 'auto': the one inside the Gemma file, if it has one.",
                ),
            ],
            outputs=[
                io.Clip.Output(
                    "clip", display_name="clip", tooltip="For 'CLIP Text Encode (Prompt)' and 'Generate LTX2 Prompt'."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, gemma_file, projection_file, device, sound="off", vision_file=folders.AUTO):
        from . import companions
        from .host import clip

        with companions.Load() as load:
            gemma = load.open(folders.path("ltx2_gguf_text_encoders", gemma_file))
            projection, vision = load.projection(gemma, projection_file, sound == "on"), load.vision(gemma, vision_file)
            return io.NodeOutput(clip.load_clip(gemma, projection, device, sound == "on", vision))

    @classmethod
    def fingerprint_inputs(cls, gemma_file, projection_file, device, sound="off", vision_file=folders.AUTO):
        from . import companions

        encoders = "ltx2_gguf_text_encoders"
        return companions.resolved(
            ("open", encoders, gemma_file),
            ("projection", "ltx2_gguf_projections", projection_file, sound == "on"),
            ("vision", encoders, vision_file),
        )


class LTX2GGUFVideoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFVideoVAE",
            display_name="LTX-2 Video VAE Loader",
            category=LOADERS,
            description="Loads the video VAE alone, from its own file or from any file that contains it.",
            search_aliases=["ltx2", "ltx-2", "vae loader", "gguf", "video vae"],
            inputs=[
                io.Combo.Input(
                    "vae_file",
                    options=folders.files("ltx2_gguf_vaes"),
                    tooltip="From models/vae, models/diffusion_models or models/checkpoints: a video VAE, or a model file that contains one.",
                )
            ],
            outputs=[
                io.Vae.Output("vae", display_name="vae", tooltip="The video VAE, to encode images and decode videos.")
            ],
        )

    @classmethod
    def execute(cls, vae_file):
        from .host import vae as host_vae

        return io.NodeOutput(host_vae.load_vae(folders.path("ltx2_gguf_vaes", vae_file)))

    @classmethod
    def fingerprint_inputs(cls, vae_file):
        return stamp(("ltx2_gguf_vaes", vae_file))


class LTX2GGUFAudioVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFAudioVAE",
            display_name="LTX-2 Audio VAE Loader",
            category=LOADERS,
            description="Loads ComfyUI's own audio VAE of LTX-2 or LTX-2.3 with its vocoder, from its own file or from any file that contains it.",
            search_aliases=["ltx2", "ltx-2", "audio", "sound", "audio vae", "vocoder", "gguf"],
            inputs=[
                io.Combo.Input(
                    "audio_vae_file",
                    options=folders.choices("ltx2_gguf_audio_vaes"),
                    default=folders.AUTO,
                    tooltip="File with the audio VAE and the vocoder: an 'audio_vae' file, a full checkpoint or a GGUF of one. 'auto': the file in your folders that has them.",
                )
            ],
            outputs=[
                io.Vae.Output(
                    "vae",
                    display_name="audio vae",
                    tooltip="For 'LTXV Empty Latent Audio', 'LTXV Audio VAE Encode' and 'LTXV Audio VAE Decode'.",
                )
            ],
        )

    @classmethod
    def execute(cls, audio_vae_file):
        from . import companions
        from .host import audio

        with companions.Load() as load:
            return io.NodeOutput(audio.load_audio_vae(load.audio_vae(audio_vae_file)))

    @classmethod
    def fingerprint_inputs(cls, audio_vae_file):
        from . import companions

        return companions.stamps("ltx2_gguf_audio_vaes", audio_vae_file)
