"""Cross-entropy on image-label samples plus CLIP on image-text pairs.

The multi-task baseline (ii) of UniCL (arXiv 2204.03610), section "Benefit of image-label to
image-text": the two kinds of data share the image tower but not the objective.
"""

import torch
from torch import Tensor, nn

from losses import cross_entropy
from losses._block import WALK, Walk
from losses._core import pair_losses
from losses._gather import Gather
from losses._method import CoreOptions, Features, text_features, zero_like_graph


def pairs_loss(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    scale: Tensor,
    gather: Gather,
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """CLIP's loss among the image-text pairs of the global batch, as if there were nothing else.

    Which samples are pairs is not asked of the device: the logits of all samples are walked, those
    between a pair and an image-label sample are excluded, and image-label samples count 0.

    Args:
        image, text: (b, D) l2-normalised features of this rank.
        labels: (b,) int64, negative for a pair.
        scale: (1,) or scalar multiplier of the cosines.
        gather: the ranks that share the batch. walk: memory, tiles and precision of the core.

    Returns:
        scalar, equal on every rank, 0 when there is no pair; loss per sample (b,) without
        gradient, 0 for image-label samples.
    """
    pair = labels < 0
    exclude = (~pair).long(), pair.long()
    each = pair_losses(image, text, scale, gather, exclude=exclude, walk=walk)
    sample_loss = each.masked_fill(~pair, 0)
    count = gather.sum_(pair.sum()).clamp(min=1)
    return gather.total(sample_loss.sum()) / count, sample_loss.detach()


class Method(cross_entropy.Method):
    """Sum of the two means, each over its own part of the global batch."""

    Config = CoreOptions
    needs_pairs = True

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        image = model.encode_image(batch["image"][:, 0])
        text = text_features(model, batch)
        return {
            "logits": self.head(image["pooled"].to(self.head.weight.dtype)),
            "image": image["feature"],
            "text": text,
            "scale": model.scale().expand(len(text)),
        }

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        out = super().loss(features, labels, gather)
        image, text, scale = features["image"], features["text"], features["scale"][:1]
        loss, of_pairs = pairs_loss(image, text, labels, scale, gather, self.walk())
        out["sample_loss"] = torch.where(labels < 0, of_pairs.float(), out["sample_loss"])
        out["contrastive_loss"] = loss + zero_like_graph(features)
        return out
