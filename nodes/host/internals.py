"""The host's internals this pack relies on, checked by name once.

Everything here is internal API of ComfyUI and may move. ``require`` is called before the first node is registered: when a
name is missing the user reads one sentence instead of an AttributeError in the middle of a run. Only ``nodes/host*.py`` touch ``comfy``.

Sources: ComfyUI 0.30.0 ``comfy/ops.py``, ``comfy/model_patcher.py``, ``comfy/model_base.py``, ``comfy/sd.py``, ``comfy/memory_management.py``.
"""

import importlib
import logging
import weakref

logger = logging.getLogger(__name__)

OLDEST_HOST = "0.20.0"

REQUIRED = {
    "comfy.ops": ("manual_cast", "cast_bias_weight", "uncast_bias_weight", "_quantized_apply"),
    "comfy.model_patcher": ("ModelPatcher", "ModelPatcherDynamic", "LowVramPatch", "CoreModelPatcher", "get_key_weight"),
    "comfy.model_base": ("LTXAV", "BaseModel", "ModelType"),
    "comfy.supported_models": ("LTXAV",),
    "comfy.latent_formats": ("LTXAV",),
    "comfy.model_management": (
        "archive_model_dtypes",
        "intermediate_device",
        "intermediate_dtype",
        "load_models_gpu",
        "raise_non_oom",
        "should_use_bf16",
        "soft_empty_cache",
        "text_encoder_device",
        "text_encoder_offload_device",
        "throw_exception_if_processing_interrupted",
        "unet_dtype",
        "unet_manual_cast",
        "unet_offload_device",
        "unload_model_and_clones",
        "vae_device",
        "vae_dtype",
        "vae_offload_device",
    ),
    "comfy.memory_management": ("TensorFileSlice", "aimdo_enabled"),
    "comfy.model_prefetch": ("make_prefetch_queue", "prefetch_queue_pop"),
    "comfy.patcher_extension": ("CallbacksMP", "WrapperExecutor", "WrappersMP", "get_all_wrappers"),
    "comfy.quant_ops": ("QuantizedTensor",),
    "comfy.samplers": ("CFGGuider", "sampler_object", "calc_cond_batch"),
    "comfy.sd": ("CLIP", "VAE", "load_lora_for_models"),
    "comfy.utils": ("load_torch_file",),
    "comfy.hooks": ("EnumHookMode",),
    "comfy.lora": ("calculate_weight", "model_lora_keys_unet"),
}


class HostError(RuntimeError):
    """This ComfyUI does not offer something the pack needs."""


def version():
    """The host's version as a string, ``"unknown"`` when it does not tell."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "unknown"


def missing_names(required=None):
    """Names of ``required`` (module -> names) that this host lacks, as ``["comfy.ops.manual_cast", ...]``."""
    missing = []
    for module_name, names in (REQUIRED if required is None else required).items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not module_name.startswith(error.name):
                raise  # the module is there, one of its own imports is not: that error is the one to show
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    return missing


def require():
    """Raise ``HostError`` with one sentence when the host lacks a name this pack uses."""
    missing = missing_names()
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise HostError(
            f"LTX-2 GGUF cannot work with this ComfyUI ({version()}): it lacks {shown}. "
            f"Update ComfyUI to {OLDEST_HOST} or newer; if it is newer than this pack, update the pack."
        )


JOINT_LATENT = (
    "This latent holds video and audio, and this model makes video only: connect the empty video latent itself and bypass the audio nodes "
    "(LTXVConcatAVLatent, LTXVSeparateAVLatent, audio VAE); docs/comfyui.md shows it."
)

_notices = weakref.WeakKeyDictionary()  # node class -> its notices; the host makes a class of its own for each execution


def notice(node, text):
    """Tell the user something about their input: in the log, and on the node itself, below earlier notices of the same execution."""
    logger.warning("%s", text)
    try:
        from server import PromptServer
    except ImportError:
        return  # used without a server (tests, scripts): the log line is the notice
    server = getattr(PromptServer, "instance", None)
    node_id = getattr(getattr(node, "hidden", None), "unique_id", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        notices = _notices.setdefault(node, [])
        notices.append(text)
        server.send_progress_text("\n".join(notices), node_id)
