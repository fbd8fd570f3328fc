"""Gemma 4's tokenizer from a tokenizer.json and from a GGUF's arrays, against the tokenizers package on a small trained vocabulary."""

import random

import pytest
import torch

from ltx2_gguf.ltx2_core.text.chat import chat_tokens
from ltx2_gguf.ltx2_core.text.tokenizer import TokenizerError
from ltx2_gguf.ltx2_core.text.tokenizer_gemma4 import Gemma4Tokenizer
from reference_tokenizer4 import SPECIAL, WORDS, gguf_of, trained


@pytest.fixture(scope="module")
def reference():
    return trained()


@pytest.fixture(scope="module", params=["json", "int8", "gguf"])
def ours(request, reference):
    data = reference.to_str().encode()
    if request.param == "gguf":
        return Gemma4Tokenizer.from_gguf(gguf_of(reference))
    return Gemma4Tokenizer.from_json(
        data if request.param == "json" else torch.frombuffer(bytearray(data), dtype=torch.int8)
    )


def test_ids_of_many_texts_equal_the_packages(ours, reference):
    draw, alphabet = random.Random(1), "abcdeéß東☀🎥 \n\t<>|'▁"
    texts = [" ".join(draw.choices([*WORDS, *SPECIAL, "  ", "▁▁"], k=draw.randint(0, 12))) for _ in range(1000)]
    texts += ["".join(draw.choices(alphabet, k=draw.randint(0, 30))) for _ in range(1000)]
    for text in texts:
        ids = reference.encode(text.strip(), add_special_tokens=False).ids
        want = ids if ids[:1] == [2] else [2, *ids]
        assert ours.encode(text, max_length=None) == want, text
    assert ours.vocab_size == reference.get_vocab_size()


def test_decoding_gives_the_text_back_without_special_pieces(ours):
    text = "the red circle très  ☀ 12:45"
    assert ours.decode([*ours.encode(text), *ours.stop_tokens]) == text


def test_length_and_chats(ours):
    assert len(ours.encode("red " * 900, max_length=50)) == 50 and ours.encode("") == [2]
    tokens = chat_tokens(ours, "red circle")
    assert tokens[:2] == [2, ours.id_of("<|turn>")] and tokens.count(ours.id_of("<|turn>")) == 3
    assert tokens.count(ours.id_of("<turn|>")) == 2 and ours.decode(tokens[-3:]).endswith("\n")


def test_damaged_and_foreign_tokenizers_are_refused():
    with pytest.raises(TokenizerError, match="cannot be read"):
        Gemma4Tokenizer.from_json(b"{not json")
    with pytest.raises(TokenizerError, match="of the kind 'llama'"):
        Gemma4Tokenizer.from_gguf({"tokenizer.ggml.model": "llama"})
    arrays = {
        "tokenizer.ggml.tokens": ["<pad>", "a"],
        "tokenizer.ggml.merges": ["a c"],
        "tokenizer.ggml.token_type": [3, 1],
    }
    with pytest.raises(TokenizerError, match="merges do not fit"):
        Gemma4Tokenizer.from_gguf({"tokenizer.ggml.model": "gemma4", **arrays})
