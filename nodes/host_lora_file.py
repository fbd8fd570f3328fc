"""A LoRA file onto a MODEL through the host's own loading code, after its keys were given the standard spelling.

The host looks a LoRA's keys up among names it makes from the model's, and skips those it does not know. Renamed before, every spelling reaches the same
layers, and what follows (adapters, strength, stacking, the ``lora_metadata`` attachment) is the host's, as in its 'Load LoRA (Model)'.

Source: ComfyUI 0.30.0 ``nodes.py`` (``LoraLoader``), ``comfy/sd.py`` (``load_lora_for_models``), ``comfy/lora.py`` (``model_lora_keys_unet``).
"""

import logging
import os
from collections import OrderedDict

import comfy.lora
import comfy.sd
import comfy.utils

from ..ltx2_core.lora_file import LoraError, LoraFile, nothing_fits, open_lora
from ..ltx2_core.lora_keys import STANDARD

logger = logging.getLogger(__name__)

KEPT_FILES = 4  # opened files that stay at hand, so that another strength or a second node reads nothing again

_files = OrderedDict()  # (path, size, modification time) -> (LoraFile, tensors, metadata)


def apply(model, path, strength):
    """(clone of ``model`` with the LoRA in ``path``, warnings for the user). Raises LoraError when no layer of the file fits the model."""
    lora, tensors, metadata = _open(path)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    misfits = _misfits(lora, known, model.model.state_dict())
    applied = [layer for kind in ("video", "audio") for layer in lora.names.layers(kind) if STANDARD + layer in known and layer not in misfits]
    others = [layer for layer in lora.names.layers("unknown") if _target(lora.names.by_layer[layer][0]) in known]
    if not applied and not others:
        raise LoraError(_why_nothing(lora, misfits, model))
    standard = lora.standard(tensors, skip=lambda key: key.layer in misfits or _target(key) not in known)
    patched = comfy.sd.load_lora_for_models(model, None, standard, strength, 0.0, lora_metadata=metadata)[0]
    logger.info("%s: %s", lora.path.name, lora.names.counted(len(applied) + len(others)))
    return patched, _warnings(lora, known, misfits, others, model)


def _open(path):
    info = os.stat(path)
    key = (os.path.realpath(path), info.st_size, info.st_mtime_ns)
    if key not in _files:
        lora = open_lora(path)
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        _files[key] = (lora, tensors, metadata)
        while len(_files) > KEPT_FILES:
            _files.popitem(last=False)
    _files.move_to_end(key)
    return _files[key]


def _target(key):
    """The layer under the name the host would look up."""
    return key.standard.removesuffix(f".{key.matrix}")


def _misfits(lora: LoraFile, known, weights):
    """Layers of the model whose weight has another shape than the file's product."""
    misfits = []
    for kind in ("video", "audio"):
        for layer in lora.names.layers(kind):
            name, shape = known.get(STANDARD + layer), lora.change_shape(layer)
            if isinstance(name, str) and name in weights and shape is not None and weights[name].ndim == 2 and tuple(weights[name].shape) != shape:
                misfits.append(layer)
    return misfits


def _why_nothing(lora, misfits, model):
    if misfits:
        mine = getattr(model.model.diffusion_model, "inner_dim", None)
        theirs = f"of width {lora.width()}" if lora.width() not in (None, mine) else "of another shape"
        return f"{lora.path.name} was made for a transformer {theirs}" + (f", this model is {mine} wide" if mine else "") + "; use a LoRA of this model's version."
    if not lora.names.layers("video"):
        return nothing_fits(lora)
    return f"{lora.path.name} is a LoRA for LTX-2, but this model has none of its {len(lora.names.layers('video'))} layers; connect the model of 'LTX-2 GGUF Loader'."


def _warnings(lora, known, misfits, others, model):
    name, found = lora.path.name, []
    if misfits:
        found.append(f"{name}: {_listed(misfits)} of another shape than in this model and left out; the LoRA was made for another version.")
    absent = [layer for layer in lora.names.layers("video") if STANDARD + layer not in known]
    absent += [layer for layer in lora.names.layers("unknown") if layer not in others]
    if absent:
        found.append(f"{name}: {_listed(absent)} not in this model and left out.")
    mine, theirs = getattr(getattr(model.model.diffusion_model, "config", None), "version", None), lora.version()
    if mine and theirs and mine != theirs:
        found.append(f"{name} was made for LTX-{theirs}, this model is LTX-{mine}; expect a poor effect.")
    return found


def _listed(layers):
    shown = ", ".join(layers[:5]) + (", …" if len(layers) > 5 else "")
    return f"{len(layers)} {'layer is' if len(layers) == 1 else 'layers are'} ({shown})"
