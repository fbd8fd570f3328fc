"""Dequantise-then-matmul as plain eager torch: what these kernels are compared with.

A straightforward decoder per format that works in the compute type, as a node without kernels would: unpack with shifts, scale,
then a dense product. Not used by the pack.
"""

import importlib.util
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F


def _half(blocks, at, dtype):
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(dtype)


def _shifts(count, width, device):
    return (torch.arange(count, device=device, dtype=torch.uint8) * width).view(1, 1, count, 1)


def _unpack(qs, group, width):
    """uint8 [n, b] -> uint8 [n, b * 8 / width]: per group of bytes, the lowest bits of all, then the next."""
    count = 8 // width
    return ((qs.view(qs.shape[0], -1, 1, group) >> _shifts(count, width, qs.device)) & (2**width - 1)).reshape(
        qs.shape[0], -1
    )


def _q4_0(b, dtype):
    return _half(b, 0, dtype) * (_unpack(b[:, 2:].contiguous(), 16, 4).to(torch.int8) - 8)


def _q5_1(b, dtype):
    word = b[:, 4:8].contiguous().view(torch.int32)
    fifth = ((word >> torch.arange(32, device=b.device, dtype=torch.int32)) & 1).to(torch.uint8)
    return _half(b, 0, dtype) * (_unpack(b[:, 8:].contiguous(), 16, 4) | (fifth << 4)) + _half(b, 2, dtype)


def _q8_0(b, dtype):
    return _half(b, 0, dtype) * b[:, 2:].contiguous().view(torch.int8)


def _q4_k(b, dtype):
    s = b[:, 4:16].reshape(-1, 3, 4)
    low, mid, high = s[:, 0], s[:, 1], s[:, 2]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=1)
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 48)), dim=1)
    q = _unpack(b[:, 16:].contiguous(), 32, 4).view(-1, 8, 32)
    return ((_half(b, 0, dtype) * scale).unsqueeze(2) * q - (_half(b, 2, dtype) * minimum).unsqueeze(2)).flatten(1)


def _q6_k(b, dtype):
    low = _unpack(b[:, :128].contiguous(), 64, 4).view(-1, 8, 32)
    high = _unpack(b[:, 128:192].contiguous(), 32, 2).view(-1, 8, 32)
    q = ((low | (high << 4)).to(torch.int8) - 32).view(-1, 16, 16)
    scale = _half(b, 208, dtype) * b[:, 192:208].contiguous().view(torch.int8)
    return (scale.unsqueeze(2) * q).flatten(1)


DECODERS = {"Q4_0": _q4_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k}


def dequantize(raw, fmt_name, type_size, dtype):
    """uint8 [rows, row_bytes] -> dtype [rows, cols]."""
    return DECODERS[fmt_name](raw.view(-1, type_size), dtype).view(raw.shape[0], -1)


class EagerLinear(torch.nn.Module):
    """A linear layer that decodes its whole weight in eager torch at every call."""

    def __init__(self, raw, fmt, bias):
        super().__init__()
        self.raw, self.fmt, self.bias = raw, fmt, bias

    def forward(self, x):
        return F.linear(x, dequantize(self.raw, self.fmt.name, self.fmt.type_size, x.dtype), self.bias)


def pack_dequantizer(folder):
    """``dequantize_tensor`` of a ComfyUI-GGUF tree (a GGUF pack for comparison, put there by hand), which needs the gguf package."""
    spec = importlib.util.spec_from_file_location("comfyui_gguf_dequant", Path(folder) / "dequant.py")
    module = importlib.util.module_from_spec(spec)
    if importlib.util.find_spec("tqdm") is None:  # only its write() is used, for a message
        sys.modules.setdefault("tqdm", types.SimpleNamespace(tqdm=None))
    spec.loader.exec_module(module)
    return module.dequantize_tensor


class PackLinear(torch.nn.Module):
    """A linear layer that decodes its weight with another pack's function at every call, as that pack's own layers do by default."""

    def __init__(self, raw, fmt, bias, dequantize_tensor):
        super().__init__()
        import gguf

        self.raw, self.fmt, self.bias, self.dequantize_tensor = raw, fmt, bias, dequantize_tensor
        raw.tensor_type = gguf.GGMLQuantizationType[fmt.name]
        raw.tensor_shape = torch.Size((raw.shape[0], raw.shape[1] // fmt.type_size * fmt.block_size))

    def forward(self, x):
        return F.linear(x, self.dequantize_tensor(self.raw, x.dtype), self.bias)
