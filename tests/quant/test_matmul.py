"""Where a product is chosen: every way gives the product of the dequantised weight, and each is taken where it should be."""

import threading

import pytest
import torch
import torch.nn.functional as F

from block_bytes import finite_blocks
from ltx2_gguf.quant import backends, decode, eight_bit, formats, layouts, matmul, scratch, tensor

OUT, IN = 32, 64


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def packed(n_out=OUT, n_in=IN, name="Q8_0", dtype=torch.float32):
    raw = torch.from_numpy(finite_blocks(name, rows=n_out, cols=n_in))
    return tensor.pack(raw, name, (n_out, n_in), dtype), decode.dequantize(raw, name, dtype)


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def gelu(y):
    return F.gelu(y, approximate="tanh")


@pytest.fixture
def ways(monkeypatch):
    """What the product of a packed weight went through: dispatch of the tensor, or the bytes directly."""
    taken = []
    monkeypatch.setattr(matmul, "linear_raw", lambda *a, run=matmul.linear_raw: taken.append("bytes") or run(*a))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a, run=F.linear: taken.append("torch") or run(*a))
    return taken


@pytest.mark.parametrize("kind", ["packed", "dense"])
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_product_equals_that_of_the_dense_weight(kind, with_gelu, with_bias):
    weight, dense = packed()
    x, bias = torch.randn(2, 5, IN), torch.randn(OUT) if with_bias else None
    expected = F.linear(x, dense, bias)
    got = matmul.linear(x, weight if kind == "packed" else dense, bias, with_gelu)
    assert got.shape == (2, 5, OUT) and relative(got, gelu(expected) if with_gelu else expected) < 1e-6


def test_a_weight_that_is_ready_is_multiplied_without_the_tensors_dispatch(ways):
    weight, _ = packed()
    matmul.linear(torch.randn(3, IN), weight, torch.randn(OUT))
    assert ways == ["bytes"]


@pytest.mark.parametrize("change", ["type", "bias", "transposed", "gradients"])
def test_other_calls_go_through_the_tensors_dispatch(ways, change):
    weight, dense = packed()
    x, bias = torch.randn(3, IN), torch.randn(OUT)
    if change == "type":
        weight = tensor.with_compute_dtype(weight, torch.float16)
    elif change == "bias":
        bias = bias.half()
    elif change == "transposed":
        (weight, dense), bias = packed(IN, OUT), None
        weight, dense = weight.t(), dense.t()
    if change == "gradients":
        with torch.inference_mode(False), torch.enable_grad():
            got = matmul.linear(x.clone(), weight)
        bias = None
    else:
        got = matmul.linear(x, weight, bias)
    assert ways[0] == "torch" and relative(got, F.linear(x, dense, bias if bias is None else bias.float())) < 1e-3


def test_several_layers_on_one_input_give_the_products_of_each():
    made = [packed(name=name) for name in ("Q8_0", "Q4_0")]
    x, bias = torch.randn(2, 4, IN), torch.randn(OUT)
    got = matmul.linears(x, [(weight, bias) for weight, _ in made])
    assert all(relative(y, F.linear(x, dense, bias)) < 1e-6 for y, (_, dense) in zip(got, made))


@pytest.fixture
def eight_bits(monkeypatch):
    """8-bit products of one kind on this device, by the reference; ``calls`` counts how often activations were quantised."""

    class State:
        kind, calls = "int8", 0

    def quantize(rows, kind):
        State.calls += 1
        q, scale = eight_bit.quantize_rows(rows, kind)
        return q, scale[:, 0]

    monkeypatch.setattr(eight_bit, "_kind_on", lambda device, compute: State.kind)
    monkeypatch.setattr(eight_bit, "quantize", quantize)
    monkeypatch.setattr(eight_bit, "product", eight_bit.reference_product)
    monkeypatch.setattr(eight_bit, "MIN_TOKENS", 8)
    return State


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_fast_layers_on_one_input_quantise_it_once(eight_bits, kind):
    eight_bits.kind, dtype = kind, torch.bfloat16
    made = [packed(dtype=dtype) for _ in range(3)]
    layers = [(tensor.with_compute(weight, "fast"), torch.randn(OUT).to(dtype)) for weight, _ in made]
    x = torch.randn(2, 20, IN).to(dtype)
    got = matmul.linears(x, layers)
    assert eight_bits.calls == 1
    for y, (_, dense), (_, bias) in zip(got, made, layers):
        assert y.shape == (2, 20, OUT) and 0 < relative(y, F.linear(x.float(), dense.float(), bias.float())) < 0.06
    with_gelu = matmul.linear(x, *layers[0], gelu=True)
    assert eight_bits.calls == 2 and relative(with_gelu, gelu(got[0])) < 1e-2
    matmul.linears(x, [layers[0], (made[1][0], layers[1][1])])  # one of them exact
    assert eight_bits.calls == 3


def test_few_tokens_are_computed_exactly_in_fast_mode(eight_bits):
    weight, dense = packed(dtype=torch.bfloat16)
    weight, bias = tensor.with_compute(weight, "fast"), torch.randn(OUT).bfloat16()
    few, enough = torch.randn(7, IN).bfloat16(), torch.randn(8, IN).bfloat16()
    assert matmul.eight_bit_kind(few, weight) is None and matmul.eight_bit_kind(enough, weight) == "int8"
    assert torch.equal(matmul.linear(few, weight, bias), matmul.linear(few, tensor.with_compute(weight, "exact"), bias))
    assert eight_bits.calls == 0
    matmul.linear(enough, weight, bias)
    assert eight_bits.calls == 1


def test_the_table_says_up_to_how_many_rows_a_kernel_reads_the_bytes(monkeypatch):
    taken = []

    def gemv(x, raw, fmt, shape, bias):
        taken.append(len(x))
        return F.linear(x, decode.dequantize(raw, fmt, x.dtype), bias)

    row = backends.Backend("test", "linear", ("cpu",), gemv, most_rows=4)
    monkeypatch.setattr(backends, "BACKENDS", (row, *(b for b in backends.BACKENDS if b.op == "dequantize")))
    backends.forget_choices()
    try:
        weight, dense = packed()
        for rows in (1, 4, 5, 16):
            x = torch.randn(rows, IN)
            assert relative(matmul.linear(x, weight), F.linear(x, dense)) < 1e-6
    finally:
        backends.forget_choices()
    assert taken == [1, 4]


def test_a_weight_for_one_product_lies_in_memory_that_the_next_one_reuses(monkeypatch):
    weight, dense = packed()
    own = matmul.dense_for_one_product(weight, torch.float32)
    assert torch.equal(own, dense)
    monkeypatch.setattr(scratch, "DEVICES", ("cpu",))
    try:
        shared = matmul.dense_for_one_product(weight, torch.float32)
        assert (
            torch.equal(shared, dense)
            and matmul.dense_for_one_product(weight, torch.float32).data_ptr() == shared.data_ptr() != own.data_ptr()
        )
    finally:
        scratch.release()


def test_rows_of_a_table_are_those_of_the_dense_one_in_any_type():
    weight, dense = packed()
    ids = torch.tensor([[3, 0], [31, 3]])
    assert torch.equal(matmul.embedding(ids, weight), dense[ids])
    assert torch.equal(matmul.embedding(ids, weight, torch.float16), dense.half()[ids])
    assert torch.equal(matmul.embedding(ids, dense, torch.float16), dense.half()[ids])


def test_layout_names_here_are_those_of_the_registered_layouts():
    assert matmul._FORMATS == layouts.FORMAT_OF_LAYOUT and formats.FORMATS["Q8_0"] in matmul._FORMATS.values()


def test_threads_have_scratch_memory_of_their_own_and_one_call_frees_all_of_it():
    device = torch.device("cpu")  # one stream for all threads, as where nobody made others
    mine = scratch.matrix((4, 8), torch.float32, device)
    assert scratch.matrix((4, 8), torch.float32, device) is mine
    theirs, made, seen = [], threading.Event(), threading.Event()

    def work():
        theirs.append(scratch.matrix((4, 8), torch.float32, device).data_ptr())
        made.set()
        seen.wait(10)
        theirs.append(bool(scratch._thread.buffers.of))

    thread = threading.Thread(target=work)
    thread.start()
    assert made.wait(10)
    scratch.release()
    seen.set()
    thread.join()
    assert theirs[0] != mine.data_ptr() and theirs[1] is False and not scratch._thread.buffers.of
