"""Read GGUF files: a strict header reader over a memory map, tensors as views into it.

Opening reads the header only. Metadata values are located but decoded when asked for (a tokenizer's vocabulary has hundreds of
thousands of strings), and a tensor's bytes are touched when somebody computes with them: ``GGUFFile.raw`` copies nothing.

Every number in the header is checked before it is used. A file that is damaged, cut short, split or foreign is refused with a
sentence that says what was found, what was expected and what to do.

Layout of a file: ``GGUF``, version u32, tensor count u64, entry count u64; entries (key, type u32, value); tensor infos (name,
dimension count u32, dimensions u64 fastest first, type u32, offset u64); padding to ``general.alignment``; data.

Source: ggml ``docs/gguf.md``.
"""

import os
import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats import BlockFormat, UnsupportedFormatError, format_by_id, require_decodable
from .mapping import map_file
from .metadata import ARRAY, SCALARS, STRING, GGUFFormatError, Metadata
from .text import visible

if TYPE_CHECKING:
    import torch

__all__ = ["GGUFFile", "GGUFFormatError", "TensorInfo"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
MAX_TENSORS = MAX_ENTRIES = 32_768  # the largest checkpoints have 6000 tensors
MAX_STRINGS = 1 << 21  # in all arrays of a header together; vocabularies have a quarter of a million
MAX_NAME_BYTES = 1024
MIN_ENTRY_BYTES = 8 + 4 + 1  # empty key, type, one byte
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dimensions, type, offset

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_AGAIN = "Download the file again."

# What files with another beginning are: (first bytes, description).
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint, perhaps); convert it to safetensors first"),
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file itself; fetch it with 'git lfs pull' or download it from the website",
    ),
    (b"<!DO", "a web page, not a model; download the file itself, not the page about it"),
    (b"<htm", "a web page, not a model; download the file itself, not the page about it"),
    (b"lmgg", "an old GGML file; use a GGUF version of this model"),
    (b"fmgg", "an old GGML file; use a GGUF version of this model"),
    (b"tjgg", "an old GGML file; use a GGUF version of this model"),
)


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    shape:  logical, torch order (slowest dimension first)
    offset: absolute byte offset in the file
    nbytes: bytes in the file, without padding
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def packed_shape(self) -> tuple[int, int]:
        """``(rows, row_bytes)``"""
        return self.format.packed_shape(self.shape)


class _Cursor:
    """A position in the header. Every read is checked against the end of the file."""

    def __init__(self, data, size: int, name: str):
        self.data, self.size, self.name, self.at = data, size, name, 0
        self.strings = 0  # in arrays, so far

    def error(self, sentence: str) -> GGUFFormatError:
        return GGUFFormatError(f"{self.name}: {sentence}")

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they start."""
        start = self.at
        if count > self.size - start:
            raise self.error(
                f"{what} at byte {start} should take {count} bytes, but the file has only {self.size - start} more; "
                f"it is cut short or damaged. {_AGAIN}"
            )
        self.at = start + count
        return start

    def u32(self, what: str) -> int:
        return _U32.unpack_from(self.data, self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack_from(self.data, self.take(8, what))[0]

    def string(self, what: str) -> str:
        start = self.take(self.u64(what), what)
        if self.at - start > MAX_NAME_BYTES:
            raise self.error(
                f"{what} at byte {start} is {self.at - start} bytes long; names have at most {MAX_NAME_BYTES}. The header is damaged. {_AGAIN}"
            )
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} at byte {start} is not UTF-8 text; the header is damaged. {_AGAIN}") from error

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings. A tight loop, because a vocabulary has hundreds of thousands."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise self.error(
                f"{what} brings the header to {self.strings} strings; vocabularies have at most {MAX_STRINGS}. The header is damaged. {_AGAIN}"
            )
        data, at, size, unpack = self.data, self.at, self.size, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):  # beyond the file, and beyond any file
            at = size + 1
        if at > size:
            raise self.error(
                f"{what} starts at byte {self.at} and runs past the end of the file ({size} bytes); it is cut short or damaged. {_AGAIN}"
            )
        self.at = at


class GGUFFile:
    """An open GGUF file.

    path:         as given
    version:      2 or 3
    alignment:    of tensor data, bytes
    data_offset:  where tensor data begins
    metadata:     ``Metadata``, a lazy mapping
    tensors:      name -> ``TensorInfo``, in file order
    architecture: ``general.architecture``, or None

    buffer: a writable buffer over the whole file, if the caller has mapped it already; by default the file is mapped here.
    Tensors keep the map alive: closing the file while some are in use only drops this object's reference.
    Raises GGUFFormatError, or OSError when the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, buffer=None):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        self.size = os.path.getsize(self.path) if buffer is None else len(buffer)
        if self.size < 24:
            raise GGUFFormatError(
                f"{self.name}: {self.size} bytes are too few for a GGUF header of 24; the file is empty or cut short. {_AGAIN}"
            )
        self._data = map_file(self.path) if buffer is None else memoryview(buffer)
        self._read_header()

    def _read_header(self) -> None:
        cursor = _Cursor(self._data, self.size, self.name)
        self.version = self._read_version(cursor)
        tensor_count, entry_count = cursor.u64("the tensor count"), cursor.u64("the entry count")
        room = self.size - cursor.at
        for count, least, most, what in (
            (entry_count, MIN_ENTRY_BYTES, MAX_ENTRIES, "metadata entries"),
            (tensor_count, MIN_TENSOR_BYTES, MAX_TENSORS, "tensors"),
        ):
            if count > most:
                raise cursor.error(
                    f"the header announces {count} {what}, models have at most {most}; the header is damaged. {_AGAIN}"
                )
            if count * least > room:
                raise cursor.error(
                    f"the header announces {count} {what}, more than {self.size} bytes can describe; the header is damaged. {_AGAIN}"
                )
        self.metadata = Metadata(self._data, self._read_entries(cursor, entry_count))
        self._refuse_split(cursor)
        self.alignment = self._read_alignment(cursor)
        infos = [self._read_tensor_info(cursor) for _ in range(tensor_count)]
        self.data_offset = -(-cursor.at // self.alignment) * self.alignment
        self.tensors = self._place(cursor, infos)
        self.architecture: str | None = self.metadata.scalar("general.architecture", str)

    def _read_version(self, cursor: _Cursor) -> int:
        head = bytes(self._data[:32])
        if head[:4] != MAGIC:
            for magic, what in _FOREIGN:
                if head.startswith(magic):
                    raise cursor.error(f"this is {what}.")
            if head[8:9] == b"{":
                raise cursor.error("this is a safetensors file under another name; rename it to .safetensors.")
            raise cursor.error(
                f"the file begins with {head[:4]!r}, but a GGUF file begins with {MAGIC!r}; this is another kind of file."
            )
        cursor.take(4, "the magic")
        version = cursor.u32("the version")
        if version & 0xFFFF == 0 and version:
            raise cursor.error(
                f"GGUF version {version >> 24} in big-endian byte order; expected little-endian. Use the little-endian version of this file."
            )
        if version not in VERSIONS:
            older = version < VERSIONS[0]
            advice = "Convert it again with a current converter." if older else "Update this node pack."
            raise cursor.error(f"GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}. {advice}")
        return version

    def _read_entries(self, cursor: _Cursor, count: int) -> dict[str, tuple[int, int, int]]:
        entries: dict[str, tuple[int, int, int]] = {}
        for _ in range(count):
            key = cursor.string("the key of a metadata entry")
            if key in entries:
                raise cursor.error(f"metadata key {key!r} occurs twice; the header is damaged. {_AGAIN}")
            kind = cursor.u32(f"the type of metadata {key!r}")
            start = cursor.at
            self._skip_value(cursor, kind, f"metadata {key!r}")
            entries[key] = (kind, start, cursor.at)
        return entries

    def _skip_value(self, cursor: _Cursor, kind: int, what: str) -> None:
        if kind in SCALARS:
            cursor.take(SCALARS[kind].size, what)
        elif kind == STRING:
            cursor.take(cursor.u64(what), what)
        elif kind == ARRAY:
            item, count = cursor.u32(what), cursor.u64(what)
            if item in SCALARS:
                cursor.take(count * SCALARS[item].size, what)
            elif item == STRING:
                if count * 8 > self.size - cursor.at:
                    raise cursor.error(
                        f"{what} announces {count} strings, more than the file has room for; the header is damaged. {_AGAIN}"
                    )
                cursor.skip_strings(count, what)
            else:
                raise cursor.error(
                    f"{what} is an array of type {item}; expected numbers or strings. The header is damaged. {_AGAIN}"
                )
        else:
            raise cursor.error(
                f"{what} has unknown value type {kind}; the header is damaged, or written by a newer format. {_AGAIN}"
            )

    def _refuse_split(self, cursor: _Cursor) -> None:
        count = self.metadata.scalar("split.count", int, 0)
        if count > 1:
            part = self.metadata.scalar("split.no", int, 0) + 1
            raise cursor.error(
                f"this is part {part} of a model split into {count} files; expected one whole file. "
                f"Join the parts with 'llama-gguf-split --merge' (give it the first part), or download a version that is not split."
            )

    def _read_alignment(self, cursor: _Cursor) -> int:
        alignment = (
            self.metadata.scalar("general.alignment", int)
            if "general.alignment" in self.metadata
            else DEFAULT_ALIGNMENT
        )
        if alignment is None or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            said = f"a {self.metadata.type_name('general.alignment')}" if alignment is None else alignment
            raise cursor.error(
                f"general.alignment is {said}; expected a power of two up to {MAX_ALIGNMENT}. The header is damaged. {_AGAIN}"
            )
        return alignment

    def _read_tensor_info(self, cursor: _Cursor) -> tuple[str, BlockFormat, tuple[int, ...], int]:
        name = cursor.string("a tensor's name")
        if not name:
            raise cursor.error(f"a tensor has no name; the header is damaged. {_AGAIN}")
        n_dims = cursor.u32("a dimension count")
        if n_dims > MAX_DIMENSIONS:
            raise cursor.error(
                f"tensor {name} has {n_dims} dimensions; GGUF allows {MAX_DIMENSIONS}. The header is damaged. {_AGAIN}"
            )
        start = cursor.take(8 * n_dims + 12, "the description of a tensor")
        *dims, ggml_id, offset = struct.unpack_from(f"<{n_dims}QIQ", self._data, start)
        try:
            fmt = format_by_id(ggml_id)
        except UnsupportedFormatError as error:
            raise cursor.error(f"tensor {name}: {error}") from error
        shape = tuple(reversed(dims))
        if 0 in shape:
            raise cursor.error(f"tensor {name} has the shape {shape} and no numbers; the header is damaged. {_AGAIN}")
        if shape and shape[-1] % fmt.block_size:
            raise cursor.error(
                f"tensor {name} has rows of {shape[-1]} weights, which do not divide into {fmt.name} blocks of {fmt.block_size}; "
                f"the header is damaged. {_AGAIN}"
            )
        return name, fmt, shape, offset

    def _place(self, cursor: _Cursor, infos: list) -> dict[str, TensorInfo]:
        """Absolute positions, checked: aligned, inside the file, not overlapping, each name once."""
        tensors: dict[str, TensorInfo] = {}
        for name, fmt, shape, offset in infos:
            if offset % self.alignment:
                raise cursor.error(
                    f"tensor {name} lies at offset {offset}, not a multiple of the alignment {self.alignment}; the header is damaged. {_AGAIN}"
                )
            if name in tensors:
                raise cursor.error(f"tensor name {name} occurs twice; the header is damaged. {_AGAIN}")
            tensors[name] = TensorInfo(name, fmt, shape, self.data_offset + offset, fmt.nbytes(shape))
        end, before = self.data_offset, None
        for info in sorted((t for t in tensors.values() if t.nbytes), key=lambda t: t.offset):
            if info.offset < end:
                raise cursor.error(
                    f"tensors {before} and {info.name} overlap at byte {info.offset}; the header is damaged. {_AGAIN}"
                )
            end, before = info.offset + info.nbytes, info.name
        if end > self.size:
            raise cursor.error(
                f"tensor data should end at byte {end}, but the file has {self.size}: {end - self.size} bytes are missing "
                f"(the last tensor is {before}). The download was cut short. {_AGAIN}"
            )
        return tensors

    def info(self, name: str) -> TensorInfo:
        """Description of a tensor. Raises KeyError naming the file."""
        found = self.tensors.get(name)
        if found is None:
            raise KeyError(f"{self.name} has no tensor {visible(name)!r}.")
        return found

    def raw(self, name: str) -> "torch.Tensor":
        """The tensor's bytes as they are in the file, not copied: a contiguous tensor with a storage of its own.

        Block-quantised: ``uint8 [rows, row_bytes]``. Plain numbers: their dtype, logical shape. Do not write to it.
        """
        info = self.info(name)
        if self._data is None:
            raise ValueError(f"{self.name} is closed; open it again to read tensor {name}.")
        import torch

        from ..decode import torch_dtype

        quantized = info.format.is_quantized
        dtype = torch.uint8 if quantized else torch_dtype(info.format)
        shape = info.packed_shape if quantized else info.shape
        with warnings.catch_warnings():
            # Only a read-only map warns (see map_file), and nothing here writes.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._data, dtype=dtype, count=info.nbytes // dtype.itemsize, offset=info.offset)
        return flat.view(shape)

    def load(self, name: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """The tensor as numbers, logical shape. Quantised ones are decoded (to float32 unless ``dtype`` says otherwise), plain ones are
        a view of the map unless ``dtype`` differs. Raises UnsupportedFormatError, naming tensor and format, where there is no decoder."""
        info = self.info(name)
        require_decodable(info.format, f"{self.name}: tensor {name}")
        raw = self.raw(name)
        if not info.format.is_quantized:
            return raw if dtype is None else raw.to(dtype)
        import torch

        from ..decode import dequantize

        return dequantize(raw, info.format, dtype or torch.float32).view(info.shape)

    def close(self) -> None:
        """Let go of the map. Tensors made from it stay valid, and the map goes with the last of them; no more can be read from here."""
        self._data = None
        self.metadata.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({self.name!r}, architecture={self.architecture!r}, {len(self.tensors)} tensors, {len(self.metadata)} metadata entries)"
