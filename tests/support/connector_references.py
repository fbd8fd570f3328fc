"""The embeddings connector of diffusers with our weights, and its inputs."""

import torch


def features(width, batch, n, seed=0):
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


def diffusers_connector(config, state):
    from diffusers.pipelines.ltx2.connectors import LTX2ConnectorTransformer1d

    module = LTX2ConnectorTransformer1d(
        num_attention_heads=config.num_attention_heads, attention_head_dim=config.attention_head_dim, num_layers=config.num_layers,
        num_learnable_registers=config.num_learnable_registers, rope_type="split", gated_attention=config.apply_gated_attention,
    )  # fmt: skip
    spelling = (("transformer_1d_blocks", "transformer_blocks"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
    for ours, theirs in spelling:
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    module.load_state_dict(state)
    return module.eval()


def padded(rows, length, side):
    """(rows padded to length on one side, additive mask [B, 1, 1, length]) in the form diffusers' connector takes."""
    width = rows[0].shape[-1]
    x, mask = torch.randn(len(rows), length, width), torch.full((len(rows), length), torch.finfo(torch.float32).min)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        x[i, place], mask[i, place] = row, 0.0
    return x, mask[:, None, None]
