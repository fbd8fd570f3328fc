"""Load the video transformer from whatever files hold it.

The transformer and its embeddings connector may be in one GGUF, in two files, or inside a full checkpoint; each must be found
exactly once. Names and shapes give the config, the network is built on meta, and the tensors are assigned: quantised matrices of a GGUF stay
packed, everything else is made dense. Nothing of the audio stream is read unless it is asked for; then it is as strictly complete as the video's.
"""

import logging

import torch
from torch import nn

from ..files.errors import CheckpointError, WeightsMismatch
from ..files.names import AUDIO_CONNECTOR, CONNECTOR, audio_part
from ..files.opened import ModelFile, open_models
from ..files.text import first_names
from ..files.weights import WeightFile
from ..transformer.audio_video import LTX2AVModel
from ..transformer.config import MODEL_NAMES, ConfigError, config_from_shapes, connector_config_from_shapes
from ..transformer.connector import Embeddings1DConnector
from ..transformer.model import LTX2Model
from .assign import Tensors, assign
from .identify import INPUTS, identify

__all__ = ["CheckpointError", "ConfigError", "load_connector", "load_dit"]

logger = logging.getLogger(__name__)

# Top-level names that accompany a transformer without being part of it.
_NOT_THE_DIT = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "text_embedding_projection.",
    "model_ema.",
    "spiece_model",
    "tokenizer",
)


def load_dit(
    sources,
    operations=nn,
    dtype=None,
    device=None,
    attention=None,
    model_class=None,
    require_connector=True,
    audio=False,
):
    """The LTX-2 or LTX-2.3 transformer with its connector, as a ``model_class`` in eval mode.

    audio: the joint model of video and audio with both connectors; model_class (None: LTX2Model or LTX2AVModel) must be one that computes it.

    sources: a path, WeightFile or ModelFile, or a list of them. The first that holds a transformer provides it; the connector comes from
    whichever of them holds it. operations, attention: see LTX2Model. dtype: compute dtype (None: float32 on the CPU, else
    bfloat16). device: where the weights go (None: they stay views of the memory map). require_connector: False allows a model
    that only takes finished conditionings.

    Call inside ``torch.inference_mode()`` when a file is quantised. ``model.weight_sources`` maps each parameter's name to
    (WeightFile, name there). Raises CheckpointError, ConfigError or WeightFileError.
    """
    files = open_models(sources)
    dtype = dtype or (torch.float32 if device is None or torch.device(device).type == "cpu" else torch.bfloat16)
    main = _dit_source(files)
    where = {name: (main.weights, stored) for name, stored in main.names["dit"].items()}
    metadata = _text_metadata(main)
    found = _only(
        [(file, file.names["connector"]) for file in files if file.names.has("connector")], "embeddings connector"
    )
    holders = [file for file, _ in found]
    if audio:
        where |= {name: (main.weights, stored) for name, stored in _audio(main, "dit").items()}
        found += _only([(file, names) for file in files if (names := _audio(file, "connector"))], "audio connector")
    for file, names in found:
        where |= {name: (file.weights, stored) for name, stored in names.items()}
        if "config" not in metadata:
            metadata |= _text_metadata(file)
    try:
        config = config_from_shapes(
            {name: weights.shape(stored) for name, (weights, stored) in where.items()}, metadata, audio
        )
    except ConfigError as error:
        raise ConfigError(f"{main.name}: {error}") from error
    if config.connector is None and require_connector:
        raise CheckpointError(
            f"{main.name} holds the {MODEL_NAMES[config.version]} transformer but no embeddings connector, without which no prompt can be used; "
            f"also give the file that holds 'video_embeddings_connector.…' (an 'embeddings_connector' file or the full checkpoint) as {INPUTS['connector']}."
        )
    if audio and config.audio.connector is None and require_connector:
        raise CheckpointError(
            f"No audio connector was given, without which no prompt can be used for sound; give the file that holds '{AUDIO_CONNECTOR}…' "
            f"(an 'embeddings_connectors' file or the full checkpoint) as {INPUTS['connector']}, or load the model without sound."
        )
    for connector, stem in ((config.connector, CONNECTOR), (audio and config.audio.connector, AUDIO_CONNECTOR)):
        if connector is None:
            where = {name: place for name, place in where.items() if not name.startswith(stem)}
    for file in {id(file): file for file in (main, *(file for file, _ in found))}.values():
        file.weights.require_readable([stored for weights, stored in where.values() if weights is file.weights])

    model_class = model_class or (LTX2AVModel if audio else LTX2Model)
    model = model_class(config, operations=operations, dtype=dtype, device="meta", attention=attention)
    unknown = {
        name: (main.weights, name) for name in main.names["other"] if _belongs_to_dit(name, main.names.dit_prefix)
    }
    try:
        tensors = Tensors(where | unknown, _loader(dtype), device)
        extra = assign(
            model, tensors, lambda missing, unexpected: _reason(config, missing, unexpected), allow_unexpected=True
        )
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{main.name}: {error}", error.missing, error.unexpected, error.misshapen) from error
    if extra:
        logger.warning("%s", unused(main.name, extra, MODEL_NAMES[config.version]))
    model.weight_sources = {name: place for name, place in where.items() if name not in extra}
    _log(main, config, holders)
    return model.eval()


def _audio(file: ModelFile, part: str) -> dict:
    """{canonical name: stored name} of one part of the audio stream (see ``names.audio_part``)."""
    return {name: stored for name, stored in file.names["audio"].items() if audio_part(name) == part}


def _only(found: list, what: str) -> list:
    """``found``, (file, names) pairs, when there is at most one. Raises CheckpointError."""
    if len(found) > 1:
        raise CheckpointError(
            f"The {what} is in {len(found)} of the files ({', '.join(file.name for file, _ in found)}); "
            "give only one that holds it (leave 'connector_file' on auto when the model file has it)."
        )
    return found


def unused(file_name: str, extra, model_name: str) -> str:
    """The warning about tensors that no part of the model takes, as fine-tunes have them."""
    count = "1 tensor is" if len(extra) == 1 else f"{len(extra)} tensors are"
    lora = " A LoRA in a file of its own goes into a LoRA node." if any(".lora_" in name for name in extra) else ""
    return f"{file_name}: {count} not part of {model_name} and without effect (first: {first_names(extra)}).{lora}"


def load_connector(source, operations=nn, dtype=None, device=None, attention=None):
    """The embeddings connector alone, from any file that holds it. Arguments and errors as in :func:`load_dit`."""
    (file,) = open_models(source)
    names = file.names["connector"]
    config = connector_config_from_shapes(file.shapes(names), _text_metadata(file))
    if config is None:
        raise CheckpointError(f"{file.name} is {identify(file).title}; it holds no complete embeddings connector.")
    dtype = dtype or torch.float32
    module = Embeddings1DConnector(config, operations=operations, dtype=dtype, device="meta", attention=attention)
    where = {name.removeprefix(CONNECTOR): (file.weights, stored) for name, stored in names.items()}
    assign(module, Tensors(where, _loader(dtype), device))
    return module.eval()


def _loader(dtype):
    """load(weights, name, stored name) -> tensor, for products in ``dtype``."""

    def load(weights: WeightFile, name: str, stored: str) -> torch.Tensor:
        # Only GGUF blocks stay packed: the products of the host's own formats round activations, and blocks are streamed as bytes.
        if weights.kind == "gguf" and len(weights.shape(stored)) == 2 and name.endswith(".weight"):
            return weights.load_packed(stored, dtype)
        # Modulation tables stay float32: a few rows, added to activations. Everything else plain follows the compute dtype.
        return weights.load(stored, torch.float32 if "scale_shift_table" in name else dtype)

    return load


def _dit_source(files: list[ModelFile]) -> ModelFile:
    """The first file with a transformer this pack runs. Raises CheckpointError with the right name of what was given instead."""
    reports = [identify(file) for file in files]
    for file, report in zip(files, reports):
        if report.refusal is None and report.has("dit"):
            for text in report.warnings:
                logger.warning("%s", text)
            return file
    for report in reports:
        if report.refusal is not None:
            raise CheckpointError(report.refusal)
    named = "; ".join(
        f"{file.name} is {report.title}" + (f" and belongs in {report.inputs[0]}" if report.inputs else "")
        for file, report in zip(files, reports)
    )
    raise CheckpointError(
        f"No LTX-2 video transformer was given: {named}. Choose a file of LTX-2 or LTX-2.3 as {INPUTS['dit']}."
    )


def _text_metadata(file: ModelFile) -> dict:
    """The header entries that describe the model (a tokenizer's vocabulary is left undecoded)."""
    wanted = ("config", "model_version", "general.architecture")
    return {key: file.metadata[key] for key in file.metadata if key in wanted or key.endswith(".attention.head_count")}


def _belongs_to_dit(name, prefix):
    """Whether an unclassified name claims to be part of the transformer."""
    return name.startswith(prefix) if prefix else not name.startswith(_NOT_THE_DIT)


def _reason(config, missing, unexpected):
    """Likely cause of names that do not fit, as a sentence."""
    if missing and all(name.startswith((CONNECTOR, AUDIO_CONNECTOR)) for name in missing):
        return "The embeddings connector is incomplete; take it from another file ('embeddings_connector' or the full checkpoint)."
    return "The file is incomplete, or its conversion dropped tensors; download another conversion of the model."


def _log(file: ModelFile, config, connector_files):
    kept = sum(file.weights.nbytes(stored) for stored in file.names["dit"].values())
    dropped = sum(file.weights.nbytes(stored) for stored in file.names["audio"].values())
    saved = (
        f"; {len(file.names['audio'])} sound tensors skipped, {dropped / 1e9:.2f} GB not read"
        if dropped and not config.audio
        else ""
    )
    saved = "; with sound" if config.audio else saved
    connector = (
        f", connector from {connector_files[0].name}" if connector_files and connector_files[0] is not file else ""
    )
    logger.info(
        "%s: %s transformer, %d layers, %.2f GB%s%s",
        file.name,
        MODEL_NAMES[config.version],
        config.num_layers,
        kept / 1e9,
        connector,
        saved,
    )
