"""A reduced diffusion decoder with random weights, and the host's own with the same ones."""

import torch

from ltx2_gguf.ltx2_core.vae.diffusion_decoder import DiffusionDecoder, DiffusionDecoderConfig

METADATA = {
    "_class_name": "CausalDiffusionVAE", "model_output_type": "x0",
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
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1))
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
