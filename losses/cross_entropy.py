"""Cross-entropy with a linear classifier on the image tower, the supervised baseline.

Table 2 and 5 of UniCL (arXiv 2204.03610). Only image-label samples enter.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses import _mixing
from losses._gather import Gather
from losses._method import Features, zero_like_graph
from losses._method import Method as Base


def cross_entropy(logits: Tensor, labels: Tensor, gather: Gather) -> Tensor:
    """Mean cross-entropy over the labelled samples of the global batch.

    Args:
        logits: (b, K). labels: (b,) int64, negative labels are left out.
        gather: the ranks that share the batch.

    Returns:
        Scalar of this rank; its mean over ranks is the global mean, whatever the ranks'
        shares of labelled samples. 0 when there is none.
    """
    labelled = labels >= 0
    count = gather.sum_(labelled.sum()).clamp(min=1)
    targets = labels.masked_fill(~labelled, -100)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    return total * gather.world_size / count


class Method(Base):
    """Classifier head on the pooled image feature, before the projection."""

    mixes = True
    needs_labels = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.head = nn.Linear(dims["image_width"], dims["num_classes"])
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        pooled = model.encode_image(batch["image"][:, 0])["pooled"]
        features = {"logits": self.head(pooled.to(self.head.weight.dtype))}
        return features | {key: batch[key] for key in (_mixing.KEY,) if key in batch}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        logits = features["logits"]
        loss, per_sample = cross_entropy(logits, labels, gather), _per_sample(logits, labels)
        if _mixing.KEY in features:
            share, others = features[_mixing.KEY][0].detach(), _mixing.swapped(labels)
            loss = share * loss + (1 - share) * cross_entropy(logits, others, gather)
            per_sample = share * per_sample + (1 - share) * _per_sample(logits, others)
        loss = loss + zero_like_graph(features)
        return {"classification_loss": loss, "sample_loss": per_sample}


@torch.no_grad()
def _per_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) cross-entropy of each sample, 0 without a label."""
    ignored = labels.masked_fill(labels < 0, -100)
    return F.cross_entropy(logits.float(), ignored, reduction="none")
