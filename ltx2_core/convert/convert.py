"""Write GGUF files: from safetensors or GGUF checkpoints (``convert``), from a GGUF without its sound (``strip``), from tensors (``write_gguf``).

A conversion follows its plan (``convert/plan.py``) tensor by tensor and, inside a tensor, a few rows at a time, over the source's memory map. The
map is opened anew after every quarter of a gigabyte, so the process stays small whatever the size of the checkpoint. The file grows under a
temporary name and gets its own when it is whole (``quant/output.py``).

Layout of what is written: architecture ``ltxv``; transformer and connector under bare names, ``vae.`` and
``text_embedding_projection.`` before theirs; ``config`` and ``model_version`` as in the safetensors metadata; a tensor of more than
four dimensions is stored as ``[O, I, k*k*k]`` with its shape in ``comfy.gguf.orig_shape.<name>``.

Sources: ggml ``docs/gguf.md``; city96/ComfyUI-GGUF ``tools/convert.py`` (key names that readers expect).
"""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...quant.formats import FORMATS
from ...quant.gguf.metadata import GGUFValue
from ...quant.gguf.reader import GGUFFile
from ...quant.gguf.writer import GGUFWriter
from ...quant.output import Output, check_output
from ..audio.config import audio_vae_config
from ..files.errors import WeightFileError
from ..files.names import classify
from ..files.weights import ORIG_SHAPE, WeightFile, open_weights
from ..loading.audio import find_audio_vae
from . import plan as planning
from .importance import read_importance
from .plan import Entry, Inventory, Plan, PlanError

log = logging.getLogger(__name__)

ARCHITECTURE = "ltxv"
MAX_DIMENSIONS = 4

# Weights handled at once: 16 MB as float32, and a few times that inside an encoder.
CHUNK_WEIGHTS = 4 * 2**20
# Bytes read from the source before its map is opened anew, which lets go of the pages that were read.
REOPEN_BYTES = 2**28

# llama.cpp's number for "mostly this type", which other tools show.
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11, "q3_k_m": 12, "q4_k": 14, "q4_k_m": 15,
    "q5_k": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32,
}  # fmt: skip

Progress = Callable[[int, str], None]  # (bytes of the source done, tensor name)


class ConvertError(WeightFileError):
    """The conversion cannot be done; the message says why and what to do."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def open_sources(paths: Sequence[str | Path]) -> list[WeightFile]:
    return [open_weights(path) for path in paths]


def plan_for(paths: Sequence[str | Path], target: str, *, with_audio: bool = False) -> Plan:
    """The plan for converting the first file, completed by the others. with_audio: the audio stream too."""
    sources = open_sources(paths)
    try:
        first, *companions = (planning.inventory_of(source) for source in sources)
        return planning.make_plan(first, target, companions=companions, keep=planning.AUDIO_MODEL if with_audio else ())
    finally:
        for source in sources:
            source.close()


def convert(
    paths: Sequence[str | Path],
    output: str | Path,
    target: str,
    *,
    with_audio: bool = False,
    importance: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Convert a checkpoint (first path; the others hold what it lacks) to one GGUF file of the video model.

    with_audio: keep the audio stream with its connector and text projection (not the audio VAE: see ``extract_audio_vae``).
    target: see ``plan.TARGETS``. importance: a file that ``calibrate`` wrote; matrices that it lacks are encoded without. ``progress`` is
    called with the source bytes done so far. Raises PlanError, ConvertError, ImportanceError, OutputError, WeightFileError or OSError; then no
    output was written.
    """
    paths, output = [Path(path) for path in paths], Path(output)
    plan = plan_for(paths, target, with_audio=with_audio)
    weights = read_importance(importance, {row.output: row.entry.shape for row in plan.kept}) if importance else {}
    check_output(output, suffixes=(".gguf",), overwrite=overwrite, sources=paths, nbytes=plan.output_bytes)
    metadata = _metadata(
        plan.metadata, name=output.stem, target=target, config=video_config(plan.metadata.get("config"))
    )
    tensors = [(row.output, row.format, row.entry.shape) for row in plan.kept]
    with _writer(output, metadata, tensors, overwrite) as writer:
        done = 0
        for number, path in enumerate(paths):
            done = _write_rows(writer, path, [row for row in plan.kept if row.file == number], weights, done, progress)
    return plan


def _write_rows(
    writer: GGUFWriter,
    path: Path,
    rows: Sequence,
    importance: Mapping[str, torch.Tensor],
    done: int,
    progress: Progress | None,
) -> int:
    reader = _Reader(path)
    try:
        for row in rows:
            for data in reader.encoded(row.source, row.format, importance.get(row.output)):
                writer.write(row.output, data)
            done += row.entry.nbytes
            if progress:
                progress(done, row.output)
    finally:
        reader.close()
    return done


class _Reader:
    """Reads tensors of one source a few rows at a time, and lets go of what was read by opening the map anew now and then."""

    def __init__(self, path: Path):
        self.path = path
        self.source = open_weights(path)
        self.read = 0

    def close(self) -> None:
        self.source.close()

    def encoded(self, name: str, fmt: str, importance: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """The tensor's bytes in format ``fmt``, in pieces. Unchanged when the source has that format already."""
        stored = self.source.format(name)
        for rows in self._pieces(name, fmt):
            if not _finite(rows):
                raise ConvertError(
                    f"{self.path.name}: tensor {name!r} holds NaN or infinity; the checkpoint is damaged. Download it again."
                )
            data = rows if stored == fmt else _encode(rows, fmt, importance)
            if fmt == "F16" and not _finite(data if stored == fmt else data.view(torch.float16)):
                raise ConvertError(
                    f"{self.path.name}: tensor {name!r} has values beyond float16's range; convert to bf16 instead."
                )
            yield data

    def _pieces(self, name: str, fmt: str) -> Iterator[torch.Tensor]:
        """Rows of numbers, or of packed bytes when the tensor is stored as ``fmt``."""
        rows, columns = self.source.stored_matrix(name)
        copied = self.source.format(name) == fmt and FORMATS[fmt].is_quantized
        step = max(1, CHUNK_WEIGHTS // max(1, columns))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield _packed_rows(self.source, name)[start:stop] if copied else self.source.load_rows(name, start, stop)
            self.read += self.source.nbytes(name) * (stop - start) // rows
            if self.read > REOPEN_BYTES:
                self.source.close()
                self.source, self.read = open_weights(self.path), 0


def _encode(rows: torch.Tensor, fmt: str, importance: torch.Tensor | None = None) -> torch.Tensor:
    from ...quant.encode import quantize

    return quantize(rows, fmt, importance)


def _finite(x: torch.Tensor) -> bool:
    """Whether all numbers are finite; packed bytes are not looked into."""
    if x.dtype == torch.uint8:
        return True
    return all(math.isfinite(end) for end in torch.aminmax(x))  # either end is NaN as soon as one number is


def _packed_rows(source: WeightFile, name: str) -> torch.Tensor:
    """The packed bytes [rows, row_bytes] of a block-quantised tensor."""
    files = getattr(source, "files", [source])
    return next(file for file in files if name in file).gguf.raw(name)


def write_gguf(
    path: str | Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    *,
    type: str = "q8_0",
    keep: Iterable[str] = (),
) -> None:
    """Write dense tensors as ``convert`` would: names with any prefix, in any order; ``shapes`` lists all of them beforehand."""
    path = Path(path)
    if type not in planning.TARGETS:
        raise PlanError(f"Unknown format {type!r}; choose one of {', '.join(planning.TARGETS)}.")
    inventory = Inventory(
        path.name, {name: Entry("F32", tuple(shape), 4 * math.prod(shape)) for name, shape in shapes.items()}, metadata
    )
    plan = planning.make_plan(inventory, type, keep=keep)
    rows = {row.source: row for row in plan.kept}
    config = metadata.get("config") if "vocoder" in keep else video_config(metadata.get("config"))
    header = _metadata(metadata, name=path.stem, target=type, config=config)
    with _writer(path, header, [(row.output, row.format, row.entry.shape) for row in plan.kept]) as writer:
        for name, value in tensors:
            row = rows.get(name)
            if row is not None:
                writer.write(row.output, _encode(value.reshape(-1, value.shape[-1] if value.dim() else 1), row.format))


def extract_audio_vae(paths: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> dict:
    """Write the audio VAE and the vocoder of a checkpoint to a safetensors file of their own, as stored. Returns counts and sizes.

    The file has the names and the ``config`` metadata that the host's own loader wants. Raises AudioVAEConfigError, OutputError,
    WeightFileError or OSError; then no output was written.
    """
    from safetensors.torch import save_file

    paths, output = [Path(path) for path in paths], Path(output)
    files = open_sources(paths)
    try:
        found = find_audio_vae(files, everything=True)
        config = audio_vae_config({name: tuple(file.shape(stored)) for name, (file, stored) in found.items()})
        nbytes = sum(file.nbytes(stored) for file, stored in found.values())
        check_output(output, suffixes=(".safetensors",), overwrite=overwrite, sources=paths, nbytes=nbytes)
        tensors = {name: file.load(stored, None).contiguous() for name, (file, stored) in found.items()}
        with Output(output, overwrite) as written:
            save_file(tensors, str(written.partial), metadata={"config": json.dumps(config.to_metadata())})
    finally:
        for file in files:
            file.close()
    return {"tensors": len(found), "bytes": nbytes, "version": config.version}


def strip(source: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict:
    """Copy a GGUF file without its sound: every other tensor and all metadata, byte for byte. Returns counts and sizes.

    Raises ConvertError when the file is no GGUF with an LTX-2 transformer or holds no sound; then no output was written.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise ConvertError(f"{source} does not exist.")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConvertError(f"{source.name} is not a GGUF file; use 'convert' for safetensors.")
    file = GGUFFile(source)
    try:
        names = classify(file.tensors)
        if not names.has("dit"):
            raise ConvertError(
                f"{source.name} holds no LTX-2 transformer; strip is for audio-and-video LTX-2 GGUF files."
            )
        audio = set(names["audio"].values())
        if not audio:
            raise ConvertError(f"{source.name} holds no sound; there is nothing to strip.")
        kept = [info for name, info in file.tensors.items() if name not in audio]
        kept_bytes = sum(info.nbytes for info in kept)
        check_output(output, suffixes=(".gguf",), overwrite=overwrite, sources=[source], nbytes=kept_bytes)
        entries = list(file.metadata)
        dropped_shapes = {ORIG_SHAPE + name for name in audio}
        metadata = {key: file.metadata.typed(key) for key in entries if key not in dropped_shapes}
        tensors = [(info.name, info.format.name, info.shape) for info in kept]
        total_bytes = sum(info.nbytes for info in file.tensors.values())
    finally:
        file.close()

    with GGUFWriter(output, metadata, tensors, overwrite) as writer:
        file, read, done = GGUFFile(source), 0, 0
        try:
            for info in kept:
                if read > REOPEN_BYTES:
                    file.close()
                    file, read = GGUFFile(source), 0
                writer.write(info.name, file.raw(info.name))
                read += info.nbytes
                done += info.nbytes
                if progress:
                    progress(done, info.name)
        finally:
            file.close()
    return {
        "source": source.name, "output": output.name, "kept_tensors": len(kept), "dropped_tensors": len(audio),
        "source_bytes": total_bytes, "output_bytes": kept_bytes,
    }  # fmt: skip


def video_config(config: str | None) -> str | None:
    """The ``config`` without the audio VAE and the vocoder, which the written file does not hold."""
    if config is None:
        return None
    try:
        parts = json.loads(config)
    except ValueError as error:
        raise ConvertError(f"The checkpoint's 'config' metadata is not valid JSON ({error}).") from None
    return json.dumps({key: value for key, value in parts.items() if key not in ("audio_vae", "vocoder")})


def _metadata(source: Mapping[str, str], *, name: str, target: str, config: str | None) -> dict:
    main = planning.TARGETS[target][0]
    metadata = {
        "general.architecture": ARCHITECTURE,
        "general.type": "model",
        "general.name": name,
        "general.file_type": FILE_TYPES[target],
    }
    if FORMATS[main].is_quantized:
        metadata["general.quantization_version"] = 2
    if config is not None:
        metadata["config"] = config
    if "model_version" in source:
        metadata["model_version"] = str(source["model_version"])
    return metadata


def _writer(
    path: Path, metadata: dict, tensors: Sequence[tuple[str, str, tuple[int, ...]]], overwrite: bool = True
) -> GGUFWriter:
    """A writer for these tensors; those with too many dimensions are flattened and their shape recorded."""
    flattened = []
    for name, fmt, shape in tensors:
        if len(shape) > MAX_DIMENSIONS:
            metadata[ORIG_SHAPE + name] = GGUFValue("array", list(shape), "int32")
            shape = (shape[0], shape[1], math.prod(shape[2:]))
        flattened.append((name, fmt, shape))
    return GGUFWriter(path, metadata, flattened, overwrite)
