"""Text of strangers on a terminal: the one place that makes it harmless.

File names, sample keys, captions and the texts of other libraries' exceptions may hold escape
sequences that move the cursor, retitle the window or hide what follows, and halves of surrogate
pairs that no stream can encode. Whatever prints a line passes it through `printable`.
"""

MAX_CHARACTERS = 20_000  # of one message; the longest of ours lists 50 samples


def printable(text: str) -> str:
    """`text` with control, format and unassigned characters as escapes (`\\x1b`), cut when long.

    Line feeds and tabs stay: messages of several lines use them.
    """
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:MAX_CHARACTERS]}… (cut, {len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
