"""Switching a DiT between exact and fast products touches the safe layers and nothing else."""

import pytest
import torch

pytest.importorskip("comfy_kitchen")

from ltx2_gguf.ltx2_core.transformer.compute_mode import FAST_LAYERS, INT8_LAYERS, set_compute
from ltx2_gguf.quant import tensor

SAFE = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)
UNSAFE = ("patchify_proj", "proj_out", "adaln_single.linear", "transformer_blocks.1.attn2.to_k", "transformer_blocks.1.attn2.to_v",
          "transformer_blocks.0.attn1.to_gate_logits", "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
          "video_embeddings_connector.transformer_1d_blocks.0.ff.net.2")  # fmt: skip


def test_the_pattern_matches_the_safe_layers_under_any_prefix_and_no_other():
    for name in SAFE:
        assert FAST_LAYERS.search(f"transformer_blocks.17.{name}") and FAST_LAYERS.search(
            f"diffusion_model.transformer_blocks.0.{name}"
        )
    assert not any(FAST_LAYERS.search(name) for name in UNSAFE)
    kinds = {name: bool(INT8_LAYERS.search(f"transformer_blocks.17.{name}")) for name in SAFE}
    assert len({kinds[name] for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v")}) == 1  # products on one input
    assert kinds["ff.net.0.proj"] == kinds["ff.net.2"]  # or GELU and quantisation are passes of their own


def test_only_packed_weights_of_safe_layers_change_and_switching_back_restores_them():
    def packed_linear():
        layer = torch.nn.Linear(32, 32, device="meta")
        raw = torch.zeros(32, 34, dtype=torch.uint8)
        layer.weight = torch.nn.Parameter(tensor.pack(raw, "Q8_0", (32, 32), torch.float32), requires_grad=False)
        return layer

    with torch.inference_mode():
        layers = {
            "to_q": packed_linear(),
            "to_k": torch.nn.Linear(32, 32),
            "to_gate_logits": packed_linear(),
            "to_out": torch.nn.Sequential(packed_linear()),
        }
        block = torch.nn.ModuleDict(
            {"attn1": torch.nn.ModuleDict(layers), "attn2": torch.nn.ModuleDict({"to_q": packed_linear()})}
        )
        model = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([block]), "proj_out": packed_linear()})
    attn, cross = (model["transformer_blocks"][0][name] for name in ("attn1", "attn2"))
    assert set_compute(model, "fast") == 3
    assert cross["to_q"].weight._params.compute == "fast"
    assert attn["to_q"].weight._params.compute == attn["to_out"][0].weight._params.compute == "fast int8"
    assert attn["to_gate_logits"].weight._params.compute == model["proj_out"].weight._params.compute == "exact"
    assert set_compute(model, "exact") == 3
    assert all(layer.weight._params.compute == "exact" for layer in (attn["to_q"], attn["to_out"][0], cross["to_q"]))
    with pytest.raises(ValueError, match="exact, fast"):
        set_compute(model, "fp8")
