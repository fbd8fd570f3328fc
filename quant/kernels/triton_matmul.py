"""Triton kernels on raw GGML blocks: dequantise a matrix, and multiply a few rows with it without dequantising it.

Dequantise: a program decodes ROWS rows of sixteen bytes (see ``kernels/triton_decode.py``) and stores each row's weights as V runs of
sixteen. The output is four times larger than the input, so stores decide the speed: every run is a whole 32-byte sector of a
bf16 matrix, written with 16 bytes per thread.

Skinny linear, y = x W^T + b for at most sixteen rows of x: the quantised bytes are read once and decoded in registers. Two kernels
for all formats are here. For one row of x, a program owns a few output columns and runs through the whole input width; otherwise W's
decoded tile meets x on the tensor cores, the input width is split over programs, and a second kernel adds the parts in a fixed order,
so results do not vary from run to run. Both round weights to x's type before they multiply them, as in dequantise-then-matmul.
Faster kernels for some formats are in ``kernels/triton_fragments.py``, ``kernels/triton_skinny.py`` and ``kernels/triton_words.py``; ``kernels/skinny_choice.py``
says which one runs.

Nothing here synchronises with the host, and only split products allocate (their partial sums). Importing this module imports triton;
``backends.py`` does so on first use. The reference for every function is ``decode.py``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from . import skinny_choice, triton_fragments, triton_skinny, triton_words
from .triton_decode import LANES, decode
from ..formats import FORMATS
from .triton_launch import Launcher, cdiv, power_of_2
from .triton_split import add_parts
from ..tracing import is_plain

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)


@triton.jit
def _dequantize_kernel(raw, out, n_rows, FORMAT: tl.constexpr, V: tl.constexpr, G: tl.constexpr, ROW_BYTES: tl.constexpr, ROWS: tl.constexpr):
    """raw uint8 [n_rows * ROW_BYTES] -> out [n_rows * 16 * V]; ROW_BYTES is block bytes / rows per block, times ROWS a whole number."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    raw += tl.program_id(0).to(tl.int64) * ROW_BYTES
    out += first * (16 * V)
    row = tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, 16)[None, :]
    last = (n_rows - 1 - first).to(tl.int32)
    w0, w1, w2, w3 = decode(raw, tl.minimum(row, last), lane, FORMAT)
    column = (row // G) * (16 * G * V) + (row % G) * 16 + lane
    inside = row <= last
    tl.store(out + column, w0.to(out.dtype.element_ty), mask=inside)
    if V > 1:
        tl.store(out + column + 16 * G, w1.to(out.dtype.element_ty), mask=inside)
    if V > 2:
        tl.store(out + column + 32 * G, w2.to(out.dtype.element_ty), mask=inside)
        tl.store(out + column + 48 * G, w3.to(out.dtype.element_ty), mask=inside)


#: Bytes of quantised data decoded by one program, and its warps. Measured on an H100 with ``benchmarks/sweep_skinny.py``; flat around
#: these values. The formats named below gain a hundredth of the copy speed from others.
TILE_BYTES = 2048
TILE_WARPS = 4
_TILES = {"Q4_K": (4096, 8), "Q6_K": (512, 1)}


_dequantize = Launcher(_dequantize_kernel, enable_fp_fusion=False)


@lru_cache(maxsize=64)
def _dequantize_constants(fmt_name, tile_bytes):
    """(weights per row of sixteen bytes, rows per program, the kernel's constants)."""
    lanes, rows = LANES[fmt_name], tile_bytes // 16
    return 16 * lanes.per_byte, rows, (fmt_name, lanes.per_byte, lanes.group, rows // lanes.rows * FORMATS[fmt_name].type_size, rows)


def dequantize_launch(raw, fmt_name, out, tile_bytes=0, num_warps=TILE_WARPS):
    """The kernel call behind :func:`dequantize`, with its tile size open for measuring (0: the format's)."""
    if not tile_bytes:
        tile_bytes, num_warps = _TILES.get(fmt_name) or (TILE_BYTES, TILE_WARPS)
    per_row, rows, constants = _dequantize_constants(fmt_name, tile_bytes)
    n_rows = out.numel() // per_row
    _dequantize((-(-n_rows // rows), 1, 1), (raw, out, n_rows), constants, num_warps)
    return out


@triton.jit
def _weight_tile(raw, k, lane, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Decoded weights, rounded to x's type."""
    w0, w1, w2, w3 = decode(raw, k, lane, FORMAT)
    return w0.to(dtype), w1.to(dtype), w2.to(dtype), w3.to(dtype)


@triton.jit
def _one_row_kernel(
    x, raw, bias, y, n_out, row_bytes,
    LANE_ROWS: tl.constexpr, FORMAT: tl.constexpr, V: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """y[n] = sum_k x[k] W[n, k] + bias[n] for N output columns; LANE_ROWS rows of sixteen bytes per row of W, K at a time."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    w_rows = raw + (tl.minimum(n, n_out - 1).to(tl.int64) * row_bytes)[:, None, None]  # (N, 1, 1)
    lane = tl.arange(0, 16)[None, None, :]
    dtype = x.dtype.element_ty
    total = tl.zeros((N, K, 16), tl.float32)
    for start in range(0, LANE_ROWS, K):
        k = start + tl.arange(0, K)[None, :, None]
        inside = k < LANE_ROWS
        k = tl.minimum(k, LANE_ROWS - 1)
        column = (k // G) * (16 * G * V) + (k % G) * 16 + lane  # (1, K, 16)
        w0, w1, w2, w3 = _weight_tile(w_rows, k, lane, FORMAT, dtype)
        total += tl.load(x + column, mask=inside, other=0.0).to(tl.float32) * w0.to(tl.float32)
        if V > 1:
            total += tl.load(x + column + 16 * G, mask=inside, other=0.0).to(tl.float32) * w1.to(tl.float32)
        if V > 2:
            total += tl.load(x + column + 32 * G, mask=inside, other=0.0).to(tl.float32) * w2.to(tl.float32)
            total += tl.load(x + column + 48 * G, mask=inside, other=0.0).to(tl.float32) * w3.to(tl.float32)
    result = tl.sum(tl.reshape(total, (N, K * 16)), axis=1)
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(y + n, result.to(y.dtype.element_ty), mask=n < n_out)


@triton.jit
def _accumulate(total, x, w, m, column, n_rows, width, inside, N: tl.constexpr, K: tl.constexpr):
    """total [N, 16] += W tile [N, K, 16] times the matching columns of x [16 rows, K * 16]."""
    tile = tl.load(x + m * width + column, mask=(m < n_rows) & inside, other=0.0)  # (16 K, 16)
    return tl.dot(tl.reshape(w, (N, K * 16)), tile, total)


@triton.jit
def _few_rows_kernel(
    x, raw, parts, n_rows, n_out, width, row_bytes, lane_rows,
    SPAN: tl.constexpr, FORMAT: tl.constexpr, V: tl.constexpr, G: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """parts[split, m, n] = sum over SPAN rows of sixteen bytes of x[m, k] W[n, k], for N output columns and up to 16 rows m."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    split = tl.program_id(1)
    w_rows = raw + (tl.minimum(n, n_out - 1).to(tl.int64) * row_bytes)[:, None, None]  # (N, 1, 1)
    m = tl.arange(0, 16)
    dtype = x.dtype.element_ty
    total = tl.zeros((N, 16), tl.float32)
    for start in range(0, SPAN, K):
        k = split * SPAN + start + tl.arange(0, K)[None, :, None]
        w0, w1, w2, w3 = _weight_tile(w_rows, tl.minimum(k, lane_rows - 1), tl.arange(0, 16)[None, None, :], FORMAT, dtype)
        flat = tl.arange(0, 16 * K)
        k = split * SPAN + start + flat // 16
        inside = (k < lane_rows)[:, None]
        column = ((k // G) * (16 * G * V) + (k % G) * 16 + flat % 16)[:, None]  # (16 K, 1)
        total = _accumulate(total, x, w0, m[None, :], column, n_rows, width, inside, N, K)
        if V > 1:
            total = _accumulate(total, x, w1, m[None, :], column + 16 * G, n_rows, width, inside, N, K)
        if V > 2:
            total = _accumulate(total, x, w2, m[None, :], column + 32 * G, n_rows, width, inside, N, K)
            total = _accumulate(total, x, w3, m[None, :], column + 48 * G, n_rows, width, inside, N, K)
    target = parts + (split * n_rows + m[None, :]) * n_out + n[:, None]
    tl.store(target, total, mask=(m[None, :] < n_rows) & (n[:, None] < n_out))


_one_row = Launcher(_one_row_kernel, enable_fp_fusion=True)
_few_rows = Launcher(_few_rows_kernel, enable_fp_fusion=True)


def skinny_launch(x, raw, fmt_name, bias, y, choice=None):
    """The kernel calls behind :func:`skinny_linear`: x [M, K] contiguous, y [M, N] of x's dtype.

    choice: (kernel, tile) as in ``kernels/skinny_choice.py``, open for measuring
    """
    half = x.dtype in _HALF
    kernel, tile = choice or skinny_choice.choose(fmt_name, x.shape[0], y.shape[1], half)
    if kernel == "fragments":
        if triton_fragments.takes(x, raw):
            return triton_fragments.launch(x, raw, bias, y, tile)
        kernel, tile = skinny_choice.choose(fmt_name, x.shape[0], y.shape[1], half, fragments=False)
    if kernel == "words" and triton_words.takes(x, raw):
        return triton_words.launch(x, raw, fmt_name, bias, y, tile)
    if kernel == "patterns":
        return triton_skinny.launch(x, raw, fmt_name, bias, y, tile)
    if kernel == "words":
        tile = None
    if x.shape[0] == 1:
        return _one_row_launch(x, raw, fmt_name, bias, y, tile or skinny_choice.ONE_ROW[1])
    return _few_rows_launch(x, raw, fmt_name, bias, y, tile or skinny_choice.FEW_ROWS[1])


def _one_row_launch(x, raw, fmt_name, bias, y, tile):
    """tile: (output columns, rows of sixteen bytes in a step, warps) of a program."""
    lanes, width, n_out = LANES[fmt_name], x.shape[1], y.shape[1]
    lane_rows = width // (16 * lanes.per_byte)
    n, k, warps = tile
    constants = (lane_rows, fmt_name, lanes.per_byte, lanes.group, bias is not None, n, min(k, power_of_2(lane_rows)))
    args = (x, raw, y if bias is None else bias, y, n_out, FORMATS[fmt_name].row_bytes(width))
    _one_row((cdiv(n_out, n), 1, 1), args, constants, warps)
    return y


def _few_rows_launch(x, raw, fmt_name, bias, y, tile):
    """tile: as for one row."""
    lanes, (n_rows, width), n_out = LANES[fmt_name], x.shape, y.shape[1]
    lane_rows = width // (16 * lanes.per_byte)
    n, k, warps = tile
    columns = cdiv(n_out, n)
    splits = _splits(lane_rows, k, columns)
    parts = torch.empty((splits, n_rows, n_out), dtype=torch.float32, device=x.device)
    constants = (cdiv(cdiv(lane_rows, splits), k) * k, fmt_name, lanes.per_byte, lanes.group, n, k)
    args = (x, raw, parts, n_rows, n_out, width, FORMATS[fmt_name].row_bytes(width), lane_rows)
    _few_rows((columns, splits, 1), args, constants, warps)
    return add_parts(parts, bias, y)


def _splits(lane_rows, k, column_programs):
    """How many programs share the input width: about a thousand programs in all, each with at least four steps of k."""
    splits = max(1, min(1024 // column_programs, lane_rows // (4 * k)))
    return 1 << (splits.bit_length() - 1)


def supports(fmt_name, op, dtype=None):
    """Whether this module has ``op`` ("dequantize" or "skinny") for a format (and output type)."""
    return op in ("dequantize", "skinny") and fmt_name in LANES and (dtype is None or dtype in _DTYPES)


def is_skinny(rows, dtype, fmt_name):
    """Whether the skinny product takes this many rows: one of any type; in half precision as many as is faster, up to sixteen."""
    return 0 < rows <= skinny_choice.most_rows(fmt_name, dtype in _HALF)


@torch.library.custom_op("ltx2_gguf::dequantize", mutates_args={"out"})
def _dequantize_op(raw: torch.Tensor, fmt_name: str, out: torch.Tensor) -> None:
    dequantize_launch(raw, fmt_name, out)


@torch.library.custom_op("ltx2_gguf::skinny_linear", mutates_args=())
def _skinny_op(x: torch.Tensor, raw: torch.Tensor, fmt_name: str, bias: torch.Tensor | None, n_out: int) -> torch.Tensor:
    return skinny_launch(x, raw, fmt_name, bias, x.new_empty((x.shape[0], n_out)))


@_skinny_op.register_fake
def _(x, raw, fmt_name, bias, n_out):
    return x.new_empty((x.shape[0], n_out))


def dequantize(raw, fmt_name, out):
    """Decode ``raw`` (contiguous uint8, whole rows) into ``out`` (contiguous; float32, float16 or bfloat16) and return ``out``.

    Equals ``reference.dequantize`` in float32, and that value rounded to nearest even otherwise.
    """
    if is_plain(raw, out):
        return dequantize_launch(raw, fmt_name, out)
    torch.ops.ltx2_gguf.dequantize(raw, fmt_name, out)
    return out


def skinny_linear(x, raw, fmt_name, out_features, in_features, bias=None):
    """x [..., in_features] times the quantised matrix [out_features, in_features] plus bias -> [..., out_features], x's dtype.

    Takes as many rows as :func:`is_skinny` says. Sums in float32; the same inputs give the same bits on every call.
    """
    rows = x.reshape(-1, in_features).contiguous()
    if is_plain(rows, raw, bias):
        y = skinny_launch(rows, raw, fmt_name, bias, torch.empty((rows.shape[0], out_features), dtype=x.dtype, device=x.device))
    else:
        y = torch.ops.ltx2_gguf.skinny_linear(rows, raw, fmt_name, bias, out_features)
    return y.view(*x.shape[:-1], out_features)
