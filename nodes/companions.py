"""What ``auto`` means: the connectors, projection or VAE that a file lacks, found by content in the user's folders.

Only headers are read. A file beside the given one is preferred, then one that holds nothing else (a companion rather than another model); when the
candidates disagree about the LTX-2 version, the user is asked to choose.
"""

import logging
import os
from functools import lru_cache

from ..ltx2_core.loading.transformer import CheckpointError, identify
from ..ltx2_core.files.weights import WeightFileError, open_weights
from . import folders

logger = logging.getLogger(__name__)


def connector(model_path, choice):
    """Path of the file with the connectors when it is not ``model_path`` itself, else None."""
    report = _report(model_path)
    if choice != folders.AUTO:
        return folders.path("ltx2_gguf_connectors", choice)
    if not report.has("dit") or report.has("connector"):
        return None  # the loader names what is wrong with a file that holds no transformer
    found = _find("ltx2_gguf_connectors", "connector", lambda other: other.version == report.version, near=model_path)
    if found is None:
        raise CheckpointError(
            f"{os.path.basename(model_path)} contains no embeddings connectors, and no file in your folders has those of LTX-{report.version}; "
            "download an 'embeddings_connectors' file of the same model into models/text_encoders."
        )
    return found


def vae(model_path, choice):
    """Path of the file with the video VAE of this model; None when there is none."""
    if choice != folders.AUTO:
        return folders.path("ltx2_gguf_vaes", choice)
    report = _report(model_path)
    if report.has("vae"):
        return model_path
    return _find("ltx2_gguf_vaes", "vae", lambda other: other.version == report.version, near=model_path)


def projection(gemma_path, choice):
    """Path of the file with the text projection for this Gemma. Raises CheckpointError when there is none, or two for different versions."""
    if choice != folders.AUTO:
        return folders.path("ltx2_gguf_projections", choice)
    report = _report(gemma_path)
    if report.kind != "gemma":
        return gemma_path  # the text encoder's loader says what the file is
    wanted = report.config.width * report.config.num_hidden_states
    fitting = _candidates("ltx2_gguf_projections", "projection", lambda other: _projection_inputs(other.path) == wanted, near=gemma_path)
    if not fitting:
        raise CheckpointError(
            f"No file in your folders has a text projection for {report.title} ({os.path.basename(gemma_path)}); "
            "download the model's 'text_projection' or 'embeddings_connectors' file into models/text_encoders, or choose a model file that contains it."
        )
    versions = {_projection_version(found.path): os.path.basename(found.path) for found in fitting}
    if len(versions) > 1:
        named = " and ".join(f"{name} (LTX-{version})" for version, name in sorted(versions.items()))
        raise CheckpointError(f"Your folders have text projections for two versions: {named}; choose the one of your model in 'projection_file'.")
    logger.info("text projection from %s", fitting[0].path)
    return fitting[0].path


def _find(key, part, fits, near):
    found = _candidates(key, part, fits, near)
    if not found:
        return None
    logger.info("%s from %s", part, found[0].path)
    return found[0].path


def _candidates(key, part, fits, near):
    """Reports of files under ``key`` that hold ``part`` and fit, best first: beside ``near``, then files with the fewest other parts, then by name."""
    reports = []
    for name in folders.files(key):
        path = folders.path(key, name)
        try:
            report = _report(path)
        except (WeightFileError, OSError) as error:
            logger.debug("%s is not considered: %s", path, error)
            continue
        if report and report.has(part) and fits(report):
            reports.append(report)
    folder = os.path.dirname(os.path.realpath(near))
    return sorted(reports, key=lambda r: (os.path.dirname(os.path.realpath(r.path)) != folder, len(r.parts), r.path))


def _report(path):
    info = os.stat(path)
    return _read_report(os.path.realpath(path), info.st_size, info.st_mtime_ns)


@lru_cache(maxsize=256)
def _read_report(path, size, modified):
    file = open_weights(path)
    try:
        return identify(file)
    finally:
        file.close()


def _projection_shapes(path):
    from ..ltx2_core.files.names import classify

    file = open_weights(path)
    try:
        return {name: file.shape(source) for name, source in classify(file.names())["projection"].items()}
    finally:
        file.close()


def _projection_inputs(path):
    return next((shape[1] for name, shape in _projection_shapes(path).items() if name.endswith(".weight")), None)


def _projection_version(path):
    return "2.3" if any("video_aggregate_embed" in name for name in _projection_shapes(path)) else "2.0"
