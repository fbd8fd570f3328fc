"""What a text-encoder file holds: Gemma-3, a text projection, both, or something that LTX-2 cannot use.

Names and header decide, never the file's name. A file is asked two questions (``gemma_names``, ``projection_names``); when it answers
neither, ``files.unsupported`` says what it is. Names are brought to transformers' spelling here, so the loader knows one spelling only.

Sources: names in circulation are those of llama.cpp's converter, google/gemma-3-12b-it, and Comfy-Org/ltx-2 (``spiece_model``).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from . import identify as file_identity
from ..files import names as keys
from ..files.comfy_quant import open_quantised
from ..text.gemma import hf_name
from ..files.weights import WeightFile, WeightFileError


class TextEncoderError(WeightFileError):
    """The given files make no LTX-2 text encoder; the message says which file is wrong and what to use."""


# In safetensors, what may stand before "layers.0.…" in a Gemma-3 text model.
_LAYER0 = "layers.0.self_attn.q_proj.weight"
SPIECE = "spiece_model"

NEEDED = "LTX-2 and LTX-2.3 take Gemma 3 12B (instruction-tuned), for example gemma-3-12b-it-Q4_K_M.gguf"
PROJECTION_FILES = "ltx-2.3_text_projection_bf16.safetensors, an '…embeddings_connectors.safetensors' or the full checkpoint"


@dataclass(frozen=True)
class TextFile:
    """One open file, sorted.

    gemma: transformers name -> name in the file, empty when the file holds no Gemma-3.
    projection: name under ``text_embedding_projection.`` -> name in the file. spiece: name of the tokenizer tensor, or None.
    """

    weights: WeightFile
    gemma: Mapping[str, str]
    projection: Mapping[str, str]
    spiece: str | None

    @property
    def name(self) -> str:
        return self.weights.path.name


def identify(weights: WeightFile) -> TextFile:
    """Sort an open file's names. A file that holds neither Gemma-3 nor a projection is sorted as empty; ``files.unsupported`` then names it."""
    weights = open_quantised(weights)
    names = weights.names()
    spiece = next((name for name in names if name == SPIECE or name.endswith("." + SPIECE)), None)
    return TextFile(weights, gemma_names(weights), projection_names(names), spiece)


def gemma_names(weights: WeightFile) -> dict[str, str]:
    """{transformers name: name in the file} of a Gemma-3 text model; empty when there is none."""
    names = weights.names()
    if weights.kind == "gguf":
        if weights.metadata.get("general.architecture") != "gemma3" or "token_embd.weight" not in weights:
            return {}
        return {hf: name for name in names if (hf := hf_name(name)) != name}
    known = set(names)
    for name in names:
        if not name.endswith(_LAYER0):
            continue
        prefix = name[: -len(_LAYER0)]
        gemma3 = all(f"{prefix}layers.0.{part}.weight" in known for part in ("self_attn.q_norm", "pre_feedforward_layernorm", "self_attn.k_norm"))
        later = any(re.search(r"\.(layer_scalar|per_layer_\w+)", other) for other in names)
        if gemma3 and not later and f"{prefix}embed_tokens.weight" in known:
            return {
                "model." + other[len(prefix) :]: other
                for other in names
                if other.startswith(prefix) and other[len(prefix) :].startswith(("layers.", "embed_tokens.", "norm."))
            }
    return {}


def projection_names(names) -> dict[str, str]:
    """{name under ``text_embedding_projection.``: name in the file} of a video text projection; empty when there is none."""
    found = keys.classify(names)["projection"]
    return {canonical[len(keys.PROJECTION) :]: name for canonical, name in found.items()}


def foreign(weights: WeightFile) -> str:
    """A sentence that says what a file without Gemma-3 and without projection is, and what to use instead."""
    report = file_identity.identify(weights)
    name = weights.path.name
    if report.has("dit") or report.has("connector"):
        return f"{name} is {_article(report.title)}, without a text projection; give a file that has one, for example {PROJECTION_FILES}."
    if report.kind == "unknown":
        return f"{name} is neither Gemma 3 nor an LTX-2 text projection (first tensors: {', '.join(weights.names()[:3]) or 'none'}); {NEEDED}."
    return f"{name} is {_article(report.title)}; {NEEDED}."


def refusal(weights: WeightFile) -> str | None:
    """Why a file is of no use although it holds a projection (LTX-2.5's text encoder, a newer transformer), or None."""
    report = file_identity.identify(weights)
    return f"{report.refusal} {NEEDED}." if report.refusal else None


def _article(title: str) -> str:
    return title if title.startswith(("a ", "an ", "the ")) else f"the {title}"
