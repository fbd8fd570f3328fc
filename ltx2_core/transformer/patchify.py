"""Latents to tokens and back, and where each token lies in the video.

LTX-2 uses patches of one latent: tokens are the latent grid flattened frames-slow, then rows, then columns. The patchifier
objects carry the host's names and return values (``tokens, coords = patchifier.patchify(latent)``), because the host and
community nodes call them.

Source: Lightricks/LTX-2 ``ltx_core/components/patchifiers.py``.
"""

import torch


class SymmetricPatchifier:
    """Video latent [B, C, F, H, W] <-> tokens [B, F*H*W, C]."""

    patch_size = (1, 1, 1)

    def patchify(self, latents):
        """(tokens [B, T, C], coords [B, 3, T, 2]); coords are the latent indices [start, end) of each token along F, H, W."""
        batch, _, *grid = latents.shape
        coords = latent_coords(*grid, device=latents.device).expand(batch, -1, -1, -1)
        return latents.flatten(2).transpose(1, 2), coords  # (B, C, F, H, W) -> (B, T, C)

    def unpatchify(self, latents, output_height, output_width, output_num_frames, out_channels):
        """Tokens [B, T, C] -> latent [B, C, F, H, W]."""
        return (
            latents.transpose(1, 2)
            .contiguous()
            .view(latents.shape[0], out_channels, output_num_frames, output_height, output_width)
        )

    def get_latent_coords(self, latent_num_frames, latent_height, latent_width, batch_size, device):
        """[B, 3, T, 2]: latent indices [start, end) of each token of a grid (the host's method, for context windows with guides)."""
        return latent_coords(latent_num_frames, latent_height, latent_width, device=device).expand(
            batch_size, -1, -1, -1
        )


class AudioPatchifier:
    """Audio latent [B, C, L, bins] <-> tokens [B, L, C*bins], and when each of them sounds."""

    # 16 kHz samples, 160 per spectrogram column, 4 columns per latent.
    sample_rate, hop_length, audio_latent_downsample_factor = 16000, 160, 4

    @property
    def seconds_per_token(self):
        """Length of every token but the first."""
        return self.hop_length * self.audio_latent_downsample_factor / self.sample_rate

    def patchify(self, audio_latents):
        """(tokens [B, L, C*bins], times [B, 1, L, 2]); times are each token's [start, end) in seconds."""
        batch, _, length, _ = audio_latents.shape
        times = self.token_times(length).to(audio_latents.device).expand(batch, -1, -1, -1)
        return audio_latents.transpose(1, 2).flatten(2), times  # (B, C, L, bins) -> (B, L, C*bins)

    def unpatchify(self, audio_latents, channels, freq):
        """Tokens [B, L, C*bins] -> latent [B, C, L, bins]."""
        return audio_latents.unflatten(-1, (channels, freq)).transpose(1, 2)

    def token_times(self, length):
        """[1, 1, L, 2] float32 on the CPU: each token's [start, end) in seconds; the first holds one spectrogram column, the others four."""
        edges = torch.arange(length + 1, dtype=torch.float32) * self.audio_latent_downsample_factor
        # In this order, as the official code: float32 rounds, and the highest frequency turns 1e-7 s into 1e-4 rad.
        edges = (edges + 1 - self.audio_latent_downsample_factor).clamp(min=0) * self.hop_length / self.sample_rate
        return torch.stack((edges[:-1], edges[1:]), dim=-1)[None, None]


def latent_coords(frames, height, width, device=None):
    """[1, 3, F*H*W, 2] int64: latent indices [start, end) of each token along frames, rows and columns."""
    grid = torch.meshgrid(*(torch.arange(n, device=device) for n in (frames, height, width)), indexing="ij")
    start = torch.stack(grid).flatten(1)  # (3, F, H, W) -> (3, T)
    return torch.stack((start, start + 1), dim=-1).unsqueeze(0)


def pixel_coords(frames, height, width, scale_factors):
    """[1, 3, F*H*W, 2] int64 on the CPU: pixel intervals [start, end) of each token; the first axis counts video frames.

    The VAE is causal in time: its first latent frame holds one video frame, every later one ``scale_factors[0]``.
    """
    coords = latent_coords(frames, height, width) * torch.tensor(scale_factors).view(1, 3, 1, 1)
    coords[:, 0] = (coords[:, 0] + 1 - scale_factors[0]).clamp(min=0)
    return coords


def token_positions(coords, frame_rate):
    """Midpoints [B, 3, T] float32 in seconds, pixels, pixels from pixel intervals [B, 3, T, 2]."""
    coords = coords.to(torch.float32)
    time = coords[:, :1] / frame_rate  # video frames -> seconds, before the midpoint is taken, as in the official code
    coords = torch.cat((time, coords[:, 1:]), dim=1)
    return (coords[..., 0] + coords[..., 1]) / 2
