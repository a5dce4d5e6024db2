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

from losses._pieces import VOCABULARIES, drawn

MASKED = 0.15
BY_MASK, BY_OTHER = 0.8, 0.1  # of the chosen ones
CLIP_IDS = VOCABULARIES["clip"].mask  # and so many ids it has without the mask
WORDS = VOCABULARIES["clip"].words[1]
# More tokens are chosen than there is room for with a probability below 2**-64 a micro-batch.
BITS = 64 * math.log(2)
PIECE = 2**24  # logits that exist together


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


class WordHead(nn.Linear):
    """From states to logits of all ids, of which it says only the cross-entropy.

    The logits are by far the largest matrix of a text, so that they exist a piece at a time and
    are computed again for the backward pass, unless one piece holds them all.
    """

    def forward(self, states: Tensor, ids: Tensor) -> Tensor:
        """-log P(id | state) of each row, the logits computed with in float32 at least.

        Args:
            states: (n, W), in the type of the weights. ids: (n,) int64, what was there.

        Returns:
            (n,) float32, or wider if the weights are.
        """
        return _CrossEntropy.apply(states, self.weight, self.bias, ids)


class _CrossEntropy(torch.autograd.Function):
    """What `WordHead` returns, and its gradients by the states, the weight and the bias."""

    @staticmethod
    def forward(ctx, states, weight, bias, ids):
        step, each = max(PIECE // len(weight), 1), []
        pairs = list(zip(states.split(step), ids.split(step), strict=True))
        for some, wanted in pairs:
            exponentials, sums, own = _exponentials(some, wanted, weight, bias)
            each.append(sums.log() - own)
        kept = (exponentials, sums) if len(pairs) == 1 else ()
        ctx.save_for_backward(states, weight, bias, ids, *kept)
        return torch.cat(each)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_each):
        states, weight, bias, ids, *kept = ctx.saved_tensors
        step, of_states = max(PIECE // len(weight), 1), []
        of_weight = of_bias = None
        triples = (value.split(step) for value in (states, ids, of_each))
        for some, wanted, gradient in zip(*triples, strict=True):
            exponentials, sums = kept or _exponentials(some, wanted, weight, bias)[:2]
            # Of the logits: the probabilities less 1 at what was there, each row times its own.
            of_logits = exponentials.mul_((gradient / sums)[:, None])
            place = wanted[:, None]
            of_logits.scatter_(1, place, of_logits.gather(1, place) - gradient[:, None])
            of_bias = _plus(of_bias, of_logits.sum(0))
            of_logits = of_logits.to(weight.dtype)
            of_states.append(of_logits @ weight)
            of_weight = _plus(of_weight, of_logits.T @ some, of_each.dtype)
        return torch.cat(of_states), of_weight, of_bias, None


def _exponentials(
    states: Tensor, ids: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """exp of the logits less the largest of each row, their sums, and the logits of `ids` less the
    same: (n, V), (n,), (n,), float32 or wider."""
    logits = torch.addmm(bias, states, weight.T)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits -= logits.amax(1, keepdim=True)
    own = logits.gather(1, ids[:, None]).squeeze(1)
    logits.exp_()
    return logits, logits.sum(1), own


def _plus(total: Tensor | None, share: Tensor, kind: torch.dtype | None = None) -> Tensor:
    """The sum, in place, in the type `kind` where there are several shares."""
    if total is None:
        return share
    return total.to(kind or share.dtype).add_(share)


def word_head(width: int, vocabulary: int) -> WordHead:
    """For states of `width` numbers, initialised as BERT's layers are."""
    head = WordHead(width, vocabulary)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def guessed(head: WordHead, states: Tensor, ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the chosen tokens, for which alone the vocabulary is computed.

    How many are chosen a GPU does not tell without being waited for. There are `room` rows then, of
    which the last ones do not count. Were more chosen, those beyond would be left out.

    Args:
        head: of the vocabulary. states: (b, L', W), L' <= L, of the masked texts.
        ids: (b, L) what was there. chosen: (b, L) bool.

    Returns:
        Sum over the chosen tokens of each text (b,), and their number (b,), both float32 or wider;
        0 where none is chosen.
    """
    rows, length = states.shape[:2]
    ids, chosen = (value[:, :length].flatten() for value in (ids, chosen))
    first = chosen.to(torch.uint8).argsort(descending=True, stable=True)
    first = first[: computed(chosen, rows * max(length - 2, 0))]
    each = head(states.flatten(0, 1).index_select(0, first), ids[first])
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
