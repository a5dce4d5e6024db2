"""Texts in which word pieces are masked, replaced or deleted at random, on the device.

A token between the first one and the end is chosen with a probability, by itself. Of the chosen
ones half give way to the mask, a tenth to another token, and the rest are deleted: what follows
moves up. These shares are those of ZeroVL's released program (arXiv 2112.09331). What is drawn is a
function of the sample's seed and of the place in the text, so that neither ranks nor micro-batches
nor the padding of a batch change a text (`drawn`, which `losses._masking` shares).

Other than there: a text is cut to the context first and altered then; all pieces of a word stay,
where the program keeps at most three; and another token is a word, never a special token.
"""

from pathlib import PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from losses._random import uniform

BY_MASK, BY_OTHER = 0.5, 0.1  # of the chosen ones


class Vocabulary(NamedTuple):
    """Ids of a tokenizer. words: the first word, and the id behind the last one."""

    pad: int
    mask: int
    words: tuple[int, int]
    size: int


# By the last part of the tokenizer's name. CLIP's has no mask: the first id behind its own is one.
VOCABULARIES = {
    "clip": Vocabulary(pad=0, mask=49408, words=(0, 49406), size=49409),
    "bert-base-uncased": Vocabulary(pad=0, mask=103, words=(999, 30522), size=30522),
}


def vocabulary(text: Any) -> Vocabulary:
    """Ids of the tokenizer of `text`, a `models.config.TextConfig`.

    Raises:
        ValueError: ids that are not known here, or a text tower that has none for the mask.
    """
    known = VOCABULARIES.get(PurePath(text.tokenizer).name)
    if known is None:
        raise ValueError(
            f"model.text.tokenizer={text.tokenizer}: word pieces are masked, and the ids of this "
            f"tokenizer are not known; give one of {', '.join(VOCABULARIES)}"
        )
    own = text.name == "transformer"
    size = text.vocab_size if own else (text.hf_config or {}).get("vocab_size", known.size)
    if size < known.size:
        raise ValueError(
            f"model.text.{'' if own else 'hf_config.'}vocab_size={size}: word pieces are masked, "
            f"and the tokenizer {text.tokenizer} with a mask needs {known.size}"
        )
    return known


def drawn(
    text: Tensor, seed: Tensor, share: float, by_mask: float, known: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """Which pieces of texts are chosen, and what may stand in their place.

    Args:
        text: (b, L) bool, what is text, from the first token up to and with the end.
        seed: (b,) int64. share: probability that a piece between these two is chosen.
        by_mask: the part of the chosen ones for which the mask stands in, else another word.

    Returns:
        chosen (b, L) bool; a uniform number for each, which is below `by_mask` where the mask
        stands in; what stands in, (b, L) int64. None depends on how far the texts are padded.
    """
    inside = F.pad(text[:, 2:], (1, 1))  # a token follows, and one precedes
    choice, how, word = uniform(seed, text.shape[1], 3).unbind(2)
    first, last = known.words
    other = first + (word.double() * (last - first)).long()
    return inside & (choice < share), how, other.masked_fill(how < by_mask, known.mask)


def altered(ids: Tensor, text: Tensor, seed: Tensor, share: float, known: Vocabulary) -> Tensor:
    """Texts with some of their pieces masked, replaced or deleted.

    Args:
        ids: (b, L) int64, padded behind the end; not changed. text: (b, L) bool, what is text,
            from the first token up to and with the end. seed: (b,) int64.
        share: probability that a piece is chosen. known: ids of the tokenizer.

    Returns:
        (b, L) int64, with as much more padding as pieces were deleted.
    """
    chosen, how, instead = drawn(text, seed, share, BY_MASK, known)
    ids = torch.where(chosen, instead, ids)
    gone = chosen & (how >= BY_MASK + BY_OTHER)
    order = gone.to(torch.uint8).argsort(dim=1, stable=True)
    return ids.masked_fill(gone, known.pad).gather(1, order)
