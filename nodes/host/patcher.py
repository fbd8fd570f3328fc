"""Which of the host's model patchers holds a GGUF model, and the one subclass needed when dynamic VRAM is off.

With dynamic VRAM the host's own ``ModelPatcherDynamic`` is used unchanged: it attaches a LoRA as
``weight_lowvram_function``, which ``host.ops`` applies. Without it the host's ``ModelPatcher`` would bake a LoRA into
every fully loaded weight; ``GGUFModelPatcher`` attaches it in the same way instead.

Source: ComfyUI 0.30.0 ``comfy/model_patcher.py``.
"""

import logging

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ...quant import scratch
from . import move, retry
from .lora import is_patch
from .ops import PackedWeight, is_packed

logger = logging.getLogger(__name__)

SMALL_BYTES = 256 << 10  # of a module whose weights are on the device also when the model is only partly loaded


class GGUFModelPatcher(comfy.model_patcher.ModelPatcher):
    """``ModelPatcher`` that leaves packed weights packed: a LoRA is attached to the layer and applied when the layer
    runs."""

    def patch_weight_to_device(self, key, device_to=None, inplace_update=False, return_weight=False, force_cast=False):
        op = self._packed_op(key)
        if op is None or key not in self.patches or return_weight:
            return super().patch_weight_to_device(key, device_to, inplace_update, return_weight, force_cast)
        op.weight_lowvram_function = comfy.model_patcher.LowVramPatch(key, self.patches)

    def load(self, device_to=None, *args, **kwargs):
        with move.uploading(device_to if device_to is not None else self.load_device):
            super().load(device_to, *args, **kwargs)
        self._take_patches()
        self._place_small_weights(device_to)

    def partially_unload(self, device_to, memory_to_free=0, *args, **kwargs):
        memory_to_free += sum(size for _, _, size in self._small_modules())
        freed = super().partially_unload(device_to, memory_to_free, *args, **kwargs)
        self._take_patches()
        return freed - self._place_small_weights(self.load_device)

    def _place_small_weights(self, device):
        """Put norms' weights and modulation tables on the device, whatever else stays in main memory; returns their
        bytes.

        All together take a few megabytes. Offloaded, they would cost a wait per block and the passes that fuse a norm
        with what follows it, whose results round differently: a partly loaded model gives the bits of a fully loaded
        one.
        """
        placed = 0
        if device is None:
            return placed
        for name, module, size in self._small_modules():
            if hasattr(module, "comfy_cast_weights"):
                if getattr(module, "comfy_patched_weights", False) or module.weight_function or module.bias_function:
                    continue
                comfy.model_patcher.wipe_lowvram_weight(module)
                module.comfy_patched_weights = True
            elif all(parameter.device == device for parameter in module._parameters.values()):
                continue
            for key, parameter in module.named_parameters(recurse=False):
                self.unpin_weight(f"{name}.{key}" if name else key)
                module._parameters[key] = torch.nn.Parameter(parameter.to(device), requires_grad=False)
            placed += size
        self.model.model_loaded_weight_memory += placed
        return placed

    def _small_modules(self):
        """(name, module, bytes) of every module with few dense weights and no patch on them."""
        for name, module in self.model.named_modules():
            own = list(module.named_parameters(recurse=False))
            if own and not any(is_packed(parameter) or f"{name}.{key}" in self.patches for key, parameter in own):
                size = sum(parameter.nbytes for _, parameter in own)
                if size <= SMALL_BYTES:
                    yield name, module, size

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        if unpatch_weights:
            for module in self.model.modules():
                if isinstance(module, PackedWeight):
                    module.weight_lowvram_function = None
        super().unpatch_model(device_to, unpatch_weights)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter):
        if key in combined_patches and self._packed_op(key) is not None:
            raise RuntimeError(
                "LoRA hooks cannot be used with GGUF weights; load the LoRA with 'Load LoRA' on the MODEL instead."
            )
        super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def _packed_op(self, key):
        """The layer whose packed ``weight`` is called ``key``, or None."""
        path, _, name = key.rpartition(".")
        if name != "weight" or not path:
            return None
        op = self.model.get_submodule(path)
        return op if isinstance(op, PackedWeight) and is_packed(op.weight) else None

    def _take_patches(self):
        """Attach a LoRA that the host has put among the functions of a layer it offloads in the same way as that of a
        loaded one."""
        for module in self.model.modules():
            if (
                isinstance(module, PackedWeight)
                and is_packed(module.weight)
                and any(map(is_patch, module.weight_function))
            ):
                module.weight_lowvram_function = next(filter(is_patch, module.weight_function))
                module.weight_function = [function for function in module.weight_function if not is_patch(function)]


def uses_dynamic_vram(load_device, disable_dynamic=False):
    """Whether the host would page this model's weights in and out by itself (comfy-aimdo)."""
    dynamic = comfy.model_patcher.CoreModelPatcher is comfy.model_patcher.ModelPatcherDynamic
    return dynamic and not disable_dynamic and not comfy.model_management.is_device_cpu(load_device)


def make_patcher(model, load_device, offload_device, disable_dynamic=False):
    """The patcher for ``model`` (an nn.Module with packed weights), by the host's memory mode."""
    if uses_dynamic_vram(load_device, disable_dynamic):
        patcher = comfy.model_patcher.ModelPatcherDynamic(model, load_device=load_device, offload_device=offload_device)
    else:
        patcher = GGUFModelPatcher(model, load_device=load_device, offload_device=offload_device)
    callbacks = comfy.patcher_extension.CallbacksMP
    patcher.add_callback(callbacks.ON_CLEANUP, _after_a_run)
    patcher.add_callback(callbacks.ON_DETACH, _after_unloading)
    logger.info(
        "%s: %s", type(model).__name__, "dynamic VRAM" if patcher.is_dynamic() else "static VRAM with offloading"
    )
    return patcher


def _after_a_run(patcher):
    """What sampling kept on the device beside the weights goes, so that the next stage (the VAE's decode) has the
    memory."""
    _release(patcher.model)
    retry.usual_size(patcher.model)


def _after_unloading(patcher, unpatch_all):
    """The model leaves the device, or another clone of it (perhaps with the same LoRAs) takes over."""
    network = _release(patcher.model)
    if unpatch_all and network is not None:
        network.loras.unpin()
        network.forget_tables()


def _release(model):
    """Give back device memory of the transformer in ``model`` and of products; returns the transformer, None where
    there is none."""
    network = getattr(model, "diffusion_model", None)
    if network is not None:
        network.release()
    scratch.release()
    return network
