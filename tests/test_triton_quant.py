"""Triton kernels on quantised bytes against the torch reference; without a GPU they run in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")
from ltx2_gguf.quant import formats, reference  # noqa: E402
from ltx2_gguf.quant import kernels_triton as kt  # noqa: E402
from ltx2_gguf.quant import skinny_triton as st  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = sorted(formats.QUANTIZED)


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
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float())) and torch.equal(
        a[~a.isnan()].signbit(), b[~b.isnan()].signbit()
    )


def test_every_quantised_format_has_a_triton_decoder_whose_geometry_fits_its_block():
    assert sorted(kt.LANES) == NAMES
    for name, lanes in kt.LANES.items():
        assert lanes.rows * 16 * lanes.per_byte == formats.FORMATS[name].block_size
        assert lanes.rows % lanes.group == 0
        assert kt.supports(name, "dequantize", torch.bfloat16) and kt.supports(name, "skinny")
    assert not kt.supports("F16", "dequantize") and not kt.supports("Q4_0", "dequantize", torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_triton_decodes_random_bytes_exactly_like_the_reference(name):
    raw = random_raw(name, 3, 512, finite=False)
    out = torch.full((3, 512), 7.0, device=DEVICE)
    kt.dequantize(raw, name, out)
    assert equal_bits(out, reference.dequantize(raw, formats.FORMATS[name], torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_output_is_the_float32_value_rounded_once(name, dtype):
    raw = random_raw(name, 5, 256, seed=1)
    out = torch.full((5, 256), 7.0, device=DEVICE, dtype=dtype)
    kt.dequantize(raw, name, out)
    expected = reference.dequantize(raw, formats.FORMATS[name], torch.float32)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bf16 off where a device rounds
        expected = (expected.view(torch.int32) & -65536).view(torch.float32)
    assert equal_bits(out, expected.to(dtype))


def test_a_matrix_larger_than_one_program_decodes_without_gaps_or_overruns():
    for name in ("Q4_0", "Q8_0", "Q6_K"):
        cols = 256
        rows = kt.TILE_BYTES * 2 * 3 // cols + 1
        raw = random_raw(name, rows, cols, seed=2)
        buffer = torch.full((rows * cols + 64,), 7.0, device=DEVICE)
        kt.dequantize(raw, name, buffer[: rows * cols].view(rows, cols))
        assert equal_bits(buffer[: rows * cols].view(rows, cols), reference.dequantize(raw, formats.FORMATS[name], torch.float32))
        assert (buffer[rows * cols :] == 7.0).all()


@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (3, torch.float16), (16, torch.float16)])
@pytest.mark.parametrize("name", NAMES)
def test_the_skinny_product_equals_decode_then_matmul(name, rows, dtype):
    n_out, width = 70, 512
    raw = random_raw(name, n_out, width, seed=3)
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=gen).to(DEVICE, dtype)
    bias = torch.randn(n_out, generator=gen).to(DEVICE, dtype)
    weight = reference.dequantize(raw, formats.FORMATS[name], torch.float32).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert kt.is_skinny(rows, dtype)
    got = kt.skinny_linear(x, raw, name, n_out, width, bias)
    assert got.dtype == dtype
    assert torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected) < (2e-6 if dtype == torch.float32 else 6e-4)
    assert torch.equal(got, kt.skinny_linear(x, raw, name, n_out, width, bias))


def test_several_rows_in_float32_and_many_rows_are_not_for_the_skinny_product():
    assert not kt.is_skinny(2, torch.float32) and not kt.is_skinny(17, torch.bfloat16) and kt.is_skinny(16, torch.bfloat16)


@pytest.mark.parametrize("dtype, lead", [(torch.float16, (1, 3)), (torch.bfloat16, (1, 1)), (torch.bfloat16, ())])
def test_the_skinny_product_takes_half_precision_leading_dimensions_and_no_bias(dtype, lead):
    n_out, width = 33, 2560
    raw = random_raw("Q4_0", n_out, width, seed=4)
    x = torch.randn(*lead, width).to(DEVICE, dtype)
    weight = reference.dequantize(raw, formats.FORMATS["Q4_0"], torch.float32)
    if dtype == torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts bf16 off where a device rounds
        weight = (weight.view(torch.int32) & -65536).view(torch.float32)
    expected = torch.nn.functional.linear(x.float(), weight.to(dtype).float())
    got = kt.skinny_linear(x, raw, "Q4_0", n_out, width)
    assert got.shape == (*lead, n_out) and got.dtype == dtype
    assert torch.linalg.norm(got.float() - expected) / torch.linalg.norm(expected) < 5e-3


def test_the_registered_operators_trace_without_running_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        raw = torch.empty(8, 18 * 8, dtype=torch.uint8)
        out = kt.dequantize(raw, "Q4_0", torch.empty(8, 256, dtype=torch.bfloat16))
        y = kt.skinny_linear(torch.empty(2, 256, dtype=torch.bfloat16), raw, "Q4_0", 8, 256)
    assert out.shape == (8, 256) and y.shape == (2, 8) and y.dtype == torch.bfloat16


@pytest.fixture
def bfloat16_products(monkeypatch):
    """Triton's interpreter keeps bfloat16 as bit patterns and multiplies those; let it multiply the numbers."""
    if DEVICE != "cpu":
        return
    import numpy as np
    from triton.runtime import interpreter

    product = interpreter.InterpreterBuilder.create_dot

    def numbers(handle):
        if handle.dtype.scalar != interpreter.tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: product(self, numbers(a), numbers(b), *rest))


@pytest.mark.parametrize("rows, dtype, width", [(1, torch.bfloat16, 768), (5, torch.float16, 512), (16, torch.bfloat16, 512)])
@pytest.mark.parametrize("name", sorted(st.UNITS))
def test_the_product_on_bit_patterns_rounds_no_weight(name, rows, dtype, width, bfloat16_products):
    """Against float64 with the weights as the file has them: what is left is float32 summation. 768 columns leave a partial step."""
    n_out = 40
    raw = random_raw(name, n_out, width, seed=5)
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=gen).to(DEVICE, dtype)
    bias = torch.randn(n_out, generator=gen).to(DEVICE, dtype)
    expected = torch.nn.functional.linear(x.double(), reference.dequantize(raw, formats.FORMATS[name], torch.float32).double(), bias.double())
    for tile in ((16, 16, 1, 4), (16, 8, 0, 4)):
        got = st.launch(x, raw, name, bias, torch.full((rows, n_out), float("nan"), device=DEVICE), tile)
        assert torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected) < 2e-5


def test_the_units_of_the_product_fill_their_blocks():
    for name, unit in st.UNITS.items():
        fmt = formats.FORMATS[name]
        assert unit.weights * unit.rows == fmt.block_size and unit.rows % unit.group == 0
        assert unit.first == fmt.offset("ql" if name == "Q6_K" else "qs")
