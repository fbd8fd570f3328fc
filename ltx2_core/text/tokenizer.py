"""Gemma-3 tokenizer, rebuilt from what a weight file carries.

A llama.cpp GGUF holds the vocabulary as three arrays (pieces, scores, types); the host's safetensors hold the original
SentencePiece model as bytes (``spiece_model``). Both end in one SentencePiece BPE model with byte fallback. The protobuf
package is not needed: the few fields of the model are written by hand.

Three things differ between the arrays in a GGUF and the original model, and are put back here:

* ``<unk>`` may be marked CONTROL; SentencePiece needs exactly one UNKNOWN piece.
* ``<start_of_turn>``, ``<end_of_turn>``, ``<unused0>``, ... are marked CONTROL, which SentencePiece never finds in a text;
  the original marks them USER_DEFINED.
* USER_DEFINED pieces are written with literal spaces where SentencePiece wants U+2581, so runs of spaces would be cut apart.

``<bos>``, ``<eos>``, ``<pad>`` and ``<unk>`` are found in a text by the official tokenizer (Hugging Face ``tokenizers``) and never by
SentencePiece, so the text is cut at them first. One difference to the official ids is left: where a prompt itself contains
two or more U+2581 characters in a row, the official tokenizer takes them apart from neighbouring spaces, SentencePiece does not.

Sources: sentencepiece ``src/sentencepiece_model.proto`` (field numbers); Lightricks ltx-core
``text_encoders/gemma/tokenizer.py`` (strip, BOS, truncation at 1024 tokens); llama.cpp ``convert_hf_to_gguf.py`` (types).
"""

import re
import struct
from collections.abc import Mapping, Sequence

from ..files.errors import WeightFileError
from ..files.text import visible

MAX_TOKENS = 1024
"""Longest prompt in tokens, BOS included; the official encoder keeps the first 1024."""

# Piece types of SentencePiece; llama.cpp uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_SPACE = "▁"
_MODEL_TYPE_BPE = 2
_LONGEST = 1000  # bytes of a piece
_RESERVED = ("<pad>", "<eos>", "<bos>", "<unk>")


class TokenizerError(WeightFileError):
    """The file has no tokenizer that Gemma-3 could have been trained with."""

    __module__ = "ltx2_gguf"  # shown before the name of the error


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def sentencepiece_model(pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> bytes:
    """Serialise a SentencePiece BPE model: identity normaliser, no dummy prefix, all white space kept, byte fallback.

    ``pieces``, ``scores`` and ``types`` have one entry per id, as llama.cpp stores them. Returns the bytes of a ModelProto.
    Raises TokenizerError when ``<pad>``, ``<eos>``, ``<bos>`` or ``<unk>`` is not among the first pieces.
    """
    pad, eos, bos, unk = (_index(pieces, name) for name in _RESERVED)
    pieces, kinds = list(pieces), list(types)
    for index in [i for i, kind in enumerate(kinds) if kind != NORMAL and kind != BYTE]:
        if kinds[index] in (CONTROL, UNKNOWN):
            kinds[index] = CONTROL if index in (pad, eos, bos) else USER_DEFINED
        if kinds[index] == USER_DEFINED:
            pieces[index] = pieces[index].replace(" ", _SPACE)
    kinds[unk] = UNKNOWN
    _name_duplicates(pieces, kinds)

    # A quarter of a million pieces: everything that does not depend on the piece is made once. Each entry is
    # ModelProto.pieces=1 { piece=1, score=2 (float), type=3 }.
    packed_scores = struct.pack(f"<{len(pieces)}f", *scores)
    tails = {kind: b"\x18" + _varint(kind) for kind in set(kinds)}
    heads = [b"\x0a" + _varint(len(_varint(n)) + n + 8) + b"\x0a" + _varint(n) for n in range(_LONGEST + 1)]
    chunks = []
    for index, (piece, kind) in enumerate(zip(pieces, kinds)):
        text = piece.encode("utf-8", "surrogatepass")
        if len(text) > _LONGEST:
            raise TokenizerError(
                f"piece {index} of the vocabulary is {len(text)} bytes long; the longest of Gemma-3 has 93. The file is damaged."
            )
        chunks += heads[len(text)], text, b"\x15", packed_scores[4 * index : 4 * index + 4], tails[kind]
    trainer = b"".join(
        _int_field(number, value)
        for number, value in (
            (3, _MODEL_TYPE_BPE),
            (35, 1),  # byte_fallback
            (40, unk),
            (41, bos),
            (42, eos),
            (43, pad),
        )
    )
    names = _field(45, b"<unk>") + _field(46, b"<bos>") + _field(47, b"<eos>") + _field(48, b"<pad>")
    normalizer = _field(1, b"identity") + _int_field(3, 0) + _int_field(4, 0) + _int_field(5, 1)
    return b"".join(chunks) + _field(2, trainer + names) + _field(3, normalizer)


def _name_duplicates(pieces: list[str], kinds: list[int]) -> None:
    """Rename, in place, empty pieces and repetitions (padding rows of a resized table): SentencePiece refuses them, but their ids must exist."""
    if len(set(pieces)) == len(pieces) and "" not in pieces:
        return
    seen = {""}
    for index, piece in enumerate(pieces):
        if piece in seen:
            pieces[index], kinds[index] = f"<duplicate_{index}>", UNUSED
        seen.add(pieces[index])


def _index(pieces: Sequence[str], name: str) -> int:
    try:
        return pieces.index(name, 0, 16)
    except ValueError:
        raise TokenizerError(
            f"the vocabulary begins with {list(pieces[:4])}, without '{name}'; it is not Gemma-3's. Use a Gemma-3 file."
        ) from None


class GemmaTokenizer:
    """Text to Gemma-3 token ids. Build it with ``from_gguf`` or ``from_spiece``.

    ``model_proto`` is the serialised SentencePiece model (what the host saves as ``spiece_model``).
    """

    turn_marks = ("<start_of_turn>", "<end_of_turn>")
    image_marks = ("<start_of_image>", "<end_of_image>")

    def __init__(self, model_proto: bytes):
        import sentencepiece  # the host has it; loaded on first use

        self.model_proto = model_proto
        self._processor = processor = sentencepiece.SentencePieceProcessor()
        # Pieces that SentencePiece never finds in a text, though the official tokenizer does.
        self._special = {}
        try:
            processor.LoadFromSerializedProto(model_proto)
            self.bos, self.pad = processor.bos_id(), max(processor.pad_id(), 0)
            for name in (*_RESERVED, *self.turn_marks):
                index = processor.PieceToId(name)
                if processor.IdToPiece(index) == name and (processor.IsControl(index) or processor.IsUnknown(index)):
                    self._special[name] = index
        except (RuntimeError, ValueError, OverflowError) as error:
            raise TokenizerError(
                f"SentencePiece refuses the file's vocabulary ({visible(error)}); the file is damaged, download it again."
            ) from error
        if self.bos < 0:
            raise TokenizerError(
                "the file's SentencePiece model has no beginning-of-sequence piece, so it is not Gemma-3's tokenizer."
            )

    @classmethod
    def from_gguf(cls, gguf) -> "GemmaTokenizer":
        """Build from a GGUF's metadata. ``gguf``: anything with a ``metadata`` mapping, or that mapping itself.

        Raises TokenizerError when the file has no SentencePiece vocabulary.
        """
        metadata = getattr(gguf, "metadata", gguf)
        model = metadata.get("tokenizer.ggml.model")
        if model is None:
            raise TokenizerError(
                "the GGUF file holds no tokenizer ('tokenizer.ggml.model' is missing); use a Gemma-3 GGUF made by llama.cpp's converter."
            )
        if model != "llama":
            raise TokenizerError(
                f"the GGUF file holds a '{visible(model)}' tokenizer (vocabulary and merges), Gemma-3 needs the SentencePiece form ('llama'); "
                "use a GGUF that was converted from a folder with tokenizer.model."
            )
        pieces, scores, types = (
            gguf_array(metadata, f"tokenizer.ggml.{name}", kind)
            for name, kind in (("tokens", str), ("scores", (int, float)), ("token_type", int))
        )
        if any(not NORMAL <= kind <= BYTE for kind in types):
            raise TokenizerError(
                f"the GGUF tokenizer has pieces of type {visible(sorted(set(types)))}; the types are {NORMAL} to {BYTE}. The file is damaged."
            )
        if not len(pieces) == len(scores) == len(types):
            raise TokenizerError(
                f"the GGUF tokenizer has {len(pieces)} pieces, {len(scores)} scores and {len(types)} types; the counts must be equal."
            )
        return cls(sentencepiece_model(pieces, scores, types))

    @classmethod
    def from_spiece(cls, spiece) -> "GemmaTokenizer":
        """Build from the original SentencePiece model: bytes, or a uint8 tensor as in the host's ``spiece_model``."""
        if not isinstance(spiece, (bytes, bytearray, memoryview)):
            spiece = spiece.cpu().numpy().tobytes()
        return cls(bytes(spiece))

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a written text."""
        return frozenset(i for i in map(self.id_of, ("<eos>", self.turn_marks[1])) if i is not None)

    def id_of(self, piece: str) -> int | None:
        """The id of exactly this piece, or None."""
        index = self._processor.PieceToId(piece)
        return index if self._processor.IdToPiece(index) == piece else None

    def encode(self, text: str, bos: bool = True, max_length: int | None = MAX_TOKENS, strip: bool = True) -> list[int]:
        """Token ids of ``text``; white space at both ends is dropped, and at most ``max_length`` ids (BOS included) are kept.

        The empty text gives BOS alone. ``max_length=None`` keeps everything, ``strip=False`` the white space.
        """
        ids = [self.bos] if bos else []
        for part in self._split(text.strip() if strip else text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._processor.EncodeAsIds(part))
        return ids if max_length is None else ids[:max_length]

    def what_is_cut(self, text: str, max_length: int = MAX_TOKENS) -> str | None:
        """A sentence about what ``encode`` leaves out of a text that is too long, None when it keeps everything."""
        ids = self.encode(text, max_length=None)
        if len(ids) <= max_length:
            return None
        first = " ".join(self.decode(ids[max_length : max_length + 24]).split())
        return f'The prompt has {len(ids)} tokens and the model reads {max_length}; what comes from "{first[:80]}" on was cut off.'

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; BOS, padding and the marks of turns and of the end are left out."""
        skipped = {self.bos, self.pad, self.id_of(self.turn_marks[0]), *self.stop_tokens}
        return self._processor.DecodeIds([int(i) for i in ids if i not in skipped])

    def _split(self, text: str) -> list[str]:
        """Cut ``text`` at the special pieces that SentencePiece cannot see; the pieces themselves are kept."""
        if not any(name in text for name in self._special):
            return [text]
        return re.split("(" + "|".join(map(re.escape, self._special)) + ")", text)


def gguf_array(metadata: Mapping, key: str, kind: type | tuple = str) -> list:
    """A list of a GGUF's tokenizer, all of its items of ``kind``. Raises TokenizerError when it is missing or something else."""
    value = metadata.get(key)
    if value is None:
        raise TokenizerError(
            f"the GGUF tokenizer lacks '{key}'; the file is incomplete or was made by an unusual converter."
        )
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TokenizerError(
            f"the GGUF tokenizer's '{key}' is no list of the type it should be; the file is damaged, download it again."
        )
    return value
