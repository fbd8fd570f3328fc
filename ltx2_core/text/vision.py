"""What Gemma 3 sees: the SigLIP vision tower and the projector, an image to rows that stand among the text's embeddings.

Parameters carry transformers' names under ``vision_tower.vision_model`` and ``multi_modal_projector``; ``files.gemma.vision_names`` maps those
of a llama.cpp mmproj GGUF and of other prefixes to them.

Letters: P patches on a side, W width of the tower, m tokens of an image (a square number), D width of Gemma.

Sources: transformers ``models/siglip/modeling_siglip.py``, ``models/gemma3/modeling_gemma3.py``; llama.cpp ``convert_hf_to_gguf.py``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..files.weights import WeightFile

TOKENS_PER_IMAGE = 256
HEAD_WIDTH = 72  # of the released tower, 16 heads of 1152; its shapes do not tell
EPS = 1e-6


class VisionError(ValueError):
    """The file holds no vision part that fits the text model."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of the tower, read off shapes. ``image_size`` is the side of the square image in pixels."""

    width: int
    ffn_width: int
    num_layers: int
    num_heads: int
    patch_size: int
    patches: int
    text_width: int
    tokens: int = TOKENS_PER_IMAGE

    @property
    def image_size(self) -> int:
        return self.patches * self.patch_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None = None) -> "VisionConfig":
        """``shapes`` under this module's names. Raises VisionError."""
        try:
            width, _, patch, _ = shapes["vision_tower.vision_model.embeddings.patch_embedding.weight"]
            positions = shapes["vision_tower.vision_model.embeddings.position_embedding.weight"][0]
            ffn_width = shapes["vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"][0]
            text_width = shapes["multi_modal_projector.mm_input_projection_weight"][1]
        except KeyError as error:
            raise VisionError(f"the vision part lacks {error}; it is not Gemma 3's, or incomplete.") from None
        layers = {int(m[1]) for m in map(re.compile(r".*encoder\.layers\.(\d+)\.").match, shapes) if m}
        patches = math.isqrt(positions)
        if patches**2 != positions or layers != set(range(len(layers))):
            raise VisionError(
                f"the vision part has {positions} positions and layers {sorted(layers)}; it is not Gemma 3's, or incomplete."
            )
        return cls(width, ffn_width, len(layers), num_heads or max(1, width // HEAD_WIDTH), patch, patches, text_width)


class _Attention(nn.Module):
    def __init__(self, c: VisionConfig, operations, dtype, device):
        super().__init__()
        self.heads = c.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, operations.Linear(c.width, c.width, dtype=dtype, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, c: VisionConfig, operations, dtype, device):
        super().__init__()
        self.fc1 = operations.Linear(c.width, c.ffn_width, dtype=dtype, device=device)
        self.fc2 = operations.Linear(c.ffn_width, c.width, dtype=dtype, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Layer(nn.Module):
    def __init__(self, c: VisionConfig, operations, dtype, device):
        super().__init__()
        self.layer_norm1 = operations.LayerNorm(c.width, eps=EPS, dtype=dtype, device=device)
        self.self_attn = _Attention(c, operations, dtype, device)
        self.layer_norm2 = operations.LayerNorm(c.width, eps=EPS, dtype=dtype, device=device)
        self.mlp = _MLP(c, operations, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Tower(nn.Module):
    """[B, 3, S, S] pixels in -1 to 1 -> [B, P*P, W]."""

    def __init__(self, c: VisionConfig, operations, dtype, device):
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embedding = operations.Conv2d(
            3, c.width, c.patch_size, c.patch_size, dtype=dtype, device=device
        )
        self.embeddings.position_embedding = operations.Embedding(c.patches**2, c.width, dtype=dtype, device=device)
        self.encoder.layers = nn.ModuleList(_Layer(c, operations, dtype, device) for _ in range(c.num_layers))
        self.post_layernorm = operations.LayerNorm(c.width, eps=EPS, dtype=dtype, device=device)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, W, P, P) -> (B, P*P, W)
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + self.embeddings.position_embedding(positions).to(x)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class _Projector(nn.Module):
    """Averages patches to m tokens, norms them and takes them to Gemma's width."""

    def __init__(self, c: VisionConfig, operations, dtype, device):
        super().__init__()
        self.config = c
        self.mm_input_projection_weight = nn.Parameter(
            torch.empty(c.width, c.text_width, dtype=dtype, device=device), requires_grad=False
        )
        self.mm_soft_emb_norm = operations.RMSNorm(
            c.width, eps=EPS, dtype=torch.float32, device=device
        )  # holds the factor itself

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.config
        x = x.transpose(1, 2).unflatten(2, (c.patches, c.patches))  # (B, P*P, W) -> (B, W, P, P)
        x = F.avg_pool2d(x, c.patches // math.isqrt(c.tokens)).flatten(2).transpose(1, 2)  # -> (B, m, W)
        weight = self.mm_input_projection_weight
        return self.mm_soft_emb_norm(x.float()).to(weight.dtype).to(x.device) @ weight.to(x.device)


class VisionEncoder(nn.Module):
    """Images to rows among a text's embeddings. Not scaled like the embeddings of words."""

    def __init__(self, config: VisionConfig, operations=nn, dtype: torch.dtype = torch.float32, device=None):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = _Tower(config, operations, dtype, device)
        self.multi_modal_projector = _Projector(config, operations, dtype, device)

    @torch.inference_mode()
    def forward(self, image: torch.Tensor, device=None) -> torch.Tensor:
        """image [H, W, 3], 0 to 1, any size -> [m, D] float32 on ``device``; it is resized to the tower's square, as it was trained."""
        device = (
            torch.device(device) if device is not None else self.multi_modal_projector.mm_input_projection_weight.device
        )
        pixels = image.float().permute(2, 0, 1)[None]
        size = (self.config.image_size,) * 2
        if pixels.shape[-2:] != size:  # on the CPU: not every device resizes with a filter
            pixels = F.interpolate(pixels.cpu(), size, mode="bilinear", antialias=True, align_corners=False).clamp_(
                0, 1
            )
        pixels = (pixels * 2 - 1).to(device=device, dtype=self.dtype)
        return self.multi_modal_projector(self.vision_tower.vision_model(pixels))[0].float()


def vision_tensor(weights: WeightFile, name: str, stored: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the vision part as ``VisionEncoder`` wants it: dense, and the norm before the projection as its factor."""
    if name.endswith("mm_soft_emb_norm.weight"):
        norm = weights.load(stored, torch.float32)
        return norm if weights.kind == "gguf" else norm + 1.0  # llama.cpp's converter has added the 1
    if name.endswith("_proj.weight") or (".mlp." in name and name.endswith("weight")):
        return weights.load_packed(stored, dtype)
    return weights.load(stored, dtype)
