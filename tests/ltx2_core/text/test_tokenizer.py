"""Token ids: against ids of the official tokenizer, against transformers reading the same GGUF, and against the host.

``data/gemma3_token_ids.jsonl`` holds 382 texts with the ids that Hugging Face ``tokenizers`` gives for Gemma-3's own
``tokenizer.json`` (sha256 4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795) after ``strip()``.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from ltx2_gguf.ltx2_core.text.tokenizer import MAX_TOKENS, GemmaTokenizer, TokenizerError, sentencepiece_model
from ltx2_gguf.quant.gguf.reader import GGUFFile

OFFICIAL = [
    json.loads(line)
    for line in (Path(__file__).parents[2] / "data" / "gemma3_token_ids.jsonl").read_text(encoding="ascii").splitlines()
]


@pytest.fixture(scope="module")
def metadata(gemma_gguf):
    return GGUFFile(gemma_gguf).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return GemmaTokenizer.from_gguf(metadata)


def test_ids_equal_the_official_tokenizer_on_every_kind_of_text(tokenizer):
    assert len(OFFICIAL) > 350
    wrong = [(text, want, got) for text, want in OFFICIAL if (got := tokenizer.encode(text)) != want]
    assert not wrong, f"{len(wrong)} of {len(OFFICIAL)} differ, first: {wrong[0]!r}"


@pytest.mark.slow
def test_ids_equal_transformers_reading_the_same_gguf(tokenizer, gemma_gguf):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(gemma_gguf.parent, gguf_file=gemma_gguf.name, local_files_only=True)
    texts = [text for text, _ in OFFICIAL] + [" ".join(["lighthouse"] * 900), "x" * 3000, "雪" * 700]
    # transformers makes up the order of merges from the scores; beyond 31 spaces that order is not the official tokenizer's.
    for text in (t for t in texts if " " * 32 not in t):
        assert tokenizer.encode(text, max_length=None) == reference(text.strip()).input_ids, repr(text)


def test_the_rebuilt_model_tokenises_alike_in_the_host(host, tokenizer):
    from comfy.text_encoders.spiece_tokenizer import SPieceTokenizer

    theirs = SPieceTokenizer(
        torch.frombuffer(bytearray(tokenizer.model_proto), dtype=torch.uint8), add_bos=True, add_eos=False
    )
    texts = [text for text, _ in OFFICIAL if not any(name in text for name in ("<bos>", "<eos>", "<pad>", "<unk>"))]
    for text in texts:
        assert theirs(text.strip())["input_ids"] == tokenizer.encode(text), repr(text)


def test_a_tokenizer_from_spiece_bytes_or_tensor_is_the_same_tokenizer(tokenizer):
    data = tokenizer.model_proto
    for spiece in (data, torch.frombuffer(bytearray(data), dtype=torch.uint8)):
        again = GemmaTokenizer.from_spiece(spiece)
        assert (again.bos, again.pad, again.vocab_size) == (2, 0, 262144)
        assert all(again.encode(text) == want for text, want in OFFICIAL)


def test_empty_and_blank_prompts_are_bos_alone(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode(" \n\t ") == [2]
    assert tokenizer.encode("", bos=False) == []


def test_white_space_at_the_ends_is_dropped_and_inside_kept(tokenizer):
    assert tokenizer.encode("  a cat ") == tokenizer.encode("a cat") != tokenizer.encode("a  cat")
    assert tokenizer.decode(tokenizer.encode("a   b\n\n c\t\td")) == "a   b\n\n c\t\td"


def test_long_prompts_keep_their_first_1024_tokens(tokenizer):
    text = "a lighthouse, " * 1000
    everything = tokenizer.encode(text, max_length=None)
    assert len(everything) > MAX_TOKENS == len(tokenizer.encode(text))
    assert tokenizer.encode(text) == everything[:MAX_TOKENS]


def test_characters_outside_the_vocabulary_become_bytes_and_come_back(tokenizer):
    text = "\U0001f9ff\u0d9e𓀀\u0378"
    ids = tokenizer.encode(text)
    assert any(238 <= i <= 493 for i in ids) and 3 not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "name, index",
    [
        ("<bos>", 2),
        ("<eos>", 1),
        ("<pad>", 0),
        ("<unk>", 3),
        ("<mask>", 4),
        ("<start_of_turn>", 105),
        ("<end_of_turn>", 106),
    ],
)
def test_special_names_in_a_text_are_one_token_as_in_the_official_tokenizer(tokenizer, name, index):
    assert tokenizer.encode(f"a{name}b", bos=False) == [
        *tokenizer.encode("a", bos=False),
        index,
        *tokenizer.encode("b", bos=False),
    ]


def test_the_arrays_alone_are_not_enough(metadata):
    """Left as stored, control types and literal spaces give other ids: this is what ``from_gguf`` puts right."""
    import sentencepiece

    pieces, scores, types = (metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "scores", "token_type"))
    runs = {p for p, t in zip(pieces, types) if t == 4 and p.strip(" ") == ""}
    assert runs and all(types[i] == 3 for i in (3, 105, 106))
    rebuilt = sentencepiece.SentencePieceProcessor()
    rebuilt.LoadFromSerializedProto(sentencepiece_model(pieces, scores, types))
    assert all(rebuilt.PieceToId(run.replace(" ", "▁")) == pieces.index(run) for run in runs)
    assert rebuilt.IsUnknown(3) and rebuilt.IsControl(2) and not rebuilt.IsControl(105)


def test_padding_rows_and_repeated_pieces_keep_their_ids(metadata):
    extra = ["<image_soft_token>", "[PAD262145]", "the", ""]
    pieces = [*metadata["tokenizer.ggml.tokens"], *extra]
    scores = [*metadata["tokenizer.ggml.scores"], *[-1000.0] * 4]
    types = [*metadata["tokenizer.ggml.token_type"], 3, 5, 1, 5]
    tokenizer = GemmaTokenizer(sentencepiece_model(pieces, scores, types))
    assert tokenizer.vocab_size == len(pieces)
    assert all(tokenizer.encode(text) == want for text, want in OFFICIAL)


def test_files_without_a_usable_tokenizer_are_refused_with_a_sentence(metadata):
    class Changed(dict):
        def __init__(self, **changes):
            super().__init__(
                {k: metadata[k] for k in metadata if "ggml.tok" not in k or "id" in k}
                | {k.replace("__", "."): v for k, v in changes.items()}
            )

    with pytest.raises(TokenizerError, match="'gpt2' tokenizer.*tokenizer.model"):
        GemmaTokenizer.from_gguf(Changed(tokenizer__ggml__model="gpt2"))
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        GemmaTokenizer.from_gguf({"general.architecture": "gemma3"})
    with pytest.raises(TokenizerError, match="lacks 'tokenizer.ggml.tokens'"):
        GemmaTokenizer.from_gguf(Changed())
    arrays = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<s>", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0],
        "tokenizer.ggml.token_type": [3, 1],
    }
    with pytest.raises(TokenizerError, match="not Gemma-3's"):
        GemmaTokenizer.from_gguf(arrays)
    with pytest.raises(TokenizerError, match="2 pieces, 1 scores"):
        GemmaTokenizer.from_gguf(arrays | {"tokenizer.ggml.scores": [0.0]})


def test_opening_and_building_take_less_than_a_second_and_a_half_of_processor_time(gemma_gguf):
    import sentencepiece  # noqa: F401  (its import is not part of the time)

    def build():
        start = time.process_time()
        with GGUFFile(gemma_gguf) as gguf:
            GemmaTokenizer.from_gguf(gguf)
        return time.process_time() - start

    assert min(build() for _ in range(3)) < 1.5


def test_sentencepiece_is_imported_on_first_use_only():
    import subprocess

    code = "import sys, packloader; import ltx2_gguf.ltx2_core.text.tokenizer; sys.exit('sentencepiece' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=Path(__file__).parents[2] / "support", env={**os.environ}
        ).returncode
        == 0
    )
