"""UniCL: unified contrastive learning in image-text-label space (arXiv 2204.03610).

Every sample is a triplet (image x, text t, label y). With u, v the l2-normalised features,
tau the multiplier and P(i) = {k : y_k = y_i} over the whole batch B:

    L_i2t = - sum_i 1/|P(i)| sum_{k in P(i)} log exp(tau u_i.v_k) / sum_j exp(tau u_i.v_j)  (2)
    L_t2i = - sum_j 1/|P(j)| sum_{k in P(j)} log exp(tau u_k.v_j) / sum_i exp(tau u_i.v_j)  (3)
    L_BiC = L_i2t + L_t2i                                                                   (1)

Algorithm 1 averages over rows and halves the sum of both directions, that is
L = L_BiC / (2 |B|); this is the form implemented. An image-text pair is its own only positive.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from losses._core import contrast
from losses._gather import Gather
from losses._method import Features
from losses._method import Method as Base


def unicl_loss(
    image_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    scale: Tensor,
    group: ProcessGroup | None = None,
) -> Tensor:
    """UniCL loss of the global batch (Algorithm 1), equal on every rank.

    Args:
        image_features, text_features: (b, D) l2-normalised features of this rank.
        labels: (b,) int64: class id >= 0 (0 is a class), -1 for an image-text pair, equal
            numbers <= -2 for pairs with equal captions. Not changed.
        scale: (1,) or scalar multiplier of the cosines, not its logarithm.
        group: ranks that share the batch; None is the default group, if one is initialised.

    Returns:
        Scalar. On R ranks the gradients are R times this rank's share of the global gradient,
        so that averaging over ranks, as DeepSpeed and DDP do, gives the exact gradient.
    """
    return contrast(image_features, text_features, labels, scale, Gather(group)).loss


@dataclass
class Config:
    """keep_mib: memory per rank for logits that a CPU keeps for the backward pass, in MiB."""

    keep_mib: int = 64


class Method(Base):
    """UniCL over image-label and image-text samples alike."""

    Config = Config

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        result = contrast(
            features["image"],
            features["text"],
            labels,
            features["scale"][:1],
            gather,
            keep_bytes=self.cfg.keep_mib * 2**20,
            precision=self.precision,
        )
        return {
            "contrastive_loss": result.loss,
            "sample_loss": result.sample_loss,
            "positives": result.positives,
        }
