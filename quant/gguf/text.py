"""Text that comes out of a file is data: what may be shown of it.

A tensor name, a metadata value or a path can hold control characters that a terminal obeys, characters that turn the direction of a line, lone
surrogates that no stream can encode, or a gigabyte of anything.
"""

NAME_LENGTH = 200  # characters of a name or a value inside a sentence
MESSAGE_LENGTH = 2000  # characters of a whole sentence


def visible(text: object, limit: int = NAME_LENGTH) -> str:
    """``text`` on one line, at most ``limit`` characters of it, everything that is not printable written as an escape (``\\x1b``, ``\\u202e``).

    What is too long loses its middle, since the end of a sentence says what to do.
    """
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    text = str(text)
    if len(text) > limit:
        head = limit * 2 // 3
        text = f"{text[:head]} … {text[len(text) - (limit - head) + 3 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
