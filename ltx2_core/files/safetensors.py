"""Read safetensors files: a checked header over a memory map, tensors as views into it.

The host's environment has the safetensors library; this reader exists because opening must touch nothing but the header, a
truncated or foreign file must be refused in a sentence, and each tensor needs a storage of its own over the map (as for GGUF).

Layout of a file: header length u64, header (JSON: name -> dtype, shape, data_offsets; ``__metadata__``), data.

Source: huggingface/safetensors README ("Format").
"""

import json
import math
import mmap
import os
import struct
import sys
import warnings
from dataclasses import dataclass

import torch

MAX_HEADER_BYTES = 100_000_000  # the library's own limit

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class SafetensorsError(ValueError):
    """The file is not a safetensors file that can be read; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype name as in the header, shape, absolute byte offset, bytes."""

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
            self.metadata, self.entries = self._read_header(file, size)
            self._map = _map(file, size)

    def _read_header(self, file, size):
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES or length > size - 8:
            raise SafetensorsError(
                f"{self.name}: a header of {length} bytes does not fit a file of {size}; the file is cut short or no safetensors file. Download it again."
            )
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", None) or {}
            entries = {name: self._entry(name, value, 8 + length) for name, value in header.items()}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            if isinstance(error, SafetensorsError):
                raise
            raise SafetensorsError(f"{self.name}: the header is not a table of tensors ({error}); the file is damaged. Download it again.") from error
        end = max((entry.offset + entry.nbytes for entry in entries.values()), default=0)
        if end > size:
            raise SafetensorsError(
                f"{self.name}: tensor data should end at byte {end}, but the file has {size}; the download was cut short. Download it again."
            )
        return metadata, entries

    def _entry(self, name, value, data):
        begin, end = value["data_offsets"]
        shape = tuple(int(n) for n in value["shape"])
        dtype = DTYPES.get(value["dtype"])
        if not 0 <= begin <= end or (dtype is not None and math.prod(shape) * dtype.itemsize != end - begin):
            raise SafetensorsError(
                f"{self.name}: tensor {name} ({value['dtype']} {shape}) occupies {end - begin} bytes; the header is damaged. Download the file again."
            )
        return Entry(value["dtype"], shape, data + begin, end - begin)

    def tensor(self, name):
        """The tensor as a view of the map, in its stored dtype. Do not write to it."""
        entry = self.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise SafetensorsError(
                f"{self.name}: tensor {name} has type {entry.dtype}, which this pack does not read; use a GGUF, BF16 or FP8-scaled version of the file."
            )
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        return flat.view(dtype).view(entry.shape)


def _map(file, size):
    """Copy-on-write map, so that torch gets a writable buffer and the file is never changed; read-only where that is refused."""
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform.startswith("linux") else 0
            return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE | noreserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
