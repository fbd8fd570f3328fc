"""A LoRA file onto a MODEL through the host's own loading code, after its keys were given the standard spelling.

The host looks a LoRA's keys up among names it makes from the model's, and skips those it does not know. Renamed before, every
spelling reaches the same layers, and what follows (adapters, strength, stacking, the ``lora_metadata`` attachment) is the host's,
as in its 'Load LoRA (Model)'.

Source: ComfyUI 0.30.0 ``nodes.py`` (``LoraLoader``), ``comfy/sd.py`` (``load_lora_for_models``), ``comfy/lora.py``
(``model_lora_keys_unet``).
"""

import logging
import os
from collections import OrderedDict

import comfy.lora
import comfy.sd
import comfy.utils

from ...ltx2_core.loading.lora import open_lora
from ...ltx2_core.lora import apply as lora_fit
from ...ltx2_core.lora.file import LoraError

logger = logging.getLogger(__name__)

KEPT_FILES = 4  # opened files that stay at hand, so that another strength or a second node reads nothing again

_files = OrderedDict()  # (path, size, modification time) -> (LoraFile, tensors, metadata)


def apply(model, path, strength):
    """(clone of ``model`` with the LoRA in ``path``, warnings for the user). Raises LoraError when no layer of the file fits the model."""
    lora, tensors, metadata = _open(path)
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    weights, network = model.model.state_dict(), model.model.diffusion_model

    def shape_of(layer):
        name = known.get(_target(lora.names.by_layer[layer][0]))
        return None if name is None else tuple(weights[name].shape) if isinstance(name, str) and name in weights else ()

    fit = lora_fit.fit(lora, shape_of)
    if not fit.applied:
        raise LoraError(lora_fit.why_nothing(lora, fit, getattr(network, "inner_dim", None)))
    applied = set(fit.applied)
    standard = lora.standard(tensors, skip=lambda key: key.layer not in applied)
    patched = comfy.sd.load_lora_for_models(model, None, standard, strength, 0.0, lora_metadata=metadata)[0]
    logger.info("%s: %s", lora.path.name, lora.names.counted(len(fit.applied)))
    return patched, lora_fit.warnings(lora, fit, getattr(getattr(network, "config", None), "version", None))


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
