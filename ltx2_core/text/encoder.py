"""The text encoder: prompt -> tokens -> Gemma-3 -> projection -> one feature vector per token.

Only the tokens of the prompt run, without padding: attention is causal and rotary positions are relative, so the official left-padded
run gives the same states for them, and the padding's states are dropped in the end anyway. The connector, which is part of
the video model, makes the context from these features.

Sources: Lightricks ltx-core ``text_encoders/gemma``; ComfyUI ``comfy/text_encoders/lt.py`` (names of modules).
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...quant import tensor as packed
from ..loading import text_files
from .gemma import GemmaModel, GemmaConfig, GemmaConfigError, is_norm
from .generate import Prompt, Sampling, generate
from ..loading.text_files import TextEncoderError, TextFile
from .projection import ProjectionError, TextProjection, WeightAccess, projection_geometry
from .tokenizer import GemmaTokenizer, TokenizerError
from .vision import VisionEncoder
from ..files.weights import WeightFile, WeightsMismatch, assign, open_weights

logger = logging.getLogger(__name__)

Source = str | os.PathLike | WeightFile


class TextEncoder(nn.Module):
    """Gemma-3 and the text projection.

    Parameters carry the host's names, so that LoRA files made for it fit: ``gemma3_12b.transformer.model.layers.…`` (whatever the size
    of Gemma) and ``text_embedding_projection.…``. ``tokenizer`` is a GemmaTokenizer; ``vision`` looks at the images of a chat. ``weight_sources`` maps the names of parameters
    that are a file's bytes unchanged to (WeightFile, name there).
    """

    def __init__(
        self, gemma: GemmaModel, projection: TextProjection, tokenizer: GemmaTokenizer, vision: VisionEncoder | None = None
    ):
        super().__init__()
        self.gemma3_12b = nn.Module()
        self.gemma3_12b.transformer = gemma
        self.text_embedding_projection = projection
        self.tokenizer = tokenizer
        self.vision = vision
        self.weight_sources: dict[str, tuple[WeightFile, str]] = {}

    @property
    def gemma(self) -> GemmaModel:
        return self.gemma3_12b.transformer

    @property
    def version(self) -> str:
        """The LTX-2 version the features are for: "2.0" or "2.3"."""
        return self.text_embedding_projection.version

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[int], device=None, layer_scope=None) -> torch.Tensor:
        """Token ids (BOS first) -> features [1, n, Dv], float32 on ``device``, where the work is done (default: where the weights are).

        ``layer_scope`` as in ``GemmaModel.hidden_states``. Hidden states are collected in main memory.
        """
        device = torch.device(device) if device is not None else self.gemma.model.norm.weight.device
        hidden = self.gemma(torch.tensor([list(ids)]), device, layer_scope)  # (L1, n, D)
        return self.text_embedding_projection(hidden, device)[None]  # (n, Dv) -> (1, n, Dv)

    def generate(
        self,
        tokens: Sequence[int | torch.Tensor],
        max_length: int = 256,
        sampling: Sampling = Sampling(),
        device=None,
        layer_scope=None,
        on_token: Callable[[], None] | None = None,
    ) -> list[int]:
        """Ids of the text that follows ``tokens`` of ``chat.chat_tokens``; arguments as in ``generate.generate``.

        Raises ValueError when there are images among the tokens and this encoder has no ``vision``.
        """
        prompt = self._with_images(tokens, device)
        access = self.text_embedding_projection.weight_access
        return generate(self.gemma, prompt, max_length, self.tokenizer.stop_tokens, sampling, device, access, layer_scope, on_token)

    def _with_images(self, tokens: Sequence[int | torch.Tensor], device) -> Prompt:
        ids, images = [], []
        for token in tokens:
            if not isinstance(token, torch.Tensor):
                ids.append(token)
                continue
            if self.vision is None:
                raise ValueError(
                    "This text encoder has no vision part, so it cannot look at an image; choose Gemma's vision file (mmproj-….gguf) beside it, "
                    "or disconnect the image."
                )
            features = self.vision(token, device)
            images.append((len(ids), features))
            ids += [self.tokenizer.pad] * len(features)
        return Prompt(ids, images)

    def encode(self, prompt: str, device=None, layer_scope=None) -> torch.Tensor:
        """Prompt -> features [1, n, Dv], float32; n counts the prompt's tokens and BOS, at most 1024."""
        return self.encode_ids(self.tokenizer.encode(prompt), device, layer_scope)


def load_text_encoder(
    *files: Source | Sequence[Source],
    operations=nn,
    dtype: torch.dtype | None = None,
    device="cpu",
    weight_access: WeightAccess | None = None,
) -> TextEncoder:
    """Build the text encoder from its files, in any order: Gemma-3 (GGUF or safetensors) and whatever holds the text projection.

    files: paths or open weight files, or sequences of them; the same file may be named twice. dtype: of the matrix products (default
    float32 on the CPU, bfloat16 elsewhere). Block-quantised matrices stay packed; nothing is copied that can be mapped. ``operations``
    and ``weight_access`` are the host's hooks (see ``TextProjection``). Raises TextEncoderError.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    gemma_file, projection_file, spiece = _sort([text_files.identify(weights) for weights in _open(files)])
    try:
        config = GemmaConfig.from_shapes({hf: gemma_file.weights.shape(name) for hf, name in gemma_file.gemma.items()}, _metadata(gemma_file))
        tokenizer = _tokenizer(gemma_file, spiece)
    except (GemmaConfigError, TokenizerError) as error:
        raise TextEncoderError(f"{gemma_file.name}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise TextEncoderError(
            f"{gemma_file.name}: the tokenizer has {tokenizer.vocab_size} pieces and the embedding table {config.vocab_size} rows; they are of different models."
        )
    shapes = {short: projection_file.weights.shape(name) for short, name in projection_file.projection.items()}
    try:
        version, features = projection_geometry(shapes, config.width, config.num_hidden_states)
    except ProjectionError as error:
        raise TextEncoderError(f"{projection_file.name} with {gemma_file.name}: {error}") from error

    with torch.inference_mode():  # packed tensors must be made here
        gemma = GemmaModel(config, operations, dtype, device="meta")
        _assign(gemma, gemma_file, _Loading(gemma_file.weights, gemma_file.gemma, partial(_gemma_tensor, dtype=dtype), device), _why_gemma)
        projection = TextProjection(version, config.width, config.num_hidden_states, features, operations, dtype, "meta", weight_access)
        # Its products are float32 whatever the weight is, so dense weights stay as stored.
        _assign(projection, projection_file, _Loading(projection_file.weights, projection_file.projection, lambda w, _, source: _as_stored(w, source), device))
    logger.info(
        "text encoder: Gemma-3 %s (%s), LTX-%s projection to %d (%s), %s products", config.size_name, gemma_file.name, version, features, projection_file.name, dtype
    )
    encoder = TextEncoder(gemma, projection, tokenizer).eval()
    encoder.weight_sources = _weight_sources(encoder, gemma_file, projection_file)
    return encoder


def _weight_sources(encoder: TextEncoder, gemma: TextFile, projection: TextFile) -> dict[str, tuple[WeightFile, str]]:
    """Parameters that hold exactly their file's bytes: packed GGUF matrices, and plain tensors that were neither cast nor changed."""
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    sources = {}
    for prefix, file, names in (("gemma3_12b.transformer.", gemma, gemma.gemma), ("text_embedding_projection.", projection, projection.projection)):
        for short, stored in names.items():
            parameter = encoder.get_parameter(prefix + short)
            changed = is_norm(short) and file.weights.kind == "safetensors"  # there the 1 was added
            if not changed and (packed.is_packed(parameter) or parameter.dtype == plain.get(file.weights.format(stored))):
                sources[prefix + short] = (file.weights, stored)
    return sources


def _assign(module: nn.Module, file: TextFile, tensors: Mapping, reason=None) -> None:
    try:
        assign(module, tensors, reason)
    except WeightsMismatch as error:
        raise TextEncoderError(f"{file.name}: {error}") from error


class _Loading(Mapping):
    """name -> tensor on ``device``, read on access, so that ``assign`` can check all names and shapes before anything is loaded."""

    def __init__(self, weights: WeightFile, names: Mapping[str, str], load, device):
        self._weights, self._names, self._load, self._device = weights, names, load, device

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)

    def __contains__(self, name):
        return name in self._names

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._weights.shape(self._names[name]))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._load(self._weights, name, self._names[name]).to(self._device)


def _gemma_tensor(weights: WeightFile, name: str, source: str, dtype: torch.dtype) -> torch.Tensor:
    """Matrices packed or in ``dtype``; norms as factors (1 + w) in float32; the embedding table as stored, for only rows of it are used."""
    if is_norm(name):
        norm = weights.load(source, torch.float32)
        return norm if weights.kind == "gguf" else norm + 1.0  # llama.cpp's converter has added the 1
    if name == "model.embed_tokens.weight":
        return _as_stored(weights, source)
    return weights.load_packed(source, dtype)


def _as_stored(weights: WeightFile, name: str) -> torch.Tensor:
    """A view of the file where possible: float16, bfloat16 and float32 as they are, GGUF's block formats packed, the host's decoded to bfloat16.

    Only rows of these tables are used at a time, and rows can be taken from the first two.
    """
    if weights.format(name) in ("F32", "F16", "BF16"):
        return weights.load(name)
    return weights.load_packed(name, torch.float32) if weights.kind == "gguf" else weights.load(name, torch.bfloat16)


def _metadata(file: TextFile):
    return file.weights.metadata if file.weights.kind == "gguf" else None


def _open(files) -> list[WeightFile]:
    opened: dict[str, WeightFile] = {}
    for file in files:
        if file is None:
            continue
        for one in [file] if isinstance(file, (str, os.PathLike, WeightFile)) else file:
            weights = one if isinstance(one, WeightFile) else open_weights(one)
            opened.setdefault(os.path.realpath(weights.path), weights)
    return list(opened.values())


def _sort(files: list[TextFile]) -> tuple[TextFile, TextFile, tuple[WeightFile, str] | None]:
    """(Gemma, projection, tokenizer tensor) among the files. Raises TextEncoderError when one is missing, doubled or foreign."""
    for file in files:
        if not (file.gemma or file.projection or file.spiece):
            raise TextEncoderError(text_files.foreign(file.weights))
        refusal = text_files.refusal(file.weights) if file.projection and not file.gemma else None
        if refusal:
            raise TextEncoderError(refusal)
    gemmas, projections = [f for f in files if f.gemma], [f for f in files if f.projection]
    for what, found in (("Gemma 3", gemmas), ("a text projection", projections)):
        if len(found) > 1:
            raise TextEncoderError(f"{found[0].name} and {found[1].name} both hold {what}; give one of them.")
    if not gemmas:
        given = ", ".join(f.name for f in files) or "no file"
        raise TextEncoderError(f"no Gemma 3 among the given files ({given}); {text_files.NEEDED}.")
    if not projections:
        raise TextEncoderError(
            f"{gemmas[0].name} holds Gemma 3 but no text projection; add a file that has one, for example {text_files.PROJECTION_FILES}."
        )
    spiece = next(((f.weights, f.spiece) for f in (gemmas[0], *files) if f.spiece), None)
    return gemmas[0], projections[0], spiece


def _tokenizer(gemma: TextFile, spiece: tuple[WeightFile, str] | None) -> GemmaTokenizer:
    if gemma.weights.kind == "gguf" and "tokenizer.ggml.model" in gemma.weights.metadata:
        return GemmaTokenizer.from_gguf(gemma.weights.metadata)
    if spiece is not None:
        return GemmaTokenizer.from_spiece(spiece[0].load(spiece[1]))
    beside = Path(gemma.weights.path).parent / "tokenizer.model"  # a folder downloaded from google/gemma-3-*
    if beside.is_file():
        return GemmaTokenizer.from_spiece(beside.read_bytes())
    raise TokenizerError(
        "the file holds no tokenizer ('spiece_model' is missing, and there is no tokenizer.model beside it); use a Gemma-3 GGUF, or the host's form "
        "of the file (gemma_3_12B_it….safetensors), or put Gemma's tokenizer.model into the same folder."
    )


def _why_gemma(missing: list[str], unexpected: list[str]) -> str:
    if unexpected:
        return "The file is not a plain Gemma-3 text model, or of a newer kind; use the text model as GGUF."
    return "The file is incomplete; download it again."
