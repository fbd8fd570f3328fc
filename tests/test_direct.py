"""Packed layers past the tensor's dispatch, and kernels past Triton's: when they are taken, and that results are the same."""

import pytest
import torch

pytest.importorskip("triton")

from test_triton_quant import DEVICE, random_raw  # noqa: E402

from ltx2_gguf.ltx2_core import fused  # noqa: E402
from ltx2_gguf.quant import direct, fast, formats, launch, linear_gpu, reference, tensor  # noqa: E402


@pytest.fixture
def everywhere(monkeypatch):
    """Let the direct path run on the CPU, with the dense product behind it."""

    class Backend:
        pass

    def product(x, raw, fmt, shape, bias=None):
        calls.append(fmt.name)
        return torch.nn.functional.linear(x, reference.dequantize(raw, fmt, x.dtype), bias)

    calls = []
    backend = Backend()
    backend.run = product
    monkeypatch.setattr(linear_gpu, "linear", product)
    monkeypatch.setattr(direct.backends, "pick", lambda *a: backend)
    monkeypatch.setattr(direct, "DEVICES", ("cpu", "cuda"))
    with torch.inference_mode():
        yield calls


def layer(n_out=32, n_in=64, seed=0, name="Q8_0"):
    module = torch.nn.Linear(n_in, n_out, device="meta")
    module.weight = torch.nn.Parameter(tensor.pack(random_raw(name, n_out, n_in, seed), name, (n_out, n_in), torch.float32), requires_grad=False)
    module.bias = torch.nn.Parameter(torch.randn(n_out, device=DEVICE), requires_grad=False)
    return module


def test_a_resident_packed_layer_is_multiplied_directly_with_the_modules_result(everywhere):
    module, x = layer(), torch.randn(2, 5, 64, device=DEVICE)
    expected = torch.nn.functional.linear(x, reference.dequantize(module.weight._qdata, formats.FORMATS["Q8_0"], torch.float32), module.bias)
    assert torch.allclose(fused.linear(module, x), expected, atol=1e-6) and everywhere == ["Q8_0"]


@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward", "weight_function", "weight_lowvram_function", "dynamic memory", "dense", "other type", "subclass", "width"])
def test_anything_hung_on_a_layer_sends_the_call_through_the_module(everywhere, change):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    if change == "hook":
        module.register_forward_hook(lambda *a: None)
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda *a: None)
    elif change == "forward":
        module.forward = lambda x: x
    elif change in ("weight_function", "weight_lowvram_function"):
        setattr(module, change, [lambda w: w])
    elif change == "dynamic memory":
        module._v = object()
    elif change == "dense":
        module.weight = torch.nn.Parameter(torch.zeros(32, 64, device=DEVICE), requires_grad=False)
    elif change == "other type":
        x = x.half()
    elif change == "width":
        x = x[:, :32]
    elif change == "subclass":
        module.__class__ = type("Other", (torch.nn.Linear,), {})
    assert direct.ready(module, x) is None
    if change == "subclass":
        type(module).plain_product = True
        assert direct.ready(module, x) is not None


def test_gradients_keep_the_modules_own_path(everywhere):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    with torch.inference_mode(False), torch.enable_grad():
        assert direct.ready(module, x) is None


def test_fast_layers_on_one_input_quantise_it_once_and_the_feed_forward_takes_gelu_in_the_same_pass(everywhere, monkeypatch):
    quantised = []

    def tokens(rows, kind, gelu=False):
        quantised.append(gelu)
        assert rows.shape == (40, rows.shape[1])
        return fast.quantize_rows(torch.nn.functional.gelu(rows, approximate="tanh") if gelu else rows, kind)

    def product(xq, scale, raw, fmt, shape, bias, kind, dtype, gelu=False):
        w, w_scale = fast.quantize_rows(reference.dequantize(raw, fmt, torch.float32), kind)
        y = (xq.float() @ w.float().t()) * scale * w_scale.t() + bias
        return (torch.nn.functional.gelu(y, approximate="tanh") if gelu else y).to(dtype)

    monkeypatch.setattr(fast, "tokens", tokens)
    monkeypatch.setattr(fast, "product", product)
    monkeypatch.setattr(fast, "supports", lambda *a: True)
    x = torch.randn(1, 40, 64, device=DEVICE)
    for kind in ("fp8", "int8"):
        monkeypatch.setattr(fast, "kind_of", lambda device, kind=kind: kind)
        layers = [layer(seed=s) for s in range(3)] + [layer(128, 64, 4), layer(64, 128, 5)]
        exact = fused.linears(layers[:3], x), fused.feed_forward(*layers[3:], x)
        for module in layers:
            module.weight = torch.nn.Parameter(tensor.with_compute(module.weight, "fast"), requires_grad=False)
        quantised.clear()
        got = fused.linears(layers[:3], x), fused.feed_forward(*layers[3:], x)
        assert quantised == [False, False, kind == "fp8"]  # q, k, v together; the input; the middle, with GELU where the epilogue has none
        for a, b in zip((*got[0], got[1]), (*exact[0], exact[1])):
            assert a.shape == b.shape and 0 < torch.linalg.norm(a - b) < 0.06 * torch.linalg.norm(b)


def test_launch_keys_tell_apart_what_triton_compiles_differently():
    a = torch.empty(64, dtype=torch.float16)
    assert launch._trait(a) == launch._trait(torch.empty(64, dtype=torch.float16)) != launch._trait(a[1:])
    assert launch._trait(a) != launch._trait(a.view(torch.bfloat16))
    assert launch._trait(0.5) == launch._trait(2.0)
    traits = [launch._trait(n) for n in (1, 16, 17, 1 << 31, (1 << 31) + 1)]
    assert len(set(traits)) == 5 and launch._trait(0) == launch._trait(32) == traits[1] and launch._trait(3) == traits[2]


def test_rounding_up_helpers():
    assert [launch.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [launch.power_of_2(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]
    assert formats.FORMATS["Q8_0"].name in {fmt.name for fmt in direct._FORMATS.values()}


def test_layout_names_here_are_those_of_the_registered_layouts():
    from ltx2_gguf.quant import layouts

    assert direct._FORMATS == layouts.FORMAT_OF_LAYOUT
