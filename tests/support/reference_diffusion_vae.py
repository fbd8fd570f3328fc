"""A reduced diffusion decoder with random weights, and the host's own with the same ones."""

import torch

from ltx2_gguf.ltx2_core.vae.config import _from_metadata
from ltx2_gguf.ltx2_core.vae.diffusion_config import DiffusionDecoderConfig
from ltx2_gguf.ltx2_core.vae.diffusion_decoder import DiffusionDecoder
from ltx2_gguf.ltx2_core.vae.model import VideoVAE

METADATA = {
    "_class_name": "CausalDiffusionVAE", "model_output_type": "x0",
    "encoder": {
        "blocks": [["compress_space_res", {"multiplier": 1}], ["compress_time_res", {"multiplier": 2}], ["res_x", {"num_layers": 1}],
                   ["compress_all_res", {"multiplier": 1}], ["compress_all_res", {"multiplier": 1}]],
        "patch_size": 4, "latent_log_var": "constant", "norm_layer": "pixel_norm", "base_channels": 16, "out_channels": 8,
        "spatial_padding_mode": "zeros",
    },
    "decoder": {
        "in_channels": 8, "out_channels": 3, "patch_size": 4, "head_dim": 16, "stage_channels": [64, 32, 32, 32, 16],
        "stage_depths": [2, 2, 1, 1, 2], "stage_kernels": [[3, 5, 7], [3, 5, 5], [3, 3, 5], [3, 3, 3], [5, 5, 7]],
        "stage5_kernel": [5, 5, 7], "upsamples": [[[1, 2, 2], 2], [[2, 1, 1], 1], [[2, 2, 2], 1], [[2, 2, 2], 2]],
        "timestep_scale_multiplier": 1000.0, "default_num_inference_steps": 1, "t_emb_dim": 24,
    },
}  # fmt: skip


def decoder(seed=0):
    """Ours, float32."""
    torch.manual_seed(seed)
    net = DiffusionDecoder(DiffusionDecoderConfig.from_metadata(METADATA))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(
                1 + 0.2 * torch.randn_like(p)
                if "norm" in name
                else torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
            )
    return net.eval().requires_grad_(False)


def host_decoder(ours):
    """The host's NADiffusionDecoder with our weights (import the host first; ComfyUI 0.32 and newer)."""
    from comfy.ldm.lightricks.vae.na_diffusion_decoder import NADiffusionDecoder

    d = METADATA["decoder"]
    net = NADiffusionDecoder(
        in_channels=d["in_channels"], head_dim=d["head_dim"], stage_channels=d["stage_channels"], stage_depths=d["stage_depths"],
        stage_kernels=d["stage_kernels"], upsamples=d["upsamples"], stage5_kernel=d["stage5_kernel"], t_emb_dim=d["t_emb_dim"],
    )  # fmt: skip
    net.load_state_dict(ours.state_dict(), strict=True)
    return net.eval().requires_grad_(False)


def vae(seed=0):
    """Our whole VAE of this geometry with random weights and statistics, float32."""
    torch.manual_seed(seed)
    net = VideoVAE(_from_metadata(METADATA))
    net.decoder.load_state_dict(decoder(seed).state_dict())
    for p in net.encoder.parameters():
        torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
    net.per_channel_statistics.get_buffer("std-of-means").uniform_(0.5, 1.5)
    net.per_channel_statistics.get_buffer("mean-of-means").normal_()
    return net.eval().requires_grad_(False)


def host_vae(ours):
    """The host's CausalDiffusionVAE with our weights (import the host first; ComfyUI 0.32 and newer)."""
    from comfy.ldm.lightricks.vae.na_diffusion_decoder import CausalDiffusionVAE

    net = CausalDiffusionVAE(METADATA | {"decoder": METADATA["decoder"]})
    for name in ("std-of-means", "mean-of-means"):  # the host fixes 128 channels
        setattr(net.per_channel_statistics, name, torch.empty(8))
    net.load_state_dict(ours.state_dict(), strict=True)
    return net.eval().requires_grad_(False)
