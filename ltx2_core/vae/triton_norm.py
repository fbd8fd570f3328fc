"""The VAE's pixel norm and SiLU as one pass: every activation read once and written once, float32 inside.

A program handles a few pixels with all their channels, so a pixel's result depends on nothing but the pixel: a clip in pieces and in one give the same
bits here. Importing this module imports triton; ``vae/blocks.py`` does so on first use.
"""

import triton
import triton.language as tl

from ...quant.kernels.triton_launch import Launcher, cdiv, power_of_2

LARGEST_BLOCK = 4096  # elements per program, one pixel or more


@triton.jit
def _norm_silu_kernel(
    x, out, pixels, channels, frames, height, width, x_b, x_f, x_h, x_w, out_b, out_f, out_h, out_w, eps,
    PIXELS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """out = silu(x / sqrt(mean over channels of x^2 + eps)); channels have unit stride, the other axes any."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, C)[None, :]
    w = pixel % width
    rest = pixel // width
    h = rest % height
    rest = rest // height
    f = rest % frames
    b = rest // frames
    inside = (pixel < pixels)[:, None] & (column < channels)
    value = tl.load(x + (b * x_b + f * x_f + h * x_h + w * x_w)[:, None] + column, mask=inside, other=0.0).to(
        tl.float32
    )
    factor = tl.rsqrt(tl.sum(value * value, axis=1) / channels + eps)
    value = value * factor[:, None]
    value = value * tl.sigmoid(value)
    tl.store(
        out + (b * out_b + f * out_f + h * out_h + w * out_w)[:, None] + column,
        value.to(out.dtype.element_ty),
        mask=inside,
    )


_norm_silu_launch = Launcher(_norm_silu_kernel)


def norm_silu(x, out, eps):
    """Write silu(pixel_norm(x)) into ``out``. Both (B, C, F, H, W) with unit stride along C, any strides otherwise. Returns out."""
    B, C, F, H, W = x.shape
    block = power_of_2(C)
    pixels = max(1, LARGEST_BLOCK // block)
    x_strides, out_strides = ((t.stride(0), *t.stride()[2:]) for t in (x, out))
    _norm_silu_launch(
        (cdiv(B * F * H * W, pixels), 1, 1),
        (x, out, B * F * H * W, C, F, H, W, *x_strides, *out_strides, eps),
        (pixels, block),
        4,
    )
    return out
