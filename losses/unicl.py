"""UniCL: unified contrastive learning in image-text-label space (arXiv 2204.03610).

Every sample is a triplet (image x, text t, label y). With u, v the l2-normalised features,
tau the multiplier and P(i) = {k : y_k = y_i} over the whole batch B:

    L_i2t = - sum_i 1/|P(i)| sum_{k in P(i)} log exp(tau u_i.v_k) / sum_j exp(tau u_i.v_j)  (2)
    L_t2i = - sum_j 1/|P(j)| sum_{k in P(j)} log exp(tau u_k.v_j) / sum_i exp(tau u_i.v_j)  (3)
    L_BiC = L_i2t + L_t2i                                                                   (1)

Algorithm 1 averages over rows and halves the sum of both directions, that is
L = L_BiC / (2 |B|); this is the form implemented. An image-text pair is its own only positive.
"""

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from losses import _mixing
from losses._core import Contrast, contrast
from losses._gather import Gather
from losses._method import CoreOptions, Features
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


class Method(Base):
    """UniCL over image-label and image-text samples alike."""

    Config = CoreOptions
    mixes = True

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        features = super().encode(model, batch)
        return features | {key: batch[key] for key in (_mixing.KEY,) if key in batch}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        result = self._contrast(features, features["text"], labels, gather)
        loss, sample_loss = result.loss, result.sample_loss
        if _mixing.KEY in features:
            # A partner's positives are those of its label: the texts and labels of this rank,
            # swapped together, are the same texts, so only the targets differ.
            swapped = _mixing.swapped(features["text"]), _mixing.swapped(labels)
            other, share = self._contrast(features, *swapped, gather), features[_mixing.KEY][0]
            share = share.detach()
            loss = share * loss + (1 - share) * other.loss
            sample_loss = share * sample_loss + (1 - share) * other.sample_loss
        return {
            "contrastive_loss": loss,
            "sample_loss": sample_loss,
            "positives": result.positives,
        }

    def _contrast(
        self, features: Features, texts: Tensor, labels: Tensor, gather: Gather
    ) -> Contrast:
        return contrast(
            features["image"],
            texts,
            labels,
            features["scale"][:1],
            gather,
            keep_bytes=self.cfg.keep_mib * 2**20,
            precision=self.precision,
        )
