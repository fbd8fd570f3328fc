"""The fast compute mode: matrix products on the 8-bit tensor cores, with one scale per weight row and one per token.

    W ~ diag(s_w) Wq,   x ~ diag(s_x) xq,   y = s_x s_w (xq Wq^T) + b

with s = largest magnitude of the row / limit, and q the row divided by s in float8 e4m3 (limit 448) or int8 (limit 127). GGUF
weights are re-expressed on the fly, so what stays in memory is the file's bytes. Weights of 4 to 6 bits lose little by it; the
error that counts is the activations'. Which layers may be computed this way is the model's business, not this module's.

Hardware: float8 from compute capability 8.9 on (Ada, Hopper, Blackwell), int8 from 8.0 on (Ampere). Where both exist, float8 is faster and
errs about three times as much: 3 bits of mantissa at every magnitude, where int8 rounds relative to the row's largest value. A weight's
compute mode says which one it takes (see :func:`kind_for`). ``reference_linear`` is the same arithmetic in plain torch, for any device.

Sources: torch ``_scaled_mm`` (row-wise scales), ``_int_mm``.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from . import decode, scratch
from .formats import FORMATS, BlockFormat
from .tracing import is_plain

KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}

#: Tokens from which a product in 8 bits is faster than an exact one. Quantising a weight takes longer than dequantising it, whatever
#: the number of tokens; a step of 1024 tokens took 1.1 to 1.2 times as long as an exact one on an H100, one of 6144 tokens 0.75 times.
MIN_TOKENS = 2048


def kind_for(device: torch.device, tokens: int, shape: tuple[int, int], dtype: torch.dtype, compute: str) -> str | None:
    """ "fp8" or "int8" for a product of so many tokens with a weight of this shape and compute mode; None for an exact product.

    "fast": whichever 8-bit products are fastest on this device. "fast int8": int8, for layers whose rounding counts most; data-centre
    Blackwell (10.x) keeps float8 there too, because its int8 units are the slow ones.
    """
    if tokens < MIN_TOKENS or shape[0] % 16 or shape[1] % 16:
        return None
    kind = _kind_on(device, compute)
    dtypes = (torch.bfloat16,) if kind == "fp8" else (torch.bfloat16, torch.float16)
    return kind if dtype in dtypes else None


@lru_cache(maxsize=64)
def _kind_on(device: torch.device, compute: str) -> str | None:
    if device.type != "cuda" or torch.version.cuda is None or compute not in ("fast", "fast int8"):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None
    return "int8" if capability < (8, 9) or (compute == "fast int8" and capability[0] != 10) else "fp8"


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M, K]`` -> (8-bit ``[M, K]``, scales float32 ``[M, 1]``), in plain torch."""
    dtype, limit = KINDS[kind]
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    q = (x * (1.0 / scale)).clamp(-limit, limit)
    return (q.round() if kind == "int8" else q).to(dtype), scale


def reference_linear(
    x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, bias: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """The fast product in plain torch: what the kernels compute, with exact sums."""
    xq, x_scale = quantize_rows(x.reshape(-1, x.shape[-1]), kind)
    y = reference_product(xq, x_scale[:, 0], raw, fmt, (raw.shape[0], x.shape[-1]), bias, kind, x.dtype)
    return y.view(*x.shape[:-1], raw.shape[0])


def reference_product(xq, x_scale, raw, fmt, shape, bias, kind, dtype, gelu=False) -> torch.Tensor:
    """:func:`product` in plain torch."""
    wq, w_scale = quantize_rows(decode.dequantize(raw, fmt, torch.float32), kind)
    y = (xq.double() @ wq.double().t()).float() * x_scale[:, None] * w_scale.t()
    if bias is not None:
        y = y + bias.float()
    return (torch.nn.functional.gelu(y, approximate="tanh") if gelu else y).to(dtype)


def linear(
    x: torch.Tensor,
    raw: torch.Tensor,
    fmt: BlockFormat,
    shape: tuple[int, int],
    bias: torch.Tensor | None,
    kind: str,
    gelu: bool = False,
) -> torch.Tensor:
    """``x @ W.T + bias`` in 8 bits of this kind; arguments as :func:`quant.matmul.linear_raw`. Ask :func:`kind_for` first.

    gelu: in int8's epilogue, and not while a program is traced
    """
    rows = x.reshape(-1, shape[1]).contiguous()
    if is_plain(rows, raw, bias):
        y = product(*quantize(rows, kind), raw, fmt, shape, bias, kind, x.dtype, gelu)
    else:
        y = torch.ops.ltx2_gguf.fast_linear(rows, raw, fmt.name, shape[0], bias, kind)
    return y.view(*x.shape[:-1], shape[0])


def _kernels():
    """The modules of Triton kernels, imported on first use."""
    global _kernels
    from .kernels import triton_eight_bit, triton_int8

    _kernels = lambda: (triton_eight_bit, triton_int8)
    return _kernels()


class Quantized(NamedTuple):
    """Activations in 8 bits: ``q [M, K]`` and float32 ``scales [M]`` stand for a tensor of this ``shape [..., K]`` and ``dtype``."""

    q: torch.Tensor
    scales: torch.Tensor
    kind: str
    shape: torch.Size
    dtype: torch.dtype


def empty(x: torch.Tensor, kind: str) -> Quantized:
    """Memory for x ``[..., K]`` in 8 bits."""
    rows = x.numel() // x.shape[-1]
    q = torch.empty(rows, x.shape[-1], dtype=KINDS[kind][0], device=x.device)
    return Quantized(q, torch.empty(rows, dtype=torch.float32, device=x.device), kind, x.shape, x.dtype)


def quantize(rows: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[M, K]`` -> (8-bit ``[M, K]``, float32 ``[M]`` scales), by the kernel."""
    made = empty(rows, kind)
    _kernels()[0].activation_rows(rows, made.q, made.scales)
    return made.q, made.scales


def product(xq, x_scale, raw, fmt, shape, bias, kind, dtype, gelu=False) -> torch.Tensor:
    """The scaled product of quantised activations (:func:`quantize`) with a packed weight, ``[M, N]`` of ``dtype``. ``gelu``: int8 only."""
    rows_kernels, int8_kernel = _kernels()
    wq, w_scale = scratch.matrix(tuple(shape), KINDS[kind][0], raw.device, row_scales=True)
    rows_kernels.weight_rows(raw, fmt.name, wq, w_scale)
    if kind == "fp8":
        return torch._scaled_mm(
            xq, wq.t(), x_scale[:, None], w_scale[None, :], bias=bias, out_dtype=dtype, use_fast_accum=True
        )
    return int8_kernel.product(
        xq, x_scale, wq, w_scale, bias, torch.empty(xq.shape[0], shape[0], dtype=dtype, device=xq.device), gelu
    )


@torch.library.custom_op("ltx2_gguf::fast_linear", mutates_args=())
def _fast_linear_op(
    rows: torch.Tensor, raw: torch.Tensor, fmt_name: str, n_out: int, bias: torch.Tensor | None, kind: str
) -> torch.Tensor:
    return product(*quantize(rows, kind), raw, FORMATS[fmt_name], (n_out, rows.shape[1]), bias, kind, rows.dtype)


@_fast_linear_op.register_fake
def _(rows, raw, fmt_name, n_out, bias, kind):
    return rows.new_empty((rows.shape[0], n_out))
