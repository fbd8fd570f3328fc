"""The toy's DiT: LTX-2.3's structure at width 256, and how its weights start."""

import torch
from torch import nn

from ltx2_gguf.ltx2_core.transformer.config import ConnectorConfig, LTX2Config
from ltx2_gguf.ltx2_core.transformer.model import LTX2Model

from . import pack  # noqa: F401

WIDTH, HEADS = 256, 4
GRID = (4, 4, 4)  # latent frames, rows, columns of 25 frames at 128x128


def dit_config(layers: int = 6, width: int = WIDTH, heads: int = HEADS, connector_layers: int = 2) -> LTX2Config:
    """Gated attention, nine-row tables, prompt modulation, 128 registers; every matrix a multiple of 32 wide."""
    connector = ConnectorConfig(
        num_layers=connector_layers, num_attention_heads=heads, attention_head_dim=width // heads, num_learnable_registers=128,
        apply_gated_attention=True, ff_dim=4 * width,
    )  # fmt: skip
    return LTX2Config(
        version="2.3", num_layers=layers, num_attention_heads=heads, attention_head_dim=width // heads, in_channels=128, out_channels=128,
        cross_attention_dim=width, caption_channels=640, cross_attention_adaln=True, apply_gated_attention=True,
        caption_proj_before_connector=True, ff_dim=4 * width, connector=connector,
    )  # fmt: skip


class Toy(nn.Module):
    """DiT with connector, and the small matrix that stands for the text projection while training (see ``text.fold``)."""

    def __init__(self, config: LTX2Config, components: int):
        super().__init__()
        self.dit = LTX2Model(config)
        self.projection = nn.Linear(components, config.inner_dim)

    def context(self, z, real):
        """Whitened features z [B, n, r] and their mask [B, n] -> context [B, 1024, D]."""
        features = self.projection(z.to(self.projection.weight.dtype))
        return self.dit.video_embeddings_connector(features, real)[0]

    def set_dtype(self, dtype):
        self.to(dtype)
        self.dit.dtype = dtype
        return self


def initialise(toy: Toy, seed: int = 0) -> Toy:
    """Starting weights.

    Gates start open, branches small, the velocity at zero. The registers start as one common vector with a little noise: a thousand
    of them stand beside a dozen text tokens, and attention learns to look past them sooner when they look alike.
    """
    generator = torch.Generator().manual_seed(seed)
    depth = toy.dit.config.num_layers
    with torch.no_grad():
        for name, p in toy.named_parameters():
            if name.endswith("learnable_registers"):
                common = torch.randn(1, p.shape[1], generator=generator)
                p.copy_(common + 0.05 * torch.randn(p.shape, generator=generator))
            elif name.endswith("scale_shift_table"):
                p.zero_()
                if p.shape[0] == 9:
                    p[[2, 5, 8]] = 1.0  # gates of self-attention, feed-forward, cross-attention
            elif name.endswith("norm.weight"):
                p.fill_(1.0)
            elif (
                p.ndim == 1
                or "to_gate_logits" in name
                or name.endswith(("proj_out.weight", "adaln_single.linear.weight"))
            ):
                p.zero_()
            else:
                std = p.shape[1] ** -0.5
                if name.endswith(("to_out.0.weight", "ff.net.2.weight")):
                    std *= (3 * depth) ** -0.5
                p.copy_(std * torch.randn(p.shape, generator=generator))
        nn.init.normal_(toy.projection.weight, std=0.1, generator=generator)
    return toy


def is_muon(name: str, p) -> bool:
    """Matrices inside blocks; everything else (tables, embeddings, first and last layers, gates) is Adam's."""
    return p.ndim == 2 and "blocks." in name and name.endswith("weight") and "gate" not in name
