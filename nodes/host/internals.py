"""The host's internals that this pack uses, in two lists.

``NEEDED``: without them a result is wrong or there is none. They are checked by name and by the parameters that this
pack passes when the pack loads, so that the user of another ComfyUI reads one sentence instead of an AttributeError in
the middle of a run.

``ACCELERATORS``: what makes a run faster. Each is used only where its names and parameters are as they were tested;
else, or after an error inside it, it is off for the rest of the process, a line in the log says so, and the step is
computed in the host's plain way.

Sources: ComfyUI 0.30.0 and 0.33.0 ``comfy/ops.py``, ``comfy/model_patcher.py``, ``comfy/model_base.py``,
``comfy/sd.py``, ``comfy/memory_management.py``.
"""

import importlib
import inspect
import logging
import weakref

from ...ltx2_core.files.text import html

logger = logging.getLogger(__name__)

OLDEST_HOST = "0.23.0"

# module -> name -> the parameters that this pack passes by name, with those before them that it passes by place (""
# where it is not called).
NEEDED = {
    "comfy.cli_args": {"args.disable_pinned_memory": ""},
    "comfy.conds": {"CONDConstant": "cond"},
    "comfy.float": {"stochastic_rounding": "value dtype seed"},
    "comfy.hooks": {"EnumHookMode.MinVram": ""},
    "comfy.latent_formats": {"LTXAV": ""},
    "comfy.ldm.lightricks.model": {"GuideAttentionMask": ""},
    "comfy.ldm.modules.attention": {
        "attention_pytorch": "q k v heads mask transformer_options",
        "optimized_attention": "q k v heads mask transformer_options",
    },
    "comfy.lora": {
        "calculate_weight": "patches weight key intermediate_dtype",
        "model_lora_keys_unet": "model key_map",
    },
    "comfy.model_base": {"BaseModel.__init__": "model_config model_type device unet_model", "LTXAV": "", "ModelType.FLUX": ""},
    "comfy.model_management": {
        "archive_model_dtypes": "model", "current_loaded_models": "", "free_memory": "memory_required device keep_loaded",
        "get_torch_device": "", "intermediate_device": "", "intermediate_dtype": "", "is_device_cpu": "device",
        "raise_non_oom": "e", "should_use_bf16": "device", "soft_empty_cache": "",
        "text_encoder_device": "", "text_encoder_offload_device": "", "throw_exception_if_processing_interrupted": "",
        "unet_dtype": "device supported_dtypes weight_dtype", "unet_manual_cast": "weight_dtype inference_device supported_dtypes",
        "unet_offload_device": "", "vae_device": "", "vae_dtype": "device allowed_dtypes", "vae_offload_device": "",
    },
    "comfy.model_patcher": {
        "CoreModelPatcher": "", "LowVramPatch": "key patches", "wipe_lowvram_weight": "m",
        "ModelPatcher": "model load_device offload_device", "ModelPatcherDynamic": "model load_device offload_device",
        "ModelPatcher.load": "device_to", "ModelPatcher.partially_unload": "device_to memory_to_free",
        "ModelPatcher.patch_weight_to_device": "key device_to inplace_update return_weight force_cast",
        "ModelPatcher.patch_hook_weight_to_device": "hooks combined_patches key original_weights memory_counter",
        "ModelPatcher.unpatch_model": "device_to unpatch_weights",
    },
    "comfy.nested_tensor": {"NestedTensor": ""},
    "comfy.ops": {
        "_quantized_apply": "", "cast_bias_weight": "input dtype device bias_dtype offloadable", "uncast_bias_weight": "s weight bias offload_stream",
        "manual_cast.Conv3d": "", "manual_cast.Embedding": "", "manual_cast.Linear": "", "manual_cast.Linear.forward_comfy_cast_weights": "input",
    },
    "comfy.patcher_extension": {
        "CallbacksMP.ON_CLEANUP": "", "CallbacksMP.ON_DETACH": "", "WrapperExecutor.new_class_executor": "original class_obj wrappers",
        "WrappersMP.DIFFUSION_MODEL": "", "WrappersMP.SAMPLER_SAMPLE": "", "get_all_wrappers": "wrapper_type transformer_options",
    },
    "comfy.quant_ops": {"QuantizedTensor": ""},
    "comfy.sample": {"fix_empty_latent_channels": "", "prepare_noise": "latent_image seed"},
    "comfy.samplers": {"CFGGuider": "", "KSAMPLER": "sampler_function", "calc_cond_batch": "model conds x_in timestep model_options", "sampler_object": "name"},
    "comfy.sd": {"CLIP": "", "VAE": "", "load_lora_for_models": "model clip lora strength_model strength_clip"},
    "comfy.supported_models": {"LTXAV.supported_inference_dtypes": ""},
    "comfy.utils": {"PROGRESS_BAR_ENABLED": "", "ProgressBar": "total", "load_torch_file": "return_metadata", "reshape_mask": "input_mask output_shape"},
    "comfy.weight_adapter.lora": {"LoRAAdapter": ""},
}  # fmt: skip


class HostError(RuntimeError):
    """This ComfyUI does not offer something the pack needs."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def version():
    """The host's version as a string, ``"unknown"`` when it does not tell."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "unknown"


def find(module_name, name):
    """What the host calls ``module_name.name``. Raises AttributeError, or ImportError for the module itself."""
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise RuntimeError(f"{module_name} cannot be imported: {error}") from error  # that error is the one to show
        raise
    for part in name.split("."):
        found = getattr(found, part)
    return found


def differences(names):
    """What this host lacks of ``names`` (a dictionary like ``NEEDED``): ``["comfy.ops.manual_cast",
    "comfy.ops.x(dtype)", ...]``."""
    lacking = []
    for module_name, wanted in names.items():
        for name, parameters in wanted.items():
            try:
                found = find(module_name, name)
            except (AttributeError, ImportError):
                lacking.append(f"{module_name}.{name}")
                continue
            missing = _missing_parameters(found, parameters.split())
            lacking += [f"{module_name}.{name}({', '.join(missing)})"] if missing else []
    return lacking


def _missing_parameters(function, wanted):
    if not wanted:
        return []
    try:
        has = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in has.values()):
        return []
    return [name for name in wanted if name not in has]


def require():
    """Raise ``HostError`` with one sentence when the host lacks something this pack needs."""
    lacking = differences(NEEDED)
    if lacking:
        shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise HostError(
            f"LTX-2 GGUF cannot work with this ComfyUI ({version()}): it lacks {shown}. "
            f"Update ComfyUI to {OLDEST_HOST} or newer; if it is newer than this pack, update the pack."
        )


def _minor(text):
    """(major, minor) of a version; an unknown one counts as old."""
    parts = text.split(".")
    return tuple(map(int, parts[:2])) if len(parts) > 1 and all(part.isdigit() for part in parts[:2]) else (0, 0)


class Accelerator:
    """Something of the host that makes a run faster. True where it may be used.

    title: for the log; names: like ``NEEDED``; newer: it came after the oldest host, so that lacking it is no news; last: the newest host
    ("0.33") with which it works as tested, for what names and parameters do not tell.
    """

    def __init__(self, title, names, newer=False, last=None):
        self.title, self.names, self.newer, self.last = title, names, newer, last
        self._usable = None  # not asked yet

    def __bool__(self):
        if self._usable is None:
            lacking = differences(self.names)
            untested = self.last is not None and _minor(version()) > _minor(self.last)
            self._usable = not lacking and not untested
            if lacking and not self.newer:
                self._say(f"this ComfyUI ({version()}) lacks {', '.join(lacking)}")
            elif untested:
                self._say(f"this ComfyUI is {version()}, tested was up to {self.last}")
        return self._usable

    def failed(self, error):
        """Not to be used any more in this process."""
        if self._usable is not False:
            self._usable = False
            self._say(f"{type(error).__name__}: {error}")

    def _say(self, why):
        logger.warning(
            "Without %s from here on (%s); results stay the same, ComfyUI's plain way may take longer.", self.title, why
        )

    def guard(self, cleanup=None):
        """A context that ends at an error inside this accelerator, switches it off and calls ``cleanup``; ``ok`` tells
        how it ended."""
        return _Guard(self, cleanup)


class _Guard:
    def __init__(self, accelerator, cleanup):
        self.accelerator, self.cleanup, self.ok = accelerator, cleanup, True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is None or not isinstance(error, Exception):
            return False
        self.ok = False
        self.accelerator.failed(error)
        if self.cleanup is not None:
            try:
                self.cleanup()
            except Exception as second:
                logger.debug("After that: %s", second)
        return True


_PREFETCH = {
    "make_prefetch_queue": "queue device transformer_options",
    "prefetch_queue_pop": "queue device module",
    "cleanup_prefetch_queues": "",
}

PREFETCH = Accelerator("prefetching of the next block's weights", {"comfy.model_prefetch": _PREFETCH})

LORA_STREAMING = Accelerator(
    "streaming of a LoRA's matrices",
    {
        "comfy.model_patcher": {"LowVramPatch.memory_required": "", "LowVramPatch.prepare": "destination stream copy commit"},
        "comfy.model_management": {
            "MAX_PINNED_MEMORY": "", "NUM_STREAMS": "", "TOTAL_PINNED_MEMORY": "", "current_loaded_models": "", "extra_reserved_memory": "",
            "get_free_memory": "dev", "minimum_inference_memory": "", "synchronize": "",
        },
        "comfy.cli_args": {"args.disable_pinned_memory": ""},
    },
)  # fmt: skip

GRAPHS = Accelerator(
    "recording of small clips' blocks",
    {
        "comfy.model_prefetch": {
            "prefetch_queue_pop": "queue device module dtype core enable_graph",
            "cleanup_prefetch_queues": "",
        },
        "comfy.model_management": {"get_free_memory": "dev", "minimum_inference_memory": ""},
    },
    newer=True,
    last="0.33",  # later hosts record graphs only inside a memory recording of their own
)

FILE_SLICES = Accelerator(
    "reading weights straight from the file",
    {
        "comfy.memory_management": {"TensorFileSlice": "file_ref lock offset size"},
        "comfy_aimdo.model_mmap": {"ModelMMAP": ""},
    },
)

ACCELERATORS = (PREFETCH, LORA_STREAMING, GRAPHS, FILE_SLICES)


JOINT_LATENT = (
    "This latent holds video and audio, and this model was loaded for video only: set 'sound' of 'LTX-2 GGUF Loader' and of the text encoder's "
    "loader to 'on', or connect the empty video latent itself and bypass the audio nodes "
    "(LTXVConcatAVLatent, LTXVSeparateAVLatent, audio VAE); docs/comfyui.md shows it."
)

_notices = (
    weakref.WeakKeyDictionary()
)  # node class -> its notices; the host makes a class of its own for each execution


def notice(node, text):
    """Tell the user something about their input: in the log, and on the node itself, below earlier notices of the same
    execution."""
    logger.warning("%s", text)
    notices = _notices.setdefault(node, [])
    notices.append(text)
    _show(notices, lambda server: getattr(getattr(node, "hidden", None), "unique_id", None))


def notice_running(text):
    """As ``notice``, on the node that the host is running: for what happens inside an object of ours in a node of the
    host."""
    logger.warning("%s", text)
    _show([text], lambda server: getattr(server, "last_node_id", None))


def _show(notices, node_of):
    """Lines of text on a node of the open page; nothing without a server (tests, scripts). Older pages take the text
    for HTML."""
    try:
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    node_id = None if server is None else node_of(server)
    if node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text("\n".join(map(html, notices)), node_id)
