"""Encode weights as GGML blocks: the 32-weight formats bit for bit as gguf-py does, K-formats by a least-squares search.

The 32-weight formats have one accepted encoding (the largest magnitude, or the range, sets the scale), and ``quantize`` gives the
same bytes as gguf-py. K-formats leave the choice of scales to the encoder: here each group of 16 or 32 weights tries a ladder of
scales, fits scale and minimum by weighted least squares for each, and keeps the best; the group scales are then rounded to whole numbers
against one float16 per super-block of 256, where the neighbours of the nearest number are tried too, and that float16 is fitted last.
Larger weights count more, as in llama.cpp's encoder without an importance matrix.

With ``importance`` (mean squares of a layer's inputs, one per column) every format is searched, and the squared error of a weight counts
by its column: that is the error of the layer's output for inputs whose columns do not correlate.

An encoder maps ``float32 [n, block_size]`` and weights of the errors (the same shape, or None) to ``uint8 [n, type_size]``, on any device,
without float64.

Sources: gguf-py ``gguf/quants.py``; ggml ``src/ggml-quants.c`` (``quantize_row_*_ref``, for the objective of the K search).
"""

from collections.abc import Callable

import torch

from .formats import BlockFormat, format_by_name

# Weights encoded at once: bounds the temporaries of the K search (a few dozen bytes per weight).
CHUNK_WEIGHTS = 1 << 20

# Of the mean: columns that were hardly ever fed still keep their weights near.
LEAST_IMPORTANCE = 1e-3


def _half_bytes(value: torch.Tensor) -> torch.Tensor:
    """float32 ``[n, 1]`` -> the bytes of its float16, ``uint8 [n, 2]``."""
    return value.to(torch.float16).contiguous().view(torch.uint8)


def _reciprocal(d: torch.Tensor) -> torch.Tensor:
    """1 / d, and 0 where d is 0."""
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def _to_level(x: torch.Tensor, highest: int) -> torch.Tensor:
    """Truncate to whole numbers in ``0 .. highest``. A scale that underflows gives NaN here, which counts as level 0."""
    return torch.nan_to_num(x, nan=0.0).trunc().clamp(0, highest).to(torch.uint8)


def _pack_nibbles(q: torch.Tensor, group: int) -> torch.Tensor:
    """``uint8 [n, b]`` -> ``uint8 [n, b / 2]``: of each ``2 * group`` levels, the first half goes low and the second half high."""
    n = q.shape[0]
    q = (q & 0x0F).reshape(n, -1, 2, group)
    return (q[:, :, 0] | (q[:, :, 1] << 4)).reshape(n, -1)


def _pack_bits(bits: torch.Tensor, width: int, group: int) -> torch.Tensor:
    """Bit fields ``uint8 [n, b]`` -> bytes: of each ``(8 / width) * group`` values, value block i goes to bits ``width * i``."""
    n, count = bits.shape[0], 8 // width
    bits = bits.reshape(n, -1, count, group)
    packed = bits[:, :, 0].clone()
    for i in range(1, count):
        packed |= bits[:, :, i] << (width * i)
    return packed.reshape(n, -1)


def _pack_fifth_bits(q: torch.Tensor) -> torch.Tensor:
    """Bit 4 of 32 levels -> the little-endian 32-bit word, ``uint8 [n, 4]``."""
    return _pack_bits((q >> 4).reshape(-1, 8), 1, 1).reshape(-1, 4)


def _half_rounded(value: torch.Tensor) -> torch.Tensor:
    """``[n]`` -> ``[n, 1]``, each the nearest float16: what the decoder will multiply by."""
    return value.to(torch.float16).float()[:, None]


def _signed_scale(x: torch.Tensor, levels: int) -> torch.Tensor:
    """The scale that puts the weight of largest magnitude at ``-levels``, ``[n, 1]``."""
    largest = x.abs().argmax(dim=1, keepdim=True)
    return x.gather(1, largest) / -levels


def _encode_q4_0(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d = _signed_scale(x, 8) if w is None else _half_rounded(_fit_signed_scale(x, w, 8))
    q = _to_level(x * _reciprocal(d) + 8.5, 15)
    return torch.cat((_half_bytes(d), _pack_nibbles(q, 16)), dim=1)


def _encode_q5_0(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d = _signed_scale(x, 16) if w is None else _half_rounded(_fit_signed_scale(x, w, 16))
    q = _to_level(x * _reciprocal(d) + 16.5, 31)
    return torch.cat((_half_bytes(d), _pack_fifth_bits(q), _pack_nibbles(q, 16)), dim=1)


def _range_scale(x: torch.Tensor, highest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale, minimum ``[n, 1]`` and levels ``uint8 [n, b]`` that spread ``0 .. highest`` over the range of each block."""
    minimum, maximum = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    d = (maximum - minimum) / highest
    return d, minimum, _to_level((x - minimum) * _reciprocal(d) + 0.5, highest)


def _fitted_range(x: torch.Tensor, w: torch.Tensor, highest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`_range_scale` with the scale and minimum of least weighted error."""
    ladder = torch.arange(highest - 1.0, highest + 1.01, 0.1)
    scale, minimum = _fit_scale_and_min(x, w, highest, ladder, free=True)
    d, m = _half_rounded(scale), _half_rounded(-minimum)
    return d, m, _to_level((x - m) * _reciprocal(d) + 0.5, highest)


def _encode_q4_1(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, m, q = _range_scale(x, 15) if w is None else _fitted_range(x, w, 15)
    return torch.cat((_half_bytes(d), _half_bytes(m), _pack_nibbles(q, 16)), dim=1)


def _encode_q5_1(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, m, q = _range_scale(x, 31) if w is None else _fitted_range(x, w, 31)
    return torch.cat((_half_bytes(d), _half_bytes(m), _pack_fifth_bits(q), _pack_nibbles(q, 16)), dim=1)


def _encode_q8_0(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d = x.abs().amax(dim=1, keepdim=True) / 127 if w is None else _half_rounded(_fit_signed_scale(x, w, 127))
    scaled = torch.nan_to_num(x * _reciprocal(d), nan=0.0)
    whole = scaled.abs().floor()
    q = (scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())).clamp(-127, 127)  # halves away from zero
    return torch.cat((_half_bytes(d), q.to(torch.int8).view(torch.uint8)), dim=1)


def _fit_scale_and_min(
    x: torch.Tensor, weight: torch.Tensor, highest: int, ladder: torch.Tensor, free: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best ``x ~ scale * level - minimum`` with levels ``0 .. highest`` and (unless ``free``) minimum >= 0, per row of ``x [n, g]``.

    ``ladder`` holds the numbers of steps to spread over the range; for each, levels are rounded and scale and minimum re-fitted by
    weighted least squares. Returns (scale, minimum), each ``[n]``.
    """
    low = x.amin(dim=1, keepdim=True)
    if not free:
        low = low.clamp_max(0)
    span = x.amax(dim=1, keepdim=True) - low
    sum_w, sum_x = weight.sum(dim=1), (weight * x).sum(dim=1)

    scale, minimum = (span / highest).squeeze(1), -low.squeeze(1)
    best = None
    for steps in (float(highest), *ladder.tolist()):
        level = ((x - low) * (steps * _reciprocal(span))).round().clamp(0, highest)
        weighted = weight * level
        sum_l, sum_l2, sum_xl = weighted.sum(dim=1), (weighted * level).sum(dim=1), (weighted * x).sum(dim=1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        fit = (sum_w * sum_xl - sum_x * sum_l) * _reciprocal(determinant)
        offset = (sum_l2 * sum_x - sum_l * sum_xl) * _reciprocal(determinant)
        if not free:
            through_zero = offset > 0  # a positive offset cannot be stored: fit the scale alone
            fit = torch.where(through_zero, sum_xl * _reciprocal(sum_l2), fit)
            offset = offset.clamp_max(0)
        error = (weight * (fit[:, None] * level + offset[:, None] - x).square()).sum(dim=1)
        error = torch.where((determinant > 0) & (fit > 0), error, torch.full_like(error, torch.inf))
        if best is None:
            plain = (scale[:, None] * level + low - x).square()
            best = (weight * plain).sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, fit, scale)
        minimum = torch.where(better, -offset, minimum)
    return scale, minimum


def _pack_k_scales(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Six-bit scales and minima, ``uint8 [n, 8]`` each -> the 12 bytes that ``reference.unpack_k_scales`` reads."""
    d = scale[:, 0:4] | ((scale[:, 4:8] >> 4) << 6)
    m = minimum[:, 0:4] | ((minimum[:, 4:8] >> 4) << 6)
    md = (scale[:, 4:8] & 0x0F) | ((minimum[:, 4:8] & 0x0F) << 4)
    return torch.cat((d, m, md), dim=1)


def _encode_scale_and_min(
    x: torch.Tensor, w: torch.Tensor | None, group: int, highest: int, top: int, ladder: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shared part of Q2_K, Q4_K and Q5_K, whose groups have a scale and a minimum of ``0 .. top``.

    Returns float16 (d, dmin) ``[n, 1]``, uint8 (scales, minima) ``[n, 256 / group]`` and levels uint8 ``[n, 256]``.
    """
    n, count = x.shape[0], 256 // group
    x = x.reshape(n * count, group)
    w = x.square().mean(dim=1, keepdim=True).sqrt() + x.abs() if w is None else w.reshape(n * count, group)
    scale, minimum = (value.reshape(n, count) for value in _fit_scale_and_min(x, w, highest, ladder))
    x, w = x.reshape(n, count, group), w.reshape(n, count, group)
    d, dmin = ((value.amax(dim=1, keepdim=True) / top).to(torch.float16) for value in (scale, minimum))
    near_scale, near_minimum = (
        (v * _reciprocal(unit.float())).round().clamp(0, top) for v, unit in ((scale, d), (minimum, dmin))
    )
    best = None
    for up in (0, -1, 1):
        for shift in (0, -1, 1):
            s, m = (near_scale + up).clamp(0, top), (near_minimum + shift).clamp(0, top)
            step, offset = (d.float() * s)[:, :, None], (dmin.float() * m)[:, :, None]
            level = ((x + offset) * _reciprocal(step)).round().clamp(0, highest)
            error = (w * (step * level - offset - x).square()).sum(dim=2)
            best = _better(best, error, s, m)
    _, s, m = best
    for _ in range(2):  # d and dmin fitted to the levels, then the levels to them
        step, offset = (d.float() * s)[:, :, None], (dmin.float() * m)[:, :, None]
        level = ((x + offset) * _reciprocal(step)).round().clamp(0, highest)
        d, dmin = _fit_units(x, w, level * s[:, :, None], m[:, :, None].expand_as(x), d, dmin)
    step, offset = (d.float() * s)[:, :, None], (dmin.float() * m)[:, :, None]
    level = ((x + offset) * _reciprocal(step)).round().clamp(0, highest)
    return d, dmin, s.to(torch.uint8), m.to(torch.uint8), level.to(torch.uint8).reshape(n, 256)


def _better(best, error, *values):
    """(error, values...) per group, of the choice with less error."""
    if best is None:
        return error, *values
    smaller = error < best[0]
    return torch.where(smaller, error, best[0]), *(torch.where(smaller, new, old) for new, old in zip(values, best[1:]))


def _fit_units(x, w, a, b, d, dmin):
    """float16 (d, dmin) ``[n, 1]`` of least weighted error of ``d a - dmin b ~ x [n, ...]``; the given ones where that is no better."""
    flat = lambda t: t.reshape(t.shape[0], -1)
    x, w, a, b = flat(x), flat(w), flat(a), flat(b)
    aa, bb, ab = ((w * p * q).sum(dim=1, keepdim=True) for p, q in ((a, a), (b, b), (a, b)))
    ax, bx = ((w * p * x).sum(dim=1, keepdim=True) for p in (a, b))
    inverse = _reciprocal(aa * bb - ab * ab)
    new = ((ax * bb - bx * ab) * inverse).to(torch.float16), ((ax * ab - bx * aa) * inverse).to(torch.float16)
    errors = [
        (w * (one.float() * a - other.float() * b - x).square()).sum(dim=1, keepdim=True)
        for one, other in ((d, dmin), new)
    ]
    good = (errors[1] < errors[0]) & (new[0] > 0) & (new[1] >= 0)
    return torch.where(good, new[0], d), torch.where(good, new[1], dmin)


def _encode_q2_k(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, dmin, s, m, q = _encode_scale_and_min(x, w, 16, 3, 15, torch.arange(2.0, 4.01, 0.1))
    return torch.cat((s | (m << 4), _pack_bits(q, 2, 32), d.view(torch.uint8), dmin.view(torch.uint8)), dim=1)


def _encode_q4_k(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, dmin, s, m, q = _encode_scale_and_min(x, w, 32, 15, 63, torch.arange(14.0, 16.01, 0.1))
    return torch.cat((d.view(torch.uint8), dmin.view(torch.uint8), _pack_k_scales(s, m), _pack_nibbles(q, 32)), dim=1)


def _encode_q5_k(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, dmin, s, m, q = _encode_scale_and_min(x, w, 32, 31, 63, torch.arange(30.5, 32.01, 0.1))
    header = torch.cat((d.view(torch.uint8), dmin.view(torch.uint8), _pack_k_scales(s, m)), dim=1)
    return torch.cat((header, _pack_bits(q >> 4, 1, 32), _pack_nibbles(q, 32)), dim=1)


def _fit_signed_scale(x: torch.Tensor, weight: torch.Tensor, levels: int) -> torch.Tensor:
    """Best ``x ~ scale * level`` with levels ``-levels .. levels - 1``, per row of ``x [n, g]``. Returns ``[n]``."""
    largest = x.gather(1, x.abs().argmax(dim=1, keepdim=True))
    inverse = -_reciprocal(largest)
    scale = best = None
    for step in range(-9, 10):
        level = (x * ((levels + 0.1 * step) * inverse)).round().clamp(-levels, levels - 1)
        sum_xl, sum_l2 = (weight * x * level).sum(dim=1), (weight * level * level).sum(dim=1)
        gain = sum_xl * sum_xl * _reciprocal(sum_l2)  # how much of the weighted square error the fit removes
        fit = sum_xl * _reciprocal(sum_l2)
        if best is None:
            scale, best = fit, gain
        else:
            better = gain > best
            scale, best = torch.where(better, fit, scale), torch.where(better, gain, best)
    return scale


def _encode_signed(
    x: torch.Tensor, w: torch.Tensor | None, levels: int, top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shared part of Q3_K and Q6_K, whose groups of 16 have a scale of ``-top .. top - 1``.

    Returns float16 d ``[n, 1]``, scales float32 ``[n, 16]`` and levels float32 ``[n, 256]`` of ``-levels .. levels - 1``.
    """
    n = x.shape[0]
    x = x.reshape(n * 16, 16)
    w = x.square() if w is None else w.reshape(n * 16, 16)
    scale = _fit_signed_scale(x, w, levels).reshape(n, 16)
    x, w = x.reshape(n, 16, 16), w.reshape(n, 16, 16)
    d = (scale.gather(1, scale.abs().argmax(dim=1, keepdim=True)) / -top).to(torch.float16)
    near = (scale * _reciprocal(d.float())).round()
    best = None
    for up in (0, -1, 1):
        s = (near + up).clamp(-top, top - 1)
        step = (d.float() * s)[:, :, None]
        level = (x * _reciprocal(step)).round().clamp(-levels, levels - 1)
        best = _better(best, (w * (step * level - x).square()).sum(dim=2), s)
    s = best[1]
    for _ in range(2):
        level = (x * _reciprocal((d.float() * s)[:, :, None])).round().clamp(-levels, levels - 1)
        a = level * s[:, :, None]
        fit = ((w * a * x).sum(dim=(1, 2)) * _reciprocal((w * a * a).sum(dim=(1, 2))))[:, None].to(torch.float16)
        errors = [(w * (unit.float()[:, :, None] * a - x).square()).sum(dim=(1, 2))[:, None] for unit in (d, fit)]
        d = torch.where((errors[1] < errors[0]) & (fit != 0), fit, d)
    level = (x * _reciprocal((d.float() * s)[:, :, None])).round().clamp(-levels, levels - 1)
    return d, s, level.reshape(n, 256)


def _encode_q3_k(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, s, level = _encode_signed(x, w, 4, 32)
    q, s = (level + 4).to(torch.uint8), (s + 32).to(torch.uint8)
    scales = torch.cat((_pack_nibbles(s, 8), _pack_bits(s >> 4, 2, 4)), dim=1)
    return torch.cat((_pack_bits(q >> 2, 1, 32), _pack_bits(q & 3, 2, 32), scales, d.view(torch.uint8)), dim=1)


def _encode_q6_k(x: torch.Tensor, w: torch.Tensor | None) -> torch.Tensor:
    d, s, level = _encode_signed(x, w, 32, 128)
    q = (level + 32).to(torch.uint8)
    return torch.cat(
        (_pack_nibbles(q, 64), _pack_bits(q >> 4, 2, 32), s.to(torch.int8).view(torch.uint8), d.view(torch.uint8)),
        dim=1,
    )


_ENCODERS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "Q4_0": _encode_q4_0, "Q4_1": _encode_q4_1, "Q5_0": _encode_q5_0, "Q5_1": _encode_q5_1, "Q8_0": _encode_q8_0,
    "Q2_K": _encode_q2_k, "Q3_K": _encode_q3_k, "Q4_K": _encode_q4_k, "Q5_K": _encode_q5_k, "Q6_K": _encode_q6_k,
}  # fmt: skip

#: Names of the formats that ``quantize`` can write.
ENCODABLE = ("F32", "F16", "BF16", *_ENCODERS)


def _bfloat16_bytes(x: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16 bits, to nearest even, NaN payloads kept and made quiet (as ggml does). ``int16``, same shape."""
    bits = x.contiguous().view(torch.int32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    bits = torch.where(is_nan, (bits & -0x10000) | (64 << 16), bits)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).to(torch.int16)


def quantize(x: torch.Tensor, fmt: BlockFormat | str, importance: torch.Tensor | None = None) -> torch.Tensor:
    """Weights -> packed rows.

    x: ``[..., cols]`` of any float type; importance: ``[cols]``, how much the squared error of a column's weights counts (None: see above)
    Returns ``uint8 [rows, row_bytes]``, all leading dimensions being rows.
    Raises NotImplementedError for a format without an encoder, ValueError when a row does not divide into blocks.
    """
    fmt = format_by_name(fmt) if isinstance(fmt, str) else fmt
    n_cols = x.shape[-1]
    rows = x.reshape(-1, n_cols)
    row_bytes = fmt.row_bytes(n_cols)
    if fmt.name == "F32":
        return rows.to(torch.float32).contiguous().view(torch.uint8)
    if fmt.name == "F16":
        return rows.to(torch.float16).contiguous().view(torch.uint8)
    if fmt.name == "BF16":
        return (
            rows.contiguous().view(torch.uint8)
            if x.dtype == torch.bfloat16
            else _bfloat16_bytes(rows.to(torch.float32)).view(torch.uint8)
        )
    encode = _ENCODERS.get(fmt.name)
    if encode is None:
        raise NotImplementedError(
            f"{fmt.name} has a decoder but no encoder here; convert to one of {', '.join(ENCODABLE)}."
        )
    if importance is not None:
        if importance.shape != (n_cols,):
            raise ValueError(
                f"Importance of shape {tuple(importance.shape)} does not fit rows of {n_cols}; it was measured on another layer."
            )
        importance = importance.to(device=x.device, dtype=torch.float32)
        importance = importance.clamp_min(importance.mean() * LEAST_IMPORTANCE) if bool(importance.any()) else None
    out = torch.empty(rows.shape[0], row_bytes, dtype=torch.uint8, device=x.device)
    step = max(1, CHUNK_WEIGHTS // max(n_cols, 1))
    for start in range(0, rows.shape[0], step):
        part = rows[start : start + step].to(torch.float32)
        weights = None if importance is None else importance.expand_as(part).reshape(-1, fmt.block_size)
        out[start : start + step] = encode(part.reshape(-1, fmt.block_size), weights).reshape(part.shape[0], row_bytes)
    return out
