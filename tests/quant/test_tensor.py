"""Packed weights behave like dense ones, on their bytes."""

import pytest
import torch
import torch.nn.functional as F

from block_bytes import finite_blocks
from ltx2_gguf.quant import decode, formats, matmul, tensor

QUANTIZED = list(formats.QUANTIZED)
OUT, IN = 48, 512


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def make(name, dtype=torch.float32, rows=OUT, cols=IN, seed=0):
    raw = torch.from_numpy(finite_blocks(name, rows, cols, seed))
    return tensor.pack(raw, name, (rows, cols), dtype), decode.dequantize(raw, name)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 1, 4), ()])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_equals_decode_then_linear(name, lead, with_bias):
    weight, dense = make(name)
    x = torch.randn(*lead, IN)
    bias = torch.randn(OUT) if with_bias else None
    assert relative(F.linear(x, weight, bias), F.linear(x, dense, bias)) < 1e-6


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 4e-3), (torch.float16, 1e-3)])
def test_half_precision_linear_stays_within_its_rounding(name, dtype, bound):
    weight, dense = make(name, dtype)
    x = torch.randn(9, IN).to(dtype)
    bias = torch.randn(OUT).to(dtype)
    y = F.linear(x, weight, bias)
    assert y.dtype == dtype
    assert relative(y, F.linear(x.float(), dense, bias.float())) < bound


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_decodes_the_rows_asked_for(name, dtype):
    weight, dense = make(name, dtype)
    ids = torch.tensor([[3, 0, 47], [3, 3, 1]])
    expected = F.embedding(ids, dense.to(dtype))
    assert torch.equal(F.embedding(ids, weight), expected)
    assert torch.equal(matmul.embedding(ids, weight, torch.float32), F.embedding(ids, dense))
    assert torch.equal(matmul.embedding(ids, dense.to(dtype)), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_unpack_yields_the_compute_dtype_or_the_one_asked_for(name):
    weight, dense = make(name, torch.bfloat16)
    assert torch.equal(tensor.unpack(weight), dense.bfloat16())
    assert torch.equal(tensor.unpack(weight, torch.float32), dense)
    assert torch.equal(tensor.unpack(dense, torch.float16), dense.half())


def test_a_packed_weight_knows_its_format_and_counts_its_bytes():
    weight, dense = make("Q4_0", torch.float16)
    assert tensor.is_packed(weight) and not tensor.is_packed(dense)
    assert tensor.format_of(weight) is formats.FORMATS["Q4_0"]
    assert (tuple(weight.shape), weight.dtype) == ((OUT, IN), torch.float16)
    assert weight.nbytes == OUT * IN // 32 * 18
    with pytest.raises(TypeError, match="packed GGUF weight"):
        tensor.format_of(dense)


def test_moving_converting_and_cloning_keep_the_weight_packed():
    weight, dense = make("Q5_1")
    for other in (
        weight.to("cpu"),
        weight.clone(),
        weight.detach(),
        weight.contiguous(),
        torch.empty_like(weight).copy_(weight),
    ):
        assert tensor.is_packed(other) and torch.equal(tensor.unpack(other), dense)
    assert weight.clone()._qdata.data_ptr() != weight._qdata.data_ptr()
    half = weight.to(torch.float16)
    assert half.dtype == torch.float16 and half._qdata.data_ptr() == weight._qdata.data_ptr()
    other = tensor.with_compute_dtype(weight, torch.bfloat16)
    assert other.dtype == torch.bfloat16 and other._qdata.data_ptr() == weight._qdata.data_ptr()
    meta = weight.to("meta")
    assert meta.device.type == "meta" and meta.shape == weight.shape
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    assert tensor.is_packed(parameter)


def test_packing_copies_nothing():
    raw = torch.from_numpy(finite_blocks("Q8_0"))
    assert tensor.pack(raw, "Q8_0", (16, 512), torch.float32)._qdata.data_ptr() == raw.data_ptr()


def test_other_operations_decode_the_weight():
    weight, dense = make("Q4_K")
    assert torch.equal(weight + 1, dense + 1)
    assert torch.equal(weight[3:5], dense[3:5])
    assert torch.equal(weight.sum(), dense.sum())
    x = torch.randn(3, OUT)
    assert relative(x @ weight, x @ dense) < 1e-6
    assert (
        relative(weight.t().contiguous() if not tensor.is_packed(weight.t()) else tensor.unpack(weight.t()), dense.t())
        == 0
    )
    assert relative(weight.t() + 0, dense.t()) == 0


def test_a_packed_weight_that_meets_another_as_input_is_decoded():
    x, dense_x = make("Q8_0", rows=7)
    weight, dense = make("Q4_0")
    assert relative(F.linear(x, weight), F.linear(dense_x, dense)) < 1e-6
    assert relative(F.linear(x, dense), F.linear(dense_x, dense)) < 1e-6


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_outside_inference_mode_products_still_run_on_the_bytes(name, with_bias, monkeypatch):
    calls = []
    original = matmul.linear_raw
    monkeypatch.setattr(matmul, "linear_raw", lambda *args: calls.append(1) or original(*args))
    with torch.inference_mode(False), torch.no_grad():
        weight, dense = make(name)
        x, bias = torch.randn(2, 3, IN), torch.randn(OUT) if with_bias else None
        assert relative(F.linear(x, weight, bias), F.linear(x, dense, bias)) < 1e-6
        assert relative(torch.nn.functional.embedding(torch.tensor([1, 2]), weight), dense[1:3]) == 0
    assert calls == [1]


def test_bytes_that_do_not_fit_are_refused():
    raw = torch.zeros(4, 18, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=r"Q4_0 bytes of a \(4, 64\) weight are uint8 \(4, 36\); found torch.uint8 \(4, 18\)"
    ):
        tensor.pack(raw, "Q4_0", (4, 64), torch.float32)
    with pytest.raises(ValueError, match="two-dimensional"):
        tensor.pack(raw, "Q4_0", (4, 1, 32), torch.float32)
    with pytest.raises(ValueError, match="Load this tensor dense"):
        tensor.pack(raw, "BF16", (4, 9), torch.float32)


def test_requantising_is_refused_loudly():
    weight, dense = make("Q4_0")
    with pytest.raises(NotImplementedError, match="LoRA"):
        weight.requantize_from_float(dense)
