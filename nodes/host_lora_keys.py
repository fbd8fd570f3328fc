"""Spellings of LoRA keys that the host does not know for LTX: those of diffusers and PEFT, and of full checkpoints.

The host maps ``diffusion_model.<layer>``, ``<layer>`` and ``lora_unet_<layer>``, with every usual name for the matrices themselves. It makes this map in a function that
takes the model; :func:`accept` adds the other spellings to what the function returns for a model of this pack, and for no other.

Sources: ComfyUI 0.30.0 ``comfy/lora.py`` (``model_lora_keys_unet``); huggingface/diffusers ``loaders/lora_conversion_utils.py``; huggingface/peft (``base_model.model``).
"""

import functools

import comfy.lora

from ..ltx2_core.keys import diffusers_name

PREFIXES = ("transformer.", "base_model.model.", "base_model.model.diffusion_model.", "base_model.model.transformer.", "model.diffusion_model.")
_NETWORK, _WEIGHT = "diffusion_model.", ".weight"


def accept(model_class):
    """Have the host accept the spellings for models of ``model_class``. Safe to call again."""
    known = comfy.lora.model_lora_keys_unet
    if getattr(known, "ltx2_gguf_class", None) is model_class:
        return

    @functools.wraps(known)
    def model_lora_keys_unet(model, key_map={}):  # noqa: B006  (the host's own signature)
        key_map = known(model, key_map)
        if isinstance(model, model_class):
            for spelling, key in spellings(model.state_dict()):
                key_map.setdefault(spelling, key)
        return key_map

    model_lora_keys_unet.ltx2_gguf_class = model_class
    comfy.lora.model_lora_keys_unet = model_lora_keys_unet


def spellings(keys):
    """Pairs (layer as a LoRA may call it, key of its weight) for the host's ``keys``."""
    for key in keys:
        if not (key.startswith(_NETWORK) and key.endswith(_WEIGHT)):
            continue
        layer = key[len(_NETWORK) : -len(_WEIGHT)]
        yield "lycoris_" + layer.replace(".", "_"), key
        for name in dict.fromkeys((layer, diffusers_name(layer))):
            yield name, key
            for prefix in PREFIXES:
                yield prefix + name, key
