"""3x3x3 convolution of channels-last frames on Hopper, whose result for a frame does not depend on how many frames are computed with it.

    y[f, h, w, o] = bias[o] + sum over (i, j, k) in 3x3x3 and c of x[f + i, h + j - pad, w + k - pad, c] * weight[o, i, j, k, c]

As a matrix product: a program computes a box of pixels (F frames, H rows, W columns) by N output channels, and adds up 27 taps by blocks of K
channels. The tensor memory accelerator fetches a tap's input as the same box, moved by the tap, and fills in zeros beyond the frame's edges. An
output is always summed in the same order, in float32, by one program: no choice of box or tile, and no cut through time, changes a bit of it
(cuDNN picks kernels, which add in different orders, by the number of frames).

Importing this module imports triton; ``vae/conv.py`` does so on first use.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...quant.kernels.triton_launch import cdiv

K = 64  # channels per step: 128 bytes, the widest row that shared memory swizzles
GROUP = 8  # boxes per group: weights' tiles are read again from the L2 cache
#: Pixels, output channels, pipeline stages and warps of a program: what was fastest on an H100.
LARGE, SMALL, NARROW = (256, 128, 3, 8), (128, 128, 4, 4), (256, 64, 4, 4)
FEW_PROGRAMS = 400  # fewer large programs than this, three per multiprocessor, leave too much of the GPU idle at the end
USUAL_FRAMES = 24  # of a call; a layer's tile does not go by their true number, so that each layer is compiled once


# One form for all sizes and wherever a host puts a bias: each costs a second to compile.
@triton.jit(do_not_specialize=["frames", "height", "width", "n_out", "channels"], do_not_specialize_on_alignment=["bias"])
def _conv_kernel(
    x, weight, bias, y, frames, height, width, n_out, channels,
    PAD: tl.constexpr, F: tl.constexpr, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x, weight, y: descriptors of [frames + 2, height(+2), width(+2), C], [n_out, 27 C] and [frames, height, width, n_out]; boxes [F, H, W, K],
    [N, K] and [F, H, W, N / 2]."""
    across, down = tl.cdiv(width, W), tl.cdiv(height, H)
    boxes, columns = across * down * tl.cdiv(frames, F), tl.cdiv(n_out, N)
    number = tl.program_id(0)
    group = number // (GROUP * columns)
    members = tl.minimum(boxes - group * GROUP, GROUP)
    within = number % (GROUP * columns)
    box, n0 = group * GROUP + within % members, within // members * N
    w0, h0, f0 = box % across * W, box // across % down * H, box // across // down * F
    blocks = tl.cdiv(channels, K)
    total = tl.zeros((N, F * H * W), tl.float32)  # pixels on the right: only there does the compiler feed a reshaped box from shared memory
    for step in tl.range(0, 27 * blocks, num_stages=STAGES):
        tap, c0 = step // blocks, step % blocks * K
        pixels = x.load([f0 + tap // 9, h0 + tap // 3 % 3 - PAD, w0 + tap % 3 - PAD, c0])
        # Beyond the last channel the pixels are zeros, and what the weights' tile holds of the next tap does not count.
        total = tl.dot(weight.load([n0, tap * channels + c0]), tl.reshape(pixels, (F * H * W, K)).T, total)
    n = n0 + tl.arange(0, N)
    total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    left, right = tl.split(tl.permute(tl.reshape(total.T, (F * H * W, 2, N // 2)), (0, 2, 1)))
    y.store([f0, h0, w0, n0], tl.reshape(left.to(y.dtype), (F, H, W, N // 2)))
    y.store([f0, h0, w0, n0 + N // 2], tl.reshape(right.to(y.dtype), (F, H, W, N // 2)))


@functools.lru_cache(maxsize=256)
def box_of(pixels: int, height: int, width: int) -> tuple[int, int, int]:
    """(frames, rows, columns) of the box of so many pixels that covers frames of this size with least waste; of equal ones the flattest."""
    best = None
    for rows in (1, 2, 4, 8, 16, 32):
        for columns in (4, 8, 16, 32, 64):
            if pixels % (rows * columns) == 0 and pixels // (rows * columns) <= 8:
                area = cdiv(height, rows) * rows * cdiv(width, columns) * columns
                choice = area, pixels // (rows * columns), abs(rows - columns), (pixels // (rows * columns), rows, columns)
                best = choice if best is None else min(best, choice)
    return best[3]


def tile_of(height: int, width: int, n_out: int):
    """The program for output frames of this size."""
    if n_out <= NARROW[1]:
        return NARROW
    return LARGE if cdiv(USUAL_FRAMES * height * width, LARGE[0]) * cdiv(n_out, LARGE[1]) >= FEW_PROGRAMS else SMALL


def conv3d(x, weight, bias, pad, tile=None):
    """x (B, C, F + 2, H + 2 - 2 pad, W + 2 - 2 pad) and weight (O, C, 3, 3, 3), both channels last, bias (O,) -> (B, O, F, H, W), channels last.

    C and O multiples of 8, one 16-bit dtype. pad: 1 (zeros around each frame) or 0. tile: as ``LARGE``; None: by size.
    """
    B, C, frames, height, width = x.shape
    n_out, frames, height, width = weight.shape[0], frames - 2, height - 2 + 2 * pad, width - 2 + 2 * pad
    y = torch.empty((B, n_out, frames, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    pixels, n, stages, warps = tile or tile_of(height, width, n_out)
    box = box_of(pixels, height, width)
    programs = cdiv(frames, box[0]) * cdiv(height, box[1]) * cdiv(width, box[2]) * cdiv(n_out, n)
    weights = TensorDescriptor.from_tensor(weight.permute(0, 2, 3, 4, 1).reshape(n_out, 27 * C), [n, K])
    with torch.cuda.device_of(x):
        for source, target in zip(x.permute(0, 2, 3, 4, 1), y.permute(0, 2, 3, 4, 1)):
            described = TensorDescriptor.from_tensor(source, [*box, K]), weights, bias, TensorDescriptor.from_tensor(target, [*box, n // 2])
            _conv_kernel[(programs,)](*described, frames, height, width, n_out, C, pad, *box, n, K, GROUP, stages, num_warps=warps)
    return y
