"""The sampler node: schedule and guidance presets of the official pipelines in front of the host's sampling loop."""

import dataclasses
import math

from comfy_api.latest import io

from ..ltx2_core.sampling import guidance as guidances
from ..ltx2_core.sampling import schedules
from ..ltx2_core.sampling.finite import check_frame_rate, check_numbers
from .category import SAMPLING
from .host import internals

SCHEDULES = ["ltx2", "ltx2 (tokens)", "linear quadratic", "distilled", "distilled stage 2"]
SAMPLERS = [
    "euler",
    "euler_ancestral",
    "res_multistep",
    "heun",
    "dpmpp_2m",
    "gradient_estimation",
    "er_sde",
    "uni_pc",
    "res_2s",
]
OFFICIAL, CFG_ONLY, CUSTOM, OFFICIAL_HQ = "official", "cfg only", "custom", "official HQ"


class LTX2GGUFSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LTX2GGUFSampler",
            display_name="LTX-2 Sampler",
            category=SAMPLING,
            description="Denoises a video latent with the official LTX-2 schedules and guidance.",
            search_aliases=["ltx2", "ltx-2", "ltx 2.3", "ltxv", "ksampler", "stg", "distilled", "video sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The LTX-2 model. LoRAs and other model nodes go before this input."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="What the video shows. Pass it through 'LTXVConditioning' to set the frame rate.",
                ),
                io.Conditioning.Input("negative", tooltip="What the video must not show. Not used when cfg is 1."),
                io.Latent.Input(
                    "latent",
                    tooltip="From 'EmptyLTXVLatentVideo' (width and height in multiples of 32 pixels, 8k+1 frames) or 'LTX-2 Image Conditioning'.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The starting noise. The same seed and settings give the same video.",
                ),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=1000,
                    tooltip="Denoising steps. Official: 30 for LTX-2.3, 40 for LTX-2. The distilled schedules have 8 and 3 steps and ignore this number.",
                ),
                io.Float.Input(
                    "cfg",
                    default=3.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt steers. Official: 3 for the full model, 1 (off, twice as fast) for distilled weights.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=SCHEDULES,
                    default="ltx2",
                    tooltip="How the noise falls. 'ltx2': the full model, official. 'ltx2 (tokens)': the same, shifted by the size of the video. 'distilled': 8 steps for distilled weights. 'distilled stage 2': 3 steps after the latent upsampler. 'linear quadratic': the distilled curve for any number of steps.",
                ),
                io.Combo.Input(
                    "guidance",
                    options=[OFFICIAL, CFG_ONLY, CUSTOM, OFFICIAL_HQ],
                    default=OFFICIAL,
                    advanced=True,
                    tooltip="'official': STG 1.0 and rescale 0.7 for the full model, none for the distilled schedules. 'cfg only': no STG, no rescale. 'custom': the three numbers below. 'official HQ': rescale 0.45 without STG, for 15 steps with res_2s.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=SAMPLERS,
                    default="euler",
                    advanced=True,
                    tooltip="The sampling method. Official: euler, or res_2s (two passes per step) with guidance 'official HQ'.",
                ),
                io.Float.Input(
                    "stg_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    advanced=True,
                    tooltip="With guidance 'custom': strength of spatio-temporal guidance, which sharpens motion and structure for one more pass per step. 0 = off.",
                ),
                io.String.Input(
                    "stg_blocks",
                    default="",
                    advanced=True,
                    tooltip="With guidance 'custom': transformer blocks whose self-attention STG skips, counted from 0, separated by commas. Empty = the official block (28 for LTX-2.3, 29 for LTX-2).",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    advanced=True,
                    tooltip="With guidance 'custom': pulls contrast back to that of the unguided prediction. 0 = off, 1 = fully.",
                ),
                io.Float.Input(
                    "audio_cfg",
                    default=7.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="For a latent of video and audio: how strongly the prompt steers the sound. Official: 7 for the full model; the distilled schedules do not guide it.",
                ),
                io.Float.Input(
                    "modality_scale",
                    default=3.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="For a latent of video and audio, with guidance 'custom': how strongly picture and sound are drawn to each other, for one more pass per step. Official: 3. 1 = off.",
                ),
                io.Float.Input(
                    "audio_stg_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="For a latent of video and audio, with guidance 'custom': stg_scale of the sound. 0 = off.",
                ),
                io.Float.Input(
                    "audio_rescale",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="For a latent of video and audio, with guidance 'custom': rescale of the sound. 0 = off, 1 = fully.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent_out",
                    display_name="latent",
                    tooltip="The denoised video latent, for 'LTX-2 VAE Decode' or the latent upsampler.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, seed, steps, cfg, schedule, guidance, sampler_name, stg_scale, stg_blocks, rescale,
                audio_cfg=7.0, modality_scale=3.0, audio_stg_scale=1.0, audio_rescale=0.7):  # fmt: skip
        from .host import guides, sampling

        check_latent(latent)
        check_numbers(
            cfg=cfg, stg_scale=stg_scale, rescale=rescale, audio_cfg=audio_cfg, modality_scale=modality_scale, audio_stg_scale=audio_stg_scale,
            audio_rescale=audio_rescale,
        )  # fmt: skip
        for _, options in [*positive, *negative]:
            check_frame_rate(options.get("frame_rate", 25))
        config = getattr(model.model.diffusion_model, "config", None)
        joint = guides.is_joint(latent["samples"])
        if joint and config is not None and config.audio is None:
            raise ValueError(internals.JOINT_LATENT)
        sigmas = schedules.sigmas_by_name(schedule, steps, math.prod(latent["samples"].shape[2:]))
        fixed = schedules.fixed_steps(schedule)
        if fixed is not None and fixed != steps:
            internals.notice(cls, f"The schedule '{schedule}' always has {fixed} steps; {steps} was ignored.")
        if fixed is not None and cfg != 1.0:
            internals.notice(
                cls,
                f"Distilled weights are made for cfg 1; {cfg:g} gives a harsh, noisy picture and takes twice as long.",
            )
        if guidance == CUSTOM:
            settings = guidances.Guidance(cfg, stg_scale, rescale, parse_blocks(stg_blocks, config))
        else:
            settings = preset_guidance(guidance, cfg, schedule, config)
        if settings.needs_perturbed and config is None:
            internals.notice(cls, "STG needs a model from 'LTX-2 GGUF Loader'; this one is sampled without it.")
            settings = guidances.Guidance(cfg, 0.0, settings.rescale)
        if joint:
            numbers = (audio_cfg, audio_stg_scale, audio_rescale, modality_scale) if guidance == CUSTOM else None
            settings = joint_guidance(settings, guidance, schedule, config, audio_cfg, numbers)
            if guides.audio_is_given(latent):
                settings = guidances.JointGuidance(settings.video)
        if all(is_empty_prompt(entry) for entry in positive):
            internals.notice(
                cls, "The positive prompt is empty, so nothing says what the video should show; write one to steer it."
            )
        return io.NodeOutput(
            sampling.sample(
                model,
                positive,
                negative,
                latent,
                sigmas=sigmas,
                guidance=settings,
                sampler_name=sampler_name,
                seed=seed,
            )
        )


def is_empty_prompt(entry):
    """Whether a conditioning entry (features [1, n, Dv], options) is that of an empty text: the start token alone."""
    features, options = entry
    return bool(options.get("unprocessed_ltxav_embeds")) and features.shape[1] == 1


def preset_guidance(name, cfg, schedule, config):
    """The official guidance for a schedule, with the user's ``cfg``; ``config`` is the network's, None for a foreign model."""
    if name == CFG_ONLY or schedule not in ("ltx2", "ltx2 (tokens)"):
        return guidances.Guidance(cfg)
    preset = guidances.PRESETS["2.3 HQ" if name == OFFICIAL_HQ else config.version if config is not None else "2.3"]
    layers = config.num_layers if config is not None else guidances.OFFICIAL_LAYERS
    return guidances.Guidance(cfg, preset.stg, preset.rescale, guidances.stg_blocks_for(preset.stg_block, layers))


def joint_guidance(video, name, schedule, config, audio_cfg, custom=None):
    """Guidance of video and audio around the ``video``'s own; custom: (cfg, stg, rescale, modality) of the node's numbers, else the official ones."""
    if custom is not None:
        cfg, stg, rescale, modality = custom
        blocks = video.stg_blocks if config is not None else ()
        audio = guidances.Guidance(cfg, stg if config is not None else 0.0, rescale, blocks, modality)
        return guidances.JointGuidance(dataclasses.replace(video, modality=modality), audio)
    if schedule not in ("ltx2", "ltx2 (tokens)"):
        return guidances.JointGuidance(video)  # distilled weights guide the audio no more than the video
    if name == CFG_ONLY:
        return guidances.JointGuidance(video, guidances.Guidance(audio_cfg))
    preset = guidances.PRESETS["2.3 HQ" if name == OFFICIAL_HQ else config.version if config is not None else "2.3"]
    audio = guidances.Guidance(audio_cfg, video.stg, preset.audio_rescale, video.stg_blocks, preset.modality)
    return guidances.JointGuidance(dataclasses.replace(video, modality=preset.modality), audio)


def parse_blocks(text, config):
    """Block indices from ``"28"`` or ``"28, 29"``; empty text means the official block. Raises ValueError with the allowed range."""
    layers = config.num_layers if config is not None else guidances.OFFICIAL_LAYERS
    if not text.strip():
        preset = guidances.PRESETS[config.version if config is not None else "2.3"]
        return guidances.stg_blocks_for(preset.stg_block, layers)
    try:
        blocks = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(
            f"stg_blocks is '{text}'; write block numbers from 0 to {layers - 1} separated by commas, or leave it empty."
        ) from None
    wrong = [block for block in blocks if not 0 <= block < layers]
    if wrong:
        raise ValueError(f"stg_blocks names block {wrong[0]}; this model has blocks 0 to {layers - 1}.")
    return blocks


def check_latent(latent):
    """Raise ValueError with one sentence for a latent that is not LTX-2's: of video, or of video and audio."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        parts = samples.unbind()
        if len(parts) != 2 or parts[1].ndim != 4:
            raise ValueError(
                "This latent holds several parts, but not a video and an audio latent; join them with 'LTXVConcatAVLatent'."
            )
        if parts[0].shape[0] != parts[1].shape[0]:
            raise ValueError(
                f"The latent holds {parts[0].shape[0]} videos and {parts[1].shape[0]} sounds; make both with the same batch size."
            )
        samples = parts[0]
    if samples.ndim != 5:
        raise ValueError(
            f"This latent has the shape {tuple(samples.shape)}, which is an image latent; use 'EmptyLTXVLatentVideo' (batch, channels, frames, height, width)."
        )
    if samples.shape[1] != 128:
        raise ValueError(f"This latent has {samples.shape[1]} channels; LTX-2 needs 128: use 'EmptyLTXVLatentVideo'.")
    if 0 in samples.shape:
        raise ValueError(
            f"This latent has the shape {tuple(samples.shape)}, so the video would have no frames or no area; choose at least 1 frame and 32 x 32 pixels."
        )
