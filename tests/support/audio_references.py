"""Small random audio VAEs, and the host's module on the same weights."""

import torch

from ltx2_gguf.ltx2_core.audio.config import AudioVAEConfig, VocoderConfig
from ltx2_gguf.ltx2_core.audio.model import AudioVAE

_SNAKE = {"block_kernels": (3, 7, 11), "snake": True}
VOCODERS = {
    "2.0": (VocoderConfig(128, 32, (6, 5, 2, 2, 2), (16, 15, 8, 4, 4), (3, 7, 11), False, "tanh"), None),
    "2.3": (
        VocoderConfig(128, 64, (5, 2, 2, 2, 2, 2), (11, 4, 4, 4, 4, 4), end="clamp", **_SNAKE),
        VocoderConfig(128, 32, (6, 5, 2, 2, 2), (12, 11, 4, 4, 4), end="none", **_SNAKE),
    ),
}


def error(ours, reference):
    """Relative error in the 2-norm."""
    return float((ours - reference).norm() / reference.norm())


def config(version):
    """Reduced in the vocoder alone: the host sizes the statistics by the autoencoder's width."""
    vocoder, bandwidth = VOCODERS[version]
    return AudioVAEConfig((128, 256, 512), 1, True, True, vocoder, bandwidth)


def audio_vae(version, seed=0):
    """AudioVAE with random weights whose vocoder does not saturate."""
    torch.manual_seed(seed)
    vae = AudioVAE(config(version)).eval()
    for name, tensor in vae.state_dict().items():
        if name.endswith("std-of-means"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(".filter"):
            tensor.copy_(
                torch.tensor([0.002, 0.009, -0.026, -0.058, 0.129, 0.443, 0.443, 0.129, -0.058, -0.026, 0.009, 0.002])
                + torch.randn(12) * 1e-3
            )
        elif name.endswith("mel_basis"):
            tensor.uniform_(0, 0.05)
        elif name.endswith(("alpha", "beta")):
            tensor.normal_(std=0.3)
        elif tensor.ndim > 1:
            fan = tensor[0].numel() if ".ups." not in name else tensor.shape[0] * tensor.shape[2] // 2
            tensor.normal_(std=(0.05 if "conv_post" in name else 0.7) / fan**0.5)
        else:
            tensor.normal_(std=0.1)
    return vae


def host_audio_vae(vae):
    """The host's AudioVAE with the same weights."""
    from comfy.ldm.lightricks.vae.audio_vae import AudioVAE as HostAudioVAE

    reference = HostAudioVAE({"config": vae.config.to_metadata()}).eval()
    state = {name.replace("audio_vae.", "autoencoder.", 1): tensor for name, tensor in vae.state_dict().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected and not [
        name for name in missing if "inverse_basis" not in name and "resampler" not in name
    ], (missing, unexpected)
    return reference.float()
