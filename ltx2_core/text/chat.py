"""The prompt of a chat as token ids, with images where they are to be looked at.

Source: ComfyUI ``comfy/text_encoders/lt.py`` (template and mark); transformers ``models/gemma3/processing_gemma3.py`` (tokens around an image).
"""

from collections.abc import Sequence

import torch

from .tokenizer import GemmaTokenizer
from .tokenizer_gemma4 import Gemma4Tokenizer

IMAGE = "<image_soft_token>"
"""Where an image stands in a text."""

_SYSTEM = "You are a helpful assistant."


def chat_tokens(
    tokenizer: GemmaTokenizer | Gemma4Tokenizer, text: str, images: Sequence[torch.Tensor] = (), template: bool = True
) -> list[int | torch.Tensor]:
    """Token ids, BOS first; an image [H, W, 3] (0 to 1) stands in the list where ``IMAGE`` stands in the text, between its two marks.

    template: put the text into a chat that asks for an answer, unless it is one already. Images without a mark come first in the
    user's turn. Nothing is cut off at either end: a template ends with a line break that matters.
    """
    begin, end = tokenizer.turn_marks
    if template and not text.startswith(begin):
        text = f"\n\n{IMAGE}\n\n" * max(0, len(images) - text.count(IMAGE)) + text
        text = f"{begin}system\n{_SYSTEM}{end}\n{begin}user\n{text}{end}\n{begin}model\n"
    parts = text.split(IMAGE)
    tokens: list[int | torch.Tensor] = [tokenizer.bos]
    for number, part in enumerate(parts):
        tokens += tokenizer.encode(part, bos=False, max_length=None, strip=False)
        if number < len(parts) - 1 and number < len(images):
            before, after = map(tokenizer.id_of, tokenizer.image_marks)
            tokens += [*([] if before is None else [before]), images[number], *([] if after is None else [after])]
    return tokens
