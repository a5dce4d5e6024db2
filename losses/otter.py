"""OTTER: contrast towards an optimal matching of the batch (Wu et al., arXiv 2112.09445).

Captions of a batch fit other images too. An averaged teacher with unit features v, t says how much:

    M^v = argmax <M, A> + l H(M)  over M >= 0 with all row and column sums 1/B,  M^t alike for A^T
    A_ij = g_v v_i.v_j + g_t t_i.t_j + v_i.t_j,  without the pairs themselves (i = j)

M is found by n iterations of Sinkhorn's algorithm (`losses._transport`), its rows brought to sum
1. The student's logits Z = s x y^T learn from both, with a the belief in the given pairs:

    L = CE(Z, a I + (1 - a) M^v) + CE(Z^T, a I + (1 - a) M^t)
    CE(Z, Y) = -1/B sum_i sum_j Y_ij log softmax_j(Z_i)

The released program (facebookresearch/OTTER at 605d317) subtracts the entropy of M, which is a
constant, and gives the second part, (1 - a) KL(M, .), a multiplier of its own (`form: released`).
It differs in what no option brings back: it gathers features without their gradient; on all ranks
but the first it excludes other samples than the pairs themselves, and by -100 instead of -inf; and
its teacher runs in training mode.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses._block import WALK, Walk
from losses._core import normalisers
from losses._gather import Gather
from losses._method import Features, multiplier, text_features
from losses._method import Method as Base
from losses._transport import Kernel, potentials, transported

FORMS = ("paper", "released")
SCALE_INIT, SCALE_MAX = 3.9, 100.0  # logarithm of the second multiplier, its bound; at least 1


@dataclass
class Config:
    """Defaults: those of the released launch script.

    alpha: belief in the given pairs, a. regularisation: l. iterations: n. image_weight,
    text_weight: g_v, g_t. momentum: of the teacher, which begins lower (`Method.decay`).
    form: "paper", or "released" with a multiplier for the matching alone, learnt from e^3.9.
    keep_mib: memory per rank for each of the similarities of the teacher, on any device, and the
    logits of the student, that a CPU keeps for the backward pass, in MiB.
    """

    alpha: float = 0.5
    regularisation: float = 0.15
    iterations: int = 5
    image_weight: float = 1.0
    text_weight: float = 1.0
    momentum: float = 0.999
    form: str = "paper"
    keep_mib: int = 64

    def __post_init__(self) -> None:
        for name in ("alpha", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.regularisation > 0:
            raise ValueError(f"loss.regularisation={self.regularisation} must be positive")
        if self.iterations < 0:
            raise ValueError(f"loss.iterations={self.iterations} must be at least 0")
        if self.form not in FORMS:
            raise ValueError(f"loss.form={self.form!r} is not one of {', '.join(FORMS)}")


def similarities(
    image: Tensor, text: Tensor, cfg: Config, gather: Gather, sizes: list[int], keep_bytes: int
) -> Kernel:
    """A / l, its rows those of this rank; collective.

    Args:
        image, text: (b, D) of the teacher, l2-normalised, float32 or wider, without gradient.
        sizes: b of every rank. keep_bytes: memory for A; the result does not depend on it.
    """
    columns = gather.rows(torch.cat([image, text], 1), sizes)
    rows = torch.cat([cfg.image_weight * image, cfg.text_weight * text + image], 1)
    return Kernel(rows / cfg.regularisation, columns, sum(sizes[: gather.rank]), keep_bytes)


def matching(
    features: Features, x: Tensor, y: Tensor, cfg: Config, gather: Gather, keep_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of both targets, W_ij = M^v_ij + M^t_ji; collective.

    Args:
        features: `teacher_image`, `teacher_text` (b, D); no gradient goes there.
        x, y: (b, D) of the student, float32 or wider.

    Returns:
        w_i = sum_j W_ij x_i.y_j (b,), with its gradient to x; the sum of w_i, (), with its gradient
        to the y of all ranks; the entropy of both targets by row of W, (b,), without gradient.
    """
    teacher = (features[f"teacher_{side}"].detach().to(x.dtype) for side in ("image", "text"))
    sizes = gather.sizes(len(x), x.device)
    kernel = similarities(*teacher, cfg, gather, sizes, keep_bytes)
    all_y = gather.rows(y, sizes)
    solved = potentials(kernel, cfg.iterations, gather)
    to_x, to_y, entropy = transported(kernel, *solved, x.detach(), all_y.detach())
    return (x * to_x).sum(1), (all_y * to_y).sum(), entropy


def otter_loss(
    features: Features, cfg: Config, gather: Gather, second: Tensor | None = None, walk: Walk = WALK
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the global batch, both directions added.

    Args:
        features: `image`, `text` (b, D), l2-normalised; `scale` (b,), the multiplier repeated; and
            as for `matching`.
        gather: the ranks that share the batch; b may differ between them.
        second: (1,) multiplier for the matching, with which the loss is the released one; None for
            the paper's. walk: memory, tiles and precision of the core.

    Returns:
        scalar, equal on every rank; loss per sample (b,) without gradient, whose mean over the
        global batch is the loss (in the matching, what the image gets in both directions); mean
        entropy of the targets M, (), in nats. Gradients follow the convention of `losses._gather`.

    Raises:
        ValueError: the global batch is one sample, which has no other to be matched with.
    """
    image, text, scale = features["image"], features["text"], features["scale"][:1]
    size = sum(gather.sizes(len(image), image.device))
    if size == 1:
        raise ValueError(
            "otter matches each sample with the others of the global batch, which has one sample; "
            "set train.global_batch to at least 2"
        )
    dtype = torch.promote_types(image.dtype, torch.float32)
    x, y, scale = image.to(dtype), text.to(dtype), scale.to(dtype).reshape(())
    matched, all_matched, entropy = matching(features, x, y, cfg, gather, walk.keep_bytes)
    lse = sum(normalisers(image, text, scale, gather, walk=walk))
    each = cfg.alpha * (lse - 2 * scale * (x * y).sum(1))
    if second is not None:
        scale = second.to(dtype).reshape(())
        lse = sum(normalisers(image, text, scale, gather, walk=walk)) - entropy
    each = each + (1 - cfg.alpha) * (lse - scale * matched)
    of_y = (1 - cfg.alpha) * scale * (all_matched - all_matched.detach())  # 0, with a gradient
    loss, entropy = gather.total(torch.stack([each.sum() - of_y, entropy.sum() / 2])) / max(size, 1)
    return loss, each.detach(), entropy.detach()


class Method(Base):
    """Image-label samples count as captions; labels are not used."""

    Config = Config
    teacher = True
    smallest_batch = 2

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        if cfg.form == "released":
            self.log_scale = nn.Parameter(torch.full((1,), SCALE_INIT))

    def targets(self, teacher: nn.Module, batch: dict[str, Tensor]) -> Features:
        image = teacher.model.encode_image(batch["image"][:, 0])["feature"]
        return {"teacher_image": image, "teacher_text": text_features(teacher.model, batch)}

    def decay(self, step: int) -> float:
        """min(momentum, (1 + n) / (10 + n)) with the n of the released program.

        There the teacher moves before each step, for the first time (n = 1) when it still equals
        the student; so what it takes on after step 0 is its second movement.
        """
        number = step + 2
        return min(self.cfg.momentum, (1 + number) / (10 + number))

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        released = self.cfg.form == "released"
        # The released program cuts the gradient at the bounds, where this one lets it pass.
        second = multiplier(self.log_scale, SCALE_MAX) if released else None
        loss, sample_loss, entropy = otter_loss(features, self.cfg, gather, second, self.walk())
        return {"contrastive_loss": loss, "sample_loss": sample_loss, "target_entropy": entropy}
