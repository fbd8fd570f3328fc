"""The VAE's pixel norm and SiLU in one pass (in Triton's interpreter when there is no GPU) against torch's steps."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")

from ltx2_gguf.ltx2_core.vae import blocks, triton_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = blocks.PIXEL_NORM_EPS


def clip(channels, frames=3, height=4, width=5, batch=1, dtype=torch.float32):
    x = torch.randn(batch, channels, frames, height, width, generator=torch.Generator().manual_seed(channels))
    return x.to(DEVICE, dtype).to(memory_format=torch.channels_last_3d)


def reference(x):
    """In float64, from the formula."""
    x = x.double()
    return F.silu(x / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt())


def error(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("channels", [1, 48, 128, 1024])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_equals_the_formula_for_any_number_of_channels(channels, batch):
    x = clip(channels, batch=batch)
    out = torch.empty_like(x)
    assert triton_norm.norm_silu(x, out, EPS) is out
    assert error(out, reference(x)) < 1e-6


def test_in_bfloat16_one_rounding_is_closer_than_torchs_three():
    x = clip(256, dtype=torch.bfloat16)
    fused, steps = torch.empty_like(x), torch.empty_like(x)
    triton_norm.norm_silu(x, fused, EPS)
    F.silu(torch.mul(x, blocks._norm_factor(x), out=steps), inplace=True)
    assert error(fused, reference(x)) < error(steps, reference(x)) < 4e-3


def test_it_writes_into_the_inside_of_a_padded_window_and_nowhere_else():
    x = clip(48)
    window = torch.full((1, 48, 5, 6, 7), 7.0, device=DEVICE).to(memory_format=torch.channels_last_3d)
    inside = window[:, :, 1:4, 1:5, 1:6]
    triton_norm.norm_silu(x, inside, EPS)
    assert error(inside, reference(x)) < 1e-6
    assert float((window == 7.0).sum()) == window.numel() - x.numel()


def test_a_frame_gives_the_same_bits_alone_and_in_a_clip():
    x = clip(128, frames=4, dtype=torch.bfloat16)
    whole, parts = torch.empty_like(x), torch.empty_like(x)
    triton_norm.norm_silu(x, whole, EPS)
    for start, stop in ((0, 1), (1, 4)):
        triton_norm.norm_silu(x[:, :, start:stop], parts[:, :, start:stop], EPS)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_a_streamed_residual_block_with_the_kernel_equals_one_piece(monkeypatch, padding):
    taken, kernel = [], triton_norm.norm_silu
    monkeypatch.setattr(blocks, "_TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(triton_norm, "norm_silu", lambda *arguments: taken.append(1) or kernel(*arguments))
    torch.manual_seed(0)
    block = blocks.ResBlock(32, causal=False, padding=padding, operations=torch.nn).to(DEVICE).requires_grad_(False)
    x = clip(32, frames=7)
    with torch.no_grad():
        whole = block(x, blocks.Rolling(torch.channels_last_3d), True)
        rolling = blocks.Rolling(torch.channels_last_3d)
        parts = [block(x[:, :, a:b], rolling, b == 7) for a, b in ((0, 2), (2, 5), (5, 7))]
    parts = torch.cat([part for part in parts if part is not None], dim=2)
    assert len(taken) >= 4, "at least each block's first norm; a CPU's convolution returns another layout"
    assert error(parts, whole.double()) < 1e-6


def test_where_triton_cannot_compile_the_steps_of_torch_take_over_for_good(monkeypatch):
    calls = []

    def broken(*arguments):
        calls.append(1)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(blocks, "_TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(blocks, "_HAS_TRITON", True)
    monkeypatch.setattr(triton_norm, "norm_silu", broken)
    x = clip(48)
    for _ in range(2):
        assert error(blocks._norm_silu(x, torch.empty_like(x)), reference(x)) < 1e-6
    assert calls == [1]


def test_running_out_of_memory_is_not_taken_for_a_broken_compiler(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("stand-in")

    monkeypatch.setattr(blocks, "_TRITON_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(triton_norm, "norm_silu", full)
    x = clip(48)
    with pytest.raises(torch.OutOfMemoryError):
        blocks._norm_silu(x, torch.empty_like(x))
    assert blocks._can_fuse(x, x)
