"""Triton kernel that dequantises a matrix of raw GGML blocks.

A program decodes ROWS rows of sixteen bytes (see ``kernels/triton_decode.py``) and stores each row's weights as V runs of
sixteen. The output is four times larger than the input, so stores decide the speed: every run is a whole 32-byte sector of a
bf16 matrix, written with 16 bytes per thread.

Nothing here synchronises with the host or allocates. Importing this module imports triton; ``backends.py`` does so on first use.
The reference is ``decode.py``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..formats import FORMATS
from ..tracing import is_plain
from .triton_decode import LANES, decode
from .triton_launch import Launcher


@triton.jit
def _dequantize_kernel(
    raw,
    out,
    n_rows,
    FORMAT: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
):
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


#: Bytes of quantised data decoded by one program, and its warps. Measured on an H100 (``scripts/gpu_check.py --only
#: decode_tiles``); flat around these values. The formats named below gain a hundredth of the copy speed from others.
TILE_BYTES = 2048
TILE_WARPS = 4
_TILES = {"Q4_K": (4096, 8), "Q6_K": (512, 1)}


_dequantize = Launcher(_dequantize_kernel, enable_fp_fusion=False)


@lru_cache(maxsize=64)
def _dequantize_constants(fmt_name, tile_bytes):
    """(weights per row of sixteen bytes, rows per program, the kernel's constants)."""
    lanes, rows = LANES[fmt_name], tile_bytes // 16
    return (
        16 * lanes.per_byte,
        rows,
        (fmt_name, lanes.per_byte, lanes.group, rows // lanes.rows * FORMATS[fmt_name].type_size, rows),
    )


def launch(raw, fmt_name, out, tile_bytes=0, num_warps=TILE_WARPS):
    """The kernel call behind :func:`dequantize`, with its tile size open for measuring (0: the format's)."""
    if not tile_bytes:
        tile_bytes, num_warps = _TILES.get(fmt_name) or (TILE_BYTES, TILE_WARPS)
    per_row, rows, constants = _dequantize_constants(fmt_name, tile_bytes)
    n_rows = out.numel() // per_row
    _dequantize((-(-n_rows // rows), 1, 1), (raw, out, n_rows), constants, num_warps)
    return out


@torch.library.custom_op("ltx2_gguf::dequantize", mutates_args={"out"})
def _dequantize_op(raw: torch.Tensor, fmt_name: str, out: torch.Tensor) -> None:
    launch(raw, fmt_name, out)


def dequantize(raw, fmt_name, out):
    """Decode ``raw`` (contiguous uint8, whole rows) into ``out`` (contiguous; float32, float16 or bfloat16) and return ``out``.

    Equals ``decode.dequantize`` in float32, and that value rounded to nearest even otherwise.
    """
    if is_plain(raw, out):
        return launch(raw, fmt_name, out)
    torch.ops.ltx2_gguf.dequantize(raw, fmt_name, out)
    return out
