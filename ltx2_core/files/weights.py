"""One interface over the files weights come in: GGUF, safetensors, sharded safetensors, FP8-scaled safetensors.

Opening a file reads its header, with the standard library alone. Loading touches one tensor; where nothing has to be decoded or cast, the result is
a view of the memory map.

Source: safetensors format (huggingface/safetensors README).
"""

import math
import os
import re
from pathlib import Path

from ...quant.formats import UnsupportedFormatError, require_decodable
from ...quant.gguf import reader
from .comfy_quant import SafetensorsWeights, is_companion
from .errors import WeightFileError
from .text import first_names, table, visible
from .weight_file import WeightFile

__all__ = [
    "ORIG_SHAPE",
    "GGUFWeights",
    "SafetensorsWeights",
    "ShardedWeights",
    "WeightFile",
    "WeightFileError",
    "open_weights",
]

ORIG_SHAPE = "comfy.gguf.orig_shape."  # GGUF entry: the true shape of a tensor with more dimensions than GGUF has
MAX_SHARDS = 1000
MAX_INDEX_BYTES = 2_000_000
_SHARD = re.compile(r"^(?P<stem>.*)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<suffix>\.safetensors)$")


class GGUFWeights(WeightFile):
    """A GGUF file. ``gguf`` is the underlying GGUFFile."""

    kind = "gguf"

    def __init__(self, path):
        self.path = Path(path)
        self.gguf = reader.GGUFFile(path)
        self.metadata = self.gguf.metadata
        self._shapes = {name: self._true_shape(name, info) for name, info in self.gguf.tensors.items()}

    def _true_shape(self, name, info):
        """The recorded original shape of a tensor, where there is one, else the shape in the header."""
        key = ORIG_SHAPE + name
        if key not in self.metadata:
            return info.shape
        said = self.metadata.array(key, 16)
        if said is None or not all(type(n) is int and n > 0 for n in said) or math.prod(said) != math.prod(info.shape):
            raise WeightFileError(
                f"{self.path.name}: '{visible(key)}' is {visible(said)}, which is no other shape of {info.shape}; the header is damaged. Download the file again."
            )
        return tuple(said)

    def _index(self):
        return self.gguf.tensors

    def names(self):
        return list(self.gguf.tensors)

    def shape(self, name):
        if name not in self._shapes:
            raise KeyError(f"{self.path.name} has no tensor {name!r}.")
        return self._shapes[name]

    def format(self, name):
        return self.gguf.info(name).format.name

    def nbytes(self, name):
        return self.gguf.info(name).nbytes

    def load(self, name, dtype=None):
        return self.gguf.load(name, dtype).reshape(self.shape(name))

    def load_packed(self, name, compute_dtype):
        info = self.gguf.info(name)
        shape = self.shape(name)
        if not info.format.is_quantized or len(shape) != 2:
            return self.load(name, compute_dtype)
        from ...quant import tensor

        require_decodable(info.format, f"{self.path.name}: tensor {name}")
        return tensor.pack(self.gguf.raw(name), info.format, shape, compute_dtype)

    def stored_matrix(self, name):
        shape = self.gguf.info(name).shape or (1,)
        return math.prod(shape[:-1]), shape[-1]

    def load_rows(self, name, start, stop):
        fmt = self.gguf.info(name).format
        if not fmt.is_quantized:
            return super().load_rows(name, start, stop)
        from ...quant.decode import dequantize

        return dequantize(self.gguf.raw(name)[start:stop], require_decodable(fmt, f"{self.path.name}: tensor {name}"))

    def require_readable(self, names):
        for name in names:
            try:
                require_decodable(self.gguf.info(name).format, f"{self.path.name}: tensor {visible(name)}")
            except UnsupportedFormatError as error:
                raise WeightFileError(str(error)) from error

    def close(self):
        self.gguf.close()


class ShardedWeights(WeightFile):
    """Several files that hold one model's tensors between them."""

    def __init__(self, path, files):
        self.path = Path(path)
        self.files = files
        self.kind = files[0].kind
        self.metadata = {key: value for file in reversed(files) for key, value in file.metadata.items()}
        self._owner = {}
        for file in files:
            for name in file.names():
                if name in self._owner:
                    raise WeightFileError(
                        f"'{visible(name)}' is in both {self._owner[name].path.name} and {file.path.name}; the shards belong to different models."
                    )
                self._owner[name] = file

    def _index(self):
        return self._owner

    def _of(self, name):
        if name not in self._owner:
            raise KeyError(f"{self.path.name} has no tensor {name!r}.")
        return self._owner[name]

    def names(self):
        return list(self._owner)

    def shape(self, name):
        return self._of(name).shape(name)

    def format(self, name):
        return self._of(name).format(name)

    def nbytes(self, name):
        return self._of(name).nbytes(name)

    def load(self, name, dtype=None):
        return self._of(name).load(name, dtype)

    def load_packed(self, name, compute_dtype):
        return self._of(name).load_packed(name, compute_dtype)

    def stored_matrix(self, name):
        return self._of(name).stored_matrix(name)

    def load_rows(self, name, start, stop):
        return self._of(name).load_rows(name, start, stop)

    def require_readable(self, names):
        for file in self.files:
            file.require_readable([name for name in names if self._of(name) is file])

    def close(self):
        for file in self.files:
            file.close()


def open_weights(path):
    """Open a weight file of any kind; the content decides, not the name. Returns a WeightFile.

    path: a ``.gguf`` or ``.safetensors`` file, one shard of several, a ``.safetensors.index.json``, or a folder that holds one.
    Raises WeightFileError, in one sentence, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise WeightFileError(f"{path} is a folder with {len(found)} sets of weights; name one file.")
        path = found[0]
    if not path.is_file():
        what = (
            "is a link to a file that does not exist"
            if path.is_symlink()
            else "is no file"
            if path.exists()
            else "does not exist"
        )
        raise WeightFileError(f"{path} {what}; check the name and the folder.")
    if path.name.endswith(".safetensors.index.json"):
        return _open_index(path)
    shard = _SHARD.match(path.name)
    if shard:
        count = int(shard["count"])
        if not 1 <= int(shard["part"]) <= count <= MAX_SHARDS:
            raise WeightFileError(
                f"{path.name} calls itself part {int(shard['part'])} of {count}; expected one of at most {MAX_SHARDS} parts."
            )
        return _open_shards(
            path, [f"{shard['stem']}-{part:05d}-of-{count:05d}{shard['suffix']}" for part in range(1, count + 1)]
        )
    return _open_one(path)


def _open_one(path):
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        # The GGUF reader also knows what other beginnings mean and says so.
        return SafetensorsWeights(path) if head[8:9] == b"{" else GGUFWeights(path)
    except WeightFileError:
        raise
    except ValueError as error:  # GGUFFormatError, UnsupportedFormatError
        raise WeightFileError(str(error)) from error
    except OSError as error:
        raise WeightFileError(
            f"{path} cannot be opened ({error.strerror}); check its permissions and whether the disk is full."
        ) from error


def _open_index(path):
    try:
        with open(path, "rb") as file:
            index = table(file.read(MAX_INDEX_BYTES + 1), "the index")
        where = index["weight_map"]
        names = sorted(set(where.values()))
        if (
            not names
            or len(names) > MAX_SHARDS
            or not all(isinstance(name, str) and name == os.path.basename(name) for name in names)
        ):
            raise ValueError("its shards are not named")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightFileError(
            f"{path.name} is not a safetensors index with a 'weight_map' ({error}); download it again."
        ) from error
    except OSError as error:
        raise WeightFileError(f"{path} cannot be opened ({error.strerror}); check its permissions.") from error
    weights = _open_shards(path, names)
    absent = [name for name in where if name not in weights and not is_companion(name)]
    if absent:
        raise WeightFileError(
            f"{path.name} lists {len(absent)} tensors that no shard holds (first: {first_names(absent, 1)}); download the shards again."
        )
    return weights


def _open_shards(path, names):
    missing = [name for name in names if len(name) > 200 or not os.path.isfile(path.parent / name)]
    if missing:
        raise WeightFileError(
            f"{path.name} is one of {len(names)} parts, and {len(missing)} are missing beside it (first: {missing[0]}); download them into the same folder."
        )
    return ShardedWeights(path, [_open_one(path.parent / name) for name in names])
