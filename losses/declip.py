"""DeCLIP: a pair supervised in four more ways (Li et al., arXiv 2110.05208).

An image has two views and a text has two: the caption, with tokens masked, and another wording.
With U_a, V_b their features of unit length, a, b in {1, 2}, s the multiplier, B pairs on all ranks,
and pair(a, b) the loss of CLIP between U_a and V_b:

    pair(1, 1)                                                    CLIP
    the other pair(a, b)                                          multi-view
    S = - [ cos(p_1, z_2) + cos(p_2, z_1) ] / 2, mean             self-supervision of images
    T = mean over masked tokens of -log P(token | those before)   self-supervision of texts
    N = 1/4 sum_ab 1/B sum_i [ log sum_j exp(s U_a,i . n_b,j) - s U_a,i . n_b,i ]     neighbours

S is SimSiam's (arXiv 2011.10566): z the projection of an image's feature, p the prediction from it,
no gradient through z. n_b,i is the feature nearest to V_b,i in a queue of texts of earlier steps,
without gradient, so N trains images and the multiplier only. The weights are

    released: c (sum of all four pairs) / 4      + w (S + T) + v N
    paper:    c pair(1, 1) + m (other three) / 3 + w (S + T) + v N

with c = 0.4 and w = v = m = 0.2. `released` is the default: it is what Sense-GVT/DeCLIP at 5d99a85
computes, while the other form, and that the three are averaged, is quoted from memory.

Other than there: the batch norms of the heads, the mean over masked tokens and the queue are over
all ranks, where they were each rank's own; the queue starts empty instead of with random features,
N is 0 before anything is in it, and 65,536 features are those of fewer steps; a random token is
never a special one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._block import Walk
from losses._core import normalisers, pair_losses
from losses._gather import Gather
from losses._heads import Mlp
from losses._masking import CLIP_IDS, guessed, mask_tokens, word_head
from losses._method import CoreOptions, Features, text_features
from losses._method import Method as Base
from losses._queue import Queue


def neighbour_loss(
    images: Sequence[Tensor],
    neighbours: Sequence[Tensor],
    scale: Tensor,
    gather: Gather,
    walk: Walk,
) -> Tensor:
    """N of each sample (b,), images to texts only; its mean over all ranks is N.

    The images of all views are rows of one walk, because only their own normalisers are used.

    Args:
        images: (b, D) of each view, of unit length. neighbours: (b, D) of each text, no gradient.
        scale: (1,) multiplier of the cosines. gather, walk: as for `losses._core.normalisers`.
    """
    rows, found = torch.cat(images), []
    for text in neighbours:
        over_texts, _ = normalisers(rows, text, scale, gather, walk=walk)
        matches = (rows * text.repeat(len(images), 1)).sum(1)
        found.append((over_texts - scale * matches).view(len(images), len(text)).mean(0))
    return torch.stack(found).mean(0)


def simsiam(predictions: list[Tensor], projections: list[Tensor]) -> Tensor:
    """S of each sample (b,), in [-1, 1] (arXiv 2011.10566, equations 1 to 4).

    Args:
        predictions, projections: p and z, (b, W) of two views, of any length.
    """
    targets = [other.detach() for other in reversed(projections)]
    pairs = zip(predictions, targets, strict=True)
    return -torch.stack([F.cosine_similarity(p, z, dim=1) for p, z in pairs]).mean(0)


@dataclass
class Config(CoreOptions):
    """Defaults: those of Sense-GVT/DeCLIP for YFCC15M; beside them the core's.

    weighting: `released` or `paper`. contrastive: c (0.6 in the released ViT-B/32 of 88 million
    pairs). multi_view: m, of `paper` alone. self_supervision: w. neighbours: v. queue: features of
    texts, two a sample. hidden: width of the projection's three layers. bottleneck: of the
    prediction's hidden layer.
    """

    weighting: str = "released"
    contrastive: float = 0.4
    multi_view: float | None = None
    self_supervision: float = 0.2
    neighbours: float = 0.2
    queue: int = 65536
    hidden: int = 1024
    bottleneck: int = 512

    def __post_init__(self) -> None:
        if self.weighting not in ("released", "paper"):
            raise ValueError(f"loss.weighting={self.weighting!r}; one of released, paper")
        if self.weighting == "released" and self.multi_view is not None:
            raise ValueError(
                f"loss.multi_view={self.multi_view}: the released weighting has one weight for all "
                "pairs, loss.contrastive; give loss.weighting=paper, or leave it out"
            )

    def shares(self) -> list[float]:
        """Weights of pair(1, 1), (1, 2), (2, 1), (2, 2)."""
        if self.weighting == "released":
            return [self.contrastive / 4] * 4
        other = 0.2 if self.multi_view is None else self.multi_view
        return [self.contrastive, *[other / 3] * 3]


class Method(Base):
    """Pairs; labels are not used. Four encodings a sample: two images and two texts."""

    Config = Config
    images = ("first", "second")
    texts = ("caption", "eda")

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.projector = Mlp([dims["embed_dim"], *[cfg.hidden] * 3], last_norm=True)
        self.predictor = Mlp([cfg.hidden, cfg.bottleneck, cfg.hidden])
        self.head = word_head(dims["text_width"], dims["vocab_size"])
        self.queue = Queue(cfg.queue, dims["embed_dim"])

    @classmethod
    def check_model(cls, model: Any) -> None:
        text = model.text
        if (text.name, text.tokenizer) != ("transformer", "clip") or text.vocab_size <= CLIP_IDS:
            raise ValueError(
                f"loss.name=declip masks tokens of CLIP's tokenizer by an id behind its {CLIP_IDS}:"
                f" give model.text.vocab_size={CLIP_IDS + 1} with model.text.name=transformer and "
                f"model.text.tokenizer=clip, not {text.vocab_size}, {text.name}, {text.tokenizer}"
            )

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        features = {
            name: model.encode_image(batch["image"][:, view])["projected"]
            for view, name in enumerate(self.images)
        }
        ids = batch["text"][:, 0]
        masked, chosen = mask_tokens(ids, model.text_mask(ids), batch["seed"])
        caption = model.encode_text(masked)
        sums, counts = guessed(self.head, caption["tokens"], ids, chosen)
        return {
            **features,
            "caption": caption["feature"],
            "eda": text_features(model, batch, 1),
            "masked_sum": sums,
            "masked_count": counts,
            "scale": model.scale().expand(len(ids)),
        }

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        cfg, sizes = self.cfg, gather.sizes(len(labels), labels.device)
        count = max(sum(sizes), 1)
        views = [features[name] for name in self.images]
        images = [F.normalize(view, dim=1) for view in views]
        texts = [features[name] for name in self.texts]
        walk = self.walk()
        scale = features["scale"][:1]
        # Two views cannot share a walk: the normalisers of a text over both views of the images
        # would be those of another loss. So four pairs are four walks, each logit computed once.
        pairs = [(image, text) for image in images for text in texts]
        pairings = [pair_losses(*pair, scale, gather, walk=walk) for pair in pairs]
        nearest = self.queue.nearest(torch.cat(texts)).chunk(2)
        near = neighbour_loss(images, nearest, scale, gather, walk)
        # Behind the walks, so that the backward pass frees the heads' memory before it walks.
        projections = [self.projector(view, gather) for view in views]
        predictions = [self.predictor(projection, gather) for projection in projections]
        masked = gather.sum_(features["masked_count"].detach().sum()).clamp(min=1)
        terms = {  # of each sample; the mean over the global batch is the term
            "contrastive_loss": sum(w * x for w, x in zip(cfg.shares(), pairings, strict=True)),
            "simsiam_loss": cfg.self_supervision * simsiam(predictions, projections),
            "masked_loss": cfg.self_supervision * features["masked_sum"] * (count / masked),
            "neighbour_loss": cfg.neighbours * near.masked_fill(self.queue.written == 0, 0),
        }
        # Text by text: the order must not depend on the number of ranks.
        rows = [gather.rows(text.detach(), sizes) for text in reversed(texts)]
        self.queue.keep(torch.cat(rows))
        means = gather.total(torch.stack([each.sum() for each in terms.values()])) / count
        out = dict(zip(terms, means, strict=True))
        return {**out, "sample_loss": sum(terms.values()).detach()}

    def step_end(self) -> None:
        self.queue.write()
