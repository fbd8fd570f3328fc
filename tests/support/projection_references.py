"""The feature extractors of diffusers and of the host with our weights."""

import types

import torch

from ltx2_gguf.ltx2_core.text.projection import TextProjection

WIDTH, LAYERS, FEATURES, TOKENS, PADDED = 64, 7, 96, 11, 16


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def hidden_states(n=TOKENS, width=WIDTH, layers=LAYERS):
    """States as Gemma makes them: layers of very different size, a few channels hundreds of times larger than the rest."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(layers, n, width, generator=g) * torch.logspace(-1, 3, layers)[:, None, None]
    x[:, :, 5] *= 300
    return x + 0.1


def projection(version, **options):
    torch.manual_seed(4)
    features = FEATURES if version == "2.3" else WIDTH
    return TextProjection(version, WIDTH, LAYERS, features, **options)


def diffusers_features(version, module, hidden):
    """Features of diffusers' LTX2TextConnectors before its connector, for states padded on the left with rubbish."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    dual = version == "2.3"
    model = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=LAYERS, video_connector_num_attention_heads=2, video_connector_attention_head_dim=module.features // 2,
        video_connector_num_layers=1, audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=WIDTH // 2, audio_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_learnable_registers=None,
        per_modality_projections=dual, video_hidden_dim=FEATURES, audio_hidden_dim=WIDTH, proj_bias=dual,
    )  # fmt: skip
    layer = model.video_text_proj_in if dual else model.text_proj_in
    layer.load_state_dict(module.linear.state_dict())
    seen = {}
    model.video_connector.register_forward_pre_hook(lambda _, args: seen.update(features=args[0]))
    pad = torch.randn(LAYERS, PADDED - TOKENS, WIDTH, generator=torch.Generator().manual_seed(5)) * 7
    states = torch.cat((pad, hidden), dim=1).permute(1, 2, 0)[None]  # (L1, n, D) -> (1, n, D, L1)
    with torch.no_grad():
        model(states, (torch.arange(PADDED) >= PADDED - TOKENS).long()[None])
    return seen["features"][0, PADDED - TOKENS :]


def host_features(version, module, hidden):
    """Features of the host's LTXAVTEModel, given our states instead of its Gemma: the video's, and the audio's where the module has them."""
    from comfy.ops import disable_weight_init
    from comfy.text_encoders.lt import DualLinearProjection, LTXAVTEModel

    if version == "2.3":
        theirs = DualLinearProjection(
            WIDTH * LAYERS, FEATURES, WIDTH, dtype=torch.float32, device="cpu", operations=disable_weight_init
        )
        theirs.video_aggregate_embed.load_state_dict(module.linear.state_dict())
        if module.audio_features:
            theirs.audio_aggregate_embed.load_state_dict(module.audio_aggregate_embed.state_dict())
    else:
        theirs = disable_weight_init.Linear(WIDTH * LAYERS, WIDTH, bias=False)
        theirs.load_state_dict(module.linear.state_dict())
    states = torch.cat((torch.zeros(LAYERS, PADDED - TOKENS, WIDTH), hidden), dim=1)[None]
    mask = (torch.arange(PADDED) >= PADDED - TOKENS).long()
    gemma = types.SimpleNamespace(encode_token_weights=lambda _: (states, None, {"attention_mask": mask[None]}))
    model = types.SimpleNamespace(
        text_encoder_key="gemma3_12b",  # read from 0.33 on
        gemma3_12b=gemma, execution_device=torch.device("cpu"), text_embedding_projection=theirs, compat_mode=False,
        text_projection_type="dual_linear" if version == "2.3" else "single_linear",
    )  # fmt: skip
    with torch.no_grad():
        return LTXAVTEModel.encode_token_weights(model, {"gemma3_12b": None})[0][
            0, :, : module.features + module.audio_features
        ]
