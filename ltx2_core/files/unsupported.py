"""Names for models this pack does not run, recognised by what their tensors are called.

Each row says what the file is and what runs it, so that a user who picked the wrong file reads its right name. The first row that
matches decides. GGUF text models are recognised by ``general.architecture`` as well, which llama.cpp always writes.

Sources: model detection of Comfy-Org/ComfyUI ``comfy/model_detection.py`` and ``comfy/sd.py``; tensor names of
ggml-org/llama.cpp ``gguf-py/gguf/constants.py``.
"""

import re
from dataclasses import dataclass

T5_WIDTH = 4096  # input of LTX-Video 0.9's caption_projection; LTX-2's takes Gemma's 3840

HOST_LOADER = "'Load Diffusion Model' of ComfyUI"
GGUF_LOADER = "a loader for GGUF diffusion models in general"


@dataclass(frozen=True)
class Foreign:
    """A kind of file: ``what`` it is, ``runs`` what would run it, and patterns that must all be found among the tensor names."""

    what: str
    runs: str
    patterns: tuple[str, ...]


_DIFFUSION = (
    Foreign(
        "a Wan video model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)blocks\.0\.self_attn\.q\.weight$", r"(?:^|\.)blocks\.0\.cross_attn\.k\.weight$"),
    ),
    Foreign(
        "a HunyuanVideo model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)txt_in\.individual_token_refiner\.blocks\.0\.",),
    ),
    Foreign(
        "a Flux image model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)double_blocks\.0\.img_attn\.", r"(?:^|\.)single_blocks\.0\."),
    ),
    Foreign(
        "a Flux image model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)single_transformer_blocks\.0\.attn\.", r"(?:^|\.)x_embedder\.weight$"),
    ),
    Foreign(
        "a Qwen-Image model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)transformer_blocks\.0\.img_mlp\.", r"(?:^|\.)transformer_blocks\.0\.txt_mlp\."),
    ),
    Foreign(
        "a Stable Diffusion 3 model",
        f"{HOST_LOADER} or {GGUF_LOADER}",
        (r"(?:^|\.)joint_blocks\.0\.(?:context_block|x_block)\.",),
    ),
    Foreign("a Mochi video model", HOST_LOADER, (r"(?:^|\.)t5_yproj\.weight$",)),
    Foreign("a Cosmos video model", HOST_LOADER, (r"(?:^|\.)blocks\.block0\.blocks\.0\.block\.attn\.",)),
    Foreign(
        "a Cosmos or Anima model",
        HOST_LOADER,
        (r"(?:^|\.)blocks\.0\.mlp\.layer1\.weight$", r"(?:^|\.)x_embedder\.proj\.1\.weight$"),
    ),
    Foreign(
        "a HiDream or Lumina image model",
        HOST_LOADER,
        (r"(?:^|\.)(?:noise_refiner|caption_projection\.0|double_stream_blocks\.0)\.",),
    ),
    Foreign(
        "an AuraFlow or Chroma image model", HOST_LOADER, (r"(?:^|\.)(?:double_layers\.0|distilled_guidance_layer)\.",)
    ),
    Foreign(
        "a PixArt image model",
        HOST_LOADER,
        (r"(?:^|\.)y_embedder\.y_embedding$", r"(?:^|\.)blocks\.0\.scale_shift_table$"),
    ),
    Foreign(
        "a Stable Diffusion or SDXL model", "'Load Checkpoint' of ComfyUI", (r"(?:^|\.)input_blocks\.0\.0\.weight$",)
    ),
    Foreign(
        "a Stable Diffusion UNet",
        HOST_LOADER,
        (r"(?:^|\.)down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn1\.to_q\.weight$",),
    ),
)

_TEXT = (
    Foreign(
        "a Gemma 4 text model",
        "LTX-2.5 with a newer ComfyUI",
        (r"(?:per_layer_input_gate|per_layer_model_projection|laurel|altup)",),
    ),
    Foreign(
        "the vision part (mmproj) of a Gemma model",
        "nothing here: prompts need only the text model",
        (r"^v\.blk\.0\.", r"^mm\."),
    ),
    Foreign(
        "the vision part (mmproj) of a multimodal model",
        "nothing here: prompts need only the text model",
        (r"^v\.blk\.0\.",),
    ),
    Foreign(
        "a Gemma 2 text model", "models built on Gemma 2 (Lumina)", (r"layers\.0\.pre_feedforward_layernorm\.weight$",)
    ),
    Foreign(
        "a T5 text encoder",
        "LTX-Video 0.9, Flux or Wan with 'Load CLIP' of ComfyUI",
        (r"(?:^|\.)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight$",),
    ),
    Foreign(
        "a T5 text encoder",
        "LTX-Video 0.9, Flux or Wan with a GGUF text encoder loader",
        (r"^enc\.blk\.0\.attn_q\.weight$",),
    ),
    Foreign("a CLIP text encoder", "'Load CLIP' of ComfyUI", (r"(?:^|\.)text_model\.encoder\.layers\.0\.self_attn\.",)),
    Foreign(
        "a language model (Llama or similar)",
        "llama.cpp or another text generator",
        (r"(?:^|\.)layers\.0\.self_attn\.q_proj\.weight$",),
    ),
    Foreign("a language model", "llama.cpp or another text generator", (r"^blk\.0\.attn_(?:q|qkv)\.weight$",)),
)

_PARTS = (
    Foreign(
        "a latent upscaler",
        "'Load Latent Upscale Model' of ComfyUI; put the file into models/latent_upscale_models",
        (r"^post_upsample_res_blocks\.0\.", r"^upsampler\."),
    ),
    Foreign(
        "a tiny preview autoencoder",
        "the host's previews; put the file into models/vae_approx",
        (r"(?:^|\.)decoder\.22\.bias$",),
    ),
    Foreign("a Wan or Qwen-Image VAE", "'Load VAE' of ComfyUI", (r"^decoder\.middle\.0\.residual\.0\.gamma$",)),
    Foreign(
        "a Stable Diffusion or Flux VAE",
        "'Load VAE' of ComfyUI",
        (r"(?:^|\.)decoder\.(?:up\.0\.block\.0|up_blocks\.0\.resnets\.0|mid\.block_1)\.",),
    ),
)

TABLE = (*_PARTS, *_TEXT, *_DIFFUSION)

# general.architecture of GGUF text models -> what they are. gemma3 is the right one and is not here.
_ARCHITECTURES = {
    "gemma": "a Gemma 1 text model", "gemma2": "a Gemma 2 text model", "gemma3n": "a Gemma 3n text model", "gemma4": "a Gemma 4 text model",
    "gemma-embedding": "an EmbeddingGemma model", "llama": "a Llama text model", "llama4": "a Llama 4 text model", "qwen2": "a Qwen 2 text model",
    "qwen2vl": "a Qwen 2 VL text model", "qwen3": "a Qwen 3 text model", "qwen3vl": "a Qwen 3 VL text model", "mistral": "a Mistral text model",
    "mistral3": "a Mistral 3 text model", "phi3": "a Phi 3 text model", "t5": "a T5 text encoder", "t5encoder": "a T5 text encoder",
    "clip": "the vision part (mmproj) of a multimodal model",
}  # fmt: skip

_RUNS = {
    "clip": "nothing here: prompts need only the text model",
    "gemma4": "LTX-2.5 with a newer ComfyUI",
    "t5": "LTX-Video 0.9, Flux or Wan with a GGUF text encoder loader",
    "t5encoder": "LTX-Video 0.9, Flux or Wan with a GGUF text encoder loader",
}


def is_ltx09(shapes) -> bool:
    """Whether this transformer ({canonical name: shape}) is LTX-Video 0.9, whose text comes from T5."""
    captions = shapes.get("caption_projection.linear_1.weight")
    return captions is not None and len(captions) == 2 and captions[1] == T5_WIDTH


def ltx25_part(names, metadata, has_gemma3: bool = False) -> str | None:
    """'transformer', 'duration head' or 'text encoder …' when a file is part of LTX-2.5, else None. names: sorted Names; metadata: the header's entries."""
    dit = names["dit"]
    version = str(metadata.get("model_version") or metadata.get("ltx_version") or "")
    block = "transformer_blocks.0.ff.net.0.proj."
    if dit:
        number = [int(part) for part in version.split(".")[:2] if part.isascii() and part.isdigit() and len(part) < 9]
        if len(number) == 2 and tuple(number) >= (2, 4):
            return "transformer"
        if (
            (block + "weight" in dit and block + "bias" not in dit)
            or "keyframes_abs_pos_embedding" in dit
            or any(name.startswith("duration_head.") for name in dit)
        ):
            return "transformer"
        if "transformer_blocks.0.prompt_scale_shift_table" in dit and "prompt_adaln_single.linear.weight" not in dit:
            return "transformer with text attention that can be cached"
    if any("attention_pooler.query_tokens" in name for name in (*names["vae"], *names["other"])):
        return "duration head"
    if "gemma_source_checkpoint" in metadata:
        return "text encoder"
    gemma4 = any(name.endswith((".layer_scalar", ".layer_output_scale.weight")) for name in names["other"])
    layers = gemma4 or any("layers.0." in name or name.startswith("blk.0.") for name in names["other"])
    if names.has("projection") and not dit and not has_gemma3 and layers:
        return "text encoder (Gemma 4 with projection)"
    return None


def name_foreign(names, architecture=None):
    """The Foreign row for these tensor names (and GGUF architecture), or None when nothing matches."""
    what = _ARCHITECTURES.get(architecture)
    if what is not None:
        return Foreign(what, _RUNS.get(architecture, "llama.cpp or another text generator"), ())
    for row in TABLE:
        if all(any(re.search(pattern, name) for name in names) for pattern in row.patterns):
            return row
    return None
