"""Decoding and products on packed weights for the CPU.

``linear`` decodes a tile of rows, multiplies, and takes the next tile: the tile stays in cache, and only a tile of a weight ever
exists as numbers.

The decoders compute what ``decode.py`` computes, bit for bit, with memory in mind: every buffer is reused, levels stay bytes as
long as possible, and each of the few passes over float32 is one long contiguous loop. Bytes are moved, shifted and masked eight at a time,
as columns of int64 words, because a loop over blocks of 16 single bytes costs more than the bytes. Numbers: ``benchmarks/cpu_linear.py``.
"""

import threading
from collections.abc import Callable

import torch

from .. import decode as reference
from ..formats import FORMATS, IQ4_LEVELS, BlockFormat
from ..tracing import is_plain

# Weights per tile of a product, 8 MB as float32: an eighth of a 4096 x 4096 layer. Smaller tiles pay more for the calls into torch and for
# packing x again, larger ones leave the third-level cache of common processors.
TILE_WEIGHTS = 1 << 21
# Rows are cut into pieces of this many columns at most, so that a tile of a very wide weight still has enough rows.
TILE_COLUMNS = 8192

_local = threading.local()


def scratch(tag: str, count: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat buffer of this thread, reused by every call with the same tag; contents are undefined."""
    buffers = _local.__dict__.setdefault("buffers", {})
    key = (tag, dtype)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # a buffer made in inference mode could not be written outside it
            buffer = buffers[key] = torch.empty(count, dtype=dtype)
    return buffer[:count]


def release_scratch() -> None:
    """Free this thread's buffers (they are made again when needed)."""
    _local.__dict__.pop("buffers", None)


def _half(b: torch.Tensor, at: int, tag: str) -> torch.Tensor:
    """The float16 at byte ``at`` of every block, as float32 ``[n, 1]``."""
    return scratch(tag, b.shape[0], torch.float32).view(-1, 1).copy_(b[:, at : at + 2].view(torch.float16))


def _half_pair(b: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The float16 at bytes ``at`` and ``at + 2`` of every block, each float32 ``[n, 1]``."""
    both = (
        scratch("halves", 2 * b.shape[0], torch.float32).view(-1, 2).copy_(_field(b, at, 4, "dm").view(torch.float16))
    )
    return both[:, :1], both[:, 1:]


def _field(b: torch.Tensor, at: int, size: int, tag: str) -> torch.Tensor:
    """Bytes ``at .. at + size`` of every block, contiguous ``uint8 [n, size]``."""
    n, type_size = b.shape
    out = scratch(tag, n * size, torch.uint8).view(n, size)
    for word, dtype in ((8, torch.int64), (4, torch.int32)):
        if size <= 16 and not (type_size % word or at % word or size % word) and b.storage_offset() % word == 0:
            source, target = b.view(dtype), out.view(dtype)
            for column in range(size // word):
                target[:, column].copy_(source[:, at // word + column])
            return out
    return out.copy_(b[:, at : at + size])


def _words(b: torch.Tensor, at: int, size: int, tag: str) -> torch.Tensor:
    """Bytes ``at .. at + size`` of every block as ``int64 [n, size / 8]``: where the blocks allow it a view, else a copy."""
    if b.shape[1] % 8 or at % 8 or b.storage_offset() % 8:
        return _field(b, at, size, tag).view(torch.int64)
    return b.view(torch.int64)[:, at // 8 : (at + size) // 8]


_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F


def _nibbles(words: torch.Tensor, group: int) -> torch.Tensor:
    """The nibbles of ``int64 [n, b]``, ``uint8 [n, 16 b]``: per ``group`` bytes, all low ones and then all high ones."""
    n, width = words.shape
    out = scratch("levels", n * width * 16, torch.uint8).view(n, width * 16)
    per_group = group // 8
    source = words.unflatten(1, (-1, per_group))
    target = out.view(torch.int64).view(n, -1, 2 * per_group)
    for i in range(per_group):
        target[..., i].copy_(source[..., i])
        torch.bitwise_right_shift(source[..., i], 4, out=target[..., per_group + i])
    target.view(-1).bitwise_and_(_LOW_NIBBLES)  # also what the shift brought in from the next byte, or from the sign
    return out


def _make_spread() -> torch.Tensor:
    """Byte -> eight bytes, bit i of the byte at bit 4 of byte i, as ``int64 [256]``."""
    with torch.inference_mode(False):
        bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
        return (bits << 4).to(torch.uint8).view(torch.int64).view(256)


_SPREAD = _make_spread()
with torch.inference_mode(False):
    _IQ4_LEVELS = torch.tensor(IQ4_LEVELS, dtype=torch.float32)


def _or_fifth_bits(levels: torch.Tensor, b: torch.Tensor, at: int) -> None:
    """Set bit 4 of the 32 levels of every block from the 32-bit word at byte ``at``."""
    n = b.shape[0]
    index = scratch("index", n * 4, torch.int32).copy_(_field(b, at, 4, "qh").view(-1))
    bits = torch.index_select(_SPREAD, 0, index, out=scratch("bits", n * 4, torch.int64))
    levels.view(torch.int64).view(-1).bitwise_or_(bits)


def _q4_0(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _nibbles(_words(b, 2, 16, "qs"), 16).sub_(8)
    out.copy_(q.view(torch.int8)).mul_(_half(b, 0, "d"))


def _q4_1(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _nibbles(_words(b, 4, 16, "qs"), 16)
    d, m = _half_pair(b, 0)
    out.copy_(q).mul_(d).add_(m)


def _q5_0(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _nibbles(_words(b, 6, 16, "qs"), 16)
    _or_fifth_bits(q, b, 2)
    out.copy_(q.sub_(16).view(torch.int8)).mul_(_half(b, 0, "d"))


def _q5_1(b: torch.Tensor, out: torch.Tensor) -> None:
    q = _nibbles(_words(b, 8, 16, "qs"), 16)
    _or_fifth_bits(q, b, 4)
    d, m = _half_pair(b, 0)
    out.copy_(q).mul_(d).add_(m)


def _q8_0(b: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(b[:, 2:34].view(torch.int8)).mul_(_half(b, 0, "d"))


def _k_scale_and_min(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Group scales and minima of Q4_K and Q5_K as float32 ``[8 n, 1]``."""
    scale, minimum = reference.unpack_k_scales(_field(b, 4, 12, "scales"))
    return _group_scales(scale, b, 0, "dl"), _group_scales(minimum, b, 2, "ml")


def _q4_k(b: torch.Tensor, out: torch.Tensor) -> None:
    dl, ml = _k_scale_and_min(b)
    out.copy_(_nibbles(_words(b, 16, 128, "qs"), 32)).view(-1, 32).mul_(dl).sub_(ml)


def _q5_k(b: torch.Tensor, out: torch.Tensor) -> None:
    n = b.shape[0]
    dl, ml = _k_scale_and_min(b)
    q = _nibbles(_words(b, 48, 128, "qs"), 32)
    high = _field(b, 16, 32, "qh")
    bit = scratch("bit", n * 32, torch.uint8).view(n, 32)
    for group in range(8):
        shifted = torch.bitwise_left_shift if group < 4 else torch.bitwise_right_shift
        shifted(high, abs(4 - group), out=bit)
        q.view(n, 8, 32)[:, group].bitwise_or_(bit.bitwise_and_(16))
    out.copy_(q).view(-1, 32).mul_(dl).sub_(ml)


def _q6_k(b: torch.Tensor, out: torch.Tensor) -> None:
    n = b.shape[0]
    q = _nibbles(_words(b, 0, 128, "qs"), 64)
    high = _field(b, 128, 64, "qh")
    bits = scratch("bit", n * 64, torch.uint8).view(n, 64)
    for i in range(4):
        shifted = torch.bitwise_left_shift if i < 2 else torch.bitwise_right_shift
        shifted(high, abs(4 - 2 * i), out=bits)
        q.view(n, 2, 4, 32)[:, :, i].bitwise_or_(bits.bitwise_and_(48).view(n, 2, 32))
    dl = _group_scales(b[:, 192:208].view(torch.int8), b, 208, "dl")
    out.copy_(q.sub_(32).view(torch.int8)).view(-1, 16).mul_(dl)


def _two_bits(b: torch.Tensor, at: int) -> torch.Tensor:
    """Levels ``uint8 [n, 256]`` of the 64 bytes at ``at``: per 32 bytes, all lowest bit pairs, then the next ones."""
    n = b.shape[0]
    qs = _field(b, at, 64, "qs")
    pairs = scratch("bit", n * 64, torch.uint8).view(n, 64)
    levels = scratch("levels", n * 256, torch.uint8).view(n, 2, 4, 32)
    for i in range(4):
        torch.bitwise_right_shift(qs, 2 * i, out=pairs)
        levels[:, :, i].copy_(pairs.bitwise_and_(3).view(n, 2, 32))
    return levels.view(n, 256)


def _group_scales(scales: torch.Tensor, b: torch.Tensor, at: int, tag: str) -> torch.Tensor:
    """Integer group scales ``[n, g]`` times the float16 at ``at``, as float32 ``[n * g, 1]``."""
    dl = scratch(tag, scales.numel(), torch.float32).view(scales.shape)
    return dl.copy_(scales).mul_(_half(b, at, "d")).view(-1, 1)


def _q2_k(b: torch.Tensor, out: torch.Tensor) -> None:
    scales = b[:, 0:16]
    dl, ml = _group_scales(scales & 0x0F, b, 80, "dl"), _group_scales(scales >> 4, b, 82, "ml")
    out.copy_(_two_bits(b, 16)).view(-1, 16).mul_(dl).sub_(ml)


def _q3_k(b: torch.Tensor, out: torch.Tensor) -> None:
    n = b.shape[0]
    q = _two_bits(b, 32)
    mask = _field(b, 0, 32, "qh")
    bit = scratch("bit", n * 32, torch.uint8).view(n, 32)
    for group in range(8):  # the high bit counts 4, and the level is 4 less
        shifted = torch.bitwise_left_shift if group < 2 else torch.bitwise_right_shift
        shifted(mask, abs(2 - group), out=bit)
        q.view(n, 8, 32)[:, group].bitwise_or_(bit.bitwise_and_(4))
    dl = _group_scales(reference.unpack_q3_scales(b[:, 96:108]), b, 108, "dl")
    out.copy_(q.sub_(4).view(torch.int8)).view(-1, 16).mul_(dl)


def _iq4_levels(q: torch.Tensor, out: torch.Tensor) -> None:
    index = scratch("index", q.numel(), torch.int32).copy_(q.view(-1))
    torch.index_select(_IQ4_LEVELS, 0, index, out=out.view(-1))


def _iq4_nl(b: torch.Tensor, out: torch.Tensor) -> None:
    _iq4_levels(_nibbles(_words(b, 2, 16, "qs"), 16), out)
    out.mul_(_half(b, 0, "d"))


def _iq4_xs(b: torch.Tensor, out: torch.Tensor) -> None:
    _iq4_levels(_nibbles(_words(b, 8, 128, "qs"), 16), out)
    out.view(-1, 32).mul_(_group_scales(reference.unpack_iq4_scales(b[:, 2:4], b[:, 4:8]), b, 0, "dl"))


_DECODERS: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip


def dequantize(raw: torch.Tensor, fmt: BlockFormat, out: torch.Tensor) -> torch.Tensor:
    """Packed rows ``uint8 [rows, row_bytes]`` -> ``out [rows, cols]``; equals ``reference.dequantize``. Returns ``out``."""
    if not is_plain(raw, out):
        torch.ops.ltx2_gguf.cpu_dequantize(raw, fmt.name, out)
        return out
    rows, n_cols = out.shape
    decode = _DECODERS[fmt.name]
    raw = raw.contiguous()
    step = max(1, TILE_WEIGHTS // max(n_cols, 1))
    direct = out.dtype == torch.float32 and out.is_contiguous()
    with torch.no_grad():
        for start in range(0, rows, step):
            count = min(step, rows - start)
            blocks = raw[start : start + count].view(-1, fmt.type_size)
            part = out[start : start + count]
            numbers = part if direct else scratch("slice", count * n_cols, torch.float32)
            decode(blocks, numbers.view(-1, fmt.block_size))
            if not direct:
                part.copy_(numbers.view(count, n_cols))
    return out


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of ``dtype`` are fastest here: bfloat16 where the processor multiplies it natively, else float32."""
    if dtype == torch.bfloat16:
        for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if getattr(torch.cpu, probe, bool)():
                return torch.bfloat16
    return torch.float32


def linear(
    x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None
) -> torch.Tensor:
    """``x [..., in] @ decode(raw).T + bias`` -> ``[..., out]`` in the dtype of x."""
    if not is_plain(x, raw, bias):
        return torch.ops.ltx2_gguf.cpu_linear(x, raw, fmt.name, shape[0], bias)
    out_features, in_features = shape
    n_blocks = in_features // fmt.block_size
    # K is cut at block boundaries; sums over the cuts are kept in the compute dtype
    block_step = min(n_blocks, max(1, TILE_COLUMNS // fmt.block_size))
    row_step = max(1, min(out_features, TILE_WEIGHTS // (block_step * fmt.block_size)))
    dtype = compute_dtype(x.dtype) if block_step == n_blocks else torch.float32
    with torch.no_grad():
        rows = x.detach().reshape(-1, in_features).to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        out = torch.empty(rows.shape[0], out_features, dtype=x.dtype)
        tile = scratch("tile", row_step * block_step * fmt.block_size, dtype)
        for start in range(0, out_features, row_step):
            count = min(row_step, out_features - start)
            target = out[:, start : start + count]
            product = target if out.dtype == dtype else scratch("product", rows.shape[0] * count, dtype).view(-1, count)
            for first in range(0, n_blocks, block_step):
                blocks = min(block_step, n_blocks - first)
                columns = slice(first * fmt.block_size, (first + blocks) * fmt.block_size)
                part = tile[: count * blocks * fmt.block_size].view(count, -1)
                dequantize(
                    raw[start : start + count, first * fmt.type_size : (first + blocks) * fmt.type_size], fmt, part
                )
                if first:
                    product.addmm_(rows[:, columns], part.t())
                elif bias is None:
                    torch.mm(rows[:, columns], part.t(), out=product)
                else:
                    torch.addmm(bias[start : start + count], rows[:, columns], part.t(), out=product)
            if product is not target:
                target.copy_(product)
    return out.view(*x.shape[:-1], out_features)


@torch.library.custom_op("ltx2_gguf::cpu_dequantize", mutates_args={"out"}, device_types="cpu")
def _dequantize_op(raw: torch.Tensor, fmt_name: str, out: torch.Tensor) -> None:
    dequantize(raw, FORMATS[fmt_name], out)


@torch.library.custom_op("ltx2_gguf::cpu_linear", mutates_args=(), device_types="cpu")
def _linear_op(
    x: torch.Tensor, raw: torch.Tensor, fmt_name: str, out_features: int, bias: torch.Tensor | None
) -> torch.Tensor:
    return linear(x, raw, FORMATS[fmt_name], (out_features, x.shape[-1]), bias)


@_linear_op.register_fake
def _(x, raw, fmt_name, out_features, bias):
    return x.new_empty((*x.shape[:-1], out_features))
