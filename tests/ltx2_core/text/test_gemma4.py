"""Gemma 4's text model against transformers: the same random weights, both kinds of attention, texts longer than the window."""

import pytest
import torch

from ltx2_gguf.ltx2_core.text.config import GemmaConfig, GemmaConfigError, hf_name
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel

WIDTH, FFN, LAYERS, VOCAB = 48, 64, 12, 90


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def reference():
    """A random transformers model in float32: sliding heads of 16, full heads of 32, one key head there, no value weights."""
    from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

    torch.manual_seed(0)
    config = Gemma4UnifiedTextConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True, sliding_window=8, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = Gemma4UnifiedTextModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if "norm" in name else 2 * p.shape[-1] ** -0.5 * torch.randn_like(p))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.5 + torch.rand(1))
    return model


def state_of(model):
    """The tensors a file of this model has, under transformers' names."""
    state = {f"model.{name}": value.detach() for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if "rotary" not in name}


def ours(model, **metadata):
    state = state_of(model)
    config = GemmaConfig.from_shapes({name: tuple(v.shape) for name, v in state.items()}, {"gemma4.attention.sliding_window": 8, **metadata})
    net = GemmaModel(config, device="meta")
    net.load_state_dict(state, assign=True)
    return net


@pytest.mark.parametrize("n", [1, 8, 30])
def test_hidden_states_equal_transformers_in_every_layer(reference, n):
    ids = torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = torch.stack(reference(ids[None], output_hidden_states=True, use_cache=False).hidden_states)[:, 0]
        got = ours(reference, **{"general.architecture": "gemma4"})(ids)
    assert got.shape == (LAYERS + 1, n, WIDTH)
    for layer in range(LAYERS + 1):
        assert rel(got[layer], want[layer]) < 1e-4, f"hidden state {layer}"


def test_the_geometry_comes_from_the_shapes(reference):
    config = ours(reference).config
    assert config.generation == 4 and config.sliding_layers == (True,) * 5 + (False,) + (True,) * 5 + (False,)
    sliding, full = config.attention(True), config.attention(False)
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.own_values, sliding.rotated) == (16, 2, True, 8)
    assert (full.head_dim, full.num_kv_heads, full.own_values, full.rotated, full.window) == (32, 1, False, 4, None)
    assert (config.query_width, config.rope_factor, config.logit_softcap) == (1, 1.0, 30.0)


def test_llama_cpp_names_are_mapped():
    assert hf_name("blk.3.layer_output_scale.weight") == "model.layers.3.layer_scalar"
    assert hf_name("rope_freqs.weight") == "rope_freqs.weight"
    assert hf_name("blk.5.post_ffw_norm.weight") == "model.layers.5.post_feedforward_layernorm.weight"


def test_the_small_gemma_4_is_refused_by_name(reference):
    shapes = {name: tuple(v.shape) for name, v in state_of(reference).items()}
    with pytest.raises(GemmaConfigError, match="E2B or E4B"):
        GemmaConfig.from_shapes({**shapes, "model.layers.0.per_layer_input_gate.weight": (4, 4)})
