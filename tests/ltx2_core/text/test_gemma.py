"""Gemma-3 against transformers: tiny random models of every released kind, and the real 270M file."""

import pytest
import torch

from ltx2_gguf.ltx2_core.files.gemma import hf_name
from ltx2_gguf.ltx2_core.text import gemma
from ltx2_gguf.ltx2_core.text.config import GemmaConfig, GemmaConfigError
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel
from reference_gemma import FFN, HEAD_DIM, HEADS, KV_HEADS, VOCAB, WIDTH, ours, reference, reference_states, rel


@pytest.mark.parametrize(
    "n, window, factor, query_width",
    [
        (1, 1024, 8.0, HEAD_DIM),
        (40, 1024, 8.0, HEAD_DIM),
        (40, 1024, 1.0, HEAD_DIM),
        (40, 1024, 8.0, 21),
        (40, 7, 8.0, HEAD_DIM),
        (40, 40, 1.0, HEAD_DIM),
    ],
)
def test_hidden_states_equal_transformers_for_every_position_and_layer(n, window, factor, query_width):
    model = reference(window=window, factor=factor, query_width=query_width)
    ids = torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(1))
    want = reference_states(model, ids)
    with torch.inference_mode():
        got = ours(model, sliding_window=window, rope_factor=factor, query_width=query_width)(ids)
    assert got.shape == (8, n, WIDTH)
    for layer in range(8):
        assert rel(got[layer], want[layer]) < 2e-5, f"hidden state {layer}"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_factor": 1.0},
        {"sliding_window": 1024},
        {"query_width": 16},
        {"rope_local_theta": 1e6},
        {"norm_eps": 1e-3},
    ],
)
def test_every_constant_of_the_geometry_matters(change):
    model = reference(window=7)
    ids = torch.arange(40)
    with torch.inference_mode():
        got = ours(model, **{"sliding_window": 7, "rope_factor": 8.0, **change})(ids)
    assert rel(got[-1], reference_states(model, ids)[-1]) > 1e-4


def test_running_only_the_real_tokens_equals_running_left_padded():
    model = reference()
    ids, pad = torch.arange(1, 30), 35
    padded = torch.cat((torch.zeros(pad, dtype=torch.long), ids))
    mask = (torch.arange(len(padded)) >= pad).long()
    with torch.no_grad():
        want = torch.stack(
            model(padded[None], attention_mask=mask[None], output_hidden_states=True, use_cache=False).hidden_states
        )[:, 0, pad:]
    with torch.inference_mode():
        got = ours(model, rope_factor=8.0)(ids)
    assert rel(got, want) < 2e-5


def test_bfloat16_products_err_less_than_the_reference_in_bfloat16():
    model = reference()
    ids = torch.arange(50)
    want = reference_states(model, ids)
    with torch.inference_mode():
        got = ours(model, dtype=torch.bfloat16, rope_factor=8.0)(ids)
    theirs = reference_states(model.bfloat16(), ids).float()
    for layer in range(1, 8):
        assert rel(got[layer], want[layer]) <= rel(theirs[layer], want[layer])


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16"):
        ours(reference(num_layers=1), dtype=torch.float16)


def test_layers_are_entered_one_at_a_time_so_that_a_loader_can_move_them():
    import contextlib

    net = ours(reference())
    log = []

    @contextlib.contextmanager
    def scope(i, layer):
        assert layer is net.model.layers[i]
        log.append(("in", i))
        yield
        log.append(("out", i))

    with torch.inference_mode():
        assert torch.equal(net(torch.arange(5), layer_scope=scope), net(torch.arange(5)))
    assert log == [(way, i) for i in range(7) for way in ("in", "out")]


@pytest.mark.parametrize("window", [1024, 9])
def test_hidden_states_equal_the_hosts_gemma(host, window):
    from comfy.ops import disable_weight_init
    from comfy.text_encoders.llama import Gemma3_12B_Config, Llama2_

    model = reference(window=window)
    config = Gemma3_12B_Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=7,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    config.head_dim, config.sliding_attention = HEAD_DIM, [window] * 5 + [False]
    theirs = Llama2_(config, device="cpu", dtype=torch.float32, ops=disable_weight_init)
    theirs.load_state_dict({n: p.detach() for n, p in model.named_parameters()})
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        last, states = theirs(ids, intermediate_output="all", final_layer_norm_intermediate=False)
        got = ours(model, sliding_window=window, rope_factor=8.0)(ids)
    assert states.shape == (1, 8, 30, WIDTH)
    assert max(rel(a, b) for a, b in zip(got, states[0])) < 2e-5


@pytest.mark.parametrize("size", ["4B", "12B"])
def test_constants_that_shapes_cannot_tell_are_the_hosts(host, size):
    from comfy.text_encoders import llama

    theirs = {"4B": llama.Gemma3_4B_Config, "12B": llama.Gemma3_12B_Config}[size]()
    config = GemmaConfig.from_shapes(shapes_of_size(*RELEASED[size][0]))
    assert [config.rope_theta, config.rope_local_theta] == theirs.rope_theta
    assert [config.rope_factor, 1.0] == theirs.rope_scale
    assert (config.head_dim, config.query_width, config.norm_eps) == (
        theirs.head_dim,
        theirs.head_dim,
        theirs.rms_norm_eps,
    )
    pattern = [config.sliding_window if sliding else False for sliding in config.sliding_layers[:6]]
    assert pattern == theirs.sliding_attention


def shapes_of_size(width, layers, heads, kv_heads, ffn, vocab=262144):
    """Shapes of a released model under llama.cpp's names."""
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    for i in range(layers):
        per_layer = {
            "attn_q": (heads * 256, width), "attn_k": (kv_heads * 256, width), "attn_v": (kv_heads * 256, width), "attn_output": (width, heads * 256),
            "attn_q_norm": (256,), "attn_k_norm": (256,), "ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn),
            "attn_norm": (width,), "post_attention_norm": (width,), "ffn_norm": (width,), "post_ffw_norm": (width,),
        }  # fmt: skip
        shapes.update({f"blk.{i}.{k}.weight": v for k, v in per_layer.items()})
    return {hf_name(k): v for k, v in shapes.items()}


RELEASED = {
    "270M": ((640, 18, 4, 1, 2048), 512, 1.0, 256),
    "1B": ((1152, 26, 4, 1, 6912), 512, 1.0, 256),
    "4B": ((2560, 34, 8, 4, 10240), 1024, 8.0, 256),
    "12B": ((3840, 48, 16, 8, 15360), 1024, 8.0, 256),
    "27B": ((5376, 62, 32, 16, 21504), 1024, 8.0, 168),
}


@pytest.mark.parametrize("size", RELEASED)
def test_a_released_size_is_known_from_its_shapes_alone(size):
    geometry, window, factor, query_width = RELEASED[size]
    config = GemmaConfig.from_shapes(shapes_of_size(*geometry))
    assert (config.width, config.num_layers, config.num_heads, config.num_kv_heads, config.ffn_width) == geometry
    assert (config.sliding_window, config.rope_factor, config.query_width) == (window, factor, query_width)
    assert (config.size_name, config.head_dim, config.num_hidden_states) == (size, 256, geometry[1] + 1)
    assert [i for i, sliding in enumerate(config.sliding_layers) if not sliding] == list(range(5, geometry[1], 6))


def test_our_modules_for_the_12b_have_exactly_the_names_and_shapes_of_the_host(host):
    from comfy.ops import disable_weight_init
    from comfy.text_encoders.llama import Gemma3_12B

    theirs = Gemma3_12B({}, dtype=torch.bfloat16, device="meta", operations=disable_weight_init).state_dict()
    theirs = {k: tuple(v.shape) for k, v in theirs.items() if k.startswith("model.")}
    net = GemmaModel(GemmaConfig.from_shapes(shapes_of_size(*RELEASED["12B"][0], vocab=262208)), device="meta")
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == theirs


def test_metadata_win_over_the_table_of_sizes():
    shapes = shapes_of_size(3840, 48, 16, 8, 15360)
    metadata = {
        "general.architecture": "gemma3",
        "gemma3.attention.sliding_window": 4096,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 4.0,
        "gemma3.rope.freq_base": 500_000.0,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-5,
        "gemma3.attention.sliding_window_pattern": 4,
    }
    config = GemmaConfig.from_shapes(shapes, metadata)
    assert (config.sliding_window, config.rope_factor, config.rope_theta, config.norm_eps) == (
        4096,
        4.0,
        500_000.0,
        1e-5,
    )
    assert config.sliding_layers[:5] == (True, True, True, False, True)
    assert GemmaConfig.from_shapes(shapes, {**metadata, "gemma3.rope.scaling.type": "none"}).rope_factor == 1.0
    with pytest.raises(GemmaConfigError, match="yarn"):
        GemmaConfig.from_shapes(shapes, {**metadata, "gemma3.rope.scaling.type": "yarn"})


def test_metadata_that_contradict_the_tensors_are_refused_with_both_numbers():
    with pytest.raises(GemmaConfigError, match="block_count = 34.*48"):
        GemmaConfig.from_shapes(shapes_of_size(3840, 48, 16, 8, 15360), {"gemma3.block_count": 34})


def test_missing_layers_are_named():
    shapes = {k: v for k, v in shapes_of_size(640, 18, 4, 1, 2048).items() if ".layers.7." not in k}
    with pytest.raises(GemmaConfigError, match=r"lacks \[7\]"):
        GemmaConfig.from_shapes(shapes)
    with pytest.raises(GemmaConfigError, match="embed_tokens"):
        GemmaConfig.from_shapes({"x": (1, 2)})


def test_rotation_is_a_rotation():
    cos, sin = gemma.rope_table(torch.arange(9), 16, 10_000.0)
    x = torch.randn(1, 2, 9, 16)
    assert torch.allclose(gemma.passes.rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(gemma.passes.rotate(x, cos, sin)[:, :, 0], x[:, :, 0])
