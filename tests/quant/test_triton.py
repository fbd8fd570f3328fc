"""Triton kernels on quantised bytes against the torch reference; without a GPU they run in Triton's interpreter (conftest.py)."""

import pytest
import torch

pytest.importorskip("triton")
from block_bytes import DEVICE, NAMES, equal_bits, random_raw
from ltx2_gguf.quant import decode, formats  # noqa: E402
from ltx2_gguf.quant.kernels import skinny_choice  # noqa: E402
from ltx2_gguf.quant.kernels import triton_fragments as ft  # noqa: E402
from ltx2_gguf.quant.kernels import triton_matmul as kt  # noqa: E402
from ltx2_gguf.quant.kernels import triton_skinny as st  # noqa: E402
from ltx2_gguf.quant.kernels import triton_words as wt  # noqa: E402


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
    assert equal_bits(out, decode.dequantize(raw, formats.FORMATS[name], torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_output_is_the_float32_value_rounded_once(name, dtype):
    raw = random_raw(name, 5, 256, seed=1)
    out = torch.full((5, 256), 7.0, device=DEVICE, dtype=dtype)
    kt.dequantize(raw, name, out)
    expected = decode.dequantize(raw, formats.FORMATS[name], torch.float32)
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
        assert equal_bits(buffer[: rows * cols].view(rows, cols), decode.dequantize(raw, formats.FORMATS[name], torch.float32))
        assert (buffer[rows * cols :] == 7.0).all()


@pytest.mark.parametrize("rows, dtype", [(1, torch.float32), (3, torch.float16), (16, torch.float16)])
@pytest.mark.parametrize("name", NAMES)
def test_the_skinny_product_equals_decode_then_matmul(name, rows, dtype):
    n_out, width = 70, 512
    raw = random_raw(name, n_out, width, seed=3)
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=gen).to(DEVICE, dtype)
    bias = torch.randn(n_out, generator=gen).to(DEVICE, dtype)
    weight = decode.dequantize(raw, formats.FORMATS[name], torch.float32).to(dtype)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    got = kt.skinny_linear(x, raw, name, n_out, width, bias)
    assert got.dtype == dtype
    assert torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected) < (2e-6 if dtype == torch.float32 else 6e-4)
    assert torch.equal(got, kt.skinny_linear(x, raw, name, n_out, width, bias))


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_for_every_format_equal_decode_then_matmul_whatever_is_chosen(name, rows):
    n_out, width = 37, 768
    raw = random_raw(name, n_out, width, seed=6)
    x = torch.randn(rows, width).to(DEVICE, torch.float16)
    weight = decode.dequantize(raw, formats.FORMATS[name], torch.float32).to(torch.float16)
    choice = skinny_choice.ONE_ROW if rows == 1 else skinny_choice.FEW_ROWS
    got = kt.skinny_launch(x, raw, name, None, torch.full((rows, n_out), float("nan"), dtype=x.dtype, device=DEVICE), choice)
    expected = x.double() @ weight.double().T
    assert torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected) < 6e-4


def test_float32_has_one_row_only_and_how_many_rows_half_precision_has_depends_on_the_format():
    for name in NAMES:
        most = skinny_choice.most_rows(name, True)
        assert kt.is_skinny(1, torch.float32, name) and not kt.is_skinny(2, torch.float32, name)
        assert kt.is_skinny(most, torch.bfloat16, name) and not kt.is_skinny(most + 1, torch.float16, name) and most <= 16
        assert not kt.is_skinny(0, torch.bfloat16, name)


def test_every_choice_names_a_kernel_that_takes_it():
    for name in NAMES:
        for rows in range(1, skinny_choice.most_rows(name, True) + 1):
            for n_out in (128, 65536):
                kernel, tile = skinny_choice.choose(name, rows, n_out, True)
                if kernel == "patterns":
                    assert name in st.UNITS and tile[1] % st.UNITS[name].rows == 0
                elif kernel == "words":
                    assert name in wt.WORDS and rows <= wt.MOST_ROWS
                elif kernel == "fragments":
                    assert name == "Q4_0" and 1 < rows <= ft.MOST_ROWS
                    assert skinny_choice.choose(name, rows, n_out, True, fragments=False)[0] != "fragments"
                else:
                    assert kernel == ("one row" if rows == 1 else "few rows")


@pytest.mark.parametrize("dtype, lead", [(torch.float16, (1, 3)), (torch.bfloat16, (1, 1)), (torch.bfloat16, ())])
def test_the_skinny_product_takes_half_precision_leading_dimensions_and_no_bias(dtype, lead):
    n_out, width = 33, 2560
    raw = random_raw("Q4_0", n_out, width, seed=4)
    x = torch.randn(*lead, width).to(DEVICE, dtype)
    weight = decode.dequantize(raw, formats.FORMATS["Q4_0"], torch.float32)
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


def against_float64(launch, name, rows, dtype, width, n_out=40):
    """Relative error against float64 with the weights as the file has them."""
    raw = random_raw(name, n_out, width, seed=5)
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=gen).to(DEVICE, dtype)
    bias = torch.randn(n_out, generator=gen).to(DEVICE, dtype)
    expected = torch.nn.functional.linear(x.double(), decode.dequantize(raw, formats.FORMATS[name], torch.float32).double(), bias.double())
    got = launch(x, raw, name, bias, torch.full((rows, n_out), float("nan"), device=DEVICE))
    return torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected)


@pytest.mark.parametrize("rows, dtype, width", [(1, torch.bfloat16, 768), (5, torch.float16, 512), (16, torch.bfloat16, 512)])
@pytest.mark.parametrize("name", sorted(st.UNITS))
def test_the_product_on_bit_patterns_rounds_no_weight(name, rows, dtype, width, bfloat16_products):
    """What is left is float32 summation. 768 columns leave a partial step."""
    for tile in ((16, 16, 1, 4), (16, 8, 0, 4)):
        assert against_float64(lambda *args: st.launch(*args, tile), name, rows, dtype, width) < 2e-5


@pytest.mark.parametrize("name", ["Q5_1", "Q4_K", "Q5_K"])
def test_the_product_on_bit_patterns_reads_words_at_any_even_address(name):
    """Blocks of these formats are a multiple of four bytes long and read in words; not so if they start elsewhere."""
    raw = random_raw(name, 32, 512, seed=7)
    moved = torch.cat([raw.new_zeros(2), raw.flatten()])[2:].view_as(raw)
    x = torch.randn(3, 512).to(DEVICE, torch.float16)
    assert raw.data_ptr() % 4 == 0 and moved.data_ptr() % 4 == 2
    first, second = (st.launch(x, data, name, None, torch.empty(3, 32, device=DEVICE), (16, 8, 0, 4)) for data in (raw, moved))
    assert torch.linalg.norm(first - second) / torch.linalg.norm(first) < 1e-5


@pytest.mark.parametrize(
    "rows, dtype, width",
    [(1, torch.bfloat16, 768), (1, torch.float16, 1024), (2, torch.bfloat16, 512), (3, torch.float16, 768), (4, torch.bfloat16, 512)],
)
@pytest.mark.parametrize("name", sorted(wt.WORDS))
def test_the_product_on_words_rounds_no_weight(name, rows, dtype, width):
    """What is left is float32 summation. 768 columns leave a partial step, and 40 output columns a partial program."""
    for tile in ((16, 2, 1), (4, 1, 2)):
        assert against_float64(lambda *args: wt.launch(*args, tile), name, rows, dtype, width) < 2e-5


@pytest.mark.parametrize(
    "rows, dtype, width, n_out, tile",
    [
        (5, torch.bfloat16, 768, 170, (2, 16, 1)),
        (8, torch.float16, 512, 100, (2, 8, 2)),
        (13, torch.float16, 512, 40, (1, 16, 1)),
        (16, torch.bfloat16, 2304, 90, (1, 8, 1)),
        (9, torch.bfloat16, 256, 70, (1, 8, 2)),
    ],
)
def test_the_product_on_fragments_rounds_no_weight(rows, dtype, width, n_out, tile):
    """Idle warps, tiles and output columns beyond the last; a second program along the width, of which one adds the bias."""
    error = against_float64(lambda x, raw, name, bias, y: ft.launch(x, raw, bias, y, tile), "Q4_0", rows, dtype, width, n_out)
    assert error < (3e-5 if dtype == torch.bfloat16 else 1e-4)  # the number that is taken off a code's is eight times as large in float16


@pytest.mark.parametrize("rows, dtype", [(2, torch.bfloat16), (8, torch.float16), (16, torch.float16)])
def test_q4_0_goes_to_fragments_where_they_run_and_elsewhere_where_they_do_not(rows, dtype, monkeypatch):
    """Not on this device, a width that is no multiple of 256, an address that is none of 16."""
    ran = []
    monkeypatch.setattr(ft, "runs_on", lambda device: True)
    monkeypatch.setattr(ft, "launch", lambda *args, launch=ft.launch: (ran.append(args[-1]), launch(*args))[1])

    def check(width, expect, moved=0):
        raw = random_raw("Q4_0", 40, width, seed=9)
        raw = torch.cat([raw.new_zeros(moved), raw.flatten()])[moved:].view_as(raw)
        x = torch.randn(rows, width).to(DEVICE, dtype)
        expected = x.double() @ decode.dequantize(raw, formats.FORMATS["Q4_0"], torch.float32).double().T
        got = kt.skinny_linear(x, raw, "Q4_0", 40, width)
        error = torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected)
        assert got.dtype == dtype and error < (1e-2 if dtype == torch.bfloat16 else 6e-4)
        assert len(ran) == expect

    check(512, 1)
    assert ran[0] == skinny_choice.choose("Q4_0", rows, 40, True)[1]
    check(512, 1, moved=2)
    check(320, 1)
    monkeypatch.setattr(ft, "runs_on", lambda device: False)
    check(512, 1)


def test_fragments_run_on_nvidia_gpus_from_8_0(monkeypatch):
    gpu = torch.device("cuda", 7)
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ft, "PTX", ft.tl.constexpr(True))
    monkeypatch.setattr(ft, "version", lambda: (3, 6))
    assert ft.runs_on.__wrapped__(gpu) and not ft.runs_on.__wrapped__(torch.device("cpu"))
    monkeypatch.setattr(ft, "version", lambda: (3, 5))
    assert not ft.runs_on.__wrapped__(gpu), "this Triton was not tried"
    monkeypatch.setattr(ft, "version", lambda: (3, 6))
    capability = (7, 5)
    assert not ft.runs_on.__wrapped__(gpu)
    capability = (12, 0)
    monkeypatch.setattr(ft, "PTX", ft.tl.constexpr(False))
    assert not ft.runs_on.__wrapped__(gpu)


def test_rows_of_x_at_an_odd_address_go_to_another_kernel():
    x = torch.randn(1 + 256).to(DEVICE, torch.float16)[1:].view(1, 256)
    raw = random_raw("Q4_0", 33, 256, seed=8)
    assert skinny_choice.choose("Q4_0", 1, 33, True)[0] == "words" and not wt.takes(x, raw) and wt.takes(x.clone(), raw)
    got, aligned = (kt.skinny_linear(rows, raw, "Q4_0", 33, 256) for rows in (x, x.clone()))
    assert torch.linalg.norm(got.double() - aligned.double()) / torch.linalg.norm(aligned.double()) < 1e-3


def test_the_units_of_the_product_fill_their_blocks():
    for name, unit in st.UNITS.items():
        fmt = formats.FORMATS[name]
        assert unit.weights * unit.rows == fmt.block_size and unit.rows % unit.group == 0
        assert unit.first == fmt.offset("ql" if name == "Q6_K" else "qs")
