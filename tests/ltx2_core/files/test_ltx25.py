"""Parts of LTX-2.5 are recognised by name, whatever they are called in the file."""

import pytest
import torch
from safetensors.torch import save_file

from ltx2_gguf.ltx2_core.files import structure
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.quant.gguf.writer import GGUFWriter

SMALL = structure.Geometry.small("2.3", num_layers=1, heads=2, head_dim=32, connector_layers=1)


def transformer():
    """2.5's transformer: 2.3's without the biases of the video feed-forward, with one marker."""
    shapes = {
        name: shape
        for name, shape in structure.dit_shapes(SMALL).items()
        if ".ff.net." not in name or not name.endswith(".bias")
    }
    return shapes | {"keyframes_abs_pos_embedding": (1, 64)}


def diffusion_vae():
    return {
        "encoder.conv_in.conv.weight": (8, 48, 3, 3, 3), "decoder.conv_in.weight": (16, 8), "decoder.conv_in_x_t.weight": (8, 48),
        "decoder.det_stages.0.0.attn.qkv.weight": (48, 16), "decoder.t_embedder.mlp.0.weight": (8, 8), "per_channel_statistics.mean-of-means": (8,),
    }  # fmt: skip


DURATION_HEAD = {"duration_head.attention_pooler.query_tokens": (1, 4, 8), "duration_head.mlp.0.weight": (8, 8)}
CASES = {
    "official transformer": (transformer(), "model.diffusion_model.", "LTX-2.5 transformer"),
    "bare transformer": (transformer(), "", "LTX-2.5 transformer"),
    "host's transformer": (transformer(), "diffusion_model.", "LTX-2.5 transformer"),
    "transformer without marker": (
        {n: s for n, s in transformer().items() if "keyframes" not in n},
        "",
        "LTX-2.5 transformer",
    ),
    "diffusion VAE": (diffusion_vae(), "", "LTX-2.5 diffusion VAE"),
    "diffusion VAE in a checkpoint": (diffusion_vae(), "vae.", "LTX-2.5 diffusion VAE"),
    "duration head": (DURATION_HEAD, "", "LTX-2.5 duration head"),
    "duration head of a model": (DURATION_HEAD, "model.diffusion_model.", "LTX-2.5 duration head"),
    "bare duration head": (
        {n.removeprefix("duration_head."): s for n, s in DURATION_HEAD.items()},
        "",
        "LTX-2.5 duration head",
    ),
}


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
@pytest.mark.parametrize("case", CASES)
def test_every_part_is_named(tmp_path, case, container):
    shapes, prefix, words = CASES[case]
    path = tmp_path / f"a.{container}"
    if container == "safetensors":
        save_file({prefix + name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    else:
        flat = {prefix + name: shape if len(shape) < 5 else (*shape[:2], 27) for name, shape in shapes.items()}
        with GGUFWriter(
            path, {"general.architecture": "ltxv"}, [(name, "F32", shape) for name, shape in flat.items()]
        ) as writer:
            for name, shape in flat.items():
                writer.write(name, torch.zeros(shape))
    report = identify(path)
    assert words in report.title
    if "VAE" in case:  # the one part that runs: its latents are LTX-2.3's
        assert report.kind == "vae" and not report.refusal
    else:
        assert report.refusal.startswith(f"a.{container} is an LTX-2.5")


def test_ltx23_is_none_of_it(tmp_path):
    save_file(
        {name: torch.zeros(shape) for name, shape in structure.dit_shapes(SMALL).items()}, tmp_path / "a.safetensors"
    )
    assert identify(tmp_path / "a.safetensors").refusal is None
