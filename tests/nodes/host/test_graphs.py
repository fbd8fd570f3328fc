"""Graphs that users build: nodes of the host and of other packs around our MODEL, on tiny models, in this process."""

import pytest
import torch

import host_models as hm

pytestmark = pytest.mark.usefixtures("host")

SMALL = {"heads": 2, "head_dim": 64, "connector_heads": 2, "connector_head_dim": 64, "registers": 128}


def tiny(fmt="Q8_0", **options):
    return hm.model(fmt, **{**SMALL, **options})


@pytest.fixture(scope="module")
def patcher():
    return tiny()


@pytest.fixture(scope="module")
def plain(patcher):
    return hm.ksample(patcher, hm.latent(), steps=6)


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_the_hosts_caches_skip_steps(patcher, plain, name, caplog):
    import comfy_extras.nodes_easycache as caches

    caplog.set_level("INFO")
    node = getattr(caches, name)
    with torch.inference_mode():
        cached = node.execute(patcher, reuse_threshold=50.0, start_percent=0.0, end_percent=1.0, verbose=False).args[0]
        never = node.execute(patcher, reuse_threshold=0.0, start_percent=0.0, end_percent=1.0, verbose=False).args[0]
    result = hm.ksample(cached, hm.latent(), steps=6)
    assert " - skipped 3/6 steps" in caplog.text or " - skipped 4/6 steps" in caplog.text
    assert torch.isfinite(result).all() and hm.error(result, plain) > 1e-4
    assert torch.equal(hm.ksample(never, hm.latent(), steps=6), plain)


def test_the_hosts_stg_node_guides_by_the_blocks_it_names(patcher, plain):
    import comfy_extras.nodes_lt as lt

    if not hasattr(lt, "LTXVSpatioTemporalGuidance"):
        pytest.skip("this host has no STG node")
    with torch.inference_mode():
        guided = lt.LTXVSpatioTemporalGuidance.execute(patcher, scale=1.0, blocks="1", start_percent=0.0, end_percent=1.0).args[0]
    assert hm.error(hm.ksample(guided, hm.latent(), steps=6), plain) > 1e-3
    from ltx2_gguf.ltx2_core.sampling import conditioning, guidance

    x = conditioning.gaussian_noise((1, 128, 2, 2, 3), 3)
    network = patcher.model.diffusion_model
    one = hm.ksample(guided, hm.latent(), steps=1)
    with torch.inference_mode():
        contexts = [network.preprocess_text_embeds(hm.conditioning(patcher, seed=seed)[0][0], unprocessed=True) for seed in (5, 6)]
        x0 = [x - network.velocity(x, 1.0, c, hm.FPS, stg_blocks=stg) for c, stg in ((contexts[0], ()), (contexts[1], ()), (contexts[0], (1,)))]
        expected = guidance.combine(*x0, cfg=2.0, stg=1.0)
    assert hm.error(one, expected) < 1e-4


@pytest.mark.parametrize("strength", [0.6, 1.5])
def test_guide_masks_are_of_the_hosts_class_and_reach_replaced_attention(patcher, strength):
    """KJNodes' attention patches ask for the host's class and read its fields."""
    from comfy.ldm.lightricks import model as lt
    from comfy.ldm.lightricks.symmetric_patchifier import SymmetricPatchifier  # noqa: F401  (the host's module is there)

    from ltx2_gguf.ltx2_core.transformer.guides import query_groups

    tokens = 12
    seen = []
    block = patcher.model.diffusion_model.transformer_blocks[0]
    patched = patcher.clone()

    def forward(x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):
        seen.append(mask)
        return type(block.attn1).forward(block.attn1, x, context, mask, pe, k_pe, transformer_options)

    patched.add_object_patch("diffusion_model.transformer_blocks.0.attn1.forward", forward)
    keyframes = torch.zeros(1, 3, 6, 2)
    keyframes[..., 1] = 1
    values = {"keyframe_idxs": keyframes, "guide_attention_entries": [{"pre_filter_count": 6, "strength": strength, "pixel_mask": None, "latent_shape": [1, 2, 3]}]}
    positive = hm.conditioning(patcher, **values)
    mask = torch.ones(1, 1, 2, 2, 3)
    ours = hm.ksample(patched, hm.latent(noise_mask=mask), positive, steps=1, cfg=1.0)
    assert torch.isfinite(ours).all() and all(isinstance(mask, lt.GuideAttentionMask) for mask in seen) and seen
    q, k, v = torch.randn(3, 1, tokens, 128, generator=torch.Generator().manual_seed(0)).unbind()
    expected = lt._attention_with_guide_mask(q, k, v, 2, seen[0], attn_precision=None, transformer_options={})
    assert hm.error(block.attn1._attend(q, k, v, seen[0], {}), expected) < 1e-5
    assert len(query_groups(seen[0], tokens)) == 2


def test_normalized_attention_guidance_of_kjnodes_finds_what_it_reads(patcher):
    """The reads of its LTX2_NAG and preview nodes, in their order, and a replaced ``attn2.forward`` without rotation."""
    network = patcher.clone().get_model_object("diffusion_model")
    assert network.audio_inner_dim * 2 == network.inner_dim
    features = hm.conditioning(patcher, seed=6)[0][0]
    assert features.shape[-1] != network.cross_attention_dim + network.audio_cross_attention_dim
    assert not (network.caption_proj_before_connector and network.caption_projection_first_linear)
    with torch.inference_mode():
        negative = network.video_embeddings_connector(features)[0].view(1, -1, network.inner_dim)
    assert network.audio_caption_projection is None
    patched, calls = patcher.clone(), []
    for index, block in enumerate(network.transformer_blocks):

        def forward(x, context, mask=None, transformer_options={}, attn=block.attn2, **kwargs):
            import comfy.ldm.modules.attention as attention

            calls.append(kwargs)
            q = attn.q_norm(attn.to_q(x))
            out = [
                attention.optimized_attention(q, attn.k_norm(attn.to_k(c)), attn.to_v(c), heads=attn.heads, attn_precision=attn.attn_precision, transformer_options=transformer_options)
                for c in (context, negative.expand(context.shape[0], -1, -1))
            ]
            out = out[0] + 0.5 * (out[0] - out[1])
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(x))
            return attn.to_out((out.unflatten(-1, (attn.heads, attn.dim_head)) * gates.unsqueeze(-1)).flatten(2))

        patched.add_object_patch(f"diffusion_model.transformer_blocks.{index}.attn2.forward", forward)
    result = hm.ksample(patched, hm.latent(), steps=1, cfg=1.0)
    assert len(calls) == 2 and hm.error(result, hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)) > 1e-4


def test_a_node_that_swaps_the_networks_class_is_refused_before_it_changes_anything(patcher, plain):
    from comfy.ldm.lightricks.model import BasicTransformerBlock, LTXVModel

    class LTXVModelModified(LTXVModel):
        pass

    network = patcher.model.diffusion_model
    with pytest.raises(TypeError, match="LTXVModelModified.*remove the node"):
        network.__class__ = LTXVModelModified
        network.transformer_blocks[0].__class__ = BasicTransformerBlock
    assert torch.equal(hm.ksample(patcher, hm.latent(), steps=6), plain)


def test_attention_functions_the_user_chose_compute_every_attention_of_a_block(patcher, monkeypatch):
    """Sage, sparse and 8-bit attention come as another ``optimized_attention`` or as an override in the options."""
    import comfy.ldm.modules.attention as host_attention

    before = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    shapes = []

    def chosen(q, k, v, heads, *args, **kwargs):
        shapes.append((q.shape[1], k.shape[1]))
        return host_attention.attention_basic(q, k, v, heads, *args, **kwargs)

    monkeypatch.setattr(host_attention, "optimized_attention", chosen)
    replaced = hm.ksample(patcher, hm.latent(), steps=1, cfg=1.0)
    blocks = [(12, 12), (12, 1024)] * 2  # self-attention and text, in each block
    connector = [(1024, 1024)] * 4  # of the positive and of the negative prompt
    assert sorted(shapes) == sorted(blocks + connector) and hm.error(replaced, before) < 1e-4
    monkeypatch.undo()

    shapes.clear()
    overridden = patcher.clone()
    overridden.model_options["transformer_options"]["optimized_attention_override"] = lambda function, *args, **kwargs: chosen(*args, **{n: kwargs[n] for n in ("mask",) if n in kwargs})
    assert hm.error(hm.ksample(overridden, hm.latent(), steps=1, cfg=1.0), before) < 1e-4
    assert shapes == blocks
