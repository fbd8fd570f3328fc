"""Load the text encoder from its files: Gemma 3 (or Gemma 4 of LTX-2.5), the text projection and the tokenizer, in whichever of them they are.

Names and header decide, never the file's name. Block-quantised matrices stay packed; nothing is copied that can be mapped.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ...quant import tensor as packed
from ..files.errors import WeightFileError, WeightsMismatch
from ..files.gemma import SPIECE, TOKENIZER_JSON, is_norm
from ..files.names import PROJECTION, audio_part
from ..files.opened import ModelFile, Source, open_models
from ..files.weights import WeightFile
from ..text.config import GemmaConfig, GemmaConfigError
from ..text.encoder import TextEncoder
from ..text.gemma import GemmaModel
from ..text.projection import ProjectionError, TextProjection, WeightAccess, projection_geometry
from ..text.tokenizer import GemmaTokenizer, TokenizerError
from ..text.tokenizer_gemma4 import Gemma4Tokenizer
from ..text.vision import VisionConfig, VisionEncoder, VisionError, vision_tensor
from .assign import Tensors, assign
from .identify import identify

logger = logging.getLogger(__name__)

NEEDED = "LTX-2 and LTX-2.3 take Gemma 3 12B (instruction-tuned), for example gemma-3-12b-it-Q4_K_M.gguf"
PROJECTION_FILES = (
    "ltx-2.3_text_projection_bf16.safetensors, an '…embeddings_connectors.safetensors' or the full checkpoint"
)
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TextEncoderError(WeightFileError):
    """The given files make no LTX-2 text encoder; the message says which file is wrong and what to use."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def load_text_encoder(
    *files: Source | Sequence[Source],
    operations=nn,
    dtype: torch.dtype | None = None,
    device="cpu",
    weight_access: WeightAccess | None = None,
    audio: bool = False,
) -> TextEncoder:
    """The text encoder from its files, in any order, in eval mode: Gemma 3 (GGUF or safetensors), whatever holds the text projection and, if
    it is to look at images, the vision part (mmproj GGUF, or in Gemma's own safetensors).

    files: paths, WeightFiles or ModelFiles, or sequences of them; the same file may be named twice. dtype: of the matrix products (default
    float32 on the CPU, bfloat16 elsewhere). ``operations`` and ``weight_access`` are the host's hooks (see ``TextProjection``).
    audio: features for sound too; 2.3 has a second projection for them, which must then be there (2.0 uses one for both).
    ``encoder.weight_sources`` maps the names of parameters that are a file's bytes unchanged to (WeightFile, name there). Raises TextEncoderError.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    opened = open_models(files)
    gemma_file, projection_file = _sources(opened)
    vision_file = next((file for file in opened if file.vision), None)
    try:
        config = GemmaConfig.from_shapes(gemma_file.shapes(gemma_file.gemma), gemma_file.metadata)
        tokenizer = _tokenizer(config, gemma_file, opened)
    except (GemmaConfigError, TokenizerError) as error:
        raise TextEncoderError(f"{gemma_file.name}: {error}") from error
    if tokenizer.vocab_size > config.vocab_size:
        raise TextEncoderError(
            f"{gemma_file.name}: the tokenizer has {tokenizer.vocab_size} pieces and the embedding table {config.vocab_size} rows; "
            "they are of different models."
        )
    try:
        version, features = projection_geometry(
            projection_file.shapes(projection_file.projection), config.width, config.num_hidden_states
        )
    except ProjectionError as error:
        raise TextEncoderError(f"{projection_file.name} with {gemma_file.name}: {error}") from error

    projection_names, audio_features = dict(projection_file.projection), 0
    if audio and version == "2.3":
        projection_names |= _audio_projection(projection_file)
        audio_features = projection_file.weights.shape(projection_names["audio_aggregate_embed.weight"])[0]
    gemma_file.weights.require_readable(gemma_file.gemma.values())
    projection_file.weights.require_readable(projection_names.values())

    with torch.inference_mode():  # packed tensors must be made here
        gemma = GemmaModel(config, operations, dtype, device="meta")
        adds_one = config.generation == 3 and gemma_file.weights.kind == "safetensors"
        gemma_where = {name: (gemma_file.weights, stored) for name, stored in gemma_file.gemma.items()}
        _assign(
            gemma,
            gemma_file,
            Tensors(gemma_where, partial(_gemma_tensor, dtype=dtype, adds_one=adds_one), device),
            _reason,
        )
        projection = TextProjection(
            version,
            config.width,
            config.num_hidden_states,
            features,
            operations,
            dtype,
            "meta",
            weight_access,
            audio_features,
        )
        projection_where = {name: (projection_file.weights, stored) for name, stored in projection_names.items()}
        # Its products are float32 whatever the weight is, so dense weights stay as stored.
        _assign(
            projection,
            projection_file,
            Tensors(projection_where, lambda weights, _, stored: _as_stored(weights, stored), device),
        )
        vision = None if vision_file is None else _vision(vision_file, config, dtype)
    encoder = TextEncoder(gemma, projection, tokenizer, vision).eval()
    encoder.weight_sources = _unchanged(encoder, "gemma3_12b.transformer.", gemma_where, adds_one)
    encoder.weight_sources |= _unchanged(encoder, "text_embedding_projection.", projection_where, False)
    logger.info(
        "text encoder: Gemma %d %s (%s), LTX-%s projection to %d (%s), %s products",
        config.generation, config.size_name, gemma_file.name, encoder.version, features, projection_file.name, dtype,
    )  # fmt: skip
    return encoder


def _audio_projection(file: ModelFile) -> dict[str, str]:
    """{name under ``text_embedding_projection.``: name in the file} of 2.3's projection for sound. Raises TextEncoderError without it."""
    found = {
        canonical.removeprefix(PROJECTION): stored
        for canonical, stored in file.names["audio"].items()
        if audio_part(canonical) == "projection"
    }
    if "audio_aggregate_embed.weight" not in found:
        raise TextEncoderError(
            f"{file.name} holds the text projection for video alone; sound needs a file that has 'audio_aggregate_embed' too, or turn sound off."
        )
    return found


def _vision(file: ModelFile, config: GemmaConfig, dtype: torch.dtype) -> VisionEncoder:
    """What looks at images; it stays in the memory map. Raises TextEncoderError."""
    try:
        geometry = VisionConfig.from_shapes(file.shapes(file.vision))
    except VisionError as error:
        raise TextEncoderError(f"{file.name}: {error}") from error
    if geometry.text_width != config.width:
        raise TextEncoderError(
            f"{file.name} is the vision part for a Gemma of width {geometry.text_width}, this Gemma's is {config.width}; "
            "use the vision file (mmproj) of the same Gemma."
        )
    file.weights.require_readable(file.vision.values())
    vision = VisionEncoder(geometry, nn, dtype, device="meta")
    where = {name: (file.weights, stored) for name, stored in file.vision.items()}
    _assign(vision, file, Tensors(where, partial(vision_tensor, dtype=dtype), torch.device("cpu")), _reason)
    return vision.eval()


def _sources(files: list[ModelFile]) -> tuple[ModelFile, ModelFile]:
    """(Gemma, projection) among the files. Raises TextEncoderError when one is missing, there twice, or of another model."""
    for file in files:
        if not (file.gemma or file.projection or file.tokenizer or file.vision):
            raise TextEncoderError(_wrong(file))
        if file.projection and not file.gemma and identify(file).refusal:
            raise TextEncoderError(f"{identify(file).refusal} {NEEDED}.")
    gemmas, projections = [f for f in files if f.gemma], [f for f in files if f.projection]
    for what, found in (("Gemma 3", gemmas), ("a text projection", projections)):
        if len(found) > 1:
            raise TextEncoderError(f"{found[0].name} and {found[1].name} both hold {what}; give one of them.")
    if not gemmas:
        given = ", ".join(f.name for f in files) or "no file"
        raise TextEncoderError(f"no Gemma 3 among the given files ({given}); {NEEDED}.")
    if not projections:
        raise TextEncoderError(
            f"{gemmas[0].name} holds Gemma 3 but no text projection; add a file that has one, for example {PROJECTION_FILES}."
        )
    for text in identify(gemmas[0]).warnings:
        logger.warning("%s", text)
    return gemmas[0], projections[0]


def _wrong(file: ModelFile) -> str:
    """A sentence that says what a file without Gemma 3 and without projection is, and what to use instead."""
    report = identify(file)
    title = report.title if report.title.startswith(("a ", "an ", "the ")) else f"the {report.title}"
    if report.has("dit") or report.has("connector"):
        return f"{file.name} is {title}, without a text projection; give a file that has one, for example {PROJECTION_FILES}."
    if report.kind == "unknown":
        first = ", ".join(file.weights.names()[:3]) or "none"
        return f"{file.name} is neither Gemma 3 nor an LTX-2 text projection (first tensors: {first}); {NEEDED}."
    return f"{file.name} is {title}; {NEEDED}."


def _tokenizer(config: GemmaConfig, gemma: ModelFile, files: list[ModelFile]) -> GemmaTokenizer | Gemma4Tokenizer:
    """The tokenizer that the GGUF carries in its metadata, else the one of a tensor, else the one beside the file."""
    kind, read, name, beside = {
        3: (GemmaTokenizer, GemmaTokenizer.from_spiece, SPIECE, "tokenizer.model"),
        4: (Gemma4Tokenizer, Gemma4Tokenizer.from_json, TOKENIZER_JSON, "tokenizer.json"),
    }[config.generation]
    if gemma.weights.kind == "gguf" and "tokenizer.ggml.model" in gemma.metadata:
        return kind.from_gguf(gemma.metadata)
    for file in (gemma, *files):
        if file.tokenizer and file.tokenizer.endswith(name):
            return read(file.weights.load(file.tokenizer))
    beside = gemma.path.parent / beside  # a folder downloaded from google/gemma-*
    if beside.is_file():
        return read(beside.read_bytes())
    if config.generation == 4:
        raise TokenizerError(
            f"the file holds no tokenizer ('{TOKENIZER_JSON}' is missing, and there is no tokenizer.json beside it); use the released "
            "gemma4-12b-with-proj-ltx-2.5 file, or put Gemma 4's tokenizer.json into the same folder."
        )
    raise TokenizerError(
        "the file holds no tokenizer ('spiece_model' is missing, and there is no tokenizer.model beside it); use a Gemma-3 GGUF, or the host's form "
        "of the file (gemma_3_12B_it….safetensors), or put Gemma's tokenizer.model into the same folder."
    )


def _gemma_tensor(weights: WeightFile, name: str, stored: str, dtype: torch.dtype, adds_one: bool) -> torch.Tensor:
    """Matrices packed or in ``dtype``; norms as factors in float32; the embedding table as stored, for only rows of it are used.

    adds_one: the file has w for 1 + w, as Gemma 3's safetensors do; llama.cpp's converter has added the 1, Gemma 4 has none.
    """
    if is_norm(name) or name.endswith("layer_scalar"):
        value = weights.load(stored, torch.float32)
        return value + 1.0 if adds_one and is_norm(name) else value
    if name == "model.embed_tokens.weight":
        return _as_stored(weights, stored)
    return weights.load_packed(stored, dtype)


def _as_stored(weights: WeightFile, stored: str) -> torch.Tensor:
    """A view of the file where possible: plain numbers as they are, GGUF's block formats packed, the host's decoded to bfloat16.

    Only rows of these tables are used at a time, and rows can be taken from the first two.
    """
    if weights.format(stored) in _PLAIN:
        return weights.load(stored)
    return (
        weights.load_packed(stored, torch.float32) if weights.kind == "gguf" else weights.load(stored, torch.bfloat16)
    )


def _assign(module: nn.Module, file: ModelFile, tensors: Tensors, reason=None) -> None:
    try:
        assign(module, tensors, reason)
    except WeightsMismatch as error:
        raise TextEncoderError(f"{file.name}: {error}") from error


def _reason(missing: list[str], unexpected: list[str]) -> str:
    if unexpected:
        return "The file is not a plain Gemma text model, or of a newer kind; use the text model as GGUF."
    return "The file is incomplete; download it again."


def _unchanged(encoder: TextEncoder, prefix: str, where: dict, adds_one: bool) -> dict[str, tuple[WeightFile, str]]:
    """Parameters that hold exactly their file's bytes: packed GGUF matrices, and plain tensors that were neither cast nor changed."""
    sources = {}
    for short, (weights, stored) in where.items():
        parameter = encoder.get_parameter(prefix + short)
        changed = adds_one and is_norm(short)
        if not changed and (packed.is_packed(parameter) or parameter.dtype == _PLAIN.get(weights.format(stored))):
            sources[prefix + short] = (weights, stored)
    return sources
