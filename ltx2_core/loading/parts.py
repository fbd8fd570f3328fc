"""Which file holds which part of a run, checked from the headers before any weight is loaded."""

from dataclasses import dataclass
from pathlib import Path

from ..files.errors import CheckpointError
from ..files.opened import ModelFile, open_model
from .identify import TITLES, FileReport, identify, require_version

_WHERE = {
    "connector": "an 'embeddings_connector' file or the full checkpoint",
    "projection": "a 'text_projection' or 'embeddings_connectors' file, or the full checkpoint",
    "vae": "a 'video_vae' file or the full checkpoint",
    "gemma": "a Gemma-3 12B GGUF, for example gemma-3-12b-it-Q4_K_M.gguf",
}


@dataclass(frozen=True)
class Parts:
    """The files of a run. model, connector: open; the others are opened when their turn comes, so that their pages can leave.

    text, vae: reports. vae_sides: "encoder" and "decoder", as far as the VAE's file has them.
    """

    model: ModelFile
    connector: ModelFile | None
    text: tuple[FileReport, ...]
    vae: FileReport
    vae_sides: frozenset[str]


def check_parts(model, text_encoder, projection=None, connector=None, vae=None) -> Parts:
    """See that these files hold a whole model between them. Arguments: paths, as for ``LTX2Pipeline.from_files``.

    Raises CheckpointError, naming what is missing or wrong and the argument that gives it, and WeightFileError.
    """
    opened: dict[str, ModelFile] = {}

    def file(path) -> ModelFile:
        return opened.setdefault(str(path), opened.get(str(path)) or open_model(path))

    main = file(model)
    report = identify(main)
    if report.refusal is not None:
        raise CheckpointError(report.refusal)
    if not report.has("dit"):
        raise CheckpointError(
            f"{main.name} is {report.title}, which holds no video transformer; give an LTX-2 or LTX-2.3 model as 'model'."
        )
    _holder("connector", report.version, [file(connector) if connector else main])
    gemma = _holder("gemma", None, [file(text_encoder)])
    holder = _holder("projection", report.version, [file(projection)] if projection else [main, gemma])
    _check_projection(holder, gemma)
    vae_file = _holder("vae", report.version, [file(vae) if vae else main])
    names = vae_file.names["vae"]
    sides = frozenset(side for side in ("encoder", "decoder") if any(name.startswith(side + ".") for name in names))
    if "decoder" not in sides:
        raise CheckpointError(
            f"{vae_file.name} holds no VAE decoder, which every video needs; give {_WHERE['vae']} as 'vae'."
        )
    beside = file(connector) if connector else None
    for other in opened.values():
        if other not in (main, beside):
            other.close()
    return Parts(main, beside, tuple({id(f): identify(f) for f in (gemma, holder)}.values()), identify(vae_file), sides)


def _holder(part: str, version: str | None, files: list[ModelFile]) -> ModelFile:
    """The first of the files that holds the part, for the model's version."""
    for file in files:
        report = identify(file)
        if report.has(part):
            if report.refusal is not None:
                raise CheckpointError(report.refusal)
            require_version(file, part, version)
            return file
    report = identify(files[0])
    if report.refusal is not None:
        raise CheckpointError(report.refusal)
    option = "text_encoder" if part == "gemma" else part
    raise CheckpointError(
        f"{files[0].name} is {report.title}, without the {TITLES[part]} that a run needs; give {_WHERE[part]} as '{option}'."
    )


def _check_projection(file: ModelFile, gemma: ModelFile) -> None:
    """The projection takes what this Gemma gives."""
    report = identify(gemma)
    if (
        report.config.generation == 4
    ):  # for LTX-2.5, which ``identify`` refuses so far; the widths would agree with LTX-2.3's
        raise CheckpointError(
            f"{Path(gemma.path).name} ({report.title}) belongs to LTX-2.5, the model does not; give {_WHERE['gemma']} as 'text_encoder'."
        )
    wanted = report.config.width * report.config.num_hidden_states
    for short, name in file.projection.items():
        inputs = file.weights.shape(name)[-1]
        if short.endswith("aggregate_embed.weight") and inputs != wanted:
            raise CheckpointError(
                f"{file.name}: the text projection takes {inputs} numbers per token, and {Path(gemma.path).name} ({report.title}) "
                f"gives {wanted}; the released models need Gemma-3 12B."
            )
