"""Gemma 4 tokenizer: byte-pair merges by rank, from the file's ``tokenizer.json`` or from a GGUF's arrays.

Spaces become U+2581 and the whole text is one word; what no merge reaches falls back to bytes. Special pieces (``<|turn>``) are found first.

Sources: google/gemma-4-12b ``tokenizer.json``; llama.cpp ``convert_hf_to_gguf.py`` (types).
"""

from collections.abc import Mapping, Sequence

import torch

from .tokenizer import CONTROL, MAX_TOKENS, USER_DEFINED, TokenizerError, gguf_array

_SPACE = "▁"


class Gemma4Tokenizer:
    """Text to Gemma-4 token ids. Build it with ``from_gguf`` or ``from_json``.

    ``json`` is the tokenizer in the form of ``tokenizer.json``, as bytes.
    """

    turn_marks = ("<|turn>", "<turn|>")
    image_marks = ("<|image>", "<image|>")

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        tokenizer.no_truncation(), tokenizer.no_padding()
        self.bos, self.pad = (tokenizer.token_to_id(name) for name in ("<bos>", "<pad>"))
        if self.bos is None or self.pad is None:
            raise TokenizerError(
                "the file's vocabulary has no '<bos>' or '<pad>'; it is not Gemma-4's. Use a Gemma-4 file."
            )

    @classmethod
    def from_json(cls, data) -> "Gemma4Tokenizer":
        """``data``: the bytes of ``tokenizer.json``, or a tensor of byte values as in ``tokenizer_json`` (any dtype)."""
        from tokenizers import Tokenizer  # the host has it; loaded on first use

        if not isinstance(data, (bytes, bytearray, memoryview)):
            data = (
                data.flatten().to(torch.int16).bitwise_and(0xFF).to(torch.uint8).cpu().numpy().tobytes()
            )  # int8 or floats, from a converter
        try:
            return cls(Tokenizer.from_str(bytes(data).decode("utf-8")))
        except TokenizerError:
            raise
        except Exception as error:  # the package raises plain Exception
            raise TokenizerError(
                f"the file's 'tokenizer_json' cannot be read ({error}); download the file again."
            ) from error

    @classmethod
    def from_gguf(cls, gguf) -> "Gemma4Tokenizer":
        """Build from a GGUF's metadata (a mapping, or anything with one as ``metadata``). Raises TokenizerError without ranked merges."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

        metadata: Mapping = getattr(gguf, "metadata", gguf)
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gemma4":
            raise TokenizerError(
                f"the GGUF file holds a tokenizer of the kind '{kind}', Gemma 4 needs 'gemma4'; use a GGUF of Gemma 4."
            )
        pieces, merges, types = (
            gguf_array(metadata, f"tokenizer.ggml.{name}", kind)
            for name, kind in (("tokens", str), ("merges", str), ("token_type", int))
        )
        if len(pieces) != len(types):
            raise TokenizerError(
                f"the GGUF tokenizer has {len(pieces)} pieces and {len(types)} types; the counts must be equal."
            )
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        try:
            pairs = [tuple(merge.split(" ", 1)) for merge in merges]
            model = models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
        except Exception as error:  # the package raises plain Exception
            raise TokenizerError(
                f"the GGUF tokenizer's merges do not fit its pieces ({error}); the file is damaged."
            ) from error
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        added = [(pieces[i], kind) for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)]
        tokenizer.add_special_tokens(
            [AddedToken(piece, normalized=False, special=True) for piece, kind in added if kind == CONTROL]
        )
        tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece, kind in added if kind == USER_DEFINED])
        return cls(tokenizer)

    @property
    def json(self) -> bytes:
        return self._tokenizer.to_str().encode()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a written text."""
        return frozenset(i for i in map(self.id_of, ("<eos>", self.turn_marks[1])) if i is not None)

    def id_of(self, piece: str) -> int | None:
        """The id of exactly this piece, or None."""
        return self._tokenizer.token_to_id(piece)

    def encode(self, text: str, bos: bool = True, max_length: int | None = MAX_TOKENS, strip: bool = True) -> list[int]:
        """As ``GemmaTokenizer.encode``; a BOS that the text itself begins with is not doubled."""
        ids = self._tokenizer.encode(text.strip() if strip else text, add_special_tokens=False).ids
        if bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return ids if max_length is None else ids[:max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special pieces are left out."""
        return self._tokenizer.decode([int(i) for i in ids if i not in self.stop_tokens])
