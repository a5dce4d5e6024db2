"""Masked tokens of texts, and the cross-entropy of guessing them (BERT, arXiv 1810.04805, 3.1).

Each token between the first one and the end is chosen with probability MASKED by itself. Of the
chosen ones 80 % give way to the mask, 10 % to another token, and 10 % stay; the model has to say
what was there. What is drawn is a function of the sample's seed and of the position in the text.

The ids are those of CLIP's tokenizer: CLIP_IDS of them, the start and the end last, and the first
one behind them is the mask. Another token is one of those before the start, so that the first end
of a masked text is where it was, and with it the place where the text is pooled.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._pieces import VOCABULARIES, drawn

MASKED = 0.15
BY_MASK, BY_OTHER = 0.8, 0.1  # of the chosen ones
CLIP_IDS = VOCABULARIES["clip"].mask  # and so many ids it has without the mask
WORDS = VOCABULARIES["clip"].words[1]
# More tokens are chosen than there is room for with a probability below 2**-64 a micro-batch.
BITS = 64 * math.log(2)


def mask_tokens(ids: Tensor, text: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Choose tokens and hide them.

    Args:
        ids: (b, L) int64, padded behind the end; not changed. text: (b, L) bool, what is text,
            from the first token up to and with the end. seed: (b,) int64.

    Returns:
        ids (b, L) with the chosen tokens hidden, and which these are, (b, L) bool. Neither depends
        on how far the texts are padded.
    """
    chosen, how, instead = drawn(text, seed, MASKED, BY_MASK, VOCABULARIES["clip"])
    return torch.where(chosen & (how < BY_MASK + BY_OTHER), instead, ids), chosen


def word_head(width: int, vocabulary: int) -> nn.Linear:
    """From states (…, width) to logits of all ids, initialised as BERT's layers are."""
    head = nn.Linear(width, vocabulary)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def guessed(head: nn.Module, states: Tensor, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the chosen tokens, for which alone the vocabulary is computed.

    How many are chosen a GPU does not tell without being waited for. There are `room` rows then, of
    which the last ones do not count. Were more chosen, those beyond would be left out.

    Args:
        head: from states to the vocabulary. states: (b, L', W), L' <= L, of the masked texts.
        ids: (b, L) what was there. chosen: (b, L) bool.

    Returns:
        Sum over the chosen tokens of each text (b,), and their number (b,), both float32 or wider;
        0 where none is chosen.
    """
    rows, length = states.shape[:2]
    ids, chosen = (value[:, :length].flatten() for value in (ids, chosen))
    first = chosen.to(torch.uint8).argsort(descending=True, stable=True)
    first = first[: computed(chosen, rows * max(length - 2, 0))]
    logits = head(states.flatten(0, 1).index_select(0, first))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits, ids[first], reduction="none")
    counts = chosen[first].to(each.dtype)
    # By place and then along the text: sums whose order the device does not choose.
    both = torch.stack([each * counts, counts], 1)
    both = both.new_zeros(len(ids), 2).index_copy(0, first, both)
    sums, counts = both.view(rows, length, 2).sum(1).unbind(1)
    return sums, counts.detach()


def computed(chosen: Tensor, tokens: int) -> int:
    """How many rows the vocabulary is computed for; a CPU can count what is chosen of `tokens`."""
    return int(chosen.sum()) if chosen.device.type == "cpu" else room(tokens)


def room(tokens: int) -> int:
    """Rows for the chosen ones of `tokens`: Bernstein's inequality with a bound of exp(-BITS)."""
    variance = tokens * MASKED * (1 - MASKED)
    beyond = BITS / 3 + math.sqrt((BITS / 3) ** 2 + 2 * BITS * variance)
    return min(tokens, math.ceil(MASKED * tokens + beyond))
