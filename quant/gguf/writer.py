"""Write GGUF files as a stream: header first, then tensors one at a time, in any order and in pieces.

The file grows under a temporary name and takes its own only when it is whole (``quant/output.py``), so a reader never meets half a file.

Source: ggml ``docs/gguf.md``.
"""

import os
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..formats import BlockFormat, format_by_name
from ..output import Output
from .metadata import GGUFValue, infer

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
MAX_DIMENSIONS = 4


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


class GGUFWriter:
    """Write one GGUF file.

    metadata: key -> ``GGUFValue``, or a plain value whose type is inferred (see ``gguf.metadata.infer``)
    tensors:  (name, format, shape in torch order) of every tensor that will be written

        with GGUFWriter(path, {"general.architecture": "x"}, [("w", "Q8_0", (64, 256))]) as writer:
            writer.write("w", raw)

    Leaving the block normally finishes the file; leaving it by an exception removes the temporary file and touches nothing else.
    overwrite: whether a file of that name may be replaced. Raises ValueError for shapes that do not fit their format, names given
    twice, data of the wrong size, or missing data; OutputError for a target that cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        metadata: Mapping[str, Any],
        tensors: Iterable[tuple[str, BlockFormat | str, tuple[int, ...]]],
        overwrite: bool = True,
    ):
        self.path = os.fspath(path)
        self._size: dict[str, int] = {}
        self._start: dict[str, int] = {}
        self._written: dict[str, int] = {}
        header = self._header(metadata, list(tensors))
        self._output = Output(path, overwrite)
        self._file = self._output.file
        try:
            self._file.write(header)
        except BaseException as error:
            self.abort(error)
            raise

    def _header(self, metadata: Mapping[str, Any], tensors: list) -> bytes:
        values = {key: infer(value) for key, value in metadata.items()}
        alignment = values.get("general.alignment", GGUFValue("uint32", ALIGNMENT)).value
        parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
        for key, value in values.items():
            parts += (_string(key), value.to_bytes())
        end = 0
        for name, fmt, shape in tensors:
            fmt = format_by_name(fmt) if isinstance(fmt, str) else fmt
            if name in self._size:
                raise ValueError(f"Tensor {name} is announced twice; give each name once.")
            if len(shape) > MAX_DIMENSIONS:
                raise ValueError(
                    f"Tensor {name} has {len(shape)} dimensions; GGUF allows {MAX_DIMENSIONS}. Flatten it and store its shape as metadata."
                )
            self._size[name], self._start[name], self._written[name] = fmt.nbytes(shape), end, 0
            parts.append(
                _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), fmt.ggml_id, end)
            )
            end += -(-self._size[name] // alignment) * alignment
        header = b"".join(parts)
        header += bytes(-len(header) % alignment)
        self._start = {name: start + len(header) for name, start in self._start.items()}
        self._end = len(header) + end
        return header

    def write(self, name: str, data: torch.Tensor | bytes | memoryview) -> None:
        """Append data to a tensor: all of it, or the next piece.

        data: a tensor of packed bytes or of the format's own dtype, or bytes-like; its bytes are written as they lie in memory.
        """
        if name not in self._size:
            raise ValueError(f"Tensor {name} was not announced when the file was opened.")
        if isinstance(data, torch.Tensor):
            data = data.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
        data = memoryview(data).cast("B") if len(data) else memoryview(b"")
        written, size = self._written[name], self._size[name]
        if written + len(data) > size:
            raise ValueError(
                f"Tensor {name} takes {size} bytes, but {written + len(data)} were given; format or shape do not fit the data."
            )
        self._file.seek(self._start[name] + written)
        self._file.write(data)
        self._written[name] = written + len(data)

    def finish(self) -> None:
        """Check that every tensor is whole, flush, and give the file its name. A second call does nothing."""
        if self._file.closed:
            return
        lacking = [name for name, size in self._size.items() if self._written[name] != size]
        if lacking:
            name = lacking[0]
            self.abort()
            raise ValueError(
                f"{len(lacking)} of {len(self._size)} tensors are incomplete, first {name} with {self._written[name]} of {self._size[name]} bytes; "
                f"nothing was written to {self.path}."
            )
        try:
            self._file.truncate(self._end)
            self._output.commit()
        except BaseException as error:
            self.abort(error)
            raise

    def abort(self, error: BaseException | None = None) -> None:
        """Remove the temporary file. An error of the system that names no file gets this one's name."""
        self._output.abort(error)

    def __enter__(self) -> "GGUFWriter":
        return self

    def __exit__(self, kind, error, _traceback) -> None:
        if kind is None:
            self.finish()
        else:
            self.abort(error)
