"""Triton kernels on quantised bytes against the torch reference; without a GPU they run in Triton's interpreter (conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from block_bytes import DEVICE, NAMES, equal_bits, random_raw
from ltx2_gguf.quant import decode, formats
from ltx2_gguf.quant.kernels import triton_dequantize as kt
from ltx2_gguf.quant.kernels import triton_gemv

SUPPORT = Path(__file__).parents[1] / "support"


def test_every_quantised_format_has_a_triton_decoder_whose_geometry_fits_its_block():
    assert sorted(kt.LANES) == NAMES
    for name, lanes in kt.LANES.items():
        assert lanes.rows * 16 * lanes.per_byte == formats.FORMATS[name].block_size
        assert lanes.rows % lanes.group == 0


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
        assert equal_bits(
            buffer[: rows * cols].view(rows, cols), decode.dequantize(raw, formats.FORMATS[name], torch.float32)
        )
        assert (buffer[rows * cols :] == 7.0).all()


def product_error(name, rows, dtype, width, n_out, moved=0, **options):
    """Relative error of the matrix-vector kernel, written in float32, against float64 with the weights as the file has them."""
    raw = random_raw(name, n_out, width, seed=5)
    raw = torch.cat([raw.new_zeros(moved), raw.flatten()])[moved:].view_as(raw)
    gen = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=gen).to(DEVICE, dtype)
    bias = torch.randn(n_out, generator=gen).to(DEVICE, dtype)
    expected = torch.nn.functional.linear(
        x.double(), decode.dequantize(raw, formats.FORMATS[name], torch.float32).double(), bias.double()
    )
    got = triton_gemv.launch(x, raw, name, bias, torch.full((rows, n_out), float("nan"), device=DEVICE), **options)
    return torch.linalg.norm(got.double() - expected) / torch.linalg.norm(expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_matrix_vector_product_rounds_no_weight(name):
    """What is left is float32 summation. An odd number of outputs leaves half a program, 768 columns a partial step."""
    dtype = torch.bfloat16 if NAMES.index(name) % 2 else torch.float16
    assert product_error(name, 1, dtype, 768, 5) < 1e-6


@pytest.mark.parametrize(
    "name, rows, dtype, options",
    [
        ("Q4_K", 3, torch.float16, {}), ("Q4_0", 4, torch.float32, {}), ("Q6_K", 2, torch.bfloat16, {}), ("Q4_0", 2, torch.bfloat16, {"tile": (1, 1)}),
        ("Q4_K", 1, torch.bfloat16, {"tile": (1, 1)}), ("Q5_K", 4, torch.bfloat16, {"moved": 2}), ("Q4_1", 1, torch.float32, {"moved": 2}),
    ],
)  # fmt: skip
def test_the_matrix_vector_product_takes_four_rows_any_type_any_tile_and_bytes_at_any_even_address(
    name, rows, dtype, options
):
    assert product_error(name, rows, dtype, 768, 3, **options) < 1e-6


def test_the_matrix_vector_product_takes_leading_dimensions_no_bias_and_x_at_any_address():
    raw = random_raw("Q8_0", 3, 256, seed=4)
    x = torch.randn(2 * 256 + 1).to(DEVICE, torch.float16)[1:].view(1, 2, 256)
    expected = torch.nn.functional.linear(x.float(), decode.dequantize(raw, formats.FORMATS["Q8_0"], torch.float32))
    got = triton_gemv.gemv(x, raw, "Q8_0", 3, 256)
    assert got.shape == (1, 2, 3) and got.dtype == torch.float16
    assert torch.linalg.norm(got.float() - expected) / torch.linalg.norm(expected) < 1e-3
    assert torch.equal(got, triton_gemv.gemv(x, raw, "Q8_0", 3, 256))


def test_programs_have_no_more_warps_than_the_width_has_units_for():
    assert triton_gemv.tile_of("Q4_K", 3840) == (1, 4) and triton_gemv.tile_of("Q4_K", 512) == (1, 1)
    assert triton_gemv.tile_of("Q4_0", 3840) == (4, 4) and triton_gemv.tile_of("Q4_0", 256) == (4, 1)


def test_the_registered_operators_trace_without_running_a_kernel():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        raw = torch.empty(8, 18 * 8, dtype=torch.uint8)
        out = kt.dequantize(raw, "Q4_0", torch.empty(8, 256, dtype=torch.bfloat16))
        y = triton_gemv.gemv(torch.empty(2, 256, dtype=torch.bfloat16), raw, "Q4_0", 8, 256)
    assert out.shape == (8, 256) and y.shape == (2, 8) and y.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_matrix_vector_kernel_compiles_without_moving_anything_between_threads():
    """For a real GPU, as far as Triton's own compiler goes, whatever this machine has: one barrier for the sum at the end and no more."""
    pytest.importorskip("triton.compiler")
    code = f"""
import sys; sys.path.insert(0, {str(SUPPORT)!r})
import packloader
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ltx2_gguf.quant.kernels import triton_gemv as g
for name in ("Q4_K", "Q4_0"):
    fixed = g.constants_of(name, 3840, True, True, 1)
    names = g._gemv_kernel.arg_names
    signature = dict.fromkeys(names[:4], "*bf16") | {{"raw": "*u8"}} | dict.fromkeys(names[4:9], "i32") | dict.fromkeys(names[9:], "constexpr")
    made = compile(ASTSource(g._gemv_kernel, signature, constexprs=dict(zip(names[9:], fixed))), target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
    moved = [line for line in made.asm["ttgir"].splitlines() if "convert_layout" in line and "x2x" not in line]
    assert made.metadata.shared <= 64, (name, made.metadata.shared, moved)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
