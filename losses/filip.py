"""FILIP: every token of an image finds its best token of a text (Yao et al., arXiv 2111.07783).

With unit features f_ik of the N tokens of image i, g_jr of the m_j tokens of text j, multiplier s:

    sI_ij = 1/N   sum_k max_r f_ik . g_jr        image -> text
    sT_ij = 1/m_j sum_r max_k f_ik . g_jr        text -> image, another matrix than sI
    L = 1/2 [ mean_i -log softmax_j(s sI_i.)_i  +  mean_j -log softmax_i(s sT_.j)_j ]

with one learnt temperature. Padding takes part neither in the maxima nor in the means. The start
and the end of a text do; the class token of an image does not, which the paper leaves open. With
one token a side this is CLIP's loss.

Where others differ: the training loss that Huawei published in MindFormers smooths its labels by
0.1, has a multiplier for each direction, and lets padding take part with score 0.

The paper also thins the tokens before they travel, to a quarter of each sample, those that fit the
samples *of the same worker* best. That loss depends on the number of workers, so it is not offered:
here all tokens travel, and any number of ranks and micro-batches gives the same loss.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from losses._block import WALK, Walk
from losses._gather import Gather
from losses._late import late_normalisers, paired_scores, rounded
from losses._method import Features, text_outputs
from losses._method import Method as Base


def filip_loss(
    image: Tensor, text: Tensor, mask: Tensor, scale: Tensor, gather: Gather, walk: Walk = WALK
) -> tuple[Tensor, Tensor]:
    """Loss of the global batch, half the sum of both directions.

    Args:
        image, text: (b, N, D), (b, M, D) tokens of unit length of this rank, float32 or wider.
        mask: (b, M) bool, which tokens are text.
        scale: (1,) multiplier of the scores.
        gather: the ranks that share the batch. walk: memory and precision.

    Returns:
        scalar, equal on every rank; loss of each sample (b,) without gradient. Gradients follow
        the convention of `losses._gather`.
    """
    image, text = (rounded(tokens, walk.precision) for tokens in (image, text))
    rows, columns = late_normalisers(image, text, mask, scale, gather, walk)
    of_image, of_text = paired_scores(image, text, mask)
    each = 0.5 * (rows + columns - scale.to(rows.dtype) * (of_image + of_text))
    return gather.mean(each), each.detach()


@dataclass
class Config:
    """keep_mib: memory per rank, on any device, for the places of the maxima, in MiB: about N + M
    bytes for each of its pairs. What does not fit is computed again in the backward pass."""

    keep_mib: int = 256


class Method(Base):
    """Pairs; labels are not used. The model compares by `model.similarity=late`."""

    Config = Config
    similarity = "late"

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        image = model.encode_image(batch["image"][:, 0])["token_features"]
        text = text_outputs(model, batch, 0, ("token_features", "token_mask"))
        return {
            "image_tokens": image,
            "text_tokens": text["token_features"],
            "text_mask": text["token_mask"],
            "scale": model.scale().expand(len(image)),
        }

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        tokens = (features[key] for key in ("image_tokens", "text_tokens", "text_mask"))
        loss, each = filip_loss(*tokens, features["scale"][:1], gather, self.walk())
        return {"contrastive_loss": loss, "sample_loss": each}
