"""Names of Gemma 3 and Gemma 4 text models in files, brought to transformers' (``model.layers.0.self_attn.q_proj.weight``). Standard library only.

Sources: llama.cpp ``convert_hf_to_gguf.py`` (GGUF names), google/gemma-3-12b-it, Comfy-Org/ltx-2 (``spiece_model``);
Lightricks/LTX-2.5 (``tokenizer_json``).
"""

SPIECE, TOKENIZER_JSON = "spiece_model", "tokenizer_json"

_GGUF_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF_TOP_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}

# The query norm tells Gemma 3 from Gemma 2, the norm before the feed-forward from other families.
_MARKER = "layers.0.self_attn.q_norm.weight"
_SECOND_MARKER = "layers.0.pre_feedforward_layernorm.weight"
_PER_LAYER = "per_layer"  # of Gemma 3n and of the small Gemma 4 models
_GEMMA4 = "layers.0.layer_scalar"
_PARTS = ("layers.", "embed_tokens.", "norm.")

#: ``general.architecture`` of models whose tensors are called like Gemma 3's.
LOOK_ALIKES = ("gemma", "gemma2", "gemma3n", "gemma-embedding")


def hf_name(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; names that llama.cpp does not use stay as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _GGUF_LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_GGUF_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2:] == ["layer_output_scale", "weight"]:
        return f"model.layers.{parts[1]}.layer_scalar"
    if len(parts) == 2 and parts[0] in _GGUF_TOP_NAMES:
        return f"model.{_GGUF_TOP_NAMES[parts[0]]}.{parts[1]}"
    return name


def is_norm(name: str) -> bool:
    """Whether a tensor (transformers name) is the weight of an RMS norm."""
    return name.endswith(("norm.weight", "layernorm.weight"))


def gemma_names(names, architecture=None) -> dict[str, str]:
    """{transformers name: name in the file} of a Gemma 3 or Gemma 4 (12B) text model under any prefix; empty when there is none.

    names: tensor names; architecture: ``general.architecture`` of a GGUF. What else the file holds (vision, projection) is left out.
    """
    if architecture in LOOK_ALIKES:
        return {}
    stored = {hf_name(name): name for name in names}
    for name in stored:
        prefix = name.removesuffix(_MARKER)
        if prefix == name or prefix + _SECOND_MARKER not in stored:
            continue
        found = {name[len(prefix) :]: file_name for name, file_name in stored.items() if name.startswith(prefix)}
        if any(_PER_LAYER in name for name in found) or (architecture == "gemma4" and _GEMMA4 not in found):
            continue
        return {"model." + name: file_name for name, file_name in found.items() if name.startswith(_PARTS)}
    return {}


def tokenizer_name(names) -> str | None:
    """Name of the tensor that holds the tokenizer: Gemma 3's SentencePiece model or Gemma 4's ``tokenizer.json``; None when there is none."""
    return next((name for name in names if name.split(".")[-1] in (SPIECE, TOKENIZER_JSON)), None)


_TOWER, _PROJECTOR = "vision_tower.vision_model.", "multi_modal_projector."
_VISION_LAYER_NAMES = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
}
_VISION_TOP_NAMES = {
    "v.patch_embd.weight": _TOWER + "embeddings.patch_embedding.weight",
    "v.patch_embd.bias": _TOWER + "embeddings.patch_embedding.bias",
    "v.position_embd.weight": _TOWER + "embeddings.position_embedding.weight",
    "v.post_ln.weight": _TOWER + "post_layernorm.weight",
    "v.post_ln.bias": _TOWER + "post_layernorm.bias",
    "mm.input_projection.weight": _PROJECTOR + "mm_input_projection_weight",
    "mm.soft_emb_norm.weight": _PROJECTOR + "mm_soft_emb_norm.weight",
}


def vision_names(shapes) -> dict[str, str]:
    """{transformers name: name in the file} of Gemma 3's vision part under any prefix, or with llama.cpp's names; empty when there is none.

    shapes: name -> shape. Older mmproj files call the first matrix of the feed-forward ``ffn_down`` and the second ``ffn_up``: the bias's
    length tells.
    """
    names = {}
    width = tuple(shapes.get("v.post_ln.weight", ()))
    for name in shapes:
        parts = name.split(".")
        if name in _VISION_TOP_NAMES:
            names[_VISION_TOP_NAMES[name]] = name
        elif len(parts) == 5 and parts[:2] == ["v", "blk"]:
            part = parts[3]
            if part in ("ffn_up", "ffn_down"):
                part = "mlp.fc2" if tuple(shapes.get(f"v.blk.{parts[2]}.{part}.bias", ())) == width else "mlp.fc1"
            names[f"{_TOWER}encoder.layers.{parts[2]}.{_VISION_LAYER_NAMES.get(part, part)}.{parts[4]}"] = name
        elif _PROJECTOR in name:
            names[name[name.index(_PROJECTOR) :]] = name
        elif "vision_model." in name or "vision_tower." in name:
            short = name.rsplit("vision_model.", 1)[-1].rsplit("vision_tower.", 1)[-1]
            if short.startswith(("embeddings.", "encoder.layers.", "post_layernorm.")):
                names[_TOWER + short] = name
    complete = {
        _PROJECTOR + "mm_input_projection_weight",
        _TOWER + "embeddings.position_embedding.weight",
    } <= names.keys()
    return names if complete else {}
