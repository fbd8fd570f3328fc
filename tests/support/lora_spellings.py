"""One LoRA in every spelling that circulates, for the tests of keys, node, command line and pipeline."""

import json

import torch

from ltx2_gguf.ltx2_core.files.names import diffusers_name

PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")

# spelling -> (pattern of a layer, (down, up)); {ours}, {theirs}: checkpoint's and diffusers' name, {_ours}, {_theirs}: with underscores
SPELLINGS = {
    "released": ("diffusion_model.{ours}", PEFT),
    "bare": ("{ours}", PEFT),
    "down and up": ("diffusion_model.{ours}", KOHYA),
    "without weight": ("diffusion_model.{ours}", ("lora_A", "lora_B")),
    "default adapter": ("diffusion_model.{ours}", ("lora_A.default.weight", "lora_B.default.weight")),
    "named adapter": ("diffusion_model.{ours}", ("lora_A.camera.weight", "lora_B.camera.weight")),
    "old diffusers": ("{theirs}", ("lora.down.weight", "lora.up.weight")),
    "linear layer": ("{theirs}", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight")),
    "bare in diffusers' names": ("{theirs}", PEFT),
    "diffusers": ("transformer.{theirs}", PEFT),
    "diffusers' prefix alone": ("transformer.{ours}", PEFT),
    "PEFT": ("base_model.model.{ours}", PEFT),
    "PEFT over diffusers": ("base_model.model.transformer.{theirs}", PEFT),
    "PEFT over the released": ("base_model.model.diffusion_model.{ours}", PEFT),
    "PEFT, adapter named": ("base_model.model.{ours}", ("lora_A.default.weight", "lora_B.default.weight")),
    "full checkpoint": ("model.diffusion_model.{ours}", PEFT),
    "kohya": ("lora_unet_{_ours}", KOHYA),
    "kohya in diffusers' names": ("lora_unet_{_theirs}", KOHYA),
    "lycoris": ("lycoris_{_ours}", KOHYA),
    "lycoris in diffusers' names": ("lycoris_{_theirs}", KOHYA),
    "OneTrainer": ("lora_transformer_{_theirs}", KOHYA),
}
# Which of them the host's own loader reads for LTX, all layers.
HOST_READS = ("released", "bare", "down and up", "without weight", "default adapter", "kohya")

CONNECTOR_LAYER = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_v"
AUDIO = ("transformer_blocks.0.audio_attn1.to_q", "av_ca_a2v_gate_adaln_single.linear")


def video_layers(width=128, version="2.3"):
    """Layer -> (out, in): attention, feed-forward, and the ones outside the blocks, in a model of two blocks."""
    return {
        "transformer_blocks.0.attn1.to_q": (width, width),
        "transformer_blocks.1.attn2.to_out.0": (width, width),
        "transformer_blocks.0.ff.net.0.proj": (4 * width, width),
        "transformer_blocks.1.ff.net.2": (width, 4 * width),
        "patchify_proj": (width, 128),
        "adaln_single.linear": ((9 if version == "2.3" else 6) * width, width),
        CONNECTOR_LAYER: (width, width),
    }


def spell(layer, spelling):
    theirs = diffusers_name(layer)
    return SPELLINGS[spelling][0].format(
        ours=layer, theirs=theirs, _ours=layer.replace(".", "_"), _theirs=theirs.replace(".", "_")
    )


def matrices(layers, rank=4, seed=3, std=0.2, dtype=torch.float32):
    """Layer -> (up [out, r], down [r, in])."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (
            (torch.randn(outs, rank, generator=generator) * std).to(dtype),
            (torch.randn(rank, ins, generator=generator) * std).to(dtype),
        )
        for layer, (outs, ins) in layers.items()
    }


def lora(spelling="released", layers=None, *, audio=True, alpha=2.0, **options):
    """The tensors of a LoRA file. alpha: of every layer, None for no such key."""
    layers = dict(video_layers() if layers is None else layers)
    if audio:
        layers |= dict.fromkeys(AUDIO, (64, 64))
    down_name, up_name = SPELLINGS[spelling][1]
    tensors = {}
    for layer, (up, down) in matrices(layers, **options).items():
        name = spell(layer, spelling)
        tensors |= {f"{name}.{down_name}": down, f"{name}.{up_name}": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def peft_header(**settings):
    """The header entry that diffusers writes for a transformer's LoRA."""
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in settings.items()})}
