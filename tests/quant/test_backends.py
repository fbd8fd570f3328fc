"""The CPU kernels against the reference, the table of backends, and tracing."""

import logging

import pytest
import torch
import torch.nn.functional as F

from block_bytes import assert_same_bits, finite_blocks, random_bytes
from ltx2_gguf.quant import backends, decode, formats, matmul, tensor
from ltx2_gguf.quant.kernels import cpu

QUANTIZED = list(formats.QUANTIZED)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_decoding_equals_the_reference_on_random_bytes(name, dtype):
    raw = torch.from_numpy(random_bytes(formats.FORMATS[name], rows=37, blocks=4, seed=5))
    expected = decode.dequantize(raw, name, dtype)
    out = cpu.dequantize(raw, formats.FORMATS[name], torch.empty_like(expected))
    if dtype == torch.bfloat16:
        expected, out = expected.float(), out.float()
    assert_same_bits(out.numpy(), expected.numpy())


@pytest.mark.parametrize("name", QUANTIZED)
def test_cpu_decoding_in_slices_of_a_view_equals_the_reference(name, monkeypatch):
    fmt = formats.FORMATS[name]
    raw = torch.from_numpy(finite_blocks(name, rows=23, cols=1024))
    monkeypatch.setattr(cpu, "TILE_WEIGHTS", 5 * 512)
    half = raw[3:, fmt.row_bytes(512) :]  # neither the first rows nor the first columns
    out = torch.zeros(20, 600)
    cpu.dequantize(half, fmt, out[:, 50:562])
    assert torch.equal(out[:, 50:562], decode.dequantize(half.contiguous(), fmt))
    assert not out[:, :50].any() and not out[:, 562:].any()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "IQ4_XS"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_tiles_cut_both_ways_give_the_product(name, dtype, bound, monkeypatch):
    """Rows and columns are cut where neither divides evenly."""
    monkeypatch.setattr(cpu, "TILE_WEIGHTS", 7 * 768)
    monkeypatch.setattr(cpu, "TILE_COLUMNS", 768)
    raw = torch.from_numpy(finite_blocks(name, rows=50, cols=2048))
    dense = decode.dequantize(raw, name)
    x, bias = torch.randn(2, 9, 2048).to(dtype), torch.randn(50).to(dtype)
    for b in (bias, None):
        y = cpu.linear(x, raw, formats.FORMATS[name], (50, 2048), b)
        assert (y.dtype, tuple(y.shape)) == (dtype, (2, 9, 50))
        assert relative(y, F.linear(x.float(), dense, None if b is None else b.float())) < bound


def test_a_product_never_holds_the_whole_weight(monkeypatch):
    """The largest float tensor made during a product is a tile, not the layer."""
    monkeypatch.setattr(cpu, "TILE_WEIGHTS", 1 << 14)
    cpu.release_scratch()
    raw = torch.from_numpy(finite_blocks("Q4_0", rows=1024, cols=512))
    cpu.linear(torch.randn(4, 512), raw, formats.FORMATS["Q4_0"], (1024, 512), None)
    sizes = [buffer.numel() for buffer in cpu._local.buffers.values()]
    assert 0 < max(sizes) <= 1 << 14
    cpu.release_scratch()


def test_scratch_is_reused_between_calls():
    raw = torch.from_numpy(finite_blocks("Q5_1", rows=16, cols=512))
    cpu.release_scratch()
    for _ in range(2):
        cpu.linear(torch.randn(4, 512), raw, formats.FORMATS["Q5_1"], (16, 512), None)
        pointers = {key: buffer.data_ptr() for key, buffer in cpu._local.buffers.items()}
        assert pointers == locals().get("before", pointers)
        before = pointers
    assert before


def test_products_run_under_grad_mode_with_inputs_that_want_gradients():
    raw = torch.from_numpy(finite_blocks("Q8_0", rows=16, cols=512))
    x = torch.randn(4, 512, requires_grad=True)
    y = cpu.linear(x, raw, formats.FORMATS["Q8_0"], (16, 512), None)
    assert not y.requires_grad


def test_a_buffer_made_in_inference_mode_serves_outside_it():
    cpu.release_scratch()
    raw = torch.from_numpy(finite_blocks("Q4_1", rows=16, cols=512))
    fmt, expected = formats.FORMATS["Q4_1"], decode.dequantize(raw, "Q4_1")
    with torch.inference_mode():
        cpu.dequantize(raw, fmt, torch.empty(16, 512))
    assert torch.equal(cpu.dequantize(raw, fmt, torch.empty(16, 512)), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_cpu_has_a_backend_for_every_format(name):
    fmt = formats.FORMATS[name]
    assert backends.pick("linear", "cpu", fmt).name == "cpu tiles"
    assert backends.pick("dequantize", "cpu", fmt).name == "cpu"


@pytest.mark.parametrize("device", ["mps", "hpu", "privateuseone"])
def test_an_unknown_device_falls_back_to_torch(device):
    fmt = formats.FORMATS["Q4_0"]
    if device != "mps":
        assert backends.pick("dequantize", device, fmt).name == "torch"
    assert backends.pick("linear", device, fmt) is None


def test_explain_gives_a_reason_for_every_backend():
    lines = backends.explain("dequantize", "cpu", formats.FORMATS["Q4_0"])
    assert len(lines) == len(backends.candidates("dequantize"))
    assert "cpu: taken" in lines
    assert any(line.startswith("triton: runs on cuda") for line in lines)
    assert "torch: could run, a better one is taken" in lines


def test_force_takes_the_named_backend_and_refuses_what_it_cannot_do():
    raw = torch.from_numpy(finite_blocks("Q4_0"))
    fmt, expected = formats.FORMATS["Q4_0"], decode.dequantize(raw, "Q4_0")
    with backends.force("dequantize", "torch"):
        assert backends.pick("dequantize", "cpu", fmt).name == "torch"
        assert torch.equal(matmul.dequantize(raw, fmt), expected)
    assert backends.pick("dequantize", "cpu", fmt).name == "cpu"
    with (
        backends.force("dequantize", "triton"),
        pytest.raises(RuntimeError, match="'triton' was forced for dequantize, but it runs on cuda"),
    ):
        backends.pick("dequantize", "cpu", fmt)
    with pytest.raises(ValueError, match="expected one of .*cpu"):
        with backends.force("dequantize", "abacus"):
            pass


def test_the_choice_is_logged_once_with_the_reason(caplog):
    backends.forget_choices()
    with caplog.at_level(logging.INFO, logger=backends.log.name):
        for _ in range(3):
            backends.pick("dequantize", "privateuseone", formats.FORMATS["Q4_0"])
            backends.pick("dequantize", "privateuseone", formats.FORMATS["Q5_1"])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert "torch" in told[0] and "privateuseone" in told[0] and "triton: runs on cuda" in told[0]


@pytest.mark.parametrize("name, mode", [("Q4_0", torch.inference_mode), ("Q6_K", torch.no_grad)])
def test_a_linear_layer_compiles_as_one_graph(name, mode):
    with mode():
        raw = torch.from_numpy(finite_blocks(name, rows=64, cols=512))
        layer = torch.nn.Linear(512, 64, device="meta")
        layer.weight = torch.nn.Parameter(tensor.pack(raw, name, (64, 512), torch.float32), requires_grad=False)
        layer.bias = torch.nn.Parameter(torch.randn(64), requires_grad=False)
        model = torch.nn.Sequential(layer, torch.nn.GELU())
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for rows in (3, 5):
            x = torch.randn(rows, 512)
            assert relative(compiled(x), model(x)) < 1e-6
    torch._dynamo.reset()


def test_embedding_and_decoding_compile_as_one_graph():
    with torch.inference_mode():
        raw = torch.from_numpy(finite_blocks("Q6_K", rows=64, cols=512))
        weight, dense = (
            tensor.pack(raw, "Q6_K", (64, 512), torch.bfloat16),
            decode.dequantize(raw, "Q6_K", torch.bfloat16),
        )

        def run(ids, weight):
            return F.embedding(ids, weight) + weight[0]

        ids = torch.tensor([[5, 0, 63]])
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(ids, weight), F.embedding(ids, dense) + dense[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("name", sorted(formats.QUANTIZED))
@pytest.mark.parametrize("start", [2, 4, 8, 18])
def test_the_cpus_decoder_reads_bytes_wherever_they_begin(name, start):
    """A tensor in a file begins where the one before it ends: words of eight bytes are views only where they are aligned."""
    fmt = formats.FORMATS[name]
    nbytes = 3 * 2 * fmt.type_size
    memory = torch.randint(0, 120, (start + nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(start))
    raw = memory[start:].view(3, -1)
    got = cpu.dequantize(raw, fmt, torch.empty(3, 2 * fmt.block_size))
    assert torch.equal(got, decode.dequantize(raw.clone(), fmt, torch.float32))
