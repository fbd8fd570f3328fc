"""The fast mode's arithmetic: 8-bit rows with one scale each. Kernels run in Triton's interpreter when there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from block_bytes import DEVICE, NAMES, random_raw
from ltx2_gguf.quant import decode, eight_bit, formats
from ltx2_gguf.quant.kernels import triton_eight_bit as ft
from ltx2_gguf.quant.kernels import triton_int8


@pytest.mark.parametrize("kind, limit", [("fp8", 0.03), ("int8", 0.012)])
def test_a_fast_product_is_within_a_few_percent_of_the_exact_one(kind, limit):
    raw = random_raw("Q4_0", 48, 512)
    x, bias = torch.randn(40, 512, device=DEVICE), torch.randn(48, device=DEVICE)
    exact = torch.nn.functional.linear(x, decode.dequantize(raw, formats.FORMATS["Q4_0"], torch.float32))
    got = eight_bit.reference_linear(x, raw, formats.FORMATS["Q4_0"], bias, kind) - bias
    error = torch.linalg.norm(got - exact) / torch.linalg.norm(exact)
    assert 1e-4 < error < limit * 2**0.5


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rows_of_zeros_keep_scale_one_and_every_row_uses_its_whole_range(kind):
    x = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [1e4], [0.0]])
    q, scale = eight_bit.quantize_rows(x, kind)
    assert scale[3] == 1 and (q[3].float() == 0).all()
    assert (q[:3].float().abs().amax(dim=1) == eight_bit.KINDS[kind][1]).all()
    assert torch.linalg.norm(q.float() * scale - x) < 0.04 * torch.linalg.norm(x)


@pytest.mark.parametrize("name", NAMES)
def test_weight_rows_in_int8_equal_the_reference(name):
    raw = random_raw(name, 3, 768, seed=2)
    q, scale = torch.full((3, 768), 99, dtype=torch.int8, device=DEVICE), torch.zeros(3, device=DEVICE)
    ft.weight_rows(raw, name, q, scale)
    expected, expected_scale = eight_bit.quantize_rows(
        decode.dequantize(raw, formats.FORMATS[name], torch.float32), "int8"
    )
    assert torch.allclose(scale, expected_scale[:, 0], rtol=1e-6)
    different = q != expected  # a tie may fall either way when the scale differs in its last bit
    assert different.float().mean() < 0.01 and ((q.int() - expected.int()).abs() <= 1).all()


@pytest.mark.parametrize("width", [64, 320])
def test_activation_rows_in_int8_equal_the_reference(width):
    x = torch.randn(5, width, device=DEVICE)
    x[2] = 0
    q, scale = torch.empty(5, width, dtype=torch.int8, device=DEVICE), torch.empty(5, device=DEVICE)
    ft.activation_rows(x, q, scale)
    expected, expected_scale = eight_bit.quantize_rows(x, "int8")
    assert torch.allclose(scale, expected_scale[:, 0], rtol=1e-6) and ((q.int() - expected.int()).abs() <= 1).all()
    assert (q != expected).float().mean() < 0.01


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows, n_out, width", [(35, 80, 96), (64, 32, 320)])
def test_the_int8_product_sums_exactly_then_scales_adds_bias_and_applies_gelu(gelu, with_bias, rows, n_out, width):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (n, width), dtype=torch.int8, generator=gen).to(DEVICE) for n in (rows, n_out))
    x_scale, w_scale = torch.rand(rows, device=DEVICE) * 0.01, torch.rand(n_out, device=DEVICE) * 0.01
    bias = torch.randn(n_out, device=DEVICE) if with_bias else None
    y = torch.empty(rows, n_out, device=DEVICE)
    triton_int8.product(a, x_scale, b, w_scale, bias, y, gelu, (32, 32, 64, 2, 2, 4))
    expected = (a.double() @ b.double().t()).float() * x_scale[:, None] * w_scale[None]
    expected = expected + bias if with_bias else expected
    expected = torch.nn.functional.gelu(expected, approximate="tanh") if gelu else expected
    assert torch.allclose(y, expected, rtol=2e-5, atol=2e-6)


def test_only_devices_with_8_bit_tensor_cores_compute_in_fast_mode(monkeypatch):
    kind_for, shape = eight_bit.kind_for, (4096, 4096)
    assert kind_for(torch.device("cpu"), 4096, shape, torch.bfloat16, "fast") is None
    found = {(7, 5): (None, None), (8, 0): ("int8", "int8"), (8, 6): ("int8", "int8"), (8, 9): ("fp8", "int8"), (9, 0): ("fp8", "int8"),
             (10, 0): ("fp8", "fp8"), (12, 0): ("fp8", "int8")}  # fmt: skip
    for capability, (kind, precise) in found.items():
        eight_bit._kind_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        device = torch.device("cuda", 0)
        assert kind_for(device, 4096, shape, torch.bfloat16, "fast") == kind
        assert (
            kind_for(device, 4096, shape, torch.bfloat16, "fast int8") == precise
            and kind_for(device, 4096, shape, torch.bfloat16, "exact") is None
        )
        assert kind_for(device, 4096, shape, torch.float16, "fast") == (kind if kind == "int8" else None)
        assert kind_for(device, 4096, shape, torch.float16, "fast int8") == (precise if precise == "int8" else None)
        assert kind_for(device, eight_bit.MIN_TOKENS - 1, shape, torch.bfloat16, "fast") is None
        assert kind_for(device, 4096, (4090, 4096), torch.bfloat16, "fast") is None
    eight_bit._kind_on.cache_clear()


def test_the_registered_operator_traces_without_running_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = torch.ops.ltx2_gguf.fast_linear(
            torch.empty(40, 256, dtype=torch.bfloat16), torch.empty(32, 144, dtype=torch.uint8), "Q4_0", 32, None, "fp8"
        )
    assert y.shape == (40, 32) and y.dtype == torch.bfloat16


def test_the_mode_of_a_weight_survives_moves_and_reaches_the_product(monkeypatch):
    from ltx2_gguf.quant import tensor

    with torch.inference_mode():
        weight = tensor.pack(random_raw("Q8_0", 32, 64).cpu(), "Q8_0", (32, 64), torch.bfloat16)
        fast_weight = torch.nn.Parameter(tensor.with_compute(weight, "fast"), requires_grad=False).to(torch.float32)
        assert fast_weight._params.compute == "fast" and fast_weight._qdata.data_ptr() == weight._qdata.data_ptr()
        x = torch.randn(40, 64)
        exact = torch.nn.functional.linear(x, weight.to(torch.float32))
        assert torch.equal(torch.nn.functional.linear(x, fast_weight), exact)  # this device has no fast mode
        monkeypatch.setattr(eight_bit, "kind_for", lambda *a: "int8")
        monkeypatch.setattr(
            eight_bit,
            "linear",
            lambda x, raw, fmt, shape, bias, kind, gelu: eight_bit.reference_linear(x, raw, fmt, bias, "int8"),
        )
        assert (
            0 < torch.linalg.norm(torch.nn.functional.linear(x, fast_weight) - exact) < 0.02 * torch.linalg.norm(exact)
        )
        with pytest.raises(ValueError, match="exact, fast"):
            tensor.with_compute(weight, "quick")
