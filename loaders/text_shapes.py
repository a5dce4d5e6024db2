"""Text batches whose shapes come from a small closed set, made on the CPU before a batch travels.

A GPU plans attention, compiles and captures for each shape, and a batch cut to its longest text and
to its distinct texts would have a new shape in nearly every step. So both numbers are rounded up:
the length to a multiple of 4, at most the context; the distinct texts to a multiple of 8, or of an
eighth of the power of two below their number, at most the batch. Neither changes a feature: what
follows a text's end is masked, and no sample refers to a row that fills up.
"""

from collections.abc import Callable

import torch
from torch import Tensor

LENGTHS, ROWS = 4, 8  # the step of lengths, and the smallest of rows


def closed_length(longest: int, context: int) -> int:
    """The length of a batch whose longest text has `longest` tokens."""
    return min(context, _up(longest, LENGTHS))


def closed_rows(distinct: int, size: int) -> int:
    """The rows for `distinct` texts of a batch of `size` samples: at most eight sizes an octave."""
    return min(size, _up(distinct, max(ROWS, 1 << max(distinct.bit_length() - 4, 0))))


def shaped_texts(text: Tensor, tokenizer: Callable | None) -> dict[str, Tensor]:
    """What a batch holds of its texts; see docs/design.md ("Batch").

    Args:
        text: (b, T, L) token ids of T texts of each sample.
        tokenizer: a `loaders.tokenizers.Tokenizer`, which names its padding. Any other callable
            (one that draws a text as pixels), or None: nothing is known of the texts.

    Returns:
        `text` (b, T, L'), cut; `distinct_text` (T, n', L'), the distinct texts of each view, in the
        order in which they come first, then the first one again; `text_index` (b, T) int64, the row
        of each sample's text there. Of unknown texts `text` alone, as it is.
    """
    pad = getattr(tokenizer, "pad_id", None)
    if pad is None:
        return {"text": text}
    used = (text != pad).flatten(0, 1).any(dim=0).nonzero()
    longest = int(used.max()) + 1 if len(used) else 1
    longest += pad == tokenizer.end_id  # then the first padding is the end of the text
    text = text[:, :, : closed_length(longest, text.shape[2])].contiguous()
    views = [_distinct(view) for view in text.unbind(dim=1)]
    rows = closed_rows(max(len(first) for first, _ in views), len(text))
    filled = [first + first[:1] * (rows - len(first)) for first, _ in views]
    return {
        "text": text,
        "distinct_text": torch.stack([text[rows, v] for v, rows in enumerate(filled)]),
        "text_index": torch.tensor([index for _, index in views]).T.contiguous(),
    }


def _distinct(ids: Tensor) -> tuple[list[int], list[int]]:
    """Rows of (b, L) ids that differ from all before, and of each row its number among those."""
    numbers: dict[bytes, int] = {}
    first, index = [], []
    for row, key in enumerate(map(bytes, ids.contiguous().numpy())):
        if key not in numbers:
            numbers[key] = len(first)
            first.append(row)
        index.append(numbers[key])
    return first, index


def _up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step
