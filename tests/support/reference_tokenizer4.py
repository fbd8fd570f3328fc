"""A small trained tokenizer of Gemma 4's kind, and a GGUF's arrays of it."""

import json
import random

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|image>", "<image|>"]
WORDS = [
    "a",
    "the",
    "red",
    "blue",
    "circle",
    "camera",
    "moves",
    "slowly",
    "over",
    "water",
    "while",
    "rain",
    "falls;",
    "'Look!'",
    "she",
    "says,",
    "très",
    "élégant",
    "—",
    "12:45",
    "東京",
    "☀\n\n\t",
]


def trained():
    """A trained tokenizer of the released kind: ranked merges over the whole text as one word, bytes for the rest."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS[:14], k=6)) for _ in range(300)]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [
        token for token in described["added_tokens"] if token["content"] in SPECIAL
    ]  # bytes are no special pieces
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    return tokenizer


def gguf_of(reference):
    described = json.loads(reference.to_str())
    pieces = [piece for piece, _ in sorted(reference.get_vocab().items(), key=lambda item: item[1])]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in described["model"]["merges"]]
    types = [
        3 if piece in SPECIAL else 4 if piece == "\n\n" else 6 if piece.startswith("<0x") else 1 for piece in pieces
    ]
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types,
    }
