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

import torch

from . import decode, linear_gpu
from .formats import BlockFormat
from .tracing import is_plain

KINDS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}

#: Fewer rows than this are computed exactly: the product is then bound by reading the weight, and int8 products need more than 16.
MIN_ROWS = 32


@lru_cache(maxsize=16)
def kind_of(device: torch.device) -> str | None:
    """"fp8" or "int8", whichever 8-bit products are fastest on this device; None when it has none."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    capability = torch.cuda.get_device_capability(device)
    return "fp8" if capability >= (8, 9) else "int8" if capability >= (8, 0) else None


@lru_cache(maxsize=64)
def kind_for(device: torch.device, compute: str) -> str | None:
    """"fp8" or "int8" for a weight in this compute mode, None for an exact product.

    "fast": :func:`kind_of` the device. "fast int8": int8, for layers whose rounding counts most; datacentre Blackwell (10.x) keeps float8 there
    too, because its int8 units are the slow ones.
    """
    kind = kind_of(device) if compute in ("fast", "fast int8") else None
    return "int8" if kind == "fp8" and compute == "fast int8" and torch.cuda.get_device_capability(device)[0] != 10 else kind


def supports(device: torch.device, rows: int, shape: tuple[int, int], dtype: torch.dtype, compute: str = "fast") -> bool:
    """Whether a product of ``rows`` rows with a weight of this shape and compute mode runs in 8 bits on this device."""
    kind = kind_for(device, compute)
    dtypes = (torch.bfloat16,) if kind == "fp8" else (torch.bfloat16, torch.float16)
    return kind is not None and rows >= MIN_ROWS and dtype in dtypes and shape[0] % 16 == 0 and shape[1] % 16 == 0


def quantize_rows(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M, K]`` -> (8-bit ``[M, K]``, scales float32 ``[M, 1]``), in plain torch."""
    dtype, limit = KINDS[kind]
    x = x.float()
    largest = x.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / limit, torch.ones_like(largest))
    q = (x * (1.0 / scale)).clamp(-limit, limit)
    return (q.round() if kind == "int8" else q).to(dtype), scale


def reference_linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """The fast product in plain torch: what the kernels compute, with exact sums."""
    wq, w_scale = quantize_rows(decode.dequantize(raw, fmt, torch.float32), kind)
    xq, x_scale = quantize_rows(x.reshape(-1, x.shape[-1]), kind)
    y = (xq.double() @ wq.double().t()).float() * x_scale * w_scale.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], raw.shape[0])


def linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    """``x @ W.T + bias`` in 8 bits of this kind; arguments as :func:`quant.linear.linear`. Check :func:`supports` first."""
    rows = x.reshape(-1, shape[1]).contiguous()
    if is_plain(rows, raw, bias):
        y = product(*tokens(rows, kind), raw, fmt, shape, bias, kind, x.dtype, kind == "int8" and linear_gpu.take_gelu())
    else:
        y = torch.ops.ltx2_gguf.fast_linear(rows, raw, fmt.name, shape[0], bias, kind)
    return y.view(*x.shape[:-1], shape[0])


def _kernels():
    """The module of Triton kernels, imported on first use."""
    global _kernels
    from .kernels import triton_eight_bit

    _kernels = lambda: triton_eight_bit  # noqa: E731 (an import statement takes longer than a launch)
    return triton_eight_bit


def _int8():
    """The module of the int8 product, imported on first use."""
    global _int8
    from .kernels import triton_int8

    _int8 = lambda: triton_int8  # noqa: E731 (an import statement takes longer than a launch)
    return triton_int8


def tokens(rows: torch.Tensor, kind: str, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations ``[M, K]`` (tanh-GELU applied first if asked) -> (8-bit ``[M, K]``, float32 ``[M]`` scales)."""
    xq, x_scale = empty_tokens(*rows.shape, kind, rows.device)
    _kernels().token_rows(rows, xq, x_scale, gelu)
    return xq, x_scale


def empty_tokens(rows: int, width: int, kind: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised (8-bit ``[rows, width]``, float32 ``[rows]`` scales), for a pass that quantises what it computes."""
    return torch.empty(rows, width, dtype=KINDS[kind][0], device=device), torch.empty(rows, dtype=torch.float32, device=device)


def product(xq, x_scale, raw, fmt, shape, bias, kind, dtype, gelu=False) -> torch.Tensor:
    """The scaled product of quantised tokens (:func:`tokens`) with a packed weight, ``[M, N]`` of ``dtype``. ``gelu``: in int8's epilogue only."""
    triton_eight_bit = _kernels()
    wq, w_scale = linear_gpu.scratch_matrix(shape, KINDS[kind][0], raw.device, row_scales=True)
    triton_eight_bit.weight_rows(raw, fmt.name, wq, w_scale)
    if kind == "fp8":
        return torch._scaled_mm(xq, wq.t(), x_scale[:, None], w_scale[None, :], bias=bias, out_dtype=dtype, use_fast_accum=True)
    return _int8().product(xq, x_scale, wq, w_scale, bias, torch.empty(xq.shape[0], shape[0], dtype=dtype, device=xq.device), gelu)


@torch.library.custom_op("ltx2_gguf::fast_linear", mutates_args=())
def _fast_linear_op(rows: torch.Tensor, raw: torch.Tensor, fmt_name: str, n_out: int, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    from .formats import FORMATS

    return product(*tokens(rows, kind), raw, FORMATS[fmt_name], (n_out, rows.shape[1]), bias, kind, rows.dtype)


@_fast_linear_op.register_fake
def _(rows, raw, fmt_name, n_out, bias, kind):
    return rows.new_empty((rows.shape[0], n_out))
