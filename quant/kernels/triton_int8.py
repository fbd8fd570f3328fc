"""Triton kernels of the int8 product, with scales, bias and GELU in its epilogue.

    y[m, n] = sum_k a[m, k] b[n, k] * x_scales[m] * w_scales[n] + bias[n], then GELU (tanh form) if asked; the sum is an exact integer

Two kernels do the same. One addresses its tiles by pointers and runs everywhere. The other, for Hopper, has the tensor memory accelerator fetch
them (a descriptor of the matrix and two coordinates in place of an address per 16 bytes), which leaves registers for larger tiles. Importing
this module imports triton.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .triton_launch import Launcher, cdiv, version

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # older than Triton 3.4
    TensorDescriptor = None


@triton.jit
def gelu_tanh(x):
    """GELU, tanh form: x sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _tile_at(number, rows, n_out, M: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile. Numbers run through GROUP row tiles per column tile: a's and b's tiles are read again from the L2 cache."""
    column_tiles = tl.cdiv(n_out, N)
    group = number // (GROUP * column_tiles)
    group_rows = tl.minimum(tl.cdiv(rows, M) - group * GROUP, GROUP)
    within = number % (GROUP * column_tiles)
    return (group * GROUP + within % group_rows) * M, (within // group_rows) * N


@triton.jit
def _finished(total, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS: tl.constexpr, GELU: tl.constexpr):
    """The sums of rows m and columns n with scales, bias and GELU, float32."""
    value = total.to(tl.float32) * tl.load(x_scales + m, mask=m < rows, other=0.0)[:, None] * tl.load(w_scales + n, mask=n < n_out, other=0.0)[None, :]
    if HAS_BIAS:
        value += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
    if GELU:
        value = gelu_tanh(value)
    return value


@triton.jit
def _pointer_kernel(
    a, b, x_scales, w_scales, bias, y, rows, n_out, width,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m0, n0 = _tile_at(tl.program_id(0), rows, n_out, M, N, GROUP)
    m, n, k = m0 + tl.arange(0, M), n0 + tl.arange(0, N), tl.arange(0, K)
    a_tile = a + (tl.minimum(m, rows - 1).to(tl.int64) * width)[:, None] + k[None, :]
    b_tile = b + (tl.minimum(n, n_out - 1).to(tl.int64) * width)[None, :] + k[:, None]
    total = tl.zeros((M, N), tl.int32)
    for start in tl.range(0, width, K, num_stages=STAGES):
        inside = start + k < width
        total = tl.dot(tl.load(a_tile, mask=inside[None, :], other=0), tl.load(b_tile, mask=inside[:, None], other=0), total, out_dtype=tl.int32)
        a_tile += K
        b_tile += K
    value = _finished(total, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS, GELU)
    tl.store(y + m.to(tl.int64)[:, None] * n_out + n[None, :], value.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < n_out)[None, :])


@triton.jit
def _descriptor_kernel(
    a, b, y_out, x_scales, w_scales, bias, y, rows, n_out, width,
    HAS_BIAS: tl.constexpr, GELU: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """a, b, y_out: descriptors with tiles [M, K], [N, K] and [M, N / 2]. Persistent programs go on to another tile: its first loads run during
    the epilogue, which then writes the tile in halves through what is left of shared memory."""
    for number in tl.range(tl.program_id(0), tl.cdiv(rows, M) * tl.cdiv(n_out, N), PROGRAMS, flatten=PERSISTENT):
        m0, n0 = _tile_at(number, rows, n_out, M, N, GROUP)
        total = tl.zeros((M, N), tl.int32)
        for k0 in tl.range(0, width, K, num_stages=STAGES):
            total = tl.dot(a.load([m0, k0]), b.load([n0, k0]).T, total, out_dtype=tl.int32)
        m = m0 + tl.arange(0, M)
        if PERSISTENT:
            left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, N // 2)), (0, 2, 1)))
            n = n0 + tl.arange(0, N // 2)
            value = _finished(left, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS, GELU)
            y_out.store([m0, n0], value.to(y.dtype.element_ty))
            value = _finished(right, m, n + N // 2, x_scales, w_scales, bias, rows, n_out, HAS_BIAS, GELU)
            y_out.store([m0, n0 + N // 2], value.to(y.dtype.element_ty))
        else:
            n = n0 + tl.arange(0, N)
            value = _finished(total, m, n, x_scales, w_scales, bias, rows, n_out, HAS_BIAS, GELU)
            tl.store(y + m.to(tl.int64)[:, None] * n_out + n[None, :], value.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (n < n_out)[None, :])


_pointers = Launcher(_pointer_kernel)

#: Tile (rows, columns, depth), row tiles per group, pipeline stages and warps of the kernel with pointers, by compute capability.
TILES = {9: (128, 128, 128, 8, 3, 4), 8: (128, 128, 64, 8, 4, 8)}

#: Fewer rows than this go by pointers on Hopper too: making descriptors takes the processor longer than the product takes the GPU.
DESCRIPTOR_ROWS = 2048
#: The kernel with descriptors was compiled and checked with this version of Triton and newer ones.
DESCRIPTOR_TRITON = (3, 6)


@lru_cache(maxsize=16)
def _hardware(device):
    """(major compute capability, multiprocessors, whether the kernel with descriptors is for it)."""
    if device.type != "cuda":
        return 8, 1, False
    major = torch.cuda.get_device_capability(device)[0]
    return major, torch.cuda.get_device_properties(device).multi_processor_count, major == 9 and version() >= DESCRIPTOR_TRITON


def _descriptor_tile(n_out, width):
    """(tile as in TILES, whether programs are persistent): what was fastest on an H100 (``scripts/gpu_check.py fast``)."""
    if n_out >= 8192:
        return (256, 128, 128, 8, 4, 8), True
    if width >= 8192:
        return (256, 128, 128, 8, 4, 8), False
    return (128, 128, 128, 8, 3, 4), False


def product(xq, x_scales, wq, w_scales, bias, y, gelu=False):
    """xq int8 [M, K], wq int8 [N, K], K and N multiples of 16, with their scales float32 [M], [N] -> y [M, N], given and returned."""
    major, _, descriptors = _hardware(xq.device)
    if descriptors and xq.shape[0] >= DESCRIPTOR_ROWS:
        return by_descriptors(xq, x_scales, wq, w_scales, bias, y, gelu)
    return by_pointers(xq, x_scales, wq, w_scales, bias, y, gelu, TILES.get(major, TILES[8]))


def by_pointers(xq, x_scales, wq, w_scales, bias, y, gelu, tile):
    """:func:`product` with the kernel that runs everywhere."""
    (rows, width), n_out = xq.shape, wq.shape[0]
    m, n, k, group, stages, warps = tile
    args = (xq, wq, x_scales, w_scales, y if bias is None else bias, y, rows, n_out, width)
    _pointers((cdiv(rows, m) * cdiv(n_out, n), 1, 1), args, (bias is not None, gelu, m, n, k, group, stages), warps)
    return y


def by_descriptors(xq, x_scales, wq, w_scales, bias, y, gelu, tile=None, persistent=False):
    """:func:`product` with the kernel for Hopper."""
    (rows, width), n_out = xq.shape, wq.shape[0]
    if tile is None:
        tile, persistent = _descriptor_tile(n_out, width)
    m, n, k, group, stages, warps = tile
    tiles = cdiv(rows, m) * cdiv(n_out, n)
    programs = min(tiles, _hardware(xq.device)[1]) if persistent else tiles
    described = [TensorDescriptor.from_tensor(t, block) for t, block in ((xq, [m, k]), (wq, [n, k]), (y, [m, n // 2]))]
    constants = (bias is not None, gelu, m, n, k, group, stages, programs if persistent else 1 << 30, persistent)
    with torch.cuda.device_of(xq):
        _descriptor_kernel[(programs,)](*described, x_scales, w_scales, y if bias is None else bias, y, rows, n_out, width, *constants, num_warps=warps)
    return y
