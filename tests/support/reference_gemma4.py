"""A tiny random Gemma 4 text model of transformers, and ours with its weights."""

import torch

from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel

WIDTH, FFN, LAYERS, VOCAB = 48, 64, 12, 90


def reference(vocab=VOCAB):
    """A random transformers model in float32: sliding heads of 16, full heads of 32, one key head there, no value weights."""
    from transformers import Gemma4UnifiedTextConfig, Gemma4UnifiedTextModel

    torch.manual_seed(0)
    config = Gemma4UnifiedTextConfig(
        vocab_size=vocab, hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
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
    config = GemmaConfig.from_shapes(
        {name: tuple(v.shape) for name, v in state.items()}, {"gemma4.attention.sliding_window": 8, **metadata}
    )
    net = GemmaModel(config, device="meta")
    net.load_state_dict(state, assign=True)
    return net
