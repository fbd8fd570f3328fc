"""Tiny LTX-2 transformers with non-degenerate random weights, and the same weights in the reference implementations.

The host's network (``comfy.ldm.lightricks.av_model.LTXAVModel``) and diffusers' (``LTX2VideoTransformer3DModel``) are
audio-and-video; their sound streams get random weights of their own and are kept out of the video: the host skips them for an
empty sound latent, diffusers with ``isolate_modalities``.
"""

import functools

import pytest
import torch

from ltx2_gguf.ltx2_core.transformer.config import ConnectorConfig, LTX2Config
from ltx2_gguf.ltx2_core.transformer.model import LTX2Model


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only lose time to threads that wait for each other. (Imported by the tests that want it.)"""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# version -> geometries; heads x head_dim differ from the defaults of every implementation on purpose.
GEOMETRIES = {
    "2.3": [
        {"heads": 4, "head_dim": 16, "connector_heads": 2, "connector_head_dim": 32},
        {"heads": 3, "head_dim": 32, "connector_heads": 3, "connector_head_dim": 32},
        {"heads": 2, "head_dim": 128, "connector_heads": 4, "connector_head_dim": 64},
    ],
    "2.0": [
        {"heads": 4, "head_dim": 16, "connector_heads": 3, "connector_head_dim": 16},
        {"heads": 3, "head_dim": 32, "connector_heads": 5, "connector_head_dim": 16},
        {"heads": 2, "head_dim": 128, "connector_heads": 3, "connector_head_dim": 64},
    ],
}
CASES = [(version, index) for version, geometries in GEOMETRIES.items() for index in range(len(geometries))]


def tiny_config(version="2.3", index=0, layers=2, channels=16):
    """A reduced LTX2Config of the given version."""
    g = GEOMETRIES[version][index]
    width, connector_width = g["heads"] * g["head_dim"], g["connector_heads"] * g["connector_head_dim"]
    new = version == "2.3"
    return LTX2Config(
        version=version, num_layers=layers, num_attention_heads=g["heads"], attention_head_dim=g["head_dim"], in_channels=channels,
        out_channels=channels, cross_attention_dim=width, caption_channels=connector_width, cross_attention_adaln=new,
        apply_gated_attention=new, caption_proj_before_connector=new, ff_dim=4 * width,
        connector=ConnectorConfig(
            num_layers=2, num_attention_heads=g["connector_heads"], attention_head_dim=g["connector_head_dim"], num_learnable_registers=128,
            apply_gated_attention=new, ff_dim=4 * connector_width,
        ),
    )  # fmt: skip


@torch.no_grad()
def randomize_(module, seed):
    """Fill every parameter so that no norm weight is 1, no table 0 and no gate neutral; activations stay of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight") or ".norm_" in name:
            p.copy_(1 + 0.3 * noise)
        elif name.endswith("scale_shift_table") or "scale_shift_table" in name:
            p.copy_(0.3 * noise)
        elif name.endswith("learnable_registers"):
            p.copy_(noise)
        elif p.ndim == 2:
            p.copy_(noise * p.shape[1] ** -0.5)
        else:
            p.copy_(0.2 * noise)


def our_model(config, seed=0, dtype=torch.float32):
    """LTX2Model with random weights."""
    model = LTX2Model(config, dtype=torch.float32)
    randomize_(model, seed)
    model.to(dtype).eval()
    model.dtype = dtype
    return model


def host_model(config, state, dtype=torch.float32, qk_eps=1e-6):
    """The host's LTXAVModel with the video weights of ``state`` (canonical names).

    qk_eps: the host's RMS norms of queries and keys use 1e-5 where the official model and diffusers use 1e-6; None leaves it.
    """
    import comfy.ldm.lightricks.av_model as av
    import comfy.ops

    c, k = config, config.connector
    model = av.LTXAVModel(
        in_channels=c.in_channels, audio_in_channels=c.in_channels, cross_attention_dim=c.cross_attention_dim, audio_cross_attention_dim=32,
        attention_head_dim=c.attention_head_dim, audio_attention_head_dim=16, num_attention_heads=c.num_attention_heads,
        audio_num_attention_heads=2, caption_channels=c.caption_channels, num_layers=c.num_layers, causal_temporal_positioning=True,
        use_middle_indices_grid=True, apply_gated_attention=c.apply_gated_attention, cross_attention_adaln=c.cross_attention_adaln,
        caption_proj_before_connector=c.caption_proj_before_connector, caption_projection_first_linear=False, rope_type="split",
        frequencies_precision="float64", connector_attention_head_dim=k.attention_head_dim,
        connector_num_attention_heads=k.num_attention_heads, connector_num_layers=k.num_layers,
        connector_apply_gated_attention=k.apply_gated_attention, audio_connector_attention_head_dim=16,
        audio_connector_num_attention_heads=2, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    randomize_(model, 99)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected[:5]
    assert all("audio" in key or "av_ca" in key or "a2v_ca" in key for key in missing), missing[:5]
    for module in model.modules():
        if isinstance(module, av.CrossAttention) and qk_eps is not None:
            module.q_norm.eps = module.k_norm.eps = qk_eps
    model.to(dtype).eval()
    model.dtype = dtype
    # The sound projection of an empty latent needs its own channel count; the video path does not look at it.
    model.num_audio_channels, model.audio_frequency_bins = 1, c.in_channels
    return model


_TO_DIFFUSERS = (
    ("prompt_adaln_single.", "prompt_adaln."), ("adaln_single.", "time_embed."), ("patchify_proj.", "proj_in."), ("q_norm.", "norm_q."),
    ("k_norm.", "norm_k."),
)  # fmt: skip


def _diffusers_name(name):
    for ours, theirs in _TO_DIFFUSERS:
        name = name.replace(ours, theirs)
    return name


def diffusers_model(config, state, dtype=torch.float32):
    """diffusers' LTX2VideoTransformer3DModel with the video weights of ``state``."""
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel

    c = config
    model = LTX2VideoTransformer3DModel(
        in_channels=c.in_channels, out_channels=c.out_channels, num_attention_heads=c.num_attention_heads, attention_head_dim=c.attention_head_dim,
        cross_attention_dim=c.cross_attention_dim, gated_attn=c.apply_gated_attention, cross_attn_mod=c.cross_attention_adaln,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=c.num_attention_heads, audio_attention_head_dim=16,
        audio_cross_attention_dim=16 * c.num_attention_heads, audio_gated_attn=c.apply_gated_attention,
        audio_cross_attn_mod=c.cross_attention_adaln, num_layers=c.num_layers, caption_channels=c.caption_channels, rope_type="split",
        use_prompt_embeddings=not c.caption_proj_before_connector, perturbed_attn=True,
    )  # fmt: skip
    randomize_(model, 98)
    video = {_diffusers_name(k): v for k, v in state.items() if not k.startswith("video_embeddings_connector.")}
    missing, unexpected = model.load_state_dict(video, strict=False)
    assert not unexpected, unexpected[:5]
    assert all("audio" in key or "av_cross_attn" in key or "a2v_cross_attn" in key for key in missing), missing[:5]
    return model.to(dtype).eval()


def diffusers_velocity(model, config, latent, timestep, sigma, context, fps, coords=None, stg_blocks=None):
    """Video velocity [B, C, F, H, W] of diffusers' model. timestep [B] or [B, T] and sigma [B] in 0 … 1; coords [B, 3, T, 2] seconds, pixels."""
    batch, channels, frames, height, width = latent.shape
    tokens = latent.flatten(2).transpose(1, 2)
    audio_width = config.num_attention_heads * 16 if config.caption_proj_before_connector else config.caption_channels
    out = model(
        hidden_states=tokens, audio_hidden_states=torch.zeros(batch, 1, 4, dtype=latent.dtype), encoder_hidden_states=context,
        audio_encoder_hidden_states=torch.zeros(batch, 4, audio_width, dtype=latent.dtype),
        timestep=timestep.reshape(batch, -1) * 1000, audio_timestep=sigma * 1000, sigma=sigma * 1000, audio_sigma=sigma * 1000,
        num_frames=frames, height=height, width=width, fps=fps, audio_num_frames=1, isolate_modalities=True, video_coords=coords,
        spatio_temporal_guidance_blocks=stg_blocks, return_dict=False,
    )[0]  # fmt: skip
    return out.transpose(1, 2).reshape(batch, channels, frames, height, width)


def host_velocity(model, config, latent, timestep, context, fps, **kwargs):
    """Video velocity of the host's model. timestep [B] or [B, T, 1]."""
    audio_width = model.audio_inner_dim if config.caption_proj_before_connector else config.caption_channels
    context = torch.cat((context, torch.zeros(*context.shape[:2], audio_width, dtype=context.dtype)), dim=-1)
    batch = latent.shape[0]
    sigma = timestep if timestep.ndim == 1 else timestep.amax(dim=(1, 2))
    options = kwargs.pop("transformer_options", {})
    return model(
        [latent.clone()], (timestep, sigma.view(batch)), context, frame_rate=fps, transformer_options=options, **kwargs
    )


def relative_error(a, b):
    """||a - b|| / ||b||."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@functools.cache
def ours(version, index=0):
    """(config, our model) in float32; the same object on every call."""
    config = tiny_config(version, index)
    return config, our_model(config, seed=1)


@functools.cache
def theirs(reference, version, index=0, dtype=torch.float32):
    """The reference model ("diffusers" or "host") with our model's weights."""
    config, model = ours(version, index)
    return {"diffusers": diffusers_model, "host": host_model}[reference](config, model.state_dict(), dtype)


def inputs(config, batch=2, frames=4, height=5, width=6, text=40, seed=0, dtype=torch.float32):
    """(latent [B, C, F, H, W], context [B, S, Dc])."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(batch, config.in_channels, frames, height, width, generator=generator)
    context = torch.randn(batch, text, config.context_dim, generator=generator)
    return latent.to(dtype), context.to(dtype)


def reference_velocity(
    reference, version, index, latent, sigma, context, fps=24.0, mask=None, stg_blocks=(), dtype=torch.float32
):
    """Velocity of a reference on a plain or masked clip. sigma [B]; mask [B, 1, F, H, W] or None."""
    config, _ = ours(version, index)
    model = theirs(reference, version, index, dtype)
    timestep = sigma if mask is None else mask.flatten(1) * sigma[:, None]  # (B,) or (B, T)
    with torch.no_grad():
        if reference == "diffusers":
            return diffusers_velocity(
                model, config, latent, timestep, sigma, context, fps, stg_blocks=list(stg_blocks) or None
            )
        return host_velocity(
            model, config, latent, timestep if mask is None else timestep[..., None], context, fps, denoise_mask=mask
        )
