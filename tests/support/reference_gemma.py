"""A small random Gemma-3 of transformers, and ours with its weights."""

import dataclasses

import torch

from ltx2_gguf.ltx2_core.files.gemma import is_norm
from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 64, 160, 4, 2, 32, 120


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def reference(num_layers=7, factor=8.0, window=1024, query_width=HEAD_DIM, vocab=VOCAB, **overrides):
    """A random transformers Gemma3TextModel in float32 and its config."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    torch.manual_seed(0)
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": factor, "rope_theta": 1_000_000.0},
    }
    arguments = {
        "vocab_size": vocab,
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "query_pre_attn_scalar": query_width,
        "sliding_window": window,
        "rope_parameters": rope,
        "attn_implementation": "eager",
    }
    config = Gemma3TextConfig(**{**arguments, **overrides})
    model = Gemma3TextModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if "norm" in name else 2 * p.shape[-1] ** -0.5))
    return model


def state_of(model):
    """A transformers text model's tensors under full names, norms as factors."""
    return {f"model.{n}": (p + 1 if is_norm(n) else p).detach() for n, p in model.named_parameters()}


def ours(model, dtype=torch.float32, **overrides):
    """Our model with the reference's weights; geometry from shapes, then ``overrides``."""
    state = state_of(model)
    config = dataclasses.replace(GemmaConfig.from_shapes({k: tuple(v.shape) for k, v in state.items()}), **overrides)
    net = GemmaModel(config, device="meta", dtype=dtype)
    net.load_state_dict({k: v if is_norm(k) else v.to(dtype) for k, v in state.items()}, assign=True)
    return net


def reference_states(model, ids):
    with torch.no_grad():
        return torch.stack(model(ids.view(1, -1), output_hidden_states=True, use_cache=False).hidden_states)[:, 0]
