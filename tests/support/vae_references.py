"""The same random weights in our VAE and in the reference implementations (the host's and diffusers')."""

import torch

from ltx2_gguf.ltx2_core.vae.config import LTX2_0_VAE, LTX2_3_VAE, reduced
from ltx2_gguf.ltx2_core.vae.model import VideoVAE
from reference_dit import one_thread  # noqa: F401  (imported from here by the VAE's tests)

CONFIGS = {"2.3": LTX2_3_VAE, "2.0": LTX2_0_VAE}


def tiny_vae(version, channels=8, seed=0):
    """Our VAE with the version's own block lists, few channels and random weights and statistics."""
    torch.manual_seed(seed)
    vae = VideoVAE(reduced(CONFIGS[version], channels, latent_channels=channels))
    vae.per_channel_statistics.get_buffer("std-of-means").uniform_(0.5, 1.5)
    vae.per_channel_statistics.get_buffer("mean-of-means").normal_()
    return vae.eval().requires_grad_(False)


def host_vae(vae):
    """The host's VideoVAE with vae's weights (import the host first)."""
    from comfy.ldm.lightricks.vae import causal_video_autoencoder as host

    reference = host.VideoVAE(config=vae.config.to_metadata())
    channels = vae.config.latent_channels
    for name in ("std-of-means", "mean-of-means"):  # the host fixes 128 channels
        setattr(reference.per_channel_statistics, name, torch.empty(channels))
    reference.load_state_dict(vae.state_dict(), strict=True)
    return reference.eval().requires_grad_(False)


def diffusers_vae(vae):
    """diffusers' AutoencoderKLLTX2Video with vae's weights; its latents are not normalised."""
    from diffusers import AutoencoderKLLTX2Video

    config = vae.config
    kinds = {"space": "spatial", "time": "temporal", "all": "spatiotemporal"}
    down = [b for b in config.encoder_blocks if b.kind != "res"]
    up = [b for b in config.decoder_blocks if b.kind != "res"]
    widths = [config.encoder_base_channels]
    for block in down:
        widths.append(widths[-1] * block.multiplier)
    up_widths = [config.decoder_width]
    for block in up:
        up_widths.append(up_widths[-1] // block.multiplier)
    assert config.encoder_base_channels == config.latent_channels, "diffusers ties these two"
    reference = AutoencoderKLLTX2Video(
        latent_channels=config.latent_channels,
        block_out_channels=tuple(widths[1:]),
        down_block_types=("LTX2VideoDownBlock3D",) * len(down),
        decoder_block_out_channels=tuple(reversed([w * b.multiplier for w, b in zip(up_widths[1:], up)])),
        layers_per_block=tuple(b.layers for b in config.encoder_blocks if b.kind == "res"),
        decoder_layers_per_block=tuple(reversed([b.layers for b in config.decoder_blocks if b.kind == "res"])),
        spatio_temporal_scaling=(True,) * len(down),
        decoder_spatio_temporal_scaling=(True,) * len(up),
        decoder_inject_noise=(False,) * (len(up) + 1),
        downsample_type=tuple(kinds[b.kind] for b in down),
        upsample_type=tuple(kinds[b.kind] for b in up),
        upsample_residual=tuple(b.residual for b in up),
        upsample_factor=tuple(reversed([b.multiplier for b in up])),
        timestep_conditioning=False,
        patch_size=config.patch_size,
        encoder_causal=True,
        decoder_causal=False,
        encoder_spatial_padding_mode=config.encoder_padding,
        decoder_spatial_padding_mode=config.decoder_padding,
    )
    renames = {}
    for i in range(len(config.encoder_blocks)):
        theirs = f"encoder.down_blocks.{i // 2}." if i < len(config.encoder_blocks) - 1 else "encoder.mid_block."
        renames[f"encoder.down_blocks.{i}.res_blocks."] = theirs + "resnets."
        renames[f"encoder.down_blocks.{i}.conv."] = theirs + "downsamplers.0.conv."
    for i in range(len(config.decoder_blocks)):
        theirs = f"decoder.up_blocks.{(i - 1) // 2}." if i else "decoder.mid_block."
        renames[f"decoder.up_blocks.{i}.res_blocks."] = theirs + "resnets."
        renames[f"decoder.up_blocks.{i}.conv."] = theirs + "upsamplers.0.conv."
    weights = {}
    for name, tensor in vae.state_dict().items():
        if name.startswith("per_channel_statistics."):
            name = "latents_mean" if "mean-of-means" in name else "latents_std"
        for ours, theirs in renames.items():
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        weights[name] = tensor
    reference.load_state_dict(weights, strict=True)
    return reference.eval().requires_grad_(False)


def diffusers_encode(reference, pixels):
    """Normalised latents, as our VAE returns them."""
    means = reference.encode(pixels).latent_dist.mode()
    mean, std = (getattr(reference, f"latents_{s}").view(1, -1, 1, 1, 1).to(means) for s in ("mean", "std"))
    return (means - mean) / std


def diffusers_decode(reference, latent):
    mean, std = (getattr(reference, f"latents_{s}").view(1, -1, 1, 1, 1).to(latent) for s in ("mean", "std"))
    return reference.decode(latent * std + mean).sample


def error(ours, reference):
    """||ours - reference|| / ||reference||"""
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def random_clip(frames, height, width, seed=1):
    """Smooth random pixels in [-1, 1]: neighbouring frames and pixels are alike, as in a video."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 2 + frames // 8, 2 + height // 16, 2 + width // 16, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")
    return (smooth + 0.05 * torch.randn(smooth.shape, generator=generator)).clamp(-1, 1)
