"""Blocks of packed weights, a bias, a norm and a buffer: what streaming moves."""

import torch
from torch import nn

from ltx2_gguf.quant import tensor as packed
from ltx2_gguf.quant.decode import quantize

FORMATS = ("Q4_0", "Q5_1", "Q4_K", "Q4_1")  # of similar size, so that a budget of a few blocks streams most of them


class Block(nn.Module):
    """A packed linear with a dense bias, a norm and a buffer: what a transformer block is made of."""

    def __init__(self, i, width=256):
        super().__init__()
        generator = torch.Generator().manual_seed(i)
        self.linear = nn.Linear(width, width, device="meta")
        weight = torch.randn(width, width, generator=generator) / width**0.5
        fmt = FORMATS[i % len(FORMATS)]
        weight = packed.pack(quantize(weight, fmt), fmt, (width, width), torch.float32)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.linear.bias = nn.Parameter(torch.randn(width, generator=generator), requires_grad=False)
        self.norm = nn.Parameter(torch.rand(width, generator=generator).bfloat16(), requires_grad=False)
        self.register_buffer("shift", torch.randn(3, generator=generator))

    def forward(self, x):
        return torch.tanh(self.linear(x) * self.norm + self.shift.sum())


def blocks(count=7):
    return nn.ModuleList(Block(i) for i in range(count))
