"""Text from files: shown safely, read as JSON within bounds, and sizes in words. Standard library only."""

import json
from collections.abc import Mapping

from ...quant.gguf.text import MESSAGE_LENGTH, NAME_LENGTH, visible

__all__ = ["MESSAGE_LENGTH", "NAME_LENGTH", "TABLE_LENGTH", "first_names", "html", "size_text", "table", "visible"]

TABLE_LENGTH = 2_000_000  # characters of a JSON table; parsed it takes up to twenty times as many bytes


def html(text: object) -> str:
    """``text`` for the page: visible, and without a character that begins a tag, an entity or an attribute."""
    shown = visible(text, MESSAGE_LENGTH)
    return (
        shown.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&quot;")
        .replace("'", "&#39;")
    )


def table(value: object, what: str) -> Mapping:
    """``value`` as a table: itself when it is one, else the JSON object that the text spells (some writers encode it twice).

    Raises ValueError, with a sentence about ``what``, for text that is too long, no JSON, nested without end, or no object.
    """
    for _ in range(2):
        if not isinstance(value, (str, bytes)):
            break
        if len(value) > TABLE_LENGTH:
            raise ValueError(
                f"{what} is {len(value)} characters long; expected a JSON table of at most {TABLE_LENGTH}. Take the file from its original source."
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else visible(error)
            raise ValueError(f"{what} is not JSON ({reason}); download the file again or remove the entry.") from None
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{what} is {_kind(value)}; expected a JSON table. Download the file again or remove the entry."
        )
    return value


def _kind(value: object) -> str:
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        type(None): "empty",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def first_names(names, count: int = 5) -> str:
    """The first few names, for a sentence."""
    return ", ".join(visible(name) for name in list(names)[:count])


def size_text(nbytes: int) -> str:
    """A size for people: GB from a tenth of one on, else MB (decimal)."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
