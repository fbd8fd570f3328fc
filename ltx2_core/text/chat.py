"""The prompt of a chat as token ids, with images where they are to be looked at.

Source: ComfyUI ``comfy/text_encoders/lt.py`` (template and mark); transformers ``models/gemma3/processing_gemma3.py`` (tokens around an image).
"""

from collections.abc import Sequence

import torch

from .tokenizer import GemmaTokenizer

IMAGE = "<image_soft_token>"
"""Where an image stands in a text."""

_SYSTEM = "<start_of_turn>system\nYou are a helpful assistant.<end_of_turn>\n"
_USER, _MODEL = "<start_of_turn>user\n{}<end_of_turn>\n", "<start_of_turn>model\n"


def chat_tokens(
    tokenizer: GemmaTokenizer, text: str, images: Sequence[torch.Tensor] = (), template: bool = True
) -> list[int | torch.Tensor]:
    """Token ids, BOS first; an image [H, W, 3] (0 to 1) stands in the list where ``IMAGE`` stands in the text, between its two marks.

    template: put the text into a chat that asks for an answer, unless it is one already. Images without a mark come first in the
    user's turn. Nothing is cut off at either end: a template ends with a line break that matters.
    """
    if template and not text.startswith("<start_of_turn>"):
        missing = len(images) - text.count(IMAGE)
        text = _SYSTEM + _USER.format(f"\n\n{IMAGE}\n\n" * max(0, missing) + text) + _MODEL
    parts = text.split(IMAGE)
    tokens: list[int | torch.Tensor] = [tokenizer.bos]
    for number, part in enumerate(parts):
        tokens += tokenizer.encode(part, bos=False, max_length=None, strip=False)
        if number < len(parts) - 1 and number < len(images):
            before, after = tokenizer.id_of("<start_of_image>"), tokenizer.id_of("<end_of_image>")
            tokens += [*([] if before is None else [before]), images[number], *([] if after is None else [after])]
    return tokens
