"""LTX-2.5's text encoder from files: Gemma 4, its projection and its tokenizer, in one safetensors file or as a GGUF with llama.cpp's names."""

import pytest
import torch
from safetensors.torch import save_file

import reference_gemma4
import reference_tokenizer4
from ltx2_gguf.ltx2_core.files.gemma import hf_name
from ltx2_gguf.ltx2_core.loading.identify import identify
from ltx2_gguf.ltx2_core.loading.text_encoder import TextEncoderError, load_text_encoder
from ltx2_gguf.ltx2_core.text.chat import chat_tokens
from ltx2_gguf.ltx2_core.text.generate import Sampling
from ltx2_gguf.quant.gguf.metadata import GGUFValue
from ltx2_gguf.quant.gguf.writer import GGUFWriter
from reference_gemma import rel
from reference_gemma4 import LAYERS, WIDTH

FEATURES, PROMPT = 32, "the red circle moves slowly over water, très élégant"


@pytest.fixture(scope="module")
def tokenizer():
    return reference_tokenizer4.trained()


@pytest.fixture(scope="module")
def model(tokenizer):
    return reference_gemma4.reference(vocab=tokenizer.get_vocab_size() + 8)


@pytest.fixture(scope="module")
def projection():
    torch.manual_seed(5)
    inputs = WIDTH * (LAYERS + 1)
    name = "text_embedding_projection.video_aggregate_embed."
    return {name + "weight": torch.randn(FEATURES, inputs) * inputs**-0.5, name + "bias": torch.randn(FEATURES)}


@pytest.fixture(scope="module")
def files(tmp_path_factory, model, tokenizer, projection):
    folder = tmp_path_factory.mktemp("gemma4")
    state = {name: value.contiguous() for name, value in reference_gemma4.state_of(model).items()}
    json = torch.frombuffer(bytearray(tokenizer.to_str().encode()), dtype=torch.uint8)
    unused = {
        "vision_model.patch_dense.weight": torch.zeros(4, 4),
        "hf_asset__chat_template.jinja": torch.zeros(8, dtype=torch.uint8),
    }
    save_file({**state, **projection, **unused, "tokenizer_json": json}, folder / "with-proj.safetensors")
    save_file(projection, folder / "projection.safetensors")
    names = {hf_name(name): name for name in gguf_names()}
    arrays = reference_tokenizer4.gguf_of(tokenizer)
    metadata = {
        "general.architecture": "gemma4", "gemma4.block_count": GGUFValue("uint32", LAYERS), "gemma4.attention.sliding_window": GGUFValue("uint32", 8),
        "gemma4.attention.head_count_kv": GGUFValue("array", [2] * 5 + [1] + [2] * 5 + [1], "int32"), **arrays,
        "tokenizer.ggml.token_type": GGUFValue("array", arrays["tokenizer.ggml.token_type"], "int32"),
    }  # fmt: skip
    with GGUFWriter(
        folder / "gemma4.gguf", metadata, [(names[n], "F32", tuple(v.shape)) for n, v in state.items()]
    ) as writer:
        for name, value in state.items():
            writer.write(names[name], value)
    return folder


def gguf_names():
    parts = [
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "attn_norm",
        "post_attention_norm",
        "ffn_norm",
        "post_ffw_norm",
    ]
    parts += ["ffn_gate", "ffn_up", "ffn_down", "layer_output_scale"]
    return [
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{i}.{part}.weight" for i in range(LAYERS) for part in parts),
    ]


@pytest.mark.parametrize("given", [("with-proj.safetensors",), ("gemma4.gguf", "projection.safetensors")])
def test_features_are_those_of_transformers_states_through_the_projection(files, model, tokenizer, projection, given):
    encoder = load_text_encoder(*(files / name for name in given))
    ids = torch.tensor([[2, *tokenizer.encode(PROMPT, add_special_tokens=False).ids]])
    window = encoder.gemma.config.sliding_window
    if window != 8:  # a file without metadata has the released window, as long as this prompt or longer
        assert window == 1024 and ids.shape[1] <= 1024
        model.config.sliding_window = 1024
    with torch.no_grad():
        states = torch.stack(model(ids, output_hidden_states=True, use_cache=False).hidden_states)[:, 0]  # (L+1, n, D)
    model.config.sliding_window = 8
    normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * (FEATURES / WIDTH) ** 0.5
    want = normed.permute(1, 2, 0).flatten(1) @ projection["text_embedding_projection.video_aggregate_embed.weight"].T
    want = want + projection["text_embedding_projection.video_aggregate_embed.bias"]
    got = encoder.encode(PROMPT)
    assert encoder.version == "2.5" and got.shape == (1, ids.shape[1], FEATURES)
    assert rel(got[0], want) < 1e-4


def test_a_loaded_gemma_4_writes_text(files):
    encoder = load_text_encoder(files / "with-proj.safetensors")
    ids = encoder.generate(chat_tokens(encoder.tokenizer, "red"), 6, Sampling(do_sample=False))
    assert 1 <= len(ids) <= 6 and isinstance(encoder.tokenizer.decode(ids), str)


def test_the_file_is_recognised_and_what_is_missing_is_said(files, tmp_path):
    report = identify(files / "with-proj.safetensors")
    assert (report.kind, report.version) == ("gemma", "2.5") and report.has("projection") and "Gemma-4" in report.title
    with pytest.raises(TextEncoderError, match="no text projection"):
        load_text_encoder(files / "gemma4.gguf")
    from safetensors.torch import load_file

    tensors = load_file(files / "with-proj.safetensors")
    del tensors["tokenizer_json"]
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(TextEncoderError, match="no tokenizer.*tokenizer.json"):
        load_text_encoder(tmp_path / "bare.safetensors")


def test_a_model_of_another_version_is_told_the_pair_it_needs(files, tmp_path):
    """The widths agree, so that without this a video would be made of nonsense."""
    from ltx2_gguf.ltx2_core.convert import synthetic
    from ltx2_gguf.ltx2_core.files.errors import CheckpointError
    from ltx2_gguf.ltx2_core.files.structure import Geometry
    from ltx2_gguf.ltx2_core.pipeline import LTX2Pipeline

    model = synthetic.make(tmp_path / "model.gguf", Geometry.small("2.3"), type="q8_0")
    with pytest.raises(CheckpointError, match="gemma4.gguf .* belongs to LTX-2.5, the model does not"):
        LTX2Pipeline.from_files(model, files / "gemma4.gguf", projection=files / "projection.safetensors")
