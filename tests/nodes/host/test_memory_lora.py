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
        result = host_lora.linear(x, weight, bias, [function])
        without = host_lora.linear(x, weight, None, [function])
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
        weight, function, other = packed(96, 64), patch(96, 64, (4, 0.8, None)), patch(96, 64, (4, 0.8, None), (4, 0.3, 2.0))
        x = torch.randn(2, 5, 64)
        wanted = [host_lora.linear(x, weight, None, [f]) for f in (function, other)]
        monkeypatch.setattr(buffers, "DEVICES", ("cpu",))
        buffers.release()
        try:
            assert [torch.equal(host_lora.linear(x, weight, None, [f]), y) for f, y in zip((function, other, function), (*wanted, wanted[0]))] == [True] * 3
            scratch = buffers.matrix((96, 64), torch.float32, x.device)
            assert torch.equal(torch.nn.functional.linear(x, scratch), wanted[0])
            host_lora.linear(x, weight, None, [function, lambda w: seen.append(w) or w])
            assert seen[0].untyped_storage().data_ptr() != scratch.untyped_storage().data_ptr()
        finally:
            buffers.release()


@pytest.mark.parametrize("tokens, rank, beside", [(1024, 384, True), (2048, 384, True), (14080, 384, False), (14080, 16, False), (1024, 16, True), (1, 384, True)])
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
        result = host_lora.linear(x, weight, None, [small, lambda w: w * 2.0, whole])
    assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weight", "on the weight"])
def test_what_is_remembered_of_a_patch_holds_for_the_entries_it_was_made_from_alone(choose, beside):
    """Other strengths, other matrices, more or fewer LoRAs and other kinds of patches, put into the list that the patch refers to."""
    from ltx2_gguf.nodes.host import lora as host_lora

    choose(beside)
    function, others = patch(96, 64, (4, 0.8, None)), patch(96, 64, (4, 0.8, 2.0), (8, -0.5, None))
    (first,), (again, second) = function.patches[function.key], others.patches[others.key]
    whole, weaker = (0.5, ("diff", (torch.randn(96, 64),)), 1.0, None, None), (first[0], first[1], 0.5, None, None)
    with torch.inference_mode():
        weight, x = packed(96, 64), torch.randn(2, 5, 64)
        for entries in ([first], [(0.3, *first[1:])], [again], [first, second], [second], [whole], [weaker], [first, whole], [first]):
            function.patches[function.key][:] = entries
            expected = torch.nn.functional.linear(x, function(weight.dequantize()))
            for _ in range(2):
                result = host_lora.linear(x, weight, None, [function])
                assert (result - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("beside", [True, False], ids=["beside the weight", "on the weight"])
def test_matrices_that_stay_are_taken_as_they_are_and_with_what_they_hold_at_the_time(choose, beside):
    """A buffer through which other matrices pass, in the weight's type and in another, and a product in another type."""
    from ltx2_gguf.nodes.host import lora as host_lora
    from ltx2_gguf.nodes.host import stream

    choose(beside)
    device = torch.device("cpu")
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            function, weight = patch(96, 64, (4, 0.8, 2.0)), packed(96, 64)
            strength, adapter, *rest = function.patches[function.key][0]
            adapter.weights = (*(m.to(dtype) for m in adapter.weights[:2]), *adapter.weights[2:])
            buffer = torch.empty(function.memory_required(), dtype=torch.uint8)
            found = stream.Entries(function.prepare(buffer, None, copy=True, commit=False))
            function.__dict__[stream.ENTRIES] = device, found
            for factor in (1.0, -3.0):
                adapter.weights[0].mul_(factor)
                function.prepare(buffer, None, copy=True, commit=False)
                for x in (torch.randn(5, 64), torch.randn(5, 64).bfloat16()):
                    expected = torch.nn.functional.linear(x.float(), function(weight.dequantize()))
                    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
                    assert (host_lora.linear(x, weight, None, [function]).float() - expected).norm() / expected.norm() < tolerance
            assert found.changes[1][0].up.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def layer_with_a_lora():
    from host_models import load, lora, tiny, with_lora

    patcher = with_lora(tiny("Q4_0"), lora(layers=["transformer_blocks.0.attn1.to_q"]))
    load(patcher)
    return patcher, patcher.model.diffusion_model.transformer_blocks[0].attn1.to_q


def test_patches_are_hidden_from_the_hosts_cast_and_shown_again_also_when_it_fails(monkeypatch):
    import comfy.ops

    _, layer = layer_with_a_lora()
    patch, wrapper = layer.weight_lowvram_function, lambda weight: weight
    layer.weight_function = functions = [wrapper]
    layer.bias_function = [lambda bias: bias]  # sends the call through the cast
    original, seen = comfy.ops.cast_bias_weight, []

    def cast(module, *args, **kwargs):
        seen.append((module.weight_lowvram_function, list(module.weight_function)))
        if len(seen) == 2:
            raise RuntimeError("no")
        return original(module, *args, **kwargs)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast)
    with torch.inference_mode():
        layer(torch.randn(3, 128))
        with pytest.raises(RuntimeError, match="no"):
            layer(torch.randn(3, 128))
    assert seen == [(None, [])] * 2
    assert layer.weight_lowvram_function is patch and layer.weight_function is functions


@pytest.mark.parametrize("why", [None, "another type", "a function of the bias", "dynamic memory", "a bias of another type"])
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
        assert host_lora._beside(torch.randn(9999, 64), weight, [patch(96, 64, (4, 1.0, None))])
        assert not host_lora._beside(torch.randn(9999, 64), packed(96, 64), [patch(96, 64, (4, 1.0, None))])


def test_the_feed_forward_with_a_lora_still_has_its_gelu():
    import host_models as hm
    from host_models import tiny, with_lora
    from ltx2_gguf.ltx2_core.transformer import fused

    layer = "transformer_blocks.0.ff.net.0.proj"
    patcher = tiny()
    up, down = torch.randn(512, 4) * 0.3, torch.randn(4, 128) * 0.3
    patched = with_lora(patcher, {f"diffusion_model.{layer}.lora_A.weight": down, f"diffusion_model.{layer}.lora_B.weight": up})
    with torch.inference_mode():
        patched.patch_model(patched.load_device)
        module = patched.model.diffusion_model.get_submodule(layer)
        x = torch.randn(1, 5, 128)
        expected = torch.nn.functional.gelu(torch.nn.functional.linear(x, module.weight.dequantize() + up @ down, module.bias), approximate="tanh")
        assert hm.error(fused.linear_gelu(module, x), expected) < 1e-5


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
def test_matrices_stay_on_the_device_until_the_run_ends_when_there_is_room(monkeypatch, room):
    """On the meta device, which copies like another device and costs nothing."""
    import comfy.model_management

    from ltx2_gguf.nodes.host import lora_memory

    function, layer = patch(96, 64, (4, 1.0, None)), torch.nn.Linear(1, 1)
    free = comfy.model_management.minimum_inference_memory() + (function.memory_required() if room else 0)
    asked = []
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: asked.append(device) or free)
    layer.weight_lowvram_function = function
    device = torch.device("meta")
    for _ in range(3):
        assert lora_memory.entries(function, device)[0][1].weights[0].device.type == ("meta" if room else "cpu")
    assert len(asked) == 1, "the device is asked once per run"
    lora_memory.release(torch.nn.Sequential(layer))
    lora_memory.entries(function, device)
    assert len(asked) == 2


def test_what_the_host_has_staged_is_used_before_anything_is_copied():
    from ltx2_gguf.nodes.host import lora_memory

    function = patch(96, 64, (4, 1.0, None))
    buffer = torch.empty(function.memory_required(), dtype=torch.uint8)
    function.prepare(buffer, None, copy=True, commit=True)
    assert lora_memory.entries(function, torch.device("meta")) is function.prepared_patches


def test_a_run_gives_device_memory_back_when_it_ends_and_everything_when_the_model_is_unloaded(monkeypatch):
    import comfy.model_management

    import host_models as hm
    from host_models import lora, tiny, with_lora
    from ltx2_gguf.nodes.host import lora_memory

    released = []
    patched = with_lora(tiny(), lora())

    def release(model, page_locked=False):
        if model is patched.model:  # models of earlier tests may be collected now
            released.append(page_locked)

    monkeypatch.setattr(lora_memory, "release", release)
    hm.ksample(patched, hm.latent(), steps=1, cfg=1.0)
    assert released == [False]
    network = patched.model.diffusion_model
    assert len(network._rotary_tables) == 1
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert released == [False, True] and len(network._rotary_tables) == 0


@pytest.mark.parametrize("fmt", ["Q4_0", "Q8_0"])
def test_the_memory_the_host_is_asked_for_grows_with_the_tokens_and_holds_two_decoded_layers(fmt):
    from host_models import tiny
    from ltx2_gguf.nodes.host import stream

    model = tiny(fmt).model
    small, large = model.memory_required([1, 128, 2, 8, 8]), model.memory_required([1, 128, 4, 8, 8])
    assert small > 2 * 4 * 128 * 512, "the feed-forward's matrix twice, in float32"
    assert large - small == pytest.approx(128 * 128 * 4 * 14)
    model.diffusion_model.__dict__[stream.SPARING] = True  # a second try after running out of memory
    assert model.memory_required([1, 128, 4, 8, 8]) - large == pytest.approx(256 * 128 * 4 * 14)
