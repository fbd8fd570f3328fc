"""The element-wise passes: Triton kernels (in Triton's interpreter when there is no GPU) against their torch definitions."""

import pytest
import torch

pytest.importorskip("triton")

from ltx2_gguf.ltx2_core.transformer import fused
from ltx2_gguf.ltx2_core.transformer import triton_fused as ft
from ltx2_gguf.quant import eight_bit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = [96, 128, 320]


def close(a, b, dtype=torch.float32):
    """Relative error within what one rounding of the output type allows."""
    limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert a.shape == b.shape and a.dtype == b.dtype
    assert torch.linalg.norm(a.double() - b.double()) <= limit * torch.linalg.norm(b.double())


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.fixture
def torch_only(monkeypatch):
    """The reference functions, kept from dispatching to the kernels under test."""
    monkeypatch.setattr(fused, "_HAS_TRITON", False)
    with torch.no_grad():
        yield fused


@pytest.mark.parametrize("n", [1, 3, 12])
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_modulate_equals_its_definition_for_any_number_of_modulation_rows(torch_only, width, n):
    x, scale, shift = rand(2, 12, width), rand(2, n, width, seed=1), rand(2, n, width, seed=2)
    close(ft.rms_modulate(x, scale, shift, 1e-6), torch_only.rms_modulate(x, scale, shift, 1e-6))
    close(ft.rms_modulate(x, None, None, 1e-6), torch_only.rms_modulate(x, None, None, 1e-6))


def test_modulation_rows_may_be_views_into_a_larger_table(torch_only):
    x, table = rand(2, 8, 96), rand(2, 4, 9, 96, seed=1)
    shift, scale, gate = table[:, :, 3:6].unbind(2)
    close(ft.rms_modulate(x, scale, shift, 1e-6), torch_only.rms_modulate(x, scale, shift, 1e-6))
    close(ft.gate_residual_(x.clone(), x, gate), torch_only.gate_residual_(x.clone(), x, gate))
    one = table[:1, :1]
    shift, scale, gate = one[:, :, :3].unbind(2)
    close(
        ft.rms_modulate(x, scale, shift, 1e-6),
        torch_only.rms_modulate(x, scale.expand(2, -1, -1), shift.expand(2, -1, -1), 1e-6),
    )


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("modulated", [True, False])
def test_gate_residual_and_norm_in_one_pass_equal_the_two_steps(torch_only, n, modulated):
    x, y = rand(2, 8, 320), rand(2, 8, 320, seed=1)
    gate, scale, shift = (rand(2, n, 320, seed=s) if modulated else None for s in (2, 3, 4))
    expected_x, expected_h = torch_only.gate_residual_rms_modulate_(x.clone(), y, gate, scale, shift, 1e-6)
    got_x, got_h = ft.gate_residual_rms_modulate_(x, y, gate, scale, shift, 1e-6)
    assert got_x is x
    close(got_x, expected_x)
    close(got_h, expected_h)


def test_gate_and_norm_may_come_in_different_numbers_of_rows(torch_only):
    x, y, gate = rand(1, 8, 96), rand(1, 8, 96, seed=1), rand(1, 1, 96, seed=2)
    scale, shift = rand(1, 8, 96, seed=3), rand(1, 8, 96, seed=4)
    expected = torch_only.gate_residual_rms_modulate_(x.clone(), y, gate, scale, shift, 1e-6)
    for a, b in zip(ft.gate_residual_rms_modulate_(x, y, gate, scale, shift, 1e-6), expected):
        close(a, b)


def test_the_residual_stream_is_rounded_before_it_is_normed():
    x, y = rand(1, 4, 128, dtype=torch.float16), rand(1, 4, 128, seed=1, dtype=torch.float16)
    with torch.no_grad():
        got_x, got_h = ft.gate_residual_rms_modulate_(x.clone(), y, None, None, None, 1e-6)
        assert torch.equal(got_x, x + y)
        assert torch.equal(got_h, ft.rms_modulate(got_x, None, None, 1e-6))


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_modulate_subtracts_the_mean(torch_only, width):
    x, scale, shift = rand(1, 6, width) + 3, rand(1, 2, width, seed=1), rand(1, 2, width, seed=2)
    close(ft.layer_norm_modulate(x, scale, shift, 1e-6), torch_only.layer_norm_modulate(x, scale, shift, 1e-6))


@pytest.mark.parametrize("heads, hd", [(4, 32), (3, 16), (5, 64)])
@pytest.mark.parametrize("case", ["rope", "plain", "own table for k", "shared table"])
def test_norm_and_rotation_of_q_and_k_equal_their_definition(torch_only, heads, hd, case):
    batch, tokens = 2, 6
    keys = 9 if case == "plain" else tokens
    q, k = rand(batch, tokens, heads * hd), rand(batch, keys, heads * hd, seed=1)
    weights = rand(heads * hd, seed=2), rand(heads * hd, seed=3)

    def table(seed, b=batch):
        angle = rand(b, tokens, heads, hd // 2, seed=seed).transpose(1, 2)  # the model's tables are transposed views
        return angle.cos(), angle.sin()

    pe = None if case == "plain" else table(4, 1 if case == "shared table" else batch)
    k_pe = table(5) if case == "own table for k" else None
    expected = torch_only.qk_norm_rope(q, k, *weights, pe, heads, 1e-6, k_pe)
    assert ft.can_norm_rope(q, heads, pe, k_pe)
    for a, b in zip(ft.qk_norm_rope(q.clone(), k.clone(), *weights, pe, heads, 1e-6, k_pe), expected):
        close(a, b)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("batch, table_batch", [(1, 1), (2, 1), (2, 2)])
def test_rotation_from_rows_and_index_equals_rotation_from_the_full_table(axes, batch, table_batch):
    from ltx2_gguf.ltx2_core.transformer.rope import rotary_table

    heads, hd, tokens = 3, 16, 10
    positions = torch.randint(0, 4, (table_batch, axes, tokens), generator=torch.Generator().manual_seed(axes)).float()
    table = rotary_table(positions, (20,) * axes, heads * hd, heads, 10000.0, DEVICE)
    q, k, weights = (
        rand(batch, tokens, heads * hd),
        rand(batch, tokens, heads * hd, seed=1),
        (rand(heads * hd, seed=2), rand(heads * hd, seed=3)),
    )
    assert table.rows[0].shape[0] <= 4 * axes and ft.can_norm_rope(q, heads, table)
    got = ft.qk_norm_rope(q.clone(), k.clone(), *weights, table, heads, 1e-6)
    expected = ft.qk_norm_rope(q.clone(), k.clone(), *weights, table.tables, heads, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("heads, hd", [(4, 32), (3, 16)])
def test_head_gate_scales_each_head_by_twice_a_sigmoid(torch_only, heads, hd):
    out, logits = rand(2, 5, heads * hd), rand(2, 5, heads, seed=1) * 4
    close(ft.head_gate(out, logits), torch_only.head_gate(out, logits))
    close(ft.head_gate(out, torch.zeros_like(logits)), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_stay_within_one_rounding_of_the_float32_result(torch_only, dtype):
    x, y = rand(1, 8, 128, dtype=dtype), rand(1, 8, 128, seed=1, dtype=dtype)
    gate, scale, shift = (rand(1, 1, 128, seed=s, dtype=dtype) for s in (2, 3, 4))
    wide = torch_only.gate_residual_rms_modulate_(
        x.float(), y.float(), gate.float(), scale.float(), shift.float(), 1e-6
    )
    for a, b in zip(ft.gate_residual_rms_modulate_(x, y, gate, scale, shift, 1e-6), wide):
        close(a, b.to(dtype), dtype)


@pytest.mark.parametrize("kind", ("int8",) if DEVICE == "cpu" else ("int8", "fp8"))  # the interpreter has no float8
def test_an_operation_before_an_8_bit_product_quantises_what_it_makes(kind):
    x, y = (torch.randn(1, 6, 64, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    gate, scale, shift = (torch.randn(1, 2, 64, device=DEVICE).to(torch.bfloat16) for _ in range(3))
    _, h = ft.gate_residual_rms_modulate_(x.clone(), y, gate, scale, shift, 1e-6)
    logits = torch.randn(1, 6, 4, device=DEVICE).to(torch.bfloat16)
    made = (
        ft.gate_residual_rms_modulate_(x.clone(), y, gate, scale, shift, 1e-6, kind)[1],
        ft.head_gate(x, logits, kind),
    )
    for got, dense in zip(made, (h, ft.head_gate(x, logits))):
        q, scales = eight_bit.quantize_rows(dense[0], kind)
        assert (got.kind, got.shape, got.dtype) == (kind, dense.shape, torch.bfloat16)
        assert torch.equal(got.q, q) and torch.allclose(got.scales, scales[:, 0], rtol=1e-6)


def test_registered_operators_trace_without_running_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        x, y = torch.empty(1, 4, 64), torch.empty(1, 4, 64)
        gate, scale, shift = (torch.empty(1, 1, 64) for _ in range(3))
        assert ft.rms_modulate(x, scale, shift, 1e-6).shape == x.shape
        assert ft.layer_norm_modulate(x, scale, shift, 1e-6).shape == x.shape
        assert ft.gate_residual_(x, y, gate).shape == x.shape
        assert ft.gate_residual_rms_modulate_(x, y, gate, scale, shift, 1e-6)[1].shape == x.shape
        pe = torch.empty(1, 2, 4, 16), torch.empty(1, 2, 4, 16)
        assert ft.qk_norm_rope(x, y, gate[0, 0], gate[0, 0], pe, 2, 1e-6)[1].shape == x.shape
        assert ft.head_gate(x, torch.empty(1, 4, 2)).shape == x.shape


def test_tensors_on_the_cpu_are_left_to_torch():
    with torch.no_grad():
        assert fused._kernels(torch.zeros(1, 2, 64)) is None
