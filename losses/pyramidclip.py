"""PyramidCLIP: two crops, objects, and three texts, in six pairs (Gao et al., arXiv 2204.14095).

Of an image a global crop g, a local crop l and objects r that a detector has found; of its text a
summary s, the text t itself and tags a, which name what was detected. All six have unit length and
share one multiplier. With w_g, w_l the weights of the levels that are crossed,

    L = (1 - w_g - w_l) (L_gs + L_lt)/2  +  w_g (L_ga + L_rs)/2  +  w_l (L_la + L_rt)/2

    L_xy = -1/2B sum_ij q_ij (log softmax_j(scale x_i.y_j) + log softmax_j(scale y_i.x_j))
    q_ii = 1 - e,    q_ij = e / (B - 1) elsewhere

over the global batch. These targets are those of `losses/align.py` with a smoothing of e B/(B - 1).
Without objects two pairs fall away, and a crossed level is the pair that it has left.

No training program was released; pairs, weights and e are those that others quote of the paper. As
quoted, q_ii is 1 - e + e/(B - 1), so that a row adds up to more than 1: `targets=literal`. That is
1 + e/(B - 1) times ALIGN's loss with a smoothing of e B/(B - 1 + e). Whether B is the global batch
is not said; here it is.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losses._block import WALK, Walk
from losses._gather import Gather
from losses._method import CoreOptions, Features, text_features
from losses._method import Method as Base
from losses.align import align_loss

TARGETS = ("normalised", "literal")
OBJECTS = "regions"  # the feature of an image's objects
# Level -> its pairs of an image feature and a text feature.
LEVELS = {
    "peer": (("global", "summary"), ("local", "caption")),
    "cross_global": (("global", "tags"), (OBJECTS, "summary")),
    "cross_local": (("local", "tags"), (OBJECTS, "caption")),
}


def softened(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    softening: float,
    gather: Gather,
    targets: str = "normalised",
    walk: Walk = WALK,
) -> tuple[Tensor, Tensor]:
    """L_xy of one pair of features.

    Args:
        image, text: (b, D) l2-normalised features of this rank.
        scale: (1,) or scalar multiplier of the cosines.
        softening: e in [0, 1). targets: of TARGETS.
        gather: the ranks that share the batch. walk: memory, tiles and precision of the core.

    Returns:
        Scalar, the global loss, equal on every rank; loss per sample (b,) without gradient.
        Gradients follow the convention of `losses._gather`.

    Raises:
        ValueError: a global batch of one sample, which has nothing to share e with.
    """
    count = sum(gather.sizes(len(image), image.device))
    if count < 2:
        raise ValueError("softened targets need a global batch of at least 2 samples")
    total = 1 + softening / (count - 1) if targets == "literal" else 1.0
    smoothing = softening * count / ((count - 1) * total)
    loss, each = align_loss(image, text, scale, smoothing, gather, walk)
    return total * loss, total * each


@dataclass
class Config(CoreOptions):
    """Defaults: those quoted of the paper; beside them the core's.

    softening: e. global_weight, local_weight: w_g and w_l; with thirds all pairs count alike.
    objects: whether images have objects (`data_prep/annotate.py --arrays`), for which the model
    needs `model.regions`. targets: "normalised", or "literal" as the equation is quoted.
    """

    softening: float = 0.2
    global_weight: float = 1 / 3
    local_weight: float = 1 / 3
    objects: bool = True
    targets: str = "normalised"

    def __post_init__(self) -> None:
        weights = (self.global_weight, self.local_weight)
        if self.targets not in TARGETS:
            raise ValueError(f"loss.targets={self.targets!r} is not one of {', '.join(TARGETS)}")
        if not 0 <= self.softening < 1:
            raise ValueError(f"loss.softening={self.softening} is not in [0, 1)")
        if min(weights) < 0 or sum(weights) > 1:
            raise ValueError(
                f"loss.global_weight={weights[0]} and loss.local_weight={weights[1]} must not be "
                "negative, and not more than 1 together"
            )


class Method(Base):
    """Pairs with three texts; labels are not used. Two images, three texts and perhaps objects."""

    Config = Config
    images = ("global", "local")
    texts = ("summary", "caption", "tags")
    texts_differ = True
    needs_pairs = True
    smallest_batch = 2

    @classmethod
    def needs(cls, cfg: Any) -> tuple[str, ...]:
        return ("objects",) if cfg.objects else ()

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        found = {
            name: model.encode_image(batch["image"][:, view])["feature"]
            for view, name in enumerate(self.images)
        }
        found |= {name: text_features(model, batch, view) for view, name in enumerate(self.texts)}
        if self.cfg.objects:
            objects = model.encode_regions(batch["objects"], batch["objects_mask"])
            found[OBJECTS] = objects["feature"]
        return {**found, "scale": model.scale().expand(len(found["global"]))}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        cfg, walk, scale = self.cfg, self.walk(), features["scale"][:1]
        weights = (1 - cfg.global_weight - cfg.local_weight, cfg.global_weight, cfg.local_weight)
        out = {"sample_loss": 0}
        for (level, all_pairs), weight in zip(LEVELS.items(), weights, strict=True):
            pairs = [pair for pair in all_pairs if cfg.objects or OBJECTS not in pair]
            terms = [
                softened(features[x], features[y], scale, cfg.softening, gather, cfg.targets, walk)
                for x, y in pairs
            ]
            out[f"{level}_loss"] = weight * sum(loss for loss, _ in terms) / len(pairs)
            each = weight * sum(each for _, each in terms) / len(pairs)
            out["sample_loss"] = out["sample_loss"] + each
        return out
