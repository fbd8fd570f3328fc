"""Linear layers past the module's call and the tensor's dispatch: when, and that blocks with packed weights compile as one graph."""

import pytest
import torch

pytest.importorskip("triton")

import reference_dit
from block_bytes import DEVICE, random_raw
from ltx2_gguf.ltx2_core.text import gemma
from ltx2_gguf.ltx2_core.transformer import fused
from ltx2_gguf.quant import backends, decode, eight_bit, formats, scratch, tensor


def layer(n_out=32, n_in=64, name="Q8_0"):
    module = torch.nn.Linear(n_in, n_out, device="meta")
    module.weight = torch.nn.Parameter(
        tensor.pack(random_raw(name, n_out, n_in), name, (n_out, n_in), torch.float32), requires_grad=False
    )
    module.bias = torch.nn.Parameter(torch.randn(n_out, device=DEVICE), requires_grad=False)
    return module


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize(
    "change",
    [
        "none",
        "hook",
        "pre-hook",
        "forward",
        "weight_function",
        "weight_lowvram_function",
        "dynamic memory",
        "other type",
        "subclass",
    ],
)
def test_anything_hung_on_a_layer_sends_the_call_through_the_module(inference, change):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    dense = decode.dequantize(module.weight._qdata, formats.FORMATS["Q8_0"], torch.float32)
    expected = torch.nn.functional.linear(x, dense, module.bias)
    if change == "hook":
        module.register_forward_hook(lambda module, args, y: y + 1)
        expected = expected + 1
    elif change == "pre-hook":
        module.register_forward_pre_hook(lambda module, args: args[0] * 2)
        expected = torch.nn.functional.linear(2 * x, dense, module.bias)
    elif change == "forward":
        module.forward = lambda x: x
        expected = x
    elif change in ("weight_function", "weight_lowvram_function"):
        setattr(module, change, [lambda w: w])
    elif change == "dynamic memory":
        module._v = object()
    elif change == "other type":
        x, module.bias = x.half(), torch.nn.Parameter(module.bias.half(), requires_grad=False)
        expected = expected.half()
    elif change == "subclass":
        module.__class__ = type("Other", (torch.nn.Linear,), {})
    assert (fused._ready(module, x) is None) is (change != "none")
    tolerance = {"atol": 2e-2, "rtol": 1e-2} if change == "other type" else {"atol": 1e-5}
    gelu = torch.nn.functional.gelu(expected.float(), approximate="tanh")
    assert torch.allclose(fused.linear(module, x).float(), expected.float(), **tolerance)
    assert torch.allclose(fused.linear_gelu(module, x).float(), gelu, **tolerance)
    assert all(torch.allclose(y.float(), expected.float(), **tolerance) for y in fused.linears([module, module], x))
    if change == "subclass":
        type(module).plain_product = True
        assert fused._ready(module, x) is not None


def test_gradients_keep_the_modules_own_path(inference):
    module, x = layer(), torch.randn(3, 64, device=DEVICE)
    with torch.inference_mode(False), torch.enable_grad():
        assert fused._ready(module, x) is None


def test_a_class_whose_forward_takes_gelu_is_asked_for_it_unless_something_hooks_it(inference):
    class Own(torch.nn.Linear):
        takes_gelu = True

        def forward(self, x, gelu=False):
            asked.append(gelu)
            y = super().forward(x)
            return torch.nn.functional.gelu(y, approximate="tanh") if gelu else y

    asked, module, x = [], Own(64, 32, device=DEVICE), torch.randn(3, 64, device=DEVICE)
    expected = fused.linear_gelu(module, x)
    module.register_forward_hook(lambda *a: None)
    assert torch.allclose(fused.linear_gelu(module, x), expected, atol=1e-6) and asked == [True, False]


@pytest.fixture
def as_on_a_gpu(monkeypatch, inference):
    """The table of backends takes this device for a GPU, so that a compiler traces what it would trace there."""
    rows = [backends.Backend("triton", "dequantize", (DEVICE,), backends._triton_dequantize)]
    monkeypatch.setattr(backends, "BACKENDS", (*rows, *(row for row in backends.BACKENDS if row.name != "cpu tiles")))
    monkeypatch.setattr(scratch, "DEVICES", (DEVICE,))
    monkeypatch.setattr(fused, "_TRITON_DEVICES", (DEVICE,))
    backends.forget_choices()
    yield
    torch._dynamo.reset()
    backends.forget_choices()
    scratch.release()


def pack_linears(model, compute="exact"):
    """Every linear layer's weight in Q8_0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            shape = tuple(module.weight.shape)
            packed = tensor.pack(random_raw("Q8_0", *shape), "Q8_0", shape, torch.float32)
            module.weight = torch.nn.Parameter(tensor.with_compute(packed, compute), requires_grad=False)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["exact", "fast"])
def test_a_packed_block_compiles_as_one_graph(as_on_a_gpu, compute, monkeypatch):
    if compute == "fast" and DEVICE == "cpu":
        monkeypatch.setattr(
            eight_bit, "kind_for", lambda device, tokens, shape, dtype, compute: "int8" if compute == "fast" else None
        )
    config = reference_dit.tiny_config()
    model = reference_dit.our_model(config).to(DEVICE)
    pack_linears(model.transformer_blocks, compute)
    block, width = model.transformer_blocks[0], config.inner_dim
    x, context = torch.randn(1, 24, width, device=DEVICE), torch.randn(1, 20, width, device=DEVICE)
    rows, prompt = torch.randn(1, 1, 9 * width, device=DEVICE), torch.randn(1, 1, 2 * width, device=DEVICE)
    pe = model._rotary_tables_for((2, 3, 4), 24.0, None, None, torch.device(DEVICE))["v_pe"]
    assert fused._ready(block.attn1.to_q, x) is not None

    def run(block):
        return block(
            (x.clone(), x[:, :0]),
            v_context=context,
            v_timestep=rows,
            v_pe=pe,
            v_prompt_timestep=prompt,
            transformer_options={},
        )[0]

    expected = run(block)
    got = run(torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False))
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)


@pytest.mark.slow
def test_a_packed_layer_of_the_text_encoder_compiles_as_one_graph(as_on_a_gpu):
    config = gemma.GemmaConfig(
        vocab_size=32, width=64, ffn_width=128, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32, query_width=32, sliding_window=64,
        sliding_layers=(True,), rope_theta=1e6, rope_local_theta=1e4, rope_factor=1.0, norm_eps=1e-6,
    )  # fmt: skip
    layer = pack_linears(
        gemma.GemmaLayer(config, config.attention(True), torch.nn, torch.float32, DEVICE)
    ).requires_grad_(False)
    x, rope = (
        torch.randn(1, 20, config.width, device=DEVICE),
        gemma.rope_table(torch.arange(20, device=DEVICE), config.head_dim, 1e4),
    )
    expected = layer(x, rope, None, torch.float32)
    got = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)(x, rope, None, torch.float32)
    assert torch.linalg.norm(got - expected) <= 1e-5 * torch.linalg.norm(expected)
