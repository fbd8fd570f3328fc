"""Everything on packed weights uses only what Metal has, shown on an emulated device."""

import pytest
import torch
import torch.nn.functional as F

import mps_mode
from block_bytes import awkward, finite_blocks
from ltx2_gguf.quant import backends, decode, encode, formats, matmul, tensor

QUANTIZED = list(formats.QUANTIZED)


@pytest.fixture
def mps():
    with torch.inference_mode(), mps_mode.emulated() as device:
        yield device


def test_the_emulated_device_computes(mps):
    x = torch.arange(6.0).view(2, 3).to(mps)
    assert x.device.type == "mps" and isinstance(x, mps_mode.EmulatedTensor)
    y = (x @ x.t()).softmax(-1) + torch.ones(2, 2, device="mps")
    y.mul_(2)
    expected = ((x.cpu() @ x.cpu().t()).softmax(-1) + 1) * 2
    assert torch.equal(y.cpu(), expected)
    x[0] = 7
    assert x.cpu()[0].tolist() == [7, 7, 7]
    out = torch.empty(2, 3, device=mps)
    assert torch.mul(x, 2, out=out) is out and torch.equal(out.cpu(), x.cpu() * 2)
    assert torch.ones(2).to(mps, torch.bfloat16).device.type == "mps"
    assert F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]).shape == (1, 1, 2, 3)


@pytest.mark.parametrize(
    "breach",
    [
        lambda d: torch.ones(2, dtype=torch.float64, device=d),
        lambda d: torch.ones(2, device=d).double(),
        lambda d: torch.ones(2).double().to(d),
        lambda d: torch.view_as_complex(torch.ones(2, 2, device=d)),
        lambda d: torch.ones(2, device=d, dtype=torch.int16).view(torch.uint16),
        lambda d: torch.ones(2, device=d) + torch.ones(2),
        lambda d: torch.take(torch.ones(4, device=d), torch.zeros(2, dtype=torch.int64, device=d)),
        lambda d: torch.ops.ltx2_gguf.cpu_linear(
            torch.ones(1, 32, device=d), torch.zeros(1, 34, dtype=torch.uint8, device=d), "Q8_0", 1, None
        ),
    ],
    ids=[
        "float64 factory",
        "to float64",
        "float64 copied",
        "complex",
        "uint16",
        "two devices",
        "no kernel",
        "foreign operator",
    ],
)
def test_the_emulated_device_refuses_what_metal_lacks(mps, breach):
    with pytest.raises(mps_mode.RefusedByMPS):
        breach(mps)


def test_a_tensor_made_outside_inference_mode_can_be_viewed_inside(mps):
    with torch.inference_mode(False):
        table = torch.arange(6.0, device=mps).view(2, 3)
    assert torch.equal((table.transpose(0, 1) * 2).cpu(), torch.arange(6.0).view(2, 3).t() * 2)


def test_host_code_cannot_look_into_device_memory(mps):
    x = torch.ones(2, device=mps)
    with pytest.raises(TypeError):
        x.numpy()
    with pytest.raises(mps_mode.RefusedByMPS):
        x.data_ptr()


def test_a_module_moves_to_the_emulated_device_and_back(mps):
    module = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
    x = torch.randn(3, 8)
    expected = module(x)
    module.to(mps)
    assert all(p.device.type == "mps" for p in module.parameters())
    assert torch.allclose(module(x.to(mps)).cpu(), expected, atol=1e-6)
    with pytest.raises(mps_mode.RefusedByMPS, match="a CPU tensor of shape"):
        module(x)
    module.to("cpu")
    assert torch.equal(module(x), expected)


def test_known_gaps_of_metal_are_known_to_the_operator_list():
    assert (
        mps_mode.has_kernel("mm")
        and mps_mode.has_kernel("bitwise_right_shift.Tensor_Scalar")
        and mps_mode.has_kernel("linear")
    )
    assert not mps_mode.has_kernel("take") and not mps_mode.has_kernel("linalg_eig")


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_decoding_uses_only_what_metal_has(mps, name, dtype):
    raw = torch.from_numpy(finite_blocks(name))
    expected = decode.dequantize(raw, name, dtype)
    ours = matmul.dequantize(raw.to(mps), formats.FORMATS[name], dtype)
    assert ours.device.type == "mps" and torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_and_lookups_use_only_what_metal_has(mps, name):
    raw = torch.from_numpy(finite_blocks(name, rows=24, cols=512))
    dense = decode.dequantize(raw, name)
    weight = tensor.pack(raw, name, (24, 512), torch.float32).to(mps)
    assert tensor.is_packed(weight) and weight.device.type == "mps"
    x, bias = torch.randn(2, 5, 512), torch.randn(24)
    y = F.linear(x.to(mps), weight, bias.to(mps))
    assert torch.allclose(y.cpu(), F.linear(x, dense, bias), rtol=1e-5, atol=1e-5)
    ids = torch.tensor([[3, 0], [23, 3]])
    assert torch.equal(F.embedding(ids.to(mps), weight).cpu(), dense[ids])
    assert torch.equal((weight.to("cpu") + 0), dense)


@pytest.mark.parametrize("name", encode.ENCODABLE)
def test_encoding_uses_only_what_metal_has(mps, name):
    x = torch.from_numpy(awkward())
    assert torch.equal(decode.quantize(x.to(mps), name).cpu(), decode.quantize(x, name))


def test_without_metal_the_table_says_why_torch_is_used():
    lines = backends.explain("dequantize", "mps", formats.FORMATS["Q4_0"])
    assert "torch: taken" in lines or "metal: taken" in lines
