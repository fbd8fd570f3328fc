"""One open model file: its header is read once, its names are sorted once, and the object is handed on to whoever needs them."""

import os
from functools import cached_property
from pathlib import Path

from . import gemma
from .names import PROJECTION, Names, classify
from .weights import WeightFile, open_weights


class ModelFile:
    """An open weight file with its names sorted. ``report`` is what ``loading.identify`` found, once somebody asked."""

    def __init__(self, weights: WeightFile):
        self.weights = weights
        self.report = None

    @property
    def path(self) -> Path:
        return self.weights.path

    @property
    def name(self) -> str:
        """The file's name, for sentences."""
        return self.weights.path.name

    @property
    def metadata(self):
        return self.weights.metadata

    @property
    def architecture(self) -> str | None:
        """``general.architecture`` of a GGUF, None when it says none."""
        found = self.metadata.get("general.architecture")
        return found if isinstance(found, str) else None

    @cached_property
    def names(self) -> Names:
        """Tensor names by part of LTX-2: ``names["dit"]`` maps canonical names to names in the file."""
        return classify(self.weights.names())

    @cached_property
    def gemma(self) -> dict[str, str]:
        """{transformers name: name in the file} of a Gemma 3 or Gemma 4 text model, empty when there is none."""
        return gemma.gemma_names(self.weights.names(), self.architecture)

    @cached_property
    def vision(self) -> dict[str, str]:
        """{transformers name: name in the file} of Gemma 3's vision part, empty when there is none."""
        return gemma.vision_names({name: self.weights.shape(name) for name in self.weights.names()})

    @cached_property
    def projection(self) -> dict[str, str]:
        """{name under ``text_embedding_projection.``: name in the file}, empty when there is no text projection for video."""
        return {canonical.removeprefix(PROJECTION): name for canonical, name in self.names["projection"].items()}

    @cached_property
    def tokenizer(self) -> str | None:
        """Name of the tensor with the tokenizer of a Gemma, or None."""
        return gemma.tokenizer_name(self.weights.names())

    def shapes(self, names) -> dict[str, tuple[int, ...]]:
        """{key: shape} for a mapping of keys to names in the file."""
        return {key: self.weights.shape(name) for key, name in names.items()}

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> "ModelFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


Source = str | os.PathLike | WeightFile | ModelFile


def path_of(source: Source | None) -> str | None:
    """The path of a source as text, None for None."""
    return None if source is None else os.fspath(source.path if isinstance(source, (ModelFile, WeightFile)) else source)


def open_model(source: Source) -> ModelFile:
    """Open a weight file of any kind; what is open already is taken as it is. Raises WeightFileError."""
    if isinstance(source, ModelFile):
        return source
    return ModelFile(source if isinstance(source, WeightFile) else open_weights(source))


def open_models(sources) -> list[ModelFile]:
    """Open one source or several (nested lists too, None is left out), each file once, in order. Raises WeightFileError."""
    files: dict[str, ModelFile] = {}

    def add(source):
        if isinstance(source, (list, tuple)):
            for one in source:
                add(one)
        elif source is not None:
            place = os.path.realpath(source.path if isinstance(source, (ModelFile, WeightFile)) else source)
            if place not in files:
                files[place] = open_model(source)

    add(sources)
    return list(files.values())
