"""Tiny joint transformers with random weights, and the same weights in the host's and in diffusers' joint networks."""

import functools
from dataclasses import replace

import pytest
import torch

from ltx2_gguf.ltx2_core.files.names import _TO_DIFFUSERS, _rename
from ltx2_gguf.ltx2_core.transformer.audio_video import LTX2AVModel
from ltx2_gguf.ltx2_core.transformer.config import AudioConfig, ConnectorConfig
from reference_dit import GEOMETRIES, randomize_, relative_error, tiny_config  # noqa: F401

CHANNELS = 16  # video latent channels
AUDIO_CHANNELS, BINS = 8, 2


def tiny_av_config(version="2.3", layers=2):
    """A reduced joint LTX2Config; head counts are equal, as in the released models and as official and host want it."""
    video = tiny_config(version, 0, layers, CHANNELS)
    new, heads = version == "2.3", video.num_attention_heads
    width = 8 * heads
    shared = {"num_layers": 2, "num_learnable_registers": 128, "apply_gated_attention": new}
    connector = (
        video.connector
        if not new
        else ConnectorConfig(num_attention_heads=2, attention_head_dim=width // 2, ff_dim=4 * width, **shared)
    )
    audio = AudioConfig(
        num_attention_heads=heads, attention_head_dim=8, in_channels=AUDIO_CHANNELS * BINS, out_channels=AUDIO_CHANNELS * BINS,
        cross_attention_dim=width, ff_dim=4 * width, connector=connector,
    )  # fmt: skip
    return replace(video, audio=audio)


@functools.cache
def ours(version):
    """(config, joint model) in float32; the same object on every call."""
    config = tiny_av_config(version)
    model = LTX2AVModel(config, dtype=torch.float32)
    randomize_(model, 5)
    return config, model.eval()


@functools.cache
def host_model(version, cross_gate_scale=1000.0):
    """The host's LTXAVModel with our weights; its query and key norms get the official eps."""
    import comfy.ldm.lightricks.av_model as av
    import comfy.ops
    import comfyui_version

    if tuple(map(int, comfyui_version.__version__.split(".")[:2])) > (0, 30):
        pytest.skip(
            "newer hosts let the audio look at the video after the audio was added to it; the official code, diffusers and ComfyUI 0.30 do not"
        )
    config, model = ours(version)
    c, a, k, ak = config, config.audio, config.connector, config.audio.connector
    reference = av.LTXAVModel(
        in_channels=c.in_channels, audio_in_channels=a.in_channels, cross_attention_dim=c.cross_attention_dim,
        audio_cross_attention_dim=a.cross_attention_dim, attention_head_dim=c.attention_head_dim, audio_attention_head_dim=a.attention_head_dim,
        num_attention_heads=c.num_attention_heads, audio_num_attention_heads=a.num_attention_heads, caption_channels=c.caption_channels,
        num_layers=c.num_layers, causal_temporal_positioning=True, use_middle_indices_grid=True, apply_gated_attention=c.apply_gated_attention,
        cross_attention_adaln=c.cross_attention_adaln, caption_proj_before_connector=c.caption_proj_before_connector,
        caption_projection_first_linear=False, rope_type="split", frequencies_precision="float64", av_ca_timestep_scale_multiplier=cross_gate_scale,
        connector_attention_head_dim=k.attention_head_dim, connector_num_attention_heads=k.num_attention_heads, connector_num_layers=k.num_layers,
        connector_apply_gated_attention=k.apply_gated_attention, audio_connector_attention_head_dim=ak.attention_head_dim,
        audio_connector_num_attention_heads=ak.num_attention_heads, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    reference.load_state_dict(model.state_dict())
    for module in reference.modules():
        if isinstance(module, av.CrossAttention):
            module.q_norm.eps = module.k_norm.eps = 1e-6
    reference.num_audio_channels, reference.audio_frequency_bins = AUDIO_CHANNELS, BINS
    return reference.eval()


@functools.cache
def diffusers_model(version):
    """diffusers' LTX2VideoTransformer3DModel with our weights."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

    config, model = ours(version)
    c, a = config, config.audio
    reference = LTX2VideoTransformer3DModel(
        in_channels=c.in_channels, out_channels=c.out_channels, num_attention_heads=c.num_attention_heads, attention_head_dim=c.attention_head_dim,
        cross_attention_dim=c.cross_attention_dim, gated_attn=c.apply_gated_attention, cross_attn_mod=c.cross_attention_adaln,
        audio_in_channels=a.in_channels, audio_out_channels=a.out_channels, audio_num_attention_heads=a.num_attention_heads,
        audio_attention_head_dim=a.attention_head_dim, audio_cross_attention_dim=a.cross_attention_dim, audio_gated_attn=c.apply_gated_attention,
        audio_cross_attn_mod=c.cross_attention_adaln, num_layers=c.num_layers, caption_channels=c.caption_channels, rope_type="split",
        use_prompt_embeddings=not c.caption_proj_before_connector, perturbed_attn=True,
    )  # fmt: skip
    state = {
        _rename(name, _TO_DIFFUSERS): tensor
        for name, tensor in model.state_dict().items()
        if "embeddings_connector" not in name
    }
    reference.load_state_dict(state)
    return reference.eval()


def inputs(config, batch=2, frames=3, height=3, width=4, length=7, text=24, seed=0):
    """(video [B, C, F, H, W], audio [B, 8, L, bins], context [B, S, Dc + Ac])."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(batch, config.in_channels, frames, height, width, generator=generator)
    audio = torch.randn(batch, AUDIO_CHANNELS, length, BINS, generator=generator)
    context = torch.randn(batch, text, config.context_dim + config.audio_context_dim, generator=generator)
    return video, audio, context


def host_velocities(
    version, video, audio, sigma, context, fps, video_mask=None, audio_mask=None, options=None, **kwargs
):
    """[video, audio] of the host's network. sigma: a number; masks [B, 1, F, H, W] and [B, 1, L, 1]."""
    batch, scale = video.shape[0], kwargs.pop("cross_gate_scale", 1000.0)
    sigmas = torch.full((batch,), sigma)
    timesteps = [sigmas if mask is None else mask.flatten(1)[..., None] * sigma for mask in (video_mask, audio_mask)]
    with torch.no_grad():
        return host_model(version, scale)(
            [video.clone(), audio.clone()],
            timesteps,
            context,
            frame_rate=fps,
            transformer_options=options or {},
            denoise_mask=video_mask,
            **kwargs,
        )


def diffusers_velocities(version, video, audio, sigma, context, fps, isolated=False, stg_blocks=None):
    """[video, audio] of diffusers' network. sigma [B]."""
    config, _ = ours(version)
    batch, channels, frames, height, width = video.shape
    contexts = context.split((config.context_dim, config.audio_context_dim), dim=-1)
    with torch.no_grad():
        v, a = diffusers_model(version)(
            hidden_states=video.flatten(2).transpose(1, 2), audio_hidden_states=audio.transpose(1, 2).flatten(2), encoder_hidden_states=contexts[0],
            audio_encoder_hidden_states=contexts[1], timestep=sigma[:, None] * 1000, audio_timestep=sigma * 1000, sigma=sigma * 1000,
            audio_sigma=sigma * 1000, num_frames=frames, height=height, width=width, fps=fps, audio_num_frames=audio.shape[2],
            isolate_modalities=isolated, spatio_temporal_guidance_blocks=stg_blocks, return_dict=False,
        )  # fmt: skip
    return v.transpose(1, 2).reshape(batch, channels, frames, height, width), a.unflatten(
        -1, (AUDIO_CHANNELS, BINS)
    ).transpose(1, 2)
