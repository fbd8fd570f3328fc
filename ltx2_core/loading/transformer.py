"""Load the video transformer from whatever files hold it.

The transformer and its embeddings connector may be in one GGUF, in two files, or inside a full checkpoint; each must be found
exactly once. Names and shapes give the config, the network is built on meta, and the tensors are assigned: quantised matrices of a GGUF stay
packed, everything else is made dense, and nothing of the sound stream is read.
"""

import logging
import os
from collections.abc import Mapping

import torch
from torch import nn

from ..files.comfy_quant import open_quantised
from ..transformer.config import ConfigError, MODEL_NAMES, config_from_shapes, connector_config_from_shapes
from ..transformer.connector import Embeddings1DConnector
from ..transformer.model import LTX2Model
from .identify import FileReport, INPUTS, identify
from ..files.names import CONNECTOR, classify
from ..files.weights import WeightFile, WeightFileError, WeightsMismatch, assign, open_weights

__all__ = ["CheckpointError", "ConfigError", "FileReport", "identify", "load_dit", "load_connector"]

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


class CheckpointError(WeightFileError):
    """The files given do not hold what is to be loaded; the message says what they are and what is needed."""


def load_dit(sources, operations=nn, dtype=None, device=None, attention=None, model_class=LTX2Model, require_connector=True):
    """The LTX-2 or LTX-2.3 video transformer with its connector, as a ``model_class`` in eval mode.

    sources: a path or WeightFile, or a list of them. The first that holds a transformer provides it; the connector comes from
    whichever of them holds it. operations, attention: see LTX2Model. dtype: compute dtype (None: float32 on the CPU, else
    bfloat16). device: where the weights go (None: they stay views of the memory map). require_connector: False allows a model
    that only takes finished conditionings.

    Call inside ``torch.inference_mode()`` when a file is quantised. ``model.weight_sources`` maps each parameter's name to
    (WeightFile, name there). Raises CheckpointError, ConfigError or WeightFileError.
    """
    files = _open_all(sources)
    dtype = dtype or (torch.float32 if device is None or torch.device(device).type == "cpu" else torch.bfloat16)
    sorted_names = {id(file): classify(file.names()) for file in files}
    main = _dit_source(files)
    names = sorted_names[id(main)]
    where = {name: (main, source) for name, source in names["dit"].items()}
    metadata = dict(_text_metadata(main))
    holders = [file for file in files if sorted_names[id(file)].has("connector")]
    if len(holders) > 1:
        raise CheckpointError(
            f"The embeddings connector is in {len(holders)} of the files ({', '.join(file.path.name for file in holders)}); "
            "give only one that holds it (leave 'connector_file' on auto when the model file has it)."
        )
    if holders:
        where |= {name: (holders[0], source) for name, source in sorted_names[id(holders[0])]["connector"].items()}
        if "config" not in metadata:
            metadata |= _text_metadata(holders[0])
    config = config_from_shapes({name: file.shape(source) for name, (file, source) in where.items()}, metadata)
    if config.connector is None and require_connector:
        raise CheckpointError(
            f"{main.path.name} holds the {MODEL_NAMES[config.version]} transformer but no embeddings connector, without which no prompt can be used; "
            f"also give the file that holds 'video_embeddings_connector.…' (an 'embeddings_connector' file or the full checkpoint) as {INPUTS['connector']}."
        )
    if config.connector is None:
        where = {name: place for name, place in where.items() if not name.startswith(CONNECTOR)}

    model = model_class(config, operations=operations, dtype=dtype, device="meta", attention=attention)
    unknown = {name: (main, name) for name in names["other"] if _belongs_to_dit(name, names.dit_prefix)}
    try:
        assign(model, _Loading(where | unknown, dtype, device), lambda missing, unexpected: _reason(config, missing, unexpected))
    except WeightsMismatch as error:
        raise WeightsMismatch(f"{main.path.name}: {error}", error.missing, error.unexpected, error.misshapen) from error
    model.weight_sources = where
    _log(main, sorted_names[id(main)], config, holders)
    return model.eval()


def load_connector(source, operations=nn, dtype=None, device=None, attention=None):
    """The embeddings connector alone, from any file that holds it. Arguments and errors as in :func:`load_dit`."""
    (file,) = _open_all(source)
    names = classify(file.names())["connector"]
    config = connector_config_from_shapes({name: file.shape(source) for name, source in names.items()}, _text_metadata(file))
    if config is None:
        raise CheckpointError(f"{file.path.name} is {identify(file).title}; it holds no complete embeddings connector.")
    dtype = dtype or torch.float32
    module = Embeddings1DConnector(config, operations=operations, dtype=dtype, device="meta", attention=attention)
    assign(module, _Loading({name.removeprefix(CONNECTOR): (file, source) for name, source in names.items()}, dtype, device))
    return module.eval()


class _Loading(Mapping):
    """name -> tensor, read from its file on access, so that ``assign`` can check all names before anything is loaded."""

    def __init__(self, where, dtype, device):
        self._where, self._dtype, self._device = where, dtype, device

    def __iter__(self):
        return iter(self._where)

    def __len__(self):
        return len(self._where)

    def __contains__(self, name):
        return name in self._where

    def shape(self, name):
        """Logical shape, from the header."""
        file, source = self._where[name]
        return torch.Size(file.shape(source))

    def __getitem__(self, name):
        file, source = self._where[name]
        # Only GGUF blocks stay packed: the products of the host's own formats round activations, and blocks are streamed as bytes.
        if file.kind == "gguf" and len(file.shape(source)) == 2 and name.endswith(".weight"):
            tensor = file.load_packed(source, self._dtype)
        else:
            # Modulation tables stay float32: a few rows, added to activations. Everything else plain follows the compute dtype.
            tensor = file.load(source, torch.float32 if name.endswith("scale_shift_table") else self._dtype)
        return tensor if self._device is None else tensor.to(self._device)


def _open_all(sources):
    """WeightFiles for paths or WeightFiles, each file once."""
    sources = sources if isinstance(sources, (list, tuple)) else [sources]
    files, seen = [], set()
    for source in sources:
        file = open_quantised(source if isinstance(source, WeightFile) else open_weights(source))
        key = os.path.realpath(file.path)
        if key not in seen:
            seen.add(key)
            files.append(file)
    return files


def _dit_source(files):
    """The first file with a transformer this pack runs. Raises CheckpointError with the right name of what was given instead."""
    reports = [identify(file) for file in files]
    for file, report in zip(files, reports):
        if report.refusal is None and report.has("dit"):
            return file
    for report in reports:
        if report.refusal is not None:
            raise CheckpointError(report.refusal)
    named = "; ".join(
        f"{file.path.name} is {report.title}" + (f" and belongs in {report.inputs[0]}" if report.inputs else "")
        for file, report in zip(files, reports)
    )
    raise CheckpointError(f"No LTX-2 video transformer was given: {named}. Choose a file of LTX-2 or LTX-2.3 as {INPUTS['dit']}.")


def _text_metadata(file):
    """The header entries that describe the model (a tokenizer's vocabulary is left undecoded)."""
    return {key: file.metadata[key] for key in file.metadata if key in ("config", "model_version", "general.architecture") or key.endswith(".attention.head_count")}


def _belongs_to_dit(name, prefix):
    """Whether an unclassified name claims to be part of the transformer."""
    return name.startswith(prefix) if prefix else not name.startswith(_NOT_THE_DIT)


def _reason(config, missing, unexpected):
    """Likely cause of names that do not fit, as a sentence."""
    if missing and all(name.startswith(CONNECTOR) for name in missing):
        return "The embeddings connector is incomplete; take it from another file ('embeddings_connector' or the full checkpoint)."
    if any(".lora_" in name for name in unexpected):
        return "The file holds LoRA weights beside the model; load them with a LoRA node instead."
    if missing:
        return "The file is incomplete, or its conversion dropped tensors; download another conversion of the model."
    return f"The file has parts that {MODEL_NAMES[config.version]} does not have; it may be a newer or modified model, which this pack would compute wrongly."


def _log(file, names, config, connector_files):
    kept = sum(file.nbytes(source) for source in names["dit"].values())
    dropped = sum(file.nbytes(source) for source in names["audio"].values())
    saved = f"; {len(names['audio'])} sound tensors skipped, {dropped / 1e9:.2f} GB not read" if dropped else ""
    connector = f", connector from {connector_files[0].path.name}" if connector_files and connector_files[0] is not file else ""
    logger.info(
        "%s: %s transformer, %d layers, %.2f GB%s%s", file.path.name, MODEL_NAMES[config.version], config.num_layers, kept / 1e9, connector, saved
    )
