"""The CLIP object: Gemma 3 with the text projection behind the host's text-encoder interface.

``CLIP.clone`` makes a plain ``comfy.sd.CLIP``, so all behaviour is in the tokenizer and in ``cond_stage_model``. The conditioning is the text features of
the prompt's tokens with the flag ``unprocessed_ltxav_embeds``; the connectors, which belong to the video model, run when sampling begins.

Sources: ComfyUI 0.30.0 ``comfy/sd.py`` (class ``CLIP``), ``comfy/text_encoders/lt.py``.
"""

import contextlib
import logging
import os

import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...ltx2_core.files.opened import path_of
from ...ltx2_core.loading.text_encoder import load_text_encoder
from ...ltx2_core.text.chat import chat_tokens
from ...ltx2_core.text.encoder import TextEncoder
from ...ltx2_core.text.generate import Sampling
from ...quant import scratch
from . import files, internals, retry
from .ops import GGUFOps, dense
from .patcher import make_patcher, uses_dynamic_vram
from .prefetch import Prefetch

logger = logging.getLogger(__name__)

TOKENS = "ltx2_gemma3"  # key of the token list in what tokenize returns
CHAT = "ltx2_gemma3_chat"  # the same for prompts that are to be answered
FLAG = {"unprocessed_ltxav_embeds": True}
LIVE_ROWS = 24  # rows of T x D that live at once in a layer of Gemma, its feed-forward's inner activations included


class HostTokenizer:
    """The host's tokenizer interface over the tokenizer of the Gemma file."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        """``{"ltx2_gemma3": [[(id, weight), ...]]}``; weights are all 1, since LTX-2 takes prompts as they are written.

        The nodes that write text say whether a template is to be put around it (``skip_template``); their tokens have the key
        ``"ltx2_gemma3_chat"`` and may have images among them.
        """
        if "skip_template" not in kwargs:
            cut = self.tokenizer.what_is_cut(text)
            if cut is not None:
                internals.notice_running(cut)
            return {TOKENS: [[(token, 1.0) for token in self.tokenizer.encode(text)]]}
        if kwargs.get("video") is not None or kwargs.get("audio") is not None:
            raise ValueError("Gemma 3 looks at images only; disconnect 'video' and 'audio'.")
        image = kwargs.get("image")
        images = [] if image is None else [image[0, ..., :3]]
        return {
            CHAT: [[(token, 1.0) for token in chat_tokens(self.tokenizer, text, images, not kwargs["skip_template"])]]
        }

    def state_dict(self):
        """Asked for by nodes that save a CLIP, before they write."""
        raise RuntimeError(
            "A text encoder from GGUF cannot be saved by this node: the file would hold packed bytes under the wrong type. "
            "Keep the GGUF file, or convert the original weights with the pack's 'convert' command."
        )

    def decode(self, token_ids, **kwargs):
        return self.tokenizer.decode(token_ids)


class HostTextEncoder(torch.nn.Module):
    """``cond_stage_model``: parameters carry the names the host's LTX text encoder has, so that LoRAs made for it fit."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.gemma3_12b = encoder.gemma3_12b
        self.text_embedding_projection = encoder.text_embedding_projection
        self._encoder = [encoder]  # in a list: its parameters are registered above, once
        self.dtypes = {encoder.gemma.dtype}
        self.execution_device = None

    def set_clip_options(self, options):
        self.execution_device = options.get("execution_device", self.execution_device)

    def reset_clip_options(self):
        self.execution_device = None

    def encode_token_weights(self, tokens):
        """(features [1, n, Dv] float32, None, flags) of ``HostTokenizer``'s tokens."""
        if TOKENS not in tokens:
            raise ValueError(
                "These are the tokens of a chat, which no video is made from; encode the written text instead."
            )
        ids = [token for token, _ in tokens[TOKENS][0]]
        device = self.execution_device or comfy.model_management.text_encoder_device()

        def encode():
            return self._encoder[0].encode_ids(
                ids, device, _PrefetchedLayers(self.gemma3_12b.transformer.model.layers, device)
            )

        required = self.memory_estimation_function(tokens)
        advice = (
            f"The GPU ran out of memory twice while encoding a prompt of {len(ids)} tokens, which takes about {required / 2**30:.1f} GB beside the weights; "
            "choose 'cpu' as the text encoder's device, or close other programs that use the GPU."
        )
        features = retry.twice(self, encode, "encoding the prompt", lambda: required, lambda: advice)
        for pages in self.__dict__.get("dynamic_vbars", {}).values():
            pages.deprioritize()  # prompts are encoded once: these weights make room before any other model's
        scratch.release()
        return features.to(comfy.model_management.intermediate_device()), None, dict(FLAG)

    def memory_estimation_function(self, tokens, device=None):
        """Bytes of free memory encoding needs: activations, attention scores of one layer, and the largest layer once dequantised."""
        config = self.gemma3_12b.transformer.config
        n = len(next(iter(tokens.values()))[0]) if tokens else 1024
        activations = 4 * n * (config.width * LIVE_ROWS + config.num_heads * n)
        return activations + 4 * config.width * config.ffn_width + (512 << 20)  # the projection's tiles

    def generate(self, tokens, do_sample=True, max_length=256, seed=None, **options):
        """Token ids of the text that answers ``HostTokenizer``'s chat tokens; the host's sampling options."""
        if CHAT not in tokens:
            raise ValueError(
                "Text is written by the nodes 'Generate Text' and 'Generate LTX2 Prompt'; these tokens are those of a video's prompt."
            )
        device = self.execution_device or comfy.model_management.text_encoder_device()
        sampling = Sampling(
            do_sample=do_sample, seed=seed, **{name: value for name, value in options.items() if value is not None}
        )
        progress = comfy.utils.ProgressBar(max_length)
        layers = self.gemma3_12b.transformer.model.layers

        def on_token():
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update(1)

        scope = _PrefetchedLayers(layers, device) if any(hasattr(module, "_v") for module in layers.modules()) else None
        ids = self._encoder[0].generate(
            [token for token, _ in tokens[CHAT][0]], max_length, sampling, device, scope, on_token
        )
        scratch.release()
        return ids

    def load_sd(self, sd):
        raise RuntimeError(
            "This text encoder is loaded by 'LTX-2 Gemma Text Encoder (GGUF)' and takes no other weights."
        )


class _PrefetchedLayers:
    """A ``layer_scope``: while a layer runs, the host brings the next one's weights in (dynamic VRAM), and a cancelled run stops."""

    def __init__(self, layers, device):
        self.layers, self.device, self.prefetch = list(layers), device, None
        self.options = {"prefetch_dynamic_vbars": any(hasattr(module, "_v") for module in layers.modules())}

    @contextlib.contextmanager
    def __call__(self, number, layer):
        comfy.model_management.throw_exception_if_processing_interrupted()
        if number == 0:
            self.prefetch = Prefetch(self.layers, self.device, self.options)
        self.prefetch.enter(number)
        yield
        if number == len(self.layers) - 1:
            self.prefetch.enter(None)


@contextlib.contextmanager
def weight_access(linear, device):
    """(weight, bias) of the projection on ``device``: packed where it is packed, with LoRA patches applied where there are any."""
    dtype = linear.weight.dtype
    weight, bias, stream = comfy.ops.cast_bias_weight(
        linear, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True
    )
    patched = weight if linear.lora is None else linear.lora.apply(dense(weight, torch.float32).clone())
    yield patched, bias
    comfy.ops.uncast_bias_weight(linear, weight, bias, stream)


class LTX2CLIP(comfy.sd.CLIP):
    """The host's CLIP object around a ``HostTextEncoder``."""

    def __init__(self, encoder, load_device, offload_device, disable_dynamic=False):
        self.cond_stage_model = HostTextEncoder(encoder)
        self.tokenizer = HostTokenizer(encoder.tokenizer)
        comfy.model_management.archive_model_dtypes(self.cond_stage_model)
        self.patcher = make_patcher(self.cond_stage_model, load_device, offload_device, disable_dynamic)
        self.patcher.is_clip = True
        self.patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
        self.layer_idx = None
        self.use_clip_schedule = False
        self.apply_hooks_to_conds = None
        self.tokenizer_options = {}


def load_clip(gemma_file, projection_file, device="default", audio=False, vision_file=None, disable_dynamic=False):
    """A CLIP object for a Gemma file and the file with the projection (which may be the same), paths or open files. ``device``: "default" or "cpu".

    audio: features for sound too, as the joint model takes them. vision_file: what looks at images, where that is not in the Gemma file.
    """
    paths = path_of(gemma_file), path_of(projection_file)
    load_device = comfy.model_management.text_encoder_device() if device == "default" else torch.device("cpu")
    offload_device = (
        comfy.model_management.text_encoder_offload_device() if device == "default" else torch.device("cpu")
    )
    dtype = products_dtype(load_device)
    given = (gemma_file, projection_file, vision_file)
    encoder = load_text_encoder(*given, operations=GGUFOps, dtype=dtype, weight_access=weight_access, audio=audio)
    if uses_dynamic_vram(load_device, disable_dynamic):
        with torch.inference_mode():
            files.read_as_needed(encoder, encoder.weight_sources)
    clip = LTX2CLIP(encoder.requires_grad_(False), load_device, offload_device, disable_dynamic)
    clip.patcher.cached_patcher_init = (_load_patcher, (*paths, device, audio, path_of(vision_file)))
    logger.info("%s with %s on %s", *map(os.path.basename, paths), load_device)
    return clip


def _load_patcher(gemma_path, projection_path, device, audio, vision_path, disable_dynamic=False):
    return load_clip(gemma_path, projection_path, device, audio, vision_path, disable_dynamic).patcher


def products_dtype(device):
    """bfloat16 where the device computes in it, else float32: Gemma's activations overflow float16."""
    return torch.bfloat16 if comfy.model_management.should_use_bf16(device) else torch.float32
