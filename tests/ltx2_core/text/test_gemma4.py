"""Gemma 4's text model against transformers: the same random weights, both kinds of attention, texts longer than the window."""

import pytest
import torch

from ltx2_gguf.ltx2_core.files.gemma import hf_name
from ltx2_gguf.ltx2_core.text.config import GemmaConfig, GemmaConfigError
from reference_gemma import rel
from reference_gemma4 import LAYERS, VOCAB, WIDTH, ours, reference, state_of


@pytest.fixture(scope="module")
def model():
    return reference()


@pytest.mark.parametrize("n", [1, 8, 30])
def test_hidden_states_equal_transformers_in_every_layer(model, n):
    ids = torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = torch.stack(model(ids[None], output_hidden_states=True, use_cache=False).hidden_states)[:, 0]
        got = ours(model, **{"general.architecture": "gemma4"})(ids)
    assert got.shape == (LAYERS + 1, n, WIDTH)
    for layer in range(LAYERS + 1):
        assert rel(got[layer], want[layer]) < 1e-4, f"hidden state {layer}"


def test_the_geometry_comes_from_the_shapes(model):
    config = ours(model).config
    assert config.generation == 4 and config.sliding_layers == (True,) * 5 + (False,) + (True,) * 5 + (False,)
    sliding, full = config.attention(True), config.attention(False)
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.own_values, sliding.rotated) == (16, 2, True, 8)
    assert (full.head_dim, full.num_kv_heads, full.own_values, full.rotated, full.window) == (32, 1, False, 4, None)
    assert (config.query_width, config.rope_factor, config.logit_softcap) == (1, 1.0, 30.0)


def test_llama_cpp_names_are_mapped():
    assert hf_name("blk.3.layer_output_scale.weight") == "model.layers.3.layer_scalar"
    assert hf_name("rope_freqs.weight") == "rope_freqs.weight"
    assert hf_name("blk.5.post_ffw_norm.weight") == "model.layers.5.post_feedforward_layernorm.weight"


def test_the_small_gemma_4_is_refused_by_name(model):
    shapes = {name: tuple(v.shape) for name, v in state_of(model).items()}
    with pytest.raises(GemmaConfigError, match="E2B or E4B"):
        GemmaConfig.from_shapes({**shapes, "model.layers.0.per_layer_input_gate.weight": (4, 4)})
