"""What a training run starts from: the folder an earlier run left, or the exported file it became.

An exported file (GGUF or safetensors, see ``export.py``) holds the averaged weights only, rounded to its format, with the text
projection multiplied out. The optimiser starts anew, and so does the text basis: it is computed from the captions at hand, and
the projection is expressed in it without loss, because the basis keeps the span of the projection's rows.
"""

import contextlib
from pathlib import Path

import torch

from ltx2_gguf.ltx2_core.files.names import PROJECTION, classify
from ltx2_gguf.ltx2_core.files.weights import open_weights

from . import files, pack, text  # noqa: F401


def exported(path: Path, *parts: str) -> dict[str, torch.Tensor]:
    """Tensors of an exported file's parts (``keys.PARTS``) by canonical name, float32. Raises ValueError for a part that is not there."""
    found = {}
    with contextlib.closing(open_weights(path)) as file:
        names = classify(file.names())
        for part in parts:
            if not names.has(part):
                raise ValueError(
                    f"{path} holds no {part}; training resumes from a file that export.py wrote, or from a run's folder."
                )
            found |= {name: file.load(stored, torch.float32).clone() for name, stored in names[part].items()}
    return found


def vae_weights(source: Path) -> dict[str, torch.Tensor] | None:
    """The VAE's state of a run's folder or an exported file, None when the folder has none."""
    return exported(source, "vae") if Path(source).is_file() else files.load_weights(source, "vae")


def dit_weights(source: Path) -> dict[str, torch.Tensor] | None:
    """The state of ``model.Toy`` with the text basis (``basis.…``) a run's folder holds, None when it has none."""
    return files.load_weights(source, "dit")


def exported_projection(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(matrix on the normed states, bias) of an exported file's text projection, see ``text.unfold``."""
    found = exported(path, "projection")
    return text.unfold(found[f"{PROJECTION}video_aggregate_embed.weight"]), found[
        f"{PROJECTION}video_aggregate_embed.bias"
    ]


def exported_dit(path: Path, basis: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of ``model.Toy`` an exported file holds, its text projection expressed in ``basis`` (what lies outside it is dropped)."""
    state = {"dit." + name: value for name, value in exported(path, "dit", "connector").items()}
    mean, directions, scale = (basis[name].float().cpu() for name in ("mean", "directions", "scale"))
    wide, bias = exported_projection(path)
    state["projection.weight"], state["projection.bias"] = wide @ directions.T * scale, bias + wide @ mean
    return state
