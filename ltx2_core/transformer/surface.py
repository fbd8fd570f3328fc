"""What other code reads from the network besides calling it: the public attributes of the host's audio-video class.

Samplers and community nodes ask the model for widths, switches and modules by name. The video-only network answers for the audio
stream with the sizes that a model of its width has, and with None for modules that were not built.

Source: Comfy-Org/ComfyUI ``comfy/ldm/lightricks/{model,av_model}.py``.
"""

import torch

from .config import AudioConfig
from .rope import frequency_grid

AUDIO_CHANNELS, AUDIO_BINS = 8, 16  # an audio latent is [B, 8, L, 16]
AUDIO_MODULES = (
    "audio_patchify_proj", "audio_adaln_single", "audio_prompt_adaln_single", "audio_caption_projection", "audio_embeddings_connector",
    "av_ca_video_scale_shift_adaln_single", "av_ca_a2v_gate_adaln_single", "av_ca_audio_scale_shift_adaln_single", "av_ca_v2a_gate_adaln_single",
    "audio_scale_shift_table", "audio_norm_out", "audio_proj_out",
)  # fmt: skip


def describe(network, config, operations):
    """Set the attributes on ``network`` from its LTX2Config. Call before its modules are built: those of an audio stream replace the Nones."""
    for name in (
        "in_channels", "out_channels", "inner_dim", "num_layers", "num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels",
        "apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector", "timestep_scale_multiplier", "vae_scale_factors",
    ):  # fmt: skip
        setattr(network, name, getattr(config, name))
    network.operations, network.generator = operations, None
    network.positional_embedding_theta, network.positional_embedding_max_pos = (
        config.rope_theta,
        list(config.rope_max_pos),
    )
    network.causal_temporal_positioning = network.use_middle_indices_grid = True
    network.split_positional_embedding, network.freq_grid_generator = "split", _frequencies
    network.caption_projection_first_linear = not config.caption_proj_before_connector
    network.ff_bias = network.audio_ff_bias = network.use_prompt_adaln_single = True
    network.use_keyframes_abs_pos_embedding, network.keyframes_abs_pos_embedding = False, None

    audio = config.audio or _usual_audio(config)
    network.num_audio_channels, network.audio_frequency_bins = AUDIO_CHANNELS, audio.in_channels // AUDIO_CHANNELS
    network.audio_in_channels, network.audio_out_channels = audio.in_channels, audio.out_channels
    network.audio_num_attention_heads, network.audio_attention_head_dim = (
        audio.num_attention_heads,
        audio.attention_head_dim,
    )
    network.audio_inner_dim, network.audio_cross_attention_dim = audio.inner_dim, audio.cross_attention_dim
    network.audio_positional_embedding_max_pos = [audio.rope_max_pos]
    network.av_ca_timestep_scale_multiplier = audio.cross_gate_timestep_scale
    for name in AUDIO_MODULES:
        setattr(network, name, None)


def _usual_audio(config):
    """The audio stream that a video model of this size has in the released files: half as wide."""
    return AudioConfig(
        num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim // 2, in_channels=AUDIO_CHANNELS * AUDIO_BINS,
        out_channels=AUDIO_CHANNELS * AUDIO_BINS, cross_attention_dim=config.cross_attention_dim // 2, ff_dim=config.ff_dim // 2,
    )  # fmt: skip


def _frequencies(theta, axes, width, device=None):
    """The host's ``freq_grid_generator``: angles per axis [width / 2 / axes] float32."""
    return frequency_grid(theta, width // (2 * axes)).to(device)


class HostMethods:
    """Methods of the host's class that other code calls."""

    def separate_audio_and_video_latents(self, x, audio_length=None):
        """A tensor, [video] or [video, audio] -> (video, audio); the audio is [B, 8, 0, 16] where there is none."""
        if isinstance(x, torch.Tensor):
            x = [x]
        return x[0], x[1] if len(x) > 1 else x[0].new_zeros(
            x[0].shape[0], self.num_audio_channels, 0, self.audio_frequency_bins
        )

    def recombine_audio_and_video_latents(self, vx, ax, target_shape=None):
        """The video alone, or [video, audio] when the audio has a length."""
        return [vx, ax] if ax.numel() else vx

    def tokens_per_latent_frame(self, orig_shape):
        """Tokens in a frame of a latent of this shape (B, C, F, H, W)."""
        return orig_shape[3] * orig_shape[4]
