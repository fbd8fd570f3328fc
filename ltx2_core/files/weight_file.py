"""What every kind of weight file offers. Standard library only: torch is imported when a tensor is loaded."""

import math
from pathlib import Path


class WeightFile:
    """What every kind of weight file offers; see :func:`open_weights`.

    path: Path; kind: "gguf" or "safetensors"; metadata: mapping of the header's entries.
    """

    path: Path
    kind: str

    def names(self):
        """Tensor names in file order."""
        raise NotImplementedError

    def shape(self, name):
        """Logical shape in torch order."""
        raise NotImplementedError

    def format(self, name):
        """Name of the storage format: "Q8_0", "BF16", "F8_E4M3", …"""
        raise NotImplementedError

    def nbytes(self, name):
        """Bytes in the file."""
        raise NotImplementedError

    def load(self, name, dtype=None):
        """The tensor, dense. dtype None: as stored, quantised ones as float32."""
        raise NotImplementedError

    def load_packed(self, name, compute_dtype):
        """A packed QuantizedTensor for a 2-D block-quantised tensor, else dense in compute_dtype."""
        return self.load(name, compute_dtype)

    def stored_matrix(self, name):
        """(rows, columns) of the tensor as it lies in the file: all dimensions but the last are rows."""
        shape = self.shape(name) or (1,)
        return math.prod(shape[:-1]), shape[-1]

    def load_rows(self, name, start, stop):
        """Rows start..stop of the stored matrix, dense as by ``load(name)``, without decoding the others."""
        return self.load(name).reshape(self.stored_matrix(name))[start:stop]

    def require_readable(self, names):
        """Raise WeightFileError when one of these tensors is stored in a form this pack does not decode. Called before long work."""

    def close(self):
        """Let go of the map (views of it stay valid)."""

    def __contains__(self, name):
        return name in self._index()

    def shapes(self):
        """{name: shape} of all tensors."""
        return {name: self.shape(name) for name in self.names()}

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}, {len(self.names())} tensors)"
