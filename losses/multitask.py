"""Cross-entropy on image-label samples plus CLIP on image-text pairs.

The multi-task baseline (ii) of UniCL (arXiv 2204.03610), section "Benefit of image-label to
image-text": the two kinds of data share the image tower but not the objective.
"""

from typing import Any

import torch
from torch import Tensor, nn

from losses import cross_entropy
from losses._core import contrast
from losses._gather import Gather
from losses._method import Features, text_features, zero_like_graph


class Method(cross_entropy.Method):
    """Sum of the two means, each over its own part of the global batch."""

    needs_pairs = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)

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
        pairs = labels < 0
        result = contrast(
            features["image"][pairs],
            features["text"][pairs],
            torch.full_like(labels[pairs], -1),
            features["scale"][:1],
            gather,
        )
        out["sample_loss"] = out["sample_loss"].index_put((pairs,), result.sample_loss.float())
        out["contrastive_loss"] = result.loss + zero_like_graph(features)
        return out
