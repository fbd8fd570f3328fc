"""LoRA files under every spelling in circulation reach the same layers through the host's loader."""

import pytest
import torch

import host_models as hm

pytestmark = pytest.mark.usefixtures("host")

SIZES = {"num_layers": 2, "heads": 2, "head_dim": 64}
LAYERS = {  # canonical name -> (diffusers' name, rows, columns)
    "transformer_blocks.0.attn1.to_q": ("transformer_blocks.0.attn1.to_q", 128, 128),
    "transformer_blocks.1.ff.net.0.proj": ("transformer_blocks.1.ff.net.0.proj", 512, 128),
    "patchify_proj": ("proj_in", 128, 128),
    "adaln_single.linear": ("time_embed.linear", 9 * 128, 128),
    "prompt_adaln_single.linear": ("prompt_adaln.linear", 2 * 128, 128),
    "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_v": ("connectors.video_connector.transformer_blocks.0.attn1.to_v", 128, 128),
}
PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
SPELLINGS = {
    "official": ("diffusion_model.{ours}", PEFT),
    "bare": ("{ours}", PEFT),
    "bare in diffusers' names": ("{theirs}", PEFT),
    "named adapter": ("diffusion_model.{ours}", ("lora_A.default.weight", "lora_B.default.weight")),
    "down and up": ("diffusion_model.{ours}", KOHYA),
    "diffusers": ("transformer.{theirs}", PEFT),
    "PEFT": ("base_model.model.{ours}", PEFT),
    "PEFT over diffusers": ("base_model.model.transformer.{theirs}", PEFT),
    "PEFT over the official": ("base_model.model.diffusion_model.{ours}", PEFT),
    "full checkpoint": ("model.diffusion_model.{ours}", PEFT),
    "kohya": ("lora_unet_{ours_}", KOHYA),
    "lycoris": ("lycoris_{ours_}", KOHYA),
}


def lora(spelling, rank=4):
    """Tensors of a LoRA file; the alpha scales by a half."""
    pattern, (down, up) = SPELLINGS[spelling]
    generator, tensors = torch.Generator().manual_seed(3), {}
    for ours, (theirs, rows, columns) in LAYERS.items():
        layer = pattern.format(ours=ours, theirs=theirs, ours_=ours.replace(".", "_"))
        tensors[f"{layer}.{down}"] = torch.randn(rank, columns, generator=generator) * 0.2
        tensors[f"{layer}.{up}"] = torch.randn(rows, rank, generator=generator) * 0.2
        tensors[f"{layer}.alpha"] = torch.tensor(rank / 2)
    return tensors


def patched(spelling):
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(hm.model("Q8_0", **SIZES), None, lora(spelling), 0.8, 0.0)[0]


@pytest.fixture(scope="module")
def official(host):
    return hm.ksample(patched("official"), hm.latent())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_video(spelling, official):
    patcher = patched(spelling)
    assert sorted(patcher.patches) == sorted(f"diffusion_model.{name}.weight" for name in LAYERS)
    assert torch.equal(hm.ksample(patcher, hm.latent()), official)


def test_models_of_other_packs_keep_the_hosts_map():
    import comfy.lora

    hm.model("Q8_0", **SIZES)  # a first one brings the spellings in

    class Other:
        model_config = type("Config", (), {"unet_config": {}})()

        def state_dict(self):
            return {"diffusion_model.transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}

    assert not any(key.startswith(("transformer.", "base_model.")) for key in comfy.lora.model_lora_keys_unet(Other(), {}))
