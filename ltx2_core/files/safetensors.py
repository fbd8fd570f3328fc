"""Read safetensors files: a checked header over a memory map, tensors as views into it. Opening needs the standard library alone.

The host's environment has the safetensors library; this reader exists because opening must touch nothing but the header, a
truncated or foreign file must be refused in a sentence, and each tensor needs a storage of its own over the map (as for GGUF).

Layout of a file: header length u64, header (JSON: name -> dtype, shape, data_offsets; ``__metadata__``), data. The header is read entry by entry, since
a JSON parser would build whatever a stranger wrote: nesting without end, or objects twenty times as large as their text.

Source: huggingface/safetensors README ("Format").
"""

import json
import math
import os
import re
import struct
import warnings
from json.decoder import scanstring
from typing import NamedTuple

from ...quant.gguf.mapping import map_file
from .errors import WeightFileError
from .text import visible

MAX_HEADER_BYTES = 8 << 20  # the released checkpoints of 6000 tensors have 1 MB
MAX_ENTRIES = 65_536
MAX_NAME_LENGTH = 1024

# dtype in the header -> (torch's name, bytes)
DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2), "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1), "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}  # fmt: skip

_AGAIN = "Download it again."
_SPACE = r"[ \t\r\n]{0,64}"
_SKIP = re.compile(r"[ \t\r\n]*")
# As every library writes it, which needs no parser; and the same with white space or in another order.
_USUAL = re.compile(
    r'\{"dtype":"(\w{1,32})","shape":\[([0-9,]{0,200})\],"data_offsets":\[([0-9]{1,20}),([0-9]{1,20})\]\}'
)
_VALUE = re.compile(
    r"\{(?:%s\"(?:dtype|shape|data_offsets)\"%s:%s(?:\"\w{1,32}\"|\[[0-9, \t\r\n]{0,400}\])%s,?){3}%s\}"
    % (_SPACE, _SPACE, _SPACE, _SPACE, _SPACE)
)


class SafetensorsError(WeightFileError):
    """The file is not a safetensors file that can be read; the message says what to do."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


class Entry(NamedTuple):
    """One tensor: dtype name as in the header, shape, byte offset (in a file: absolute), bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open safetensors file. entries: name -> Entry in file order; metadata: dict of strings. Raises SafetensorsError."""

    def __init__(self, path):
        self.path = os.fspath(path)
        self.name = os.path.basename(self.path)
        size = os.path.getsize(self.path)
        with open(self.path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= size - 8:
                raise SafetensorsError(
                    f"{self.name}: a header of {length} bytes does not fit a file of {size}; the file is cut short or no safetensors file. {_AGAIN}"
                )
            if length > MAX_HEADER_BYTES:
                raise SafetensorsError(
                    f"{self.name}: a header of {length} bytes is larger than any model needs (at most {MAX_HEADER_BYTES} are read); "
                    "the file is damaged, or carries data in its metadata that should be removed."
                )
            self.metadata, self.entries = read_header(self.name, file.read(length), 8 + length)
        end = max((entry.offset + entry.nbytes for entry in self.entries.values()), default=0)
        if end > size:
            raise SafetensorsError(
                f"{self.name}: tensor data should end at byte {end}, but the file has {size}; the download was cut short. {_AGAIN}"
            )
        self._data = map_file(self.path)

    def raw(self, name) -> memoryview:
        """The tensor's bytes, a view of the map."""
        entry = self.entries[name]
        if self._data is None:
            raise SafetensorsError(f"{self.name} is closed; open it again to read tensor {visible(name)}.")
        return self._data[entry.offset : entry.offset + entry.nbytes]

    def tensor(self, name):
        """The tensor as a view of the map, in its stored dtype. Do not write to it."""
        import torch

        entry = self.entries[name]
        known = DTYPES.get(entry.dtype)
        if known is None:
            raise SafetensorsError(
                f"{self.name}: tensor {visible(name)} has type {entry.dtype}, which this pack does not read; use a GGUF, BF16 or FP8-scaled version of the file."
            )
        dtype = getattr(torch, known[0])
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self.raw(name), dtype=torch.uint8)
        return flat.view(dtype).view(entry.shape)

    def close(self) -> None:
        """Let go of the map. Tensors made from it stay valid, and the map goes with the last of them."""
        self._data = None


class _Scanner:
    """A position in the JSON text of a header."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def follows(self, char: str) -> bool:
        """Step over white space and ``char``, if that is what follows."""
        self.at = _SKIP.match(self.text, self.at).end()
        if self.text[self.at : self.at + 1] != char:
            return False
        self.at += 1
        return True

    def expect(self, char: str) -> None:
        if not self.follows(char):
            raise ValueError(f"expected {char!r} at character {self.at}")

    def string(self) -> str:
        self.expect('"')
        value, self.at = scanstring(self.text, self.at, True)
        return value

    def members(self):
        """Yield every key of the object that follows; the caller steps over its value."""
        self.expect("{")
        if self.follows("}"):
            return
        while True:
            key = self.string()
            self.expect(":")
            self.at = _SKIP.match(self.text, self.at).end()
            yield key
            if not self.follows(","):
                self.expect("}")
                return

    def value(self) -> tuple[str, tuple[int, ...], int, int]:
        """(dtype, shape, begin, end) of one tensor."""
        match = _USUAL.match(self.text, self.at)
        if match is not None:
            self.at = match.end()
            dtype, shape, begin, end = match.groups()
            return dtype, tuple(map(int, shape.split(","))) if shape else (), int(begin), int(end)
        match = _VALUE.match(self.text, self.at)
        if match is None:
            raise ValueError(f"{visible(self.text[self.at : self.at + 60])} describes no tensor")
        self.at = match.end()
        described = json.loads(match[0])
        return described["dtype"], tuple(described["shape"]), *described["data_offsets"]


def read_header(file_name: str, raw: bytes, data_start: int = 0) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, {name: Entry}) of a header's bytes; ``data_start`` is added to the offsets. Raises SafetensorsError."""
    metadata, entries = {}, {}
    try:
        header = _Scanner(raw.decode("utf-8"))
        del raw
        for name in header.members():
            if name == "__metadata__":
                for key in header.members():
                    metadata[key] = header.string()
                    _bounded(len(metadata))
                continue
            if name in entries:
                raise ValueError(f"{visible(name)} is there twice")
            if not 0 < len(name) <= MAX_NAME_LENGTH:
                raise ValueError(f"a tensor's name has {len(name)} characters")
            name.encode("utf-8")  # lone surrogates are no names
            entries[name] = _entry(name, *header.value(), data_start)
            _bounded(len(entries))
        if header.text[header.at :].strip(" \t\r\n\0"):
            raise ValueError("text after its end")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else visible(error)
        raise SafetensorsError(
            f"{file_name}: the header is not a table of tensors ({reason}); the file is damaged. {_AGAIN}"
        ) from None
    return metadata, entries


def _bounded(count: int) -> None:
    if count > MAX_ENTRIES:
        raise ValueError(f"more than {MAX_ENTRIES} entries")


def _entry(name: str, dtype: str, shape: tuple, begin: int, end: int, data_start: int) -> Entry:
    known = DTYPES.get(dtype)
    if not 0 <= begin <= end or (known is not None and math.prod(shape) * known[1] != end - begin):
        raise ValueError(f"tensor {visible(name)} ({dtype} {shape}) occupies {end - begin} bytes")
    return Entry(dtype, shape, data_start + begin, end - begin)
