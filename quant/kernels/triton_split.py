"""The sum that ends a product whose input width is split over programs. Importing this module imports triton."""

import triton
import triton.language as tl

from .triton_launch import Launcher, cdiv


@triton.jit
def _add_parts_kernel(parts, bias, y, n_rows, n_out, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, N: tl.constexpr):
    """y[m, n] = sum over splits, in order, plus bias."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.program_id(1)
    total = tl.zeros((N,), tl.float32)
    for split in range(SPLITS):
        total += tl.load(parts + (split * n_rows + m) * n_out + n, mask=n < n_out, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)
    tl.store(y + m * n_out + n, total.to(y.dtype.element_ty), mask=n < n_out)


_add_parts = Launcher(_add_parts_kernel)


def add_parts(parts, bias, y):
    """parts float32 [splits, M, N] (+ bias [N]) -> y [M, N], given and returned; in a fixed order, so the same parts give the same bits."""
    splits, n_rows, n_out = parts.shape
    has_bias = bias is not None
    _add_parts((cdiv(n_out, 1024), n_rows, 1), (parts, bias if has_bias else y, y, n_rows, n_out), (splits, has_bias, 1024))
    return y
