"""Gemma 3's vision part against transformers: features of an image, and the text written about it."""

import pytest
import torch

import reference_gemma
from ltx2_gguf.ltx2_core.files.gemma import is_norm, vision_names
from ltx2_gguf.ltx2_core.text.config import GemmaConfig
from ltx2_gguf.ltx2_core.text.gemma import GemmaModel
from ltx2_gguf.ltx2_core.text.generate import Prompt, Sampling, generate, prompt_input
from ltx2_gguf.ltx2_core.text.vision import VisionConfig, VisionEncoder, VisionError
from reference_gemma import VOCAB, rel

TOKENS, HEADS, IMAGE_ID = 4, 2, VOCAB - 1


@pytest.fixture(scope="module")
def reference():
    """A random Gemma3ForConditionalGeneration: 4 x 4 patches, four tokens per image, a window shorter than the prompt."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    text = reference_gemma.reference(window=9).config
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=56,
        patch_size=14,
        vision_use_head=False,
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=TOKENS, image_token_index=IMAGE_ID
    )
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            gain = (
                0.3 if p.ndim == 1 else 20 if "mm_input" in name else 2 * fan**-0.5
            )  # an image weighs as much as words
            p.copy_(torch.randn_like(p) * gain)
        model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


@pytest.fixture(scope="module")
def vision(reference):
    named = {name.removeprefix("model."): p.detach() for name, p in reference.named_parameters()}
    names = vision_names({name: tuple(p.shape) for name, p in named.items()})
    state = {
        ours: named[theirs] + (1 if ours.endswith("soft_emb_norm.weight") else 0) for ours, theirs in names.items()
    }
    config = VisionConfig.from_shapes({name: tuple(p.shape) for name, p in state.items()}, HEADS)
    assert (config.image_size, config.num_layers, config.text_width) == (56, 2, reference_gemma.WIDTH)
    encoder = VisionEncoder(VisionConfig(**{**config.__dict__, "tokens": TOKENS}), device="meta")
    encoder.load_state_dict(state, assign=True)
    return encoder


def image(seed=0, size=56):
    return torch.rand(size, size, 3, generator=torch.Generator().manual_seed(seed))


def test_features_of_an_image_equal_transformers(reference, vision):
    pixels = image().permute(2, 0, 1)[None] * 2 - 1
    with torch.no_grad():
        states = reference.model.vision_tower(pixel_values=pixels).last_hidden_state
        want = reference.model.multi_modal_projector(states)[0]
    assert vision(image()).shape == (TOKENS, reference_gemma.WIDTH)
    assert rel(vision(image()), want) < 1e-5
    assert rel(vision(image(1)), want) > 0.05


def test_an_image_of_any_size_is_resized(vision):
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), (56, 56), mode="bilinear").permute(0, 2, 3, 1)[0]
    larger = torch.nn.functional.interpolate(smooth.permute(2, 0, 1)[None], (112, 112), mode="bilinear").permute(
        0, 2, 3, 1
    )[0]
    assert rel(vision(larger), vision(smooth)) < 0.05


@pytest.mark.parametrize("before, after", [(3, 4), (1, 14)])
def test_the_text_written_about_an_image_equals_transformers(reference, vision, before, after):
    language = reference.model.language_model
    state = {f"model.{n}": (p + 1 if is_norm(n) else p).detach() for n, p in language.named_parameters()}
    config = GemmaConfig.from_shapes(
        {k: tuple(v.shape) for k, v in state.items()}, {"gemma3.attention.sliding_window": 9}
    )
    net = GemmaModel(GemmaConfig(**{**config.__dict__, "rope_factor": 8.0}), device="meta")
    net.load_state_dict(state, assign=True)
    words = torch.randint(0, VOCAB - 2, (before + after,), generator=torch.Generator().manual_seed(3)).tolist()
    ids = [*words[:before], *[IMAGE_ID] * TOKENS, *words[before:]]
    inputs = {
        "input_ids": torch.tensor([ids]), "pixel_values": image().permute(2, 0, 1)[None] * 2 - 1,
        "token_type_ids": torch.tensor([[int(i == IMAGE_ID) for i in ids]]),
    }  # fmt: skip
    with torch.no_grad():
        want = reference(**inputs, output_hidden_states=True).hidden_states[-1]
        out = reference.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    prompt = Prompt(ids, [(before, vision(image()))])
    with torch.inference_mode():
        x, masks = prompt_input(
            prompt, torch.tensor([ids]), lambda ids: net.embed(ids, ids.device), net.causal_masks(len(ids), "cpu")
        )
        *_, state = net.run_layers(x, torch.arange(len(ids)), masks)
    assert rel(state, want) < 2e-5  # what an image's tokens see, in layers with a window and without
    assert generate(net, prompt, 12, set(), Sampling(do_sample=False)) == out[0, len(ids) :].tolist()


@pytest.mark.parametrize("legacy", [False, True])
def test_llama_cpp_names_are_mapped_the_older_feed_forward_too(vision, legacy):
    top = {
        "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd", "post_layernorm": "v.post_ln",
        "mm_input_projection_weight": "mm.input_projection.weight", "mm_soft_emb_norm": "mm.soft_emb_norm",
        "encoder.layers.": "v.blk.", "layer_norm": "ln", "self_attn.out_proj": "attn_out", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "mlp.fc1": "ffn_down" if legacy else "ffn_up",
        "mlp.fc2": "ffn_up" if legacy else "ffn_down", "vision_tower.vision_model.": "", "multi_modal_projector.": "",
    }  # fmt: skip
    shapes, expected = {}, {}
    for name, p in vision.state_dict().items():
        theirs = name
        for ours, cpp in top.items():
            theirs = theirs.replace(ours, cpp)
        shapes[theirs], expected[name] = tuple(p.shape), theirs
    assert vision_names(shapes) == expected


def test_what_is_no_vision_part_is_said():
    assert vision_names({"model.layers.0.mlp.up_proj.weight": (4, 4)}) == {}
    with pytest.raises(VisionError, match="lacks"):
        VisionConfig.from_shapes({})
