"""Low-rank changes of packed and dense weights: the product equals the dense one, the weight stays as it is, matrices move with the module."""

import pytest
import torch
from torch import nn

from ltx2_gguf.ltx2_core.offload import streamer as offload
from ltx2_gguf.quant import decode, eight_bit, low_rank, tensor
from ltx2_gguf.quant.formats import FORMATS
from ltx2_gguf.quant.low_rank import LowRank, LowRankLinear

OUT, IN = 96, 64


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=[True, False], ids=["beside the weight", "on the weight"])
def way(request, monkeypatch):
    monkeypatch.setattr(low_rank, "beside_is_cheaper", lambda *sizes: request.param)


def weight(kind):
    dense = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) / IN**0.5
    if kind == "dense":
        return dense
    return tensor.pack(decode.quantize(dense, FORMATS[kind]), kind, (OUT, IN), torch.float32)


def changes(*ranks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    made = [
        (torch.randn(OUT, r, generator=generator) * 0.3, torch.randn(r, IN, generator=generator) * 0.3) for r in ranks
    ]
    return [LowRank(up.to(dtype), down.to(dtype), scale) for (up, down), scale in zip(made, (0.8, -0.5, 1.5))]


def module(kind, bias=True):
    made = nn.Linear(IN, OUT, bias=bias, device="meta")
    made.weight = nn.Parameter(weight(kind), requires_grad=False)
    if bias:
        made.bias = nn.Parameter(torch.randn(OUT, generator=torch.Generator().manual_seed(2)), requires_grad=False)
    return made


def expected(module, x, changes):
    """In double precision, on the changed dense weight."""
    dense = tensor.unpack(module.weight).double() + sum(c.scale * c.up.double() @ c.down.double() for c in changes)
    return nn.functional.linear(x.double(), dense, None if module.bias is None else module.bias.double())


def rel(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "dense"])
@pytest.mark.parametrize("ranks", [(4,), (4, 16, 1)], ids=["one", "three stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_module_computes_with_its_changes_and_keeps_its_weight(way, kind, ranks, dtype):
    layer, x = module(kind), torch.randn(2, 5, IN, generator=torch.Generator().manual_seed(3))
    stored = (layer.weight._qdata if kind != "dense" else layer.weight).clone()
    plain = layer(x)
    given = changes(*ranks, dtype=dtype)
    changed = LowRankLinear(layer, given)
    wanted = expected(layer, x, given)
    assert rel(changed(x), wanted) < 1e-5
    assert rel(changed(x, gelu=True), nn.functional.gelu(wanted, approximate="tanh")) < 1e-5
    assert rel(LowRankLinear(layer, given[:1])(x), expected(layer, x, given[:1])) < 1e-5
    assert torch.equal(changed.plain()(x), plain) and not list(changed.plain().buffers())
    assert torch.equal(layer.weight._qdata if kind != "dense" else layer.weight, stored)


def test_the_matrices_are_streamed_and_counted_with_the_layer(way):
    layers = nn.ModuleList(module("Q8_0") for _ in range(5))
    plain = [offload.Bundle(layer).nbytes for layer in layers]
    given = changes(16)
    layers = nn.ModuleList(LowRankLinear(layer, given) for layer in layers)
    sizes = [offload.Bundle(layer).nbytes for layer in layers]
    assert all(size - before == 4 * 16 * (OUT + IN) for size, before in zip(sizes, plain))
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(3))
    resident = [layer(x) for layer in layers]
    memory = offload.DeviceMemory("cpu", 3 * max(sizes))
    with offload.BlockStreamer([offload.Bundle(layer) for layer in layers], memory) as streamer:
        assert len(streamer.streamed) == 4
        for _ in range(2):
            for number, layer in enumerate(layers):
                assert torch.equal(streamer.run(number, lambda layer=layer: layer(x)), resident[number])
    assert memory.used == 0 and all(layer.changes[0].up is given[0].up for layer in layers)


def test_a_weight_multiplied_in_8_bits_keeps_its_packed_product(monkeypatch):
    fast, x = tensor.with_compute(weight("Q8_0"), "fast"), torch.empty(100_000, IN)
    assert not low_rank.belongs_beside(x, fast, 384), "this device computes exactly"
    monkeypatch.setattr(eight_bit, "kind_for", lambda *a: "int8")
    assert low_rank.belongs_beside(x, fast, 384)
    assert not low_rank.belongs_beside(x, weight("Q8_0"), 384)


def test_matrices_of_another_layer_are_refused():
    layer, (good,) = module("Q4_0"), changes(4)
    with pytest.raises(ValueError, match=r"does not fit a weight of \(96, 64\)"):
        LowRankLinear(layer, [good, LowRank(good.up[:-1], good.down, 1.0)])
