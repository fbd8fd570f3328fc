"""Damaged and hostile versions of model files, from a seeded random source: bits, bytes, sizes, names, types, nesting."""

import json
import struct
from random import Random

EXTREMES = (
    0,
    1,
    2,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
TEXTS = (
    "", " ", "\0", "\x1b[2J\x1b]0;title\x07", "<script>alert(1)</script>", "../../../etc/passwd", "‮gnp.exe", "\udc80", "\ud800", "a" * 5000, "9" * 5000,
    "{", "[" * 3000, '{"a":' * 2000, "(a+)+$", "(?:.*)*x", "nan", "inf", "-1", "1e999", "²", "None", "true", "%s%n", "{0.__class__}",
)  # fmt: skip
LAYERS = (
    "transformer_blocks.99999999999.",
    "transformer_blocks.4999.",
    "blk.88888.",
    "model.layers.123456789.",
    "res_blocks.77777777.",
    "up_blocks.5000.",
)


def _value(random: Random, depth: int = 0):
    """Any JSON value."""
    kind = random.randrange(9)
    if kind == 0:
        return random.choice(TEXTS).encode("utf-8", "replace").decode()
    if kind == 1:
        return random.choice(EXTREMES) * random.choice((1, -1))
    if kind == 2:
        return random.choice((0.5, -1.0, 1e308, float("inf"), float("nan")))
    if kind == 3:
        return random.choice((None, True, False))
    if kind == 4 and depth < 3:
        return [_value(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 5 and depth < 3:
        return {
            random.choice(("format", "dtype", "a", "transformer", "vae", "layers")): _value(random, depth + 1)
            for _ in range(random.randrange(3))
        }
    return random.randrange(-3, 70)


def _mutate_json(random: Random, value, rounds: int = 1):
    """A table in which one place is another value, another key, or gone."""
    path, here = [], value
    while isinstance(here, (dict, list)) and here and (not path or random.random() < 0.8):
        key = random.choice(list(here)) if isinstance(here, dict) else random.randrange(len(here))
        path.append((here, key))
        here = here[key]
    if not path:
        return _value(random)
    owner, key = path[-1]
    action = random.randrange(4)
    if action == 0 and isinstance(owner, dict):
        owner[_name(random, str(key))] = owner.pop(key)
    elif action == 1:
        del owner[key]
    elif isinstance(here, str) and here[:1] == "{" and random.random() < 0.7:
        try:
            owner[key] = json.dumps(_mutate_json(random, json.loads(here)))
        except (ValueError, RecursionError):
            owner[key] = _value(random)
    else:
        owner[key] = _value(random)
    return value if rounds <= 1 else _mutate_json(random, value, rounds - 1)


def _name(random: Random, name: str) -> str:
    """Another name in place of a tensor's or an entry's."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice(TEXTS)
    if kind == 1:
        return random.choice(LAYERS) + name.split(".")[-1]
    if kind == 2:
        return name + random.choice(TEXTS)
    if kind == 3:
        return name.replace("0", random.choice(("1", "7", "99", "-1", "٣", "0x1")))
    if kind == 4:
        return random.choice(("model.", "vae.", "diffusion_model.", ".", "..")) + name
    at = random.randrange(len(name) + 1)
    return name[:at] + chr(random.randrange(1, 0x300)) + name[at + 1 :]


def bits(random: Random, data: bytes, header: int) -> bytes:
    """A few bits or bytes of the header changed."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5, 30))):
        at = random.randrange(min(header, len(out)))
        out[at] = out[at] ^ 1 << random.randrange(8) if random.random() < 0.5 else random.randrange(256)
    return bytes(out)


def cut(random: Random, data: bytes, header: int) -> bytes:
    """Cut short, or with a piece missing, doubled or moved."""
    end = random.choice((header, len(data)))
    a, b = sorted(random.randrange(end + 1) for _ in range(2))
    kind = random.randrange(5)
    if kind == 0:
        return data[:a]
    if kind == 1:
        return data[:a] + data[b:]
    if kind == 2:
        return data[:b] + data[a : min(b, a + 4096)] + data[b:]
    if kind == 3:
        return bytes(random.randrange(256) for _ in range(random.randrange(64))) + data[a:]
    return data + bytes(random.randrange(1, 5000))


def numbers(random: Random, data: bytes, header: int) -> bytes:
    """A 32 or 64 bit number of the header is an extreme one."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 3))):
        code = random.choice(("<I", "<Q"))
        at = random.randrange(max(1, min(header, len(out)) - 8))
        struct.pack_into(code, out, at, random.choice(EXTREMES) % 2 ** (8 * struct.calcsize(code)))
    return bytes(out)


def words(random: Random, data: bytes, header: int) -> bytes:
    """A piece of text in the header is another one of the same length, or of any."""
    at = random.randrange(header)
    text = random.choice(TEXTS + LAYERS).encode("utf-8", "surrogatepass")[:200]
    return data[:at] + text + data[at + (len(text) if random.random() < 0.7 else random.randrange(40)) :]


def safetensors_table(random: Random, data: bytes, header: int) -> bytes:
    """The header's table with other values, names or types, written out whole."""
    length = struct.unpack("<Q", data[:8])[0]
    table = _mutate_json(random, json.loads(data[8 : 8 + length]), random.choice((1, 1, 2, 6)))
    text = json.dumps(table, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def json_text(random: Random, data: bytes, header: int) -> bytes:
    """A whole JSON file with other values."""
    return json.dumps(_mutate_json(random, json.loads(data), random.choice((1, 3)))).encode("utf-8", "surrogatepass")


def _entries(data: bytes):
    """(start of value type, type, start of value, end) of every metadata entry of a well-formed GGUF, and where they begin and end."""
    count, at, found = struct.unpack_from("<Q", data, 16)[0], 24, []
    size = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    for _ in range(count):
        key = at
        at += 8 + struct.unpack_from("<Q", data, at)[0]
        kind = struct.unpack_from("<I", data, at)[0]
        start = at = at + 4
        if kind in size:
            at += size[kind]
        elif kind == 8:
            at += 8 + struct.unpack_from("<Q", data, at)[0]
        else:
            item, items = struct.unpack_from("<IQ", data, at)
            at += 12
            if item == 8:
                for _ in range(items):
                    at += 8 + struct.unpack_from("<Q", data, at)[0]
            else:
                at += size[item] * items
        found.append((key, kind, start, at))
    return found


def gguf_entries(random: Random, data: bytes, header: int) -> bytes:
    """A metadata entry of a GGUF has another type, another value, or another key; positions of the tensors stay right."""
    entries = _entries(data)
    pieces = []
    chosen = random.sample(range(len(entries)), min(len(entries), random.choice((1, 1, 2))))
    for number, (key, kind, start, end) in enumerate(entries):
        name, value = data[key : start - 4], data[start - 4 : end]
        if number in chosen:
            text = data[start + 8 : end] if kind == 8 else b""
            what = random.randrange(5)
            if what == 0:
                value = _typed(random)
            elif what == 1 and text[:1] == b"{":
                try:
                    text = json.dumps(_mutate_json(random, json.loads(text), random.choice((1, 2, 6)))).encode(
                        "utf-8", "replace"
                    )
                except (ValueError, RecursionError):
                    pass
                value = struct.pack("<IQ", 8, len(text)) + text
            elif what == 2:
                other = _name(random, name[8:].decode("utf-8", "replace")).encode("utf-8", "surrogatepass")
                name = struct.pack("<Q", len(other)) + other
            elif what == 3:
                name, value = b"", b""
            else:
                value = _typed(random)
        pieces.append(name + value)
    count = sum(1 for piece in pieces if piece)
    old_end = entries[-1][3] if entries else 24
    head = data[:16] + struct.pack("<Q", count) + b"".join(pieces)
    infos = data[old_end:header]
    # The tensors' descriptions follow, then padding to where data begins: both stay aligned.
    end = len(head) + len(infos.rstrip(b"\0"))
    return head + infos.rstrip(b"\0") + bytes(-end % 32) + data[header:]


def _typed(random: Random) -> bytes:
    """Type and value of a GGUF entry."""
    kind = random.choice((0, 4, 5, 6, 7, 8, 9, 9, 10, 12, 13, 255))
    if kind == 8:
        text = random.choice(TEXTS).encode("utf-8", "surrogatepass")
        return struct.pack("<IQ", 8, len(text)) + text
    if kind == 9:
        item = random.choice((4, 5, 6, 8, 9))
        count = random.choice((0, 1, 3, 1000))
        if item == 8:
            return struct.pack("<IIQ", 9, 8, count) + b"".join(struct.pack("<Q", 2) + b"ab" for _ in range(count))
        return struct.pack("<IIQ", 9, item, count) + struct.pack("<I", random.choice(EXTREMES) % 2**32) * count
    if kind == 6:
        return struct.pack("<If", 6, random.choice((0.0, -1.0, float("nan"), float("inf"))))
    if kind == 12:
        return struct.pack("<Id", 12, random.choice((0.0, -1.0, float("nan"), 1e308)))
    width = {0: "B", 7: "B", 4: "I", 5: "I", 10: "Q"}.get(kind, "I")
    return struct.pack("<I" + width, kind, random.choice(EXTREMES) % 2 ** (8 * struct.calcsize(width)))


GENERAL = (bits, bits, cut, numbers, numbers, words)
MUTATORS = {
    "gguf": (*GENERAL, gguf_entries, gguf_entries, gguf_entries),
    "safetensors": (*GENERAL, safetensors_table, safetensors_table, safetensors_table, safetensors_table),
    "json": (bits, cut, words, json_text, json_text),
    "bytes": (bits, cut, numbers, words),
}
