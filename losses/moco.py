"""MoCo: contrast against the keys of earlier steps (He et al., arXiv 1911.05722; v2: 2003.04297).

Query q of one view, key k of the other from the teacher, both of unit length, and the keys
Q_1 .. Q_K of earlier steps in a queue; t is the temperature:

    L = mean_i [ log( exp(q_i.k_i / t) + sum_m exp(q_i.Q_m / t) ) - q_i.k_i / t ]

The teacher moves by the momentum after every step. This is the second version: two-layer head, no
batch norm in it. Two things differ from facebookresearch/moco at 4397a04: the queue starts empty
instead of with random keys, and slots that were never filled take no part; and the teacher's batch
norms use their running statistics instead of those of shuffled batches, so a key tells nothing
about the other samples of its batch.

Version 3 (no queue, a predictor, a frozen patch embedding, 2 t times the sum of both directions) is
another method and is not offered.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._gather import Gather
from losses._heads import Mlp
from losses._method import Features
from losses._method import Method as Base
from losses._queue import Queue


def moco_loss(
    query: Tensor, key: Tensor, negatives: Tensor, filled: Tensor, temperature: float
) -> Tensor:
    """Loss of each query (equation 1 of arXiv 1911.05722).

    Args:
        query: (b, D) of unit length. key: (b, D) of its other view, without gradient.
        negatives: (K, D) keys of earlier steps. filled: (K,) bool, which of them count.
        temperature: divides the cosines.

    Returns:
        (b,); 0 where no negative counts.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, negatives = query.to(dtype), key.to(dtype), negatives.to(dtype)
    positive = (query * key).sum(1, keepdim=True) / temperature
    others = (query @ negatives.T / temperature).masked_fill(~filled, float("-inf"))
    return torch.cat([positive, others], 1).logsumexp(1) - positive.squeeze(1)


@dataclass
class Config:
    """Defaults: those of `--moco-*` with v2's `--moco-t 0.2` in facebookresearch/moco.

    temperature: 0.07 in version 1, 0.2 in version 2. queue: keys that are kept. momentum: of the
    teacher. projection: width of the head's output.
    """

    temperature: float = 0.2
    queue: int = 65536
    momentum: float = 0.999
    projection: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"loss.momentum={self.momentum} must lie between 0 and 1")


class Method(Base):
    """Image-image: one view through the student, the other through the teacher."""

    Config = Config
    images = ("query", "key")
    teacher = True

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        width = dims["image_width"]
        self.head = Mlp([width, width, cfg.projection], norm=False)
        self.queue = Queue(cfg.queue, cfg.projection)

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        pooled = model.encode_image(batch["image"][:, 0])["pooled"]
        return {"query": F.normalize(self.head(pooled), dim=1)}

    def targets(self, teacher: nn.Module, batch: dict[str, Tensor]) -> Features:
        pooled = teacher.model.encode_image(batch["image"][:, 1])["pooled"]
        return {"key": F.normalize(teacher.method.head(pooled), dim=1)}

    def decay(self, step: int) -> float:
        return self.cfg.momentum

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        query, key, queue = features["query"], features["key"], self.queue
        sizes = gather.sizes(len(key), key.device)
        each = moco_loss(query, key, queue.rows, queue.filled(), self.cfg.temperature)
        queue.keep(gather.rows(key.detach(), sizes))
        loss = gather.total(each.sum()) / sum(sizes)
        return {"contrastive_loss": loss, "sample_loss": each.detach()}

    def step_end(self) -> None:
        self.queue.write()
