"""Packed weights on an NVIDIA GPU, by way of the backend table."""

import pytest
import torch
import torch.nn.functional as F

from block_bytes import finite_blocks
from ltx2_gguf.quant import backends, decode, formats, matmul

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
QUANTIZED = list(formats.QUANTIZED)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    """The table as it is, and as it is where triton is missing."""
    if request.param == "triton":
        yield request.param
        return
    table = backends.BACKENDS
    backends.BACKENDS = tuple(row for row in table if row.name != "triton")
    backends.forget_choices()
    yield request.param
    backends.BACKENDS = table
    backends.forget_choices()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_on_the_gpu_equals_the_reference(backend, name, dtype):
    raw = torch.from_numpy(finite_blocks(name, rows=33, cols=1024))
    assert torch.equal(
        matmul.dequantize(raw.cuda(), formats.FORMATS[name], dtype).cpu(), decode.dequantize(raw, name, dtype)
    )


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 6e-3), (torch.float16, 2e-3)])
def test_products_on_the_gpu_equal_decode_then_product(backend, name, rows, dtype, bound):
    from ltx2_gguf.quant import tensor

    with torch.inference_mode():
        raw = torch.from_numpy(finite_blocks(name, rows=64, cols=1024))
        weight = tensor.pack(raw, name, (64, 1024), dtype).to("cuda")
        x, bias = torch.randn(2, rows, 1024).to(dtype), torch.randn(64).to(dtype)
        y = F.linear(x.cuda(), weight, bias.cuda())
        assert tensor.is_packed(weight) and (y.dtype, tuple(y.shape)) == (dtype, (2, rows, 64))
        assert relative(y.cpu(), F.linear(x.float(), decode.dequantize(raw, name), bias.float())) < bound
        ids = torch.tensor([[5, 0, 63]])
        assert torch.equal(F.embedding(ids.cuda(), weight).cpu(), decode.dequantize(raw, name, dtype)[ids])


def test_products_allocate_their_output_and_nothing_else():
    raw = torch.from_numpy(finite_blocks("Q4_0", rows=2048, cols=2048)).cuda()
    x = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16)
    fmt, shape = formats.FORMATS["Q4_0"], (2048, 2048)
    with torch.inference_mode():
        for _ in range(3):
            matmul.linear_raw(x, raw, fmt, shape)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = matmul.linear_raw(x, raw, fmt, shape)
        assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 4096


def test_products_run_outside_inference_mode_after_running_inside(backend):
    raw = torch.from_numpy(finite_blocks("Q8_0", rows=64, cols=512)).cuda()
    fmt, x = formats.FORMATS["Q8_0"], torch.randn(40, 512, device="cuda")
    with torch.inference_mode():
        inside = matmul.linear_raw(x, raw, fmt, (64, 512))
    with torch.no_grad():
        assert torch.equal(matmul.linear_raw(x, raw, fmt, (64, 512)), inside)


def test_nothing_waits_for_the_gpu(backend):
    raw = torch.from_numpy(finite_blocks("Q5_1", rows=64, cols=512)).cuda()
    fmt = formats.FORMATS["Q5_1"]
    inputs = [torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for rows in (1, 4, 64)]
    with torch.inference_mode():
        for x in inputs:
            matmul.linear_raw(x, raw, fmt, (64, 512))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for x in inputs:
                matmul.linear_raw(x, raw, fmt, (64, 512))
        finally:
            torch.cuda.set_sync_debug_mode("default")
