"""Packed bytes for the tests of block formats, and equality to the last bit."""

import numpy as np
import torch

from ltx2_gguf.quant import formats

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = sorted(formats.QUANTIZED)


def random_bytes(fmt, rows=7, blocks=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, size=(rows, blocks * fmt.type_size), dtype=np.uint8)


def finite_blocks(name, rows=16, cols=512, seed=0):
    """Packed rows with ordinary weights, whether or not the format has an encoder: random levels under sane half scales."""
    fmt = formats.FORMATS[name]
    raw = random_bytes(fmt, rows, cols // fmt.block_size, seed).reshape(-1, fmt.type_size)
    for field in ("d", "m", "dmin"):
        if field in dict(fmt.fields):
            at = fmt.offset(field)
            scale = np.random.default_rng(seed + at).normal(0, 0.01, size=(raw.shape[0], 1)).astype(np.float16)
            raw[:, at : at + 2] = scale.view(np.uint8)
    return raw.reshape(rows, -1)


def assert_same_bits(ours, theirs):
    """Equal bit for bit, except that any NaN equals any NaN (how a NaN's payload survives a conversion is the processor's choice)."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    bits = {4: np.uint32, 2: np.uint16}[ours.dtype.itemsize]
    np.testing.assert_array_equal(ours.view(bits)[~nan], theirs.view(bits)[~nan])


def awkward(rows=32, cols=1024):
    """Weights with the cases that break encoders: zeros, ties, one-sided blocks, outliers, tiny numbers, halves."""
    x = normal(rows, cols, seed=3)
    x[0] = 0
    x[1] = 0.5
    x[2] = np.abs(x[2])
    x[3] = -np.abs(x[3])
    x[4, ::64] = 30
    x[5] = np.round(x[5] * 100) / 100
    x[6] = np.tile([1, -1], cols // 2)
    x[7] *= 1e-6
    x[8] = np.tile(np.arange(32) - 16, cols // 32)
    x[9, ::2] = 0
    return x


def random_raw(name, rows, cols, seed=0, finite=True):
    """Random bytes [rows, row_bytes]; with ``finite``, float16 scale fields hold ordinary numbers."""
    fmt = formats.FORMATS[name]
    gen = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (rows * cols // fmt.block_size, fmt.type_size), dtype=torch.uint8, generator=gen)
    if finite:
        for field in ("d", "dmin", "m"):
            if field in dict(fmt.fields):
                at = fmt.offset(field)
                raw[:, at : at + 2] = (torch.randn(len(raw), 1, generator=gen) * 0.02).half().view(torch.uint8)
    return raw.reshape(rows, -1).to(DEVICE)


def equal_bits(a, b):
    """Same values, NaN equal to NaN, zero equal to zero of the same sign."""
    return (
        torch.equal(a.isnan(), b.isnan())
        and torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
        and torch.equal(a[~a.isnan()].signbit(), b[~b.isnan()].signbit())
    )


def normal(rows=32, cols=1024, seed=0, scale=0.02):
    return np.random.default_rng(seed).normal(0, scale, size=(rows, cols)).astype(np.float32)
