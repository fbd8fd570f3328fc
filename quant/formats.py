"""The block formats of GGML, one row each: the only place where a layout is written down.

A quantised row is a sequence of blocks. A block stores ``block_size`` weights in ``type_size`` bytes, as the little-endian
fields listed here in file order. Type size, bits per weight and row sizes are computed from the fields, so the table cannot
disagree with itself. Decoding and encoding live in ``decode.py``, kernels in ``kernels_*.py``; all of them loop over this table.

This module needs the standard library alone.

Sources: ggml ``src/ggml-common.h`` (block structs), ``include/ggml.h`` (ids), gguf-py ``gguf/constants.py`` (sizes).
"""

from collections.abc import Sequence
from dataclasses import dataclass


class UnsupportedFormatError(ValueError):
    """A tensor has a GGML type that this package cannot decode."""

    __module__ = "quant"  # shown before the name of the error


@dataclass(frozen=True)
class BlockFormat:
    """How one GGML type stores its weights.

    name:       the GGML name, e.g. ``"Q4_K"``
    ggml_id:    the number that GGUF files store
    block_size: weights per block (1 for plain number types)
    fields:     (name, bytes) of every field of a block, in file order
    dtype:      name of the torch dtype for plain number types, None for quantised ones
    decodable:  False for types that are only known by name and size
    """

    name: str
    ggml_id: int
    block_size: int
    fields: tuple[tuple[str, int], ...]
    dtype: str | None = None
    decodable: bool = True

    @property
    def type_size(self) -> int:
        """Bytes per block."""
        return sum(size for _, size in self.fields)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.dtype is None

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of ``n_cols`` weights. Raises ValueError when the row does not divide into whole blocks."""
        if n_cols % self.block_size:
            raise ValueError(
                f"A row of {n_cols} weights does not divide into {self.name} blocks of {self.block_size}; "
                f"use a format with a smaller block or keep this tensor unquantised."
            )
        return n_cols // self.block_size * self.type_size

    def packed_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """Logical shape (torch order) -> ``(rows, row_bytes)`` of the packed bytes. Leading dimensions count as rows."""
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return rows, self.row_bytes(shape[-1] if len(shape) else 1)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape."""
        rows, row_bytes = self.packed_shape(shape)
        return rows * row_bytes

    def offset(self, field: str) -> int:
        """Byte offset of a field inside the block."""
        position = 0
        for name, size in self.fields:
            if name == field:
                return position
            position += size
        raise KeyError(
            f"{self.name} has no field {field!r}; its fields are {', '.join(name for name, _ in self.fields)}."
        )

    def size(self, field: str) -> int:
        """Bytes of a field."""
        return dict(self.fields)[field]

    def __str__(self) -> str:
        return self.name


def _plain(name: str, ggml_id: int, size: int, dtype: str) -> BlockFormat:
    return BlockFormat(name, ggml_id, 1, (("value", size),), dtype)


def _undecodable(name: str, ggml_id: int, block_size: int, type_size: int) -> BlockFormat:
    return BlockFormat(name, ggml_id, block_size, (("data", type_size),), None, decodable=False)


_DECODABLE = (
    _plain("F32", 0, 4, "float32"),
    _plain("F16", 1, 2, "float16"),
    _plain("BF16", 30, 2, "bfloat16"),
    _plain("F64", 28, 8, "float64"),
    _plain("I8", 24, 1, "int8"),
    _plain("I16", 25, 2, "int16"),
    _plain("I32", 26, 4, "int32"),
    _plain("I64", 27, 8, "int64"),
    # d: float16 scale, m: float16 minimum, qh: fifth bits, qs: low nibbles (element i and i+16 share byte i)
    BlockFormat("Q4_0", 2, 32, (("d", 2), ("qs", 16))),
    BlockFormat("Q4_1", 3, 32, (("d", 2), ("m", 2), ("qs", 16))),
    BlockFormat("Q5_0", 6, 32, (("d", 2), ("qh", 4), ("qs", 16))),
    BlockFormat("Q5_1", 7, 32, (("d", 2), ("m", 2), ("qh", 4), ("qs", 16))),
    BlockFormat("Q8_0", 8, 32, (("d", 2), ("qs", 32))),
    # super-blocks of 256: small integer scales per 16 or 32 weights, themselves scaled by the float16 d (and dmin)
    BlockFormat("Q2_K", 10, 256, (("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2))),
    BlockFormat("Q3_K", 11, 256, (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2))),
    BlockFormat("Q4_K", 12, 256, (("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128))),
    BlockFormat("Q5_K", 13, 256, (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128))),
    BlockFormat("Q6_K", 14, 256, (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2))),
    # nibbles index a fixed table of 16 uneven levels
    BlockFormat("IQ4_NL", 20, 32, (("d", 2), ("qs", 16))),
    BlockFormat("IQ4_XS", 23, 256, (("d", 2), ("scales_h", 2), ("scales_l", 4), ("qs", 128))),
)

_KNOWN_ONLY = (
    _undecodable("Q8_1", 9, 32, 36),
    _undecodable("Q8_K", 15, 256, 292),
    _undecodable("IQ2_XXS", 16, 256, 66),
    _undecodable("IQ2_XS", 17, 256, 74),
    _undecodable("IQ3_XXS", 18, 256, 98),
    _undecodable("IQ1_S", 19, 256, 50),
    _undecodable("IQ3_S", 21, 256, 110),
    _undecodable("IQ2_S", 22, 256, 82),
    _undecodable("IQ1_M", 29, 256, 56),
    _undecodable("TQ1_0", 34, 256, 54),
    _undecodable("TQ2_0", 35, 256, 66),
    _undecodable("MXFP4", 39, 32, 17),
    _undecodable("NVFP4", 40, 64, 36),
    _undecodable("Q1_0", 41, 128, 18),
)

# Types that GGML removed from its list; a file that uses one cannot be opened by current llama.cpp either.
REMOVED = {
    4: "Q4_2", 5: "Q4_3",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip

#: Every format that can be decoded, by name.
FORMATS: dict[str, BlockFormat] = {fmt.name: fmt for fmt in _DECODABLE}
#: The block-quantised ones among them.
QUANTIZED: dict[str, BlockFormat] = {name: fmt for name, fmt in FORMATS.items() if fmt.is_quantized}
#: Formats known by name and size alone: a file that holds them can be listed, but not decoded.
UNDECODABLE: dict[str, BlockFormat] = {fmt.name: fmt for fmt in _KNOWN_ONLY}

_BY_ID = {fmt.ggml_id: fmt for fmt in _DECODABLE + _KNOWN_ONLY}

#: The sixteen levels of IQ4_NL and IQ4_XS. Source: ggml-common.h ``kvalues_iq4nl``.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def format_by_id(ggml_id: int) -> BlockFormat:
    """The format with this GGML id, decodable or not. Raises UnsupportedFormatError for an id that is not in the list."""
    fmt = _BY_ID.get(ggml_id)
    if fmt is None:
        name = REMOVED.get(ggml_id)
        what = f"{name} (GGML type {ggml_id}), which GGML has withdrawn" if name else f"unknown GGML type {ggml_id}"
        raise UnsupportedFormatError(
            f"Found {what}; expected one of {', '.join(FORMATS)}. Use a file in one of these formats."
        )
    return fmt


def format_by_name(name: str) -> BlockFormat:
    """The format called ``name`` (upper or lower case). Raises UnsupportedFormatError for one that cannot be decoded."""
    fmt = FORMATS.get(name.upper())
    if fmt is None:
        known = " (known, but without a decoder here)" if name.upper() in UNDECODABLE else ""
        raise UnsupportedFormatError(
            f"Found format {name!r}{known}; expected one of {', '.join(FORMATS)}. Use a file in one of these formats."
        )
    return fmt


def require_decodable(fmt: BlockFormat, what: str = "tensor") -> BlockFormat:
    """Return ``fmt``, or raise UnsupportedFormatError naming it when it has no decoder. ``what`` names the tensor in the message."""
    if not fmt.decodable:
        raise UnsupportedFormatError(
            f"{what} is stored as {fmt.name}, which has no decoder here; expected one of {', '.join(FORMATS)}. "
            f"Use another quantisation of this model, e.g. Q4_K_M or Q8_0."
        )
    return fmt
