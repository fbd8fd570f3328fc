"""Decoders and encoders against gguf-py."""

import gguf
import numpy as np
import pytest
import torch

from block_bytes import assert_same_bits, awkward, finite_blocks, normal, random_bytes
from ltx2_gguf.quant import decode, encode, formats

QUANTIZED = list(formats.QUANTIZED)
EXACT_ENCODERS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_ENCODERS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def ggml_type(name):
    return gguf.GGMLQuantizationType[name]


@pytest.mark.parametrize("name", [*QUANTIZED, "F32", "F16", "BF16"])
@pytest.mark.parametrize("seed", range(3))
def test_random_bytes_decode_exactly_like_gguf_py(name, seed):
    fmt = formats.FORMATS[name]
    raw = random_bytes(fmt, rows=64, blocks=8 if fmt.is_quantized else 512, seed=seed)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, ggml_type(name))
    assert_same_bits(decode.dequantize(torch.from_numpy(raw), fmt).numpy(), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_ordinary_weights_decode_exactly_like_gguf_py(name):
    raw = finite_blocks(name)
    expected = gguf.quants.dequantize(raw, ggml_type(name))
    assert np.isfinite(expected).all() and np.abs(expected).max() > 0
    assert_same_bits(decode.dequantize(torch.from_numpy(raw), name).numpy(), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_all_zero_blocks_decode_exactly_like_gguf_py(name):
    fmt = formats.FORMATS[name]
    raw = np.zeros((4, 2 * fmt.type_size), dtype=np.uint8)
    assert_same_bits(
        decode.dequantize(torch.from_numpy(raw), fmt).numpy(), gguf.quants.dequantize(raw, ggml_type(name))
    )


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_is_the_float32_result_rounded(name, dtype):
    raw = torch.from_numpy(finite_blocks(name, rows=40, cols=16384))
    expected = decode.dequantize(raw, name).to(dtype)
    assert torch.equal(decode.dequantize(raw, name, dtype), expected)
    out = torch.empty_like(expected)
    assert decode.dequantize(raw, name, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_decoding_in_chunks_equals_decoding_at_once(name, monkeypatch):
    raw = torch.from_numpy(finite_blocks(name, rows=37, cols=512))
    whole = decode.dequantize(raw, name)
    monkeypatch.setitem(decode.CHUNK_WEIGHTS, "cpu", 5 * 512)
    assert torch.equal(decode.dequantize(raw, name), whole)


@pytest.mark.parametrize("make", [normal, awkward])
@pytest.mark.parametrize("name", [*EXACT_ENCODERS, "BF16"])
def test_encoding_equals_gguf_py_byte_for_byte(name, make):
    x = make()
    expected = gguf.quants.quantize(x, ggml_type(name))
    ours = decode.quantize(torch.from_numpy(x), name)
    np.testing.assert_array_equal(ours.numpy(), expected.view(np.uint8).reshape(ours.shape))


def test_half_encoding_equals_gguf_py_byte_for_byte():
    x = awkward()
    expected = gguf.quants.quantize(x, ggml_type("F16")).view(np.uint8)
    np.testing.assert_array_equal(decode.quantize(torch.from_numpy(x), "F16").numpy(), expected)


def test_bfloat16_encoding_rounds_every_bit_pattern_as_gguf_py():
    x = np.random.default_rng(0).integers(0, 2**32, size=(64, 4096), dtype=np.uint32).view(np.float32)
    expected = gguf.quants.quantize(x, ggml_type("BF16"))
    np.testing.assert_array_equal(decode.quantize(torch.from_numpy(x), "BF16").numpy(), expected)


# Bounds of the relative error on normally distributed weights; a correct encoder stays a few percent below, a wrong scale goes far above.
ERROR_BOUND = {
    "Q4_0": 0.105,
    "Q4_1": 0.085,
    "Q5_0": 0.052,
    "Q5_1": 0.042,
    "Q8_0": 0.0066,
    "Q2_K": 0.30,
    "Q3_K": 0.165,
    "Q4_K": 0.078,
    "Q5_K": 0.040,
    "Q6_K": 0.0195,
}


@pytest.mark.parametrize("name", ERROR_BOUND)
def test_round_trip_error_of_normal_weights_is_bounded(name):
    x = torch.from_numpy(normal(64, 4096, seed=11))
    back = decode.dequantize(decode.quantize(x, name), name)
    assert float((back - x).norm() / x.norm()) < ERROR_BOUND[name]


@pytest.mark.parametrize("name", K_ENCODERS)
def test_k_encoders_survive_awkward_weights(name):
    x = torch.from_numpy(awkward())
    back = decode.dequantize(decode.quantize(x, name), name)
    assert torch.isfinite(back).all()
    assert torch.equal(back[0], torch.zeros_like(back[0]))
    per_row = (back - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)
    assert float(per_row[[1, 2, 3, 6, 8]].max()) < (0.25 if name == "Q2_K" else 0.16)


@pytest.mark.parametrize("name", K_ENCODERS)
def test_k_encoding_is_read_by_gguf_py_as_by_us(name):
    raw = decode.quantize(torch.from_numpy(awkward()), name)
    assert_same_bits(decode.dequantize(raw, name).numpy(), gguf.quants.dequantize(raw.numpy(), ggml_type(name)))


def rounded_to_the_range(x, group, highest):
    """Every group's range spread evenly over ``0 .. highest`` in float32: what a format would do whose scales and minima were not rounded."""
    x = x.reshape(-1, group)
    low = x.amin(dim=1, keepdim=True)
    step = (x.amax(dim=1, keepdim=True) - low) / highest
    return (((x - low) / step).round() * step + low).reshape(-1)


@pytest.mark.parametrize("name, group, highest", [("Q2_K", 16, 3), ("Q4_K", 32, 15), ("Q5_K", 32, 31), ("Q3_K", 16, 7)])
def test_the_search_beats_spreading_each_groups_range_with_unrounded_scales(name, group, highest):
    x = torch.from_numpy(normal(32, 2048, seed=5))
    plain = rounded_to_the_range(x, group, highest).view_as(x)
    back = decode.dequantize(decode.quantize(x, name), name)
    assert float((back - x).norm()) < (1.25 if name == "Q3_K" else 0.97) * float(
        (plain - x).norm()
    )  # Q3_K has no minimum


@pytest.mark.parametrize("name", ERROR_BOUND)
def test_importance_lowers_the_error_that_it_weighs(name):
    x, generator = torch.from_numpy(normal(16, 1024, seed=6)), torch.Generator().manual_seed(0)
    importance = torch.rand(1024, generator=generator).pow(4)

    def weighed(raw):
        return float((importance * (decode.dequantize(raw, name) - x).square()).sum().sqrt())

    plain, given = decode.quantize(x, name), decode.quantize(x, name, importance)
    assert weighed(given) < 0.95 * weighed(plain)
    assert torch.equal(decode.quantize(x, name, torch.zeros(1024)), plain), (
        "nothing was fed: no column counts more than another"
    )
    assert torch.equal(decode.quantize(x, name, 7 * importance), given) or weighed(
        decode.quantize(x, name, 7 * importance)
    ) < 1.001 * weighed(given)
    one = torch.zeros(1024)
    one[5] = 1.0  # columns that were never fed stay near what they are
    assert torch.isfinite(decode.dequantize(decode.quantize(x, name, one), name)).all()
    with pytest.raises(ValueError, match="512.*1024.*another layer"):
        decode.quantize(x, name, torch.ones(512))


def test_a_format_without_encoder_says_so():
    with pytest.raises(NotImplementedError, match="IQ4_XS .*no encoder.*Q8_0"):
        decode.quantize(torch.zeros(1, 256), "IQ4_XS")


def test_a_row_that_does_not_divide_into_blocks_is_refused():
    with pytest.raises(ValueError, match="300.*Q4_K.*256"):
        decode.quantize(torch.zeros(1, 300), "Q4_K")
    with pytest.raises(ValueError, match="17 bytes.*Q4_0.*18"):
        decode.dequantize(torch.zeros(1, 17, dtype=torch.uint8), "Q4_0")


def test_every_encodable_format_round_trips_zero():
    for name in encode.ENCODABLE:
        raw = decode.quantize(torch.zeros(2, 256), name)
        assert torch.equal(decode.dequantize(raw, name), torch.zeros(2, 256)), name
