"""Products and look-ups on packed weights, decoded on the fly.

Both ask the table in ``backends.py``. Where it has no product on the bytes, the weight is decoded into scratch memory that every
product on that device reuses, and a dense product follows.
"""

import torch

from . import backends, linear_gpu
from .formats import BlockFormat
from .tracing import is_plain


def dequantize(raw: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32, out: torch.Tensor | None = None) -> torch.Tensor:
    """Packed rows ``uint8 [rows, row_bytes]`` -> ``[rows, cols]``, by the best backend of the device."""
    if out is None:
        n_cols = raw.shape[1] // fmt.type_size * fmt.block_size
        out = torch.empty(raw.shape[0], n_cols, dtype=dtype, device=raw.device)
    return backends.pick("dequantize", raw.device.type, fmt).run(raw, fmt, out)


def linear(x: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, shape: tuple[int, int], bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W.T + bias`` for a packed W.

    x: ``[..., in_features]`` float32, bfloat16 or float16; raw: ``uint8 [out_features, row_bytes]`` on the same device
    shape: ``(out_features, in_features)``. Returns ``[..., out_features]`` in the dtype of x.
    """
    backend = backends.pick("linear", x.device.type, fmt)
    if backend is not None:
        return backend.run(x, raw, fmt, shape, bias)
    weight = dequantize(raw, fmt, x.dtype, _scratch(shape, x.dtype, raw) if is_plain(x, raw, bias) else None)
    return torch.nn.functional.linear(x, weight, bias)


def _scratch(shape: tuple[int, int], dtype: torch.dtype, raw: torch.Tensor) -> torch.Tensor | None:
    """Memory for a decoded weight that the next product may overwrite; None on a device whose order of work is not known here."""
    if raw.device.type not in ("cuda", "xpu", "mps"):
        return None
    return linear_gpu.scratch_matrix(tuple(shape), dtype, raw.device)


def embedding_rows(ids: torch.Tensor, raw: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a packed table: gathers the bytes of these rows and decodes them. ``ids [...]`` -> ``[..., cols]``."""
    packed = raw.index_select(0, ids.reshape(-1))
    rows = dequantize(packed, fmt, dtype)
    return rows.view(*ids.shape, rows.shape[-1])


def embedding(ids: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows ``ids`` of a packed or dense weight; see ``quant.tensor.embedding``."""
    from .tensor import embedding as lookup  # tensor.py imports this module

    return lookup(ids, weight, dtype)
