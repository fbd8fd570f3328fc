"""LoRA on packed weights: both ways give the same product, the cheaper is chosen, and device memory is given back."""

import pytest
import torch

from ltx2_gguf.quant import decode, tensor
from ltx2_gguf.quant.formats import FORMATS

pytestmark = pytest.mark.usefixtures("host")


def packed(outs, ins, fmt="Q8_0", dtype=torch.float32):
    weight = torch.randn(outs, ins, generator=torch.Generator().manual_seed(0)) / ins**0.5
    return tensor.pack(decode.quantize(weight, FORMATS[fmt]), fmt, (outs, ins), dtype)


def patch(outs, ins, *entries, key="layer.weight"):
    """A host patch of LoRAs given as (rank, strength, alpha)."""
    from comfy.model_patcher import LowVramPatch
    from comfy.weight_adapter.lora import LoRAAdapter

    made = []
    for seed, (rank, strength, alpha) in enumerate(entries):
        generator = torch.Generator().manual_seed(seed + 1)
        up, down = torch.randn(outs, rank, generator=generator) * 0.3, torch.randn(rank, ins, generator=generator) * 0.3
        made.append((strength, LoRAAdapter(set(), (up, down, alpha, None, None, None)), 1.0, None, None))
    return LowVramPatch(key, {key: made})


@pytest.fixture
def choose(monkeypatch, host):
    from ltx2_gguf.quant import low_rank

    return lambda beside: monkeypatch.setattr(low_rank, "beside_is_cheaper", lambda *sizes: beside)


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weight", "on the weight"])
@pytest.mark.parametrize("entries", [[(4, 0.8, None)], [(4, 0.8, 2.0), (8, -0.5, None)]], ids=["one", "two stacked"])
def test_both_ways_equal_the_hosts_patch_on_the_dequantised_weight(choose, beside, entries):
    from ltx2_gguf.nodes.host import lora as host_lora

    choose(beside)
    with torch.inference_mode():
        weight, function = packed(96, 64), patch(96, 64, *entries)
        x, bias = torch.randn(2, 5, 64), torch.randn(96)
        expected = torch.nn.functional.linear(x, function(weight.dequantize()), bias)
        before = weight._qdata.clone()
        result = host_lora.linear(x, weight, bias, host_lora.Lora(function))
        without = host_lora.linear(x, weight, None, host_lora.Lora(function))
    assert (result - expected).norm() / expected.norm() < 1e-5
    assert (without - (expected - bias)).norm() / expected.norm() < 1e-5
    assert torch.equal(weight._qdata, before)


def test_a_decoded_weight_is_in_the_products_scratch_memory_unless_another_nodes_function_sees_it(monkeypatch, choose):
    """The rule of a GPU, followed on the CPU."""
    from ltx2_gguf.nodes.host import lora as host_lora
    from ltx2_gguf.quant import scratch as buffers

    choose(False)
    seen = []
    with torch.inference_mode():
        weight, function, other = (
            packed(96, 64),
            patch(96, 64, (4, 0.8, None)),
            patch(96, 64, (4, 0.8, None), (4, 0.3, 2.0)),
        )
        x = torch.randn(2, 5, 64)
        wanted = [host_lora.linear(x, weight, None, host_lora.Lora(f)) for f in (function, other)]
        monkeypatch.setattr(buffers, "DEVICES", ("cpu",))
        buffers.release()
        try:
            assert [
                torch.equal(host_lora.linear(x, weight, None, host_lora.Lora(f)), y)
                for f, y in zip((function, other, function), (*wanted, wanted[0]))
            ] == [True] * 3
            scratch = buffers.matrix((96, 64), torch.float32, x.device)
            assert torch.equal(torch.nn.functional.linear(x, scratch), wanted[0])
            host_lora.linear(x, weight, None, host_lora.Lora(function), [lambda w: seen.append(w) or w])
            assert seen[0].untyped_storage().data_ptr() != scratch.untyped_storage().data_ptr()
        finally:
            buffers.release()


@pytest.mark.parametrize(
    "tokens, rank, beside",
    [(1024, 384, True), (2048, 384, True), (14080, 384, False), (14080, 16, False), (1024, 16, True), (1, 384, True)],
)
def test_few_tokens_are_patched_beside_the_weight_and_many_on_it(tokens, rank, beside):
    from ltx2_gguf.quant.low_rank import beside_is_cheaper

    for outs, ins in ((4096, 4096), (4096, 16384), (16384, 4096)):
        assert beside_is_cheaper(tokens, outs, ins, rank) is beside


@pytest.mark.parametrize("rank", [16, 64, 384])
def test_wide_outputs_are_patched_on_the_weight_from_fewer_tokens_on_than_wide_inputs(rank):
    """As measured: at 4096 tokens onto the weight of 16384 outputs, beside that of 16384 inputs."""
    from ltx2_gguf.quant.low_rank import beside_is_cheaper

    assert beside_is_cheaper(3072, 16384, 4096, rank) and not beside_is_cheaper(4096, 16384, 4096, rank)
    assert beside_is_cheaper(5000, 4096, 16384, rank) and not beside_is_cheaper(9000, 4096, 16384, rank)


def test_other_nodes_wrappers_and_other_adapters_are_applied_on_the_weight_in_order(choose):
    from comfy.model_patcher import LowVramPatch

    from ltx2_gguf.nodes.host import lora as host_lora

    choose(True)
    difference = torch.randn(96, 64)
    whole = LowVramPatch("k", {"k": [(0.5, ("diff", (difference,)), 1.0, None, None)]})
    with torch.inference_mode():
        weight, small = packed(96, 64), patch(96, 64, (4, 1.0, None))
        x = torch.randn(3, 64)
        expected = torch.nn.functional.linear(x, small(weight.dequantize()) * 2.0 + 0.5 * difference)
        result = host_lora.linear(x, weight, None, host_lora.Lora(small), [lambda w: w * 2.0, whole])
    assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weight", "on the weight"])
def test_what_is_remembered_of_a_patch_holds_for_the_entries_it_was_made_from_alone(choose, beside):
    """Other strengths, other matrices, more or fewer LoRAs and other kinds of patches, put into the list that the patch refers to."""
    from ltx2_gguf.nodes.host import lora as host_lora

    choose(beside)
    function, others = patch(96, 64, (4, 0.8, None)), patch(96, 64, (4, 0.8, 2.0), (8, -0.5, None))
    (first,), (again, second) = function.patches[function.key], others.patches[others.key]
    whole, weaker = (0.5, ("diff", (torch.randn(96, 64),)), 1.0, None, None), (first[0], first[1], 0.5, None, None)
    remembering = host_lora.Lora(function)
    with torch.inference_mode():
        weight, x = packed(96, 64), torch.randn(2, 5, 64)
        for entries in (
            [first],
            [(0.3, *first[1:])],
            [again],
            [first, second],
            [second],
            [whole],
            [weaker],
            [first, whole],
            [first],
        ):
            function.patches[function.key][:] = entries
            expected = torch.nn.functional.linear(x, function(weight.dequantize()))
            for _ in range(2):
                result = host_lora.linear(x, weight, None, remembering)
                assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weight", "on the weight"])
def test_matrices_that_stay_are_taken_as_they_are_and_with_what_they_hold_at_the_time(choose, beside):
    """A buffer through which other matrices pass, in the weight's type and in another, and a product in another type."""
    from ltx2_gguf.nodes.host import lora as host_lora

    choose(beside)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            function, weight = patch(96, 64, (4, 0.8, 2.0)), packed(96, 64)
            strength, adapter, *rest = function.patches[function.key][0]
            adapter.weights = (*(m.to(dtype) for m in adapter.weights[:2]), *adapter.weights[2:])
            buffer = torch.empty(function.memory_required(), dtype=torch.uint8)
            lora = host_lora.Lora(function)
            lora.staged = found = host_lora.Staged(
                function.prepare(buffer, None, copy=True, commit=False), torch.device("cpu")
            )
            for factor in (1.0, -3.0):
                adapter.weights[0].mul_(factor)
                function.prepare(buffer, None, copy=True, commit=False)
                for x in (torch.randn(5, 64), torch.randn(5, 64).bfloat16()):
                    expected = torch.nn.functional.linear(x.float(), function(weight.dequantize()))
                    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
                    assert (
                        host_lora.linear(x, weight, None, lora).float() - expected
                    ).norm() / expected.norm() < tolerance
            assert found.changes[1][0].up.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def layer_with_a_lora():
    from host_models import load, lora, tiny, with_lora

    patcher = with_lora(tiny("Q4_0"), lora(layers=["transformer_blocks.0.attn1.to_q"]))
    load(patcher)
    return patcher, patcher.model.diffusion_model.transformer_blocks[0].attn1.to_q


def test_the_hosts_cast_sees_neither_the_lora_nor_functions_that_come_behind_it_also_when_it_fails(monkeypatch):
    import comfy.ops

    _, layer = layer_with_a_lora()
    patch, wrapper = layer.lora, lambda weight: 2 * weight
    layer.weight_function = functions = [wrapper]
    original, seen = comfy.ops.cast_bias_weight, []

    def cast(module, *args, **kwargs):
        seen.append((module.weight_lowvram_function, list(module.weight_function)))
        if len(seen) == 2:
            raise RuntimeError("no")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    with torch.inference_mode():
        x = torch.randn(3, 128)
        expected = torch.nn.functional.linear(x, 2 * patch.patch(layer.weight.dequantize()), layer.bias)
        assert (layer(x) - expected).norm() / expected.norm() < 1e-5
        with pytest.raises(RuntimeError, match="no"):
            layer(x)
    assert seen == [(None, [])] * 2
    assert layer.lora is patch and layer.weight_function is functions


@pytest.mark.parametrize(
    "why", [None, "another type", "a function of the bias", "dynamic memory", "a bias of another type"]
)
def test_a_resident_layer_needs_no_cast_and_any_other_has_it(monkeypatch, why):
    import comfy.ops

    _, layer = layer_with_a_lora()
    cast, calls, x = comfy.ops.cast_bias_weight, [], torch.randn(3, 128)
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *args, **kwargs: calls.append(1) or cast(*args, **kwargs))
    if why == "another type":
        x, layer.bias = x.bfloat16(), None
    elif why == "a function of the bias":
        layer.bias_function = [lambda bias: bias]
    elif why == "dynamic memory":
        layer._v = object()
    elif why == "a bias of another type":
        layer.bias = torch.nn.Parameter(layer.bias.double(), requires_grad=False)
    with torch.inference_mode():
        layer(x)
        assert bool(calls) is (why is not None)
        layer.weight_lowvram_function = None  # and without a LoRA
        calls.clear()
        layer(x)
        assert bool(calls) is (why is not None)


def test_a_patched_layer_stops_when_the_user_cancels():
    import comfy.model_management

    _, layer = layer_with_a_lora()
    comfy.model_management.interrupt_current_processing(True)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        layer(torch.randn(3, 128))


def test_a_weight_multiplied_in_8_bits_keeps_its_packed_product(choose, monkeypatch):
    from ltx2_gguf.nodes.host import lora as host_lora
    from ltx2_gguf.quant import eight_bit

    choose(False)
    monkeypatch.setattr(eight_bit, "kind_for", lambda *a: "int8")
    with torch.inference_mode():
        weight = tensor.with_compute(packed(96, 64), "fast")
        lora, beside = host_lora.Lora(patch(96, 64, (4, 1.0, None))), []
        monkeypatch.setattr(host_lora.low_rank, "add_beside_", lambda y, *_: beside.append(1) or y)
        host_lora.linear(torch.randn(9999, 64), weight, None, lora)
        assert beside == [1]
        host_lora.linear(torch.randn(9999, 64), packed(96, 64), None, lora)
        assert beside == [1]


def test_the_feed_forward_with_a_lora_still_has_its_gelu():
    import host_models as hm
    from host_models import tiny, with_lora
    from ltx2_gguf.ltx2_core.transformer import fused

    layer = "transformer_blocks.0.ff.net.0.proj"
    patcher = tiny()
    up, down = torch.randn(512, 4) * 0.3, torch.randn(4, 128) * 0.3
    patched = with_lora(
        patcher, {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up}
    )
    with torch.inference_mode():
        patched.patch_model(patched.load_device)
        module = patched.model.diffusion_model.get_submodule(layer)
        x = torch.randn(1, 5, 128)
        expected = torch.nn.functional.gelu(
            torch.nn.functional.linear(x, module.weight.dequantize() + up @ down, module.bias), approximate="tanh"
        )
        assert hm.error(fused.linear_gelu(module, x), expected) < 1e-5


def test_a_run_gives_device_memory_back_when_it_ends_and_everything_when_the_model_is_unloaded(monkeypatch):
    import comfy.model_management

    import host_models as hm
    from host_models import lora, tiny, with_lora

    released = []
    patched = with_lora(tiny(), lora())

    network = patched.model.diffusion_model
    monkeypatch.setattr(network.loras, "release", lambda: released.append("device"))
    monkeypatch.setattr(network.loras, "unpin", lambda: released.append("pinned"))
    hm.ksample(patched, hm.latent(), steps=1, cfg=1.0)
    assert released[-1] == "device" and "pinned" not in released[1:]
    del released[:]
    assert len(network._rotary_tables) == 1
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert released == ["device", "pinned"] and len(network._rotary_tables) == 0


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_the_memory_the_host_is_asked_for_grows_with_the_tokens_and_holds_two_decoded_layers(fmt):
    from host_models import tiny

    model = tiny(fmt).model
    small, large = model.memory_required([1, 128, 2, 8, 8]), model.memory_required([1, 128, 4, 8, 8])
    assert small > 2 * 4 * 128 * 512, "the feed-forward's matrix twice, in float32"
    assert large - small == pytest.approx(128 * 128 * 4 * 14)
    model.diffusion_model.set_low_memory(True)  # a second try after running out of memory
    assert model.memory_required([1, 128, 4, 8, 8]) - large == pytest.approx(256 * 128 * 4 * 14)
