"""Typed metadata values of GGUF files: the value types, and reading and writing one value.

Source: ggml ``docs/gguf.md`` and ``src/gguf.cpp`` (arrays of arrays are not allowed there either).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .text import MESSAGE_LENGTH, visible

STRING, ARRAY = 8, 9

#: Value type code -> name.
TYPE_NAMES = {
    0: "uint8", 1: "int8", 2: "uint16", 3: "int16", 4: "uint32", 5: "int32", 6: "float32", 7: "bool",
    STRING: "string", ARRAY: "array", 10: "uint64", 11: "int64", 12: "float64",
}  # fmt: skip
TYPE_CODES = {name: code for code, name in TYPE_NAMES.items()}

#: Value type code -> how the number is stored.
SCALARS = {
    code: struct.Struct("<" + letter)
    for code, letter in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


MAX_STRING_BYTES = 8 << 20  # of one value that is decoded
MAX_ARRAY_BYTES, MAX_ARRAY_ITEMS = 32 << 20, 1 << 20


class GGUFFormatError(ValueError):
    """The file is not a GGUF file that this package can read; the message says what to do."""

    __module__ = "quant"  # shown before the name of the error

    def __init__(self, message: str = ""):
        super().__init__(visible(message, MESSAGE_LENGTH))


@dataclass(frozen=True)
class GGUFValue:
    """A metadata value with its GGUF type.

    type:  a name from ``TYPE_NAMES``
    value: str, bool, int, float, or a list of these
    items: for an array, the type of its items
    """

    type: str
    value: Any
    items: str | None = None

    def to_bytes(self) -> bytes:
        """The entry as it stands in a file: type code, then the value."""
        code = TYPE_CODES[self.type]
        if code != ARRAY:
            return _U32.pack(code) + _one(self.type, self.value)
        if self.items not in TYPE_CODES or self.items == "array":
            known = ", ".join(name for name in TYPE_CODES if name != "array")
            raise ValueError(f"An array of {self.items!r} cannot be stored in GGUF; expected items of one of {known}.")
        head = _U32.pack(code) + _U32.pack(TYPE_CODES[self.items]) + _U64.pack(len(self.value))
        if self.items == "string":
            return head + b"".join(_one("string", item) for item in self.value)
        return head + struct.pack(f"<{len(self.value)}{SCALARS[TYPE_CODES[self.items]].format[-1]}", *self.value)


def _one(kind: str, value: Any) -> bytes:
    if kind == "string":
        text = value.encode("utf-8")
        return _U64.pack(len(text)) + text
    return SCALARS[TYPE_CODES[kind]].pack(value)


def _integer_type(low: int, high: int) -> str:
    if low >= 0 and high < 2**32:
        return "uint32"
    if low >= -(2**31) and high < 2**31:
        return "int32"
    return "uint64" if low >= 0 else "int64"


def infer(value: Any) -> GGUFValue:
    """Choose the GGUF type of a plain Python value: str, bool, int (smallest of uint32, int32, uint64, int64), float (float32), list of one kind."""
    if isinstance(value, GGUFValue):
        return value
    if isinstance(value, str):
        return GGUFValue("string", value)
    if isinstance(value, bool):
        return GGUFValue("bool", value)
    if isinstance(value, int):
        return GGUFValue(_integer_type(value, value), value)
    if isinstance(value, float):
        return GGUFValue("float32", value)
    if isinstance(value, (list, tuple)):
        items = list(value)
        kinds = {infer(item).type if not isinstance(item, int) or isinstance(item, bool) else "int" for item in items}
        if kinds == {"int"}:
            return GGUFValue("array", items, _integer_type(min(items), max(items)))
        if kinds == {"int", "float32"}:
            kinds = {"float32"}
        if len(kinds) == 1 and "array" not in kinds:
            return GGUFValue("array", items, kinds.pop())
        raise TypeError(
            f"A list of {', '.join(sorted(kinds)) or 'nothing'} has no single GGUF type; give a GGUFValue with the item type."
        )
    raise TypeError(
        f"A {type(value).__name__} cannot be stored in GGUF metadata; expected str, bool, int, float or a list of one of these."
    )


class Metadata(Mapping[str, Any]):
    """The key-value entries of a file, decoded on access: str, bool, int, float, or a list of these.

    Values were located (and their extents checked) when the file was opened; ``data`` is the mapped file.
    """

    def __init__(self, data, entries: dict[str, tuple[int, int, int]]):
        self._data = data
        self._entries = entries  # key -> (type code, start, end)
        self._decoded: dict[str, GGUFValue] = {}

    def typed(self, key: str) -> GGUFValue:
        """The value together with its type, so that a copy of the file can keep both."""
        value = self._decoded.get(key)
        if value is None:
            if self._data is None:
                raise ValueError(f"The file is closed; open it again to read metadata {key!r}.")
            value = self._decoded[key] = self._decode(*self._entries[key])
        return value

    def scalar(self, key: str, kind: type, default: Any = None) -> Any:
        """The value when the entry is a string (``kind`` str), whole number (int) or number (float), else ``default``. Arrays are not decoded."""
        code = self._entries[key][0] if key in self._entries else ARRAY
        if code == ARRAY or (code == STRING) != (kind is str):
            return default
        value = self[key]
        if kind is float and not isinstance(value, bool):
            return float(value)
        return value if type(value) is kind else default

    def array(self, key: str, most: int) -> list | None:
        """The items when the entry is an array of at most ``most``, else None; anything else is not decoded."""
        is_array = key in self._entries and self._entries[key][0] == ARRAY
        return self[key] if is_array and self.length(key) <= most else None

    def type_name(self, key: str) -> str:
        """``"string"``, ``"uint32"``, ``"array of float32"``, ... The value is not decoded."""
        kind, start, _ = self._entries[key]
        return f"array of {TYPE_NAMES[_U32.unpack_from(self._data, start)[0]]}" if kind == ARRAY else TYPE_NAMES[kind]

    def length(self, key: str) -> int:
        """Number of items of an array. The value is not decoded."""
        kind, start, _ = self._entries[key]
        if kind != ARRAY:
            raise TypeError(f"Metadata {key!r} is a {TYPE_NAMES[kind]}, not an array.")
        return _U64.unpack_from(self._data, start + 4)[0]

    def close(self) -> None:
        """Let go of the file. Values that were read before stay readable."""
        self._data = None

    def _decode(self, kind: int, start: int, end: int) -> GGUFValue:
        if kind not in (STRING, ARRAY):
            return GGUFValue(TYPE_NAMES[kind], SCALARS[kind].unpack_from(self._data, start)[0])
        if end - start > (MAX_STRING_BYTES if kind == STRING else MAX_ARRAY_BYTES):
            raise GGUFFormatError(
                f"A metadata value of {end - start} bytes is larger than any model needs; the header is damaged."
            )
        block = bytes(self._data[start:end])
        if kind == STRING:
            return GGUFValue("string", _strings(block, 0, 1)[0])
        item, count = _U32.unpack_from(block, 0)[0], _U64.unpack_from(block, 4)[0]
        if count > MAX_ARRAY_ITEMS:
            raise GGUFFormatError(
                f"A metadata array of {count} items is longer than any model needs; the header is damaged."
            )
        if item == STRING:
            return GGUFValue("array", _strings(block, 12, count), "string")
        return GGUFValue(
            "array", list(struct.unpack_from(f"<{count}{SCALARS[item].format[-1]}", block, 12)), TYPE_NAMES[item]
        )

    def __getitem__(self, key: str) -> Any:
        return self.typed(key).value

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _strings(block: bytes, at: int, count: int) -> list[str]:
    """``count`` length-prefixed strings. Bytes that are not UTF-8 (vocabularies hold some) become U+FFFD instead of an error."""
    items, unpack = [], _U64.unpack_from
    for _ in range(count):
        end = at + 8 + unpack(block, at)[0]
        items.append(block[at + 8 : end].decode("utf-8", "replace"))
        at = end
    return items
