"""CLIP (arXiv 2103.00020): every sample is its own only positive, labels are not used.

The special case of UniCL in which all labels differ; baseline of the paper's Table 6.
"""

import torch
from torch import Tensor

from losses import unicl
from losses._gather import Gather
from losses._method import Features


class Method(unicl.Method):
    """Symmetric cross-entropy on the diagonal; image-label samples count as captions."""

    mixes = True

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        return super().loss(features, torch.full_like(labels, -1), gather)
