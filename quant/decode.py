"""Decode GGML blocks in plain torch (``encode.py`` writes them): the truth that every kernel of this package is tested against.

In float32 ``dequantize`` equals gguf-py bit for bit, on any bytes; other output types are that result, rounded. Only operations
that CPU, CUDA and MPS all have are used: bits are taken apart in uint8, int16 and int32, and there is no float64.

A decoder maps blocks ``uint8 [n, type_size]`` to weights ``float32 [n, block_size]``; the order of operations in its last line is
part of the format, because floating point rounds after each.

Sources: ggml ``src/ggml-quants.c`` (``dequantize_row_*``), gguf-py ``gguf/quants.py``.
"""

from collections.abc import Callable

import torch

from .encode import ENCODABLE, quantize
from .formats import IQ4_LEVELS, BlockFormat, format_by_name, require_decodable

__all__ = [
    "ENCODABLE",
    "decode_blocks",
    "dequantize",
    "quantize",
    "torch_dtype",
    "unpack_iq4_scales",
    "unpack_k_scales",
    "unpack_q3_scales",
]

# Weights decoded at once. On the CPU the float32 intermediates then stay in the second-level cache; elsewhere it bounds scratch memory.
CHUNK_WEIGHTS = {"cpu": 1 << 18}
CHUNK_WEIGHTS_DEVICE = 1 << 24


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at a byte offset of every block, as float32 ``[n, 1]``."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(qs: torch.Tensor, group: int) -> torch.Tensor:
    """``uint8 [n, b]`` -> ``uint8 [n, 2 b]``: per ``group`` bytes, all low nibbles and then all high nibbles."""
    n = qs.shape[0]
    qs = qs.reshape(n, -1, 1, group)
    return torch.cat((qs & 0x0F, qs >> 4), dim=2).reshape(n, -1)


def _bits(packed: torch.Tensor, width: int, count: int, group: int) -> torch.Tensor:
    """Bit fields: per ``group`` bytes, field 0 (lowest ``width`` bits) of all bytes, then field 1, up to field ``count - 1``."""
    n = packed.shape[0]
    packed = packed.reshape(n, -1, 1, group)
    mask = (1 << width) - 1
    return torch.cat([(packed >> (width * i)) & mask for i in range(count)], dim=2).reshape(n, -1)


def _fifth_bits(qh: torch.Tensor) -> torch.Tensor:
    """``uint8 [n, 4]`` -> ``uint8 [n, 32]``: bit i of the little-endian word, shifted up to bit 4."""
    bits = torch.stack([(qh >> i) & 1 for i in range(8)], dim=-1)  # (n, 4, 8)
    return bits.reshape(qh.shape[0], 32) << 4


def _levels(index: torch.Tensor) -> torch.Tensor:
    """Index into the IQ4 levels, as float32 of the same shape."""
    table = torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=index.device)
    return table[index.to(torch.int32)]


def _decode_q4_0(b: torch.Tensor) -> torch.Tensor:
    """d * (q - 8): 4.5 bits per weight."""
    q = _nibbles(b[:, 2:18], 16).to(torch.int8) - 8
    return _half(b, 0) * q.float()


def _decode_q4_1(b: torch.Tensor) -> torch.Tensor:
    """d * q + m: 5 bits per weight."""
    return _half(b, 0) * _nibbles(b[:, 4:20], 16).float() + _half(b, 2)


def _decode_q5_0(b: torch.Tensor) -> torch.Tensor:
    """d * (q - 16): 5.5 bits per weight."""
    q = (_nibbles(b[:, 6:22], 16) | _fifth_bits(b[:, 2:6])).to(torch.int8) - 16
    return _half(b, 0) * q.float()


def _decode_q5_1(b: torch.Tensor) -> torch.Tensor:
    """d * q + m: 6 bits per weight."""
    q = _nibbles(b[:, 8:24], 16) | _fifth_bits(b[:, 4:8])
    return _half(b, 0) * q.float() + _half(b, 2)


def _decode_q8_0(b: torch.Tensor) -> torch.Tensor:
    """q * d: 8.5 bits per weight."""
    return b[:, 2:34].contiguous().view(torch.int8).float() * _half(b, 0)


def _decode_q2_k(b: torch.Tensor) -> torch.Tensor:
    """(d * scale) * q - (dmin * min), 16 groups of 16: 2.625 bits per weight. scales: low nibble scale, high nibble min."""
    n = b.shape[0]
    scales = b[:, 0:16]
    dl = (_half(b, 80) * (scales & 0x0F).float()).reshape(n, 16, 1)
    ml = (_half(b, 82) * (scales >> 4).float()).reshape(n, 16, 1)
    q = _bits(b[:, 16:80], 2, 4, 32).reshape(n, 16, 16).float()
    return (dl * q - ml).reshape(n, 256)


def unpack_q3_scales(scales: torch.Tensor) -> torch.Tensor:
    """The 12 scale bytes of Q3_K -> ``int8 [n, 16]``, scale - 32.

    Low nibbles are in bytes 0-7 (scales i and i + 8 share a byte), the upper two bits in bytes 8-11 (scales i, i + 4, i + 8 and
    i + 12 share a byte).
    """
    low = _nibbles(scales[:, 0:8], 8)
    high = _bits(scales[:, 8:12], 2, 4, 4)
    return (low | (high << 4)).to(torch.int8) - 32


def _decode_q3_k(b: torch.Tensor) -> torch.Tensor:
    """(d * (scale - 32)) * (q - 4 unless the high bit is set), 16 groups of 16: 3.4375 bits per weight."""
    n = b.shape[0]
    dl = (_half(b, 108) * unpack_q3_scales(b[:, 96:108]).float()).reshape(n, 16, 1)
    q = _bits(b[:, 32:96], 2, 4, 32).to(torch.int8)
    unset = (_bits(b[:, 0:32], 1, 8, 32) ^ 1).to(torch.int8)
    q = (q - unset * 4).reshape(n, 16, 16).float()
    return (dl * q).reshape(n, 256)


def unpack_k_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 scale bytes of Q4_K and Q5_K -> (scale, min), both ``uint8 [n, 8]`` with 6-bit values.

    Bytes 0-3 hold scales 0-3 in their low six bits, bytes 4-7 minima 0-3; bytes 8-11 the low nibbles of scales 4-7 (low half)
    and minima 4-7 (high half), whose upper two bits are the top bits of bytes 0-3 and 4-7.
    """
    d, m, md = scales[:, 0:4], scales[:, 4:8], scales[:, 8:12]
    scale = torch.cat((d & 0x3F, (md & 0x0F) | ((d >> 2) & 0x30)), dim=1)
    minimum = torch.cat((m & 0x3F, (md >> 4) | ((m >> 2) & 0x30)), dim=1)
    return scale, minimum


def _decode_q4_k(b: torch.Tensor) -> torch.Tensor:
    """(d * scale) * q - (dmin * min), 8 groups of 32: 4.5 bits per weight."""
    n = b.shape[0]
    scale, minimum = unpack_k_scales(b[:, 4:16])
    dl = (_half(b, 0) * scale.float()).reshape(n, 8, 1)
    ml = (_half(b, 2) * minimum.float()).reshape(n, 8, 1)
    q = _nibbles(b[:, 16:144], 32).reshape(n, 8, 32).float()
    return (dl * q - ml).reshape(n, 256)


def _decode_q5_k(b: torch.Tensor) -> torch.Tensor:
    """(d * scale) * q - (dmin * min), 8 groups of 32: 5.5 bits per weight. Bit g of qh[i] is the fifth bit of weight i of group g."""
    n = b.shape[0]
    scale, minimum = unpack_k_scales(b[:, 4:16])
    dl = (_half(b, 0) * scale.float()).reshape(n, 8, 1)
    ml = (_half(b, 2) * minimum.float()).reshape(n, 8, 1)
    q = _nibbles(b[:, 48:176], 32) | (_bits(b[:, 16:48], 1, 8, 32) << 4)
    return (dl * q.reshape(n, 8, 32).float() - ml).reshape(n, 256)


def _decode_q6_k(b: torch.Tensor) -> torch.Tensor:
    """(d * scale) * (q - 32), 16 groups of 16: 6.5625 bits per weight."""
    n = b.shape[0]
    scale = b[:, 192:208].contiguous().view(torch.int8).float()
    dl = (_half(b, 208) * scale).reshape(n, 16, 1)
    q = _nibbles(b[:, 0:128], 64) | (_bits(b[:, 128:192], 2, 4, 32) << 4)
    q = (q.to(torch.int8) - 32).reshape(n, 16, 16).float()
    return (dl * q).reshape(n, 256)


def _decode_iq4_nl(b: torch.Tensor) -> torch.Tensor:
    """d * level[q]: 4.5 bits per weight."""
    return _half(b, 0) * _levels(_nibbles(b[:, 2:18], 16))


def unpack_iq4_scales(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """scales_h ``uint8 [n, 2]`` and scales_l ``uint8 [n, 4]`` of IQ4_XS -> ``int8 [n, 8]``, scale - 32."""
    n = low.shape[0]
    low = torch.stack((low & 0x0F, low >> 4), dim=-1).reshape(n, 8)
    high = torch.stack([(high >> (2 * i)) & 3 for i in range(4)], dim=-1).reshape(n, 8)
    return (low | (high << 4)).to(torch.int8) - 32


def _decode_iq4_xs(b: torch.Tensor) -> torch.Tensor:
    """(d * (scale - 32)) * level[q], 8 groups of 32: 4.25 bits per weight."""
    n = b.shape[0]
    dl = (_half(b, 0) * unpack_iq4_scales(b[:, 2:4], b[:, 4:8]).float()).reshape(n, 8, 1)
    q = _levels(_nibbles(b[:, 8:136], 16)).reshape(n, 8, 32)
    return (dl * q).reshape(n, 256)


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _decode_q4_0, "Q4_1": _decode_q4_1, "Q5_0": _decode_q5_0, "Q5_1": _decode_q5_1, "Q8_0": _decode_q8_0,
    "Q2_K": _decode_q2_k, "Q3_K": _decode_q3_k, "Q4_K": _decode_q4_k, "Q5_K": _decode_q5_k, "Q6_K": _decode_q6_k,
    "IQ4_NL": _decode_iq4_nl, "IQ4_XS": _decode_iq4_xs,
}  # fmt: skip


def decode_blocks(blocks: torch.Tensor, fmt: BlockFormat) -> torch.Tensor:
    """Blocks ``uint8 [n, type_size]`` -> weights ``float32 [n, block_size]``."""
    return _DECODERS[fmt.name](blocks)


def torch_dtype(fmt: BlockFormat) -> torch.dtype:
    """The torch dtype of a plain number format."""
    if fmt.dtype is None:
        raise ValueError(f"{fmt.name} is block-quantised and has no torch dtype; decode it with dequantize().")
    return getattr(torch, fmt.dtype)


def dequantize(
    raw: torch.Tensor, fmt: BlockFormat | str, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Packed rows -> weights.

    raw:   uint8 ``[rows, row_bytes]``; plain number formats may also be given as their own dtype ``[rows, cols]``
    dtype: output type; every type but float32 equals the float32 result, rounded to nearest
    out:   write here instead (its dtype then counts), ``[rows, cols]``
    Returns ``[rows, cols]`` on the device of ``raw``.
    """
    fmt = require_decodable(format_by_name(fmt) if isinstance(fmt, str) else fmt)
    if not fmt.is_quantized:
        own = torch_dtype(fmt)
        dense = raw if raw.dtype == own else raw.contiguous().view(own)
        return out.copy_(dense) if out is not None else dense.to(dtype)
    rows, row_bytes = raw.shape
    if row_bytes % fmt.type_size:
        raise ValueError(
            f"Rows of {row_bytes} bytes do not divide into {fmt.name} blocks of {fmt.type_size} bytes; the data is not {fmt.name}."
        )
    n_cols = row_bytes // fmt.type_size * fmt.block_size
    decode = _DECODERS[fmt.name]
    step = max(1, CHUNK_WEIGHTS.get(raw.device.type, CHUNK_WEIGHTS_DEVICE) // max(n_cols, 1))
    if out is None:
        if rows <= step:
            return decode(raw.reshape(-1, fmt.type_size)).reshape(rows, n_cols).to(dtype)
        out = torch.empty(rows, n_cols, dtype=dtype, device=raw.device)
    for start in range(0, rows, step):
        part = raw[start : start + step]
        out[start : start + step].copy_(decode(part.reshape(-1, fmt.type_size)).reshape(part.shape[0], n_cols))
    return out
