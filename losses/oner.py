"""OneR: one tower for images, texts, and both at once (Jang et al., arXiv 2211.11153).

With F(I) and F(T) the features of an image and of its text, F(I|T) and F(T|I) those of the tokens
of one when the tower reads both together, and F(I,T|I,T) that of all tokens, each of unit length,

    ITC    F(I)                        and F(T)                  image-text contrast
    XMC    (F(I) + F(T)) / 2           and the same              cross-modal mixup
    CIC    (F(I|T) + F(T|I)) / 2       and (F(I) + F(T)) / 2     contextual invariance
    CMC    F(I,T|I,T)                  and (F(I) + F(T)) / 2     contextual mixup

are each CLIP's loss between two features of a sample, over the batches of all ranks. Their sum,
ITC + CMC at its best, has beside it the masked modelling of texts,

    M = mean over masked tokens, in the text alone and with its image, of -log P(token | the rest)

and trains one space for all inputs. Contrast and guesses come from the same passes, as in DeCLIP:
the text has masked tokens in all of them. With a mix on both sides, XMC's logit of a sample with
another is the mean of the four between their images and texts.

The table of objectives was quoted to us without its vertical bars: what is read together and what
is averaged is our reading of it. So are all weights, which are 1, that M counts both inputs alike,
and that mixes keep their length (`mixes: raw`). With `normalised` ones the positive of XMC is 1
whatever the features are, and it only repels. Images are not masked. There is no second view and no
average of the weights.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from losses._core import pair_losses
from losses._gather import Gather
from losses._masking import CLIP_IDS, guessed, mask_tokens, word_head
from losses._method import CoreOptions, Features, text_features
from losses._method import Method as Base

MIX, CONTEXT = ("image", "text"), ("image_in_text", "text_in_image")
# The features whose mean is on each side, by their names in `sides`.
OBJECTIVES = {
    "itc": (("image",), ("text",)),
    "xmc": (MIX, MIX),
    "cic": (CONTEXT, MIX),
    "cmc": (("both",), MIX),
}
MIXES = ("raw", "normalised")


@dataclass
class Config(CoreOptions):
    """Defaults: the last row of the paper's ablation; beside them the core's.

    objectives: which of OBJECTIVES are added. mixes: the mean of two features as it is (`raw`), or
    of unit length (`normalised`). masked: weight of M; with 0 texts are not masked.
    """

    objectives: list[str] = field(default_factory=lambda: ["itc", "cmc"])
    mixes: str = "raw"
    masked: float = 1.0

    def __post_init__(self) -> None:
        given = self.objectives
        known = isinstance(given, list) and all(name in OBJECTIVES for name in given)
        if not known or not given or len(set(given)) < len(given):
            raise ValueError(
                f"loss.objectives={given!r}: a list of some of {', '.join(OBJECTIVES)}, each once"
            )
        if self.mixes not in MIXES:
            raise ValueError(f"loss.mixes={self.mixes!r}; one of {', '.join(MIXES)}")
        if self.masked < 0:
            raise ValueError(f"loss.masked={self.masked} is negative")


def sides(
    features: Features, objectives: list[str], mixes: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """The two features (b, D) that each objective contrasts, by its name.

    Args:
        features: `image` and `text`, F(I) and F(T); for CIC `image_in_text` and `text_in_image`,
            F(I|T) and F(T|I); for CMC `both`, F(I,T|I,T). All (b, D) of unit length.
        objectives: of OBJECTIVES. mixes: of MIXES.
    """

    def mix(names: tuple[str, ...]) -> Tensor:
        first, *others = (features[name] for name in names)
        mean = (first + others[0]) / 2 if others else first
        return F.normalize(mean, dim=1) if others and mixes == "normalised" else mean

    found = {side: mix(side) for name in objectives for side in OBJECTIVES[name]}
    return {name: tuple(found[side] for side in OBJECTIVES[name]) for name in objectives}


class Method(Base):
    """Pairs; image-label samples count as captions. Two passes a sample, three with CIC or CMC."""

    Config = Config

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        needed = {name for each in cfg.objectives for side in OBJECTIVES[each] for name in side}
        self.together = needed - set(MIX)  # of F(I|T), F(T|I) and F(I,T|I,T)
        masks = cfg.masked > 0
        self.head = word_head(dims["text_width"], dims["vocab_size"]) if masks else None

    @classmethod
    def check_model(cls, model: Any) -> None:
        text = model.text
        if (model.kind, text.name) != ("one_tower", "transformer"):
            raise ValueError(
                "loss.name=oner reads images and texts together: give model.kind=one_tower with "
                f"model.text.name=transformer, not {model.kind}, {text.name}"
            )
        if text.vocab_size <= CLIP_IDS:
            raise ValueError(
                f"loss.name=oner masks tokens by an id behind the {CLIP_IDS} of CLIP's tokenizer: "
                f"give model.text.vocab_size={CLIP_IDS + 1}, not {text.vocab_size}"
            )

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        images, ids = batch["image"][:, 0], batch["text"][:, 0]
        features = {
            "image": model.encode_image(images)["feature"],
            "scale": model.scale().expand(len(ids)),
        }
        states, shown = [], ids
        if self.head is None:
            features["text"] = text_features(model, batch)
        else:
            shown, chosen = mask_tokens(ids, model.text_mask(ids), batch["seed"])
            text = model.encode_text(shown)
            features["text"] = text["feature"]
            states.append(text["tokens"])
        if self.together:
            pair = model.encode_pair(images, shown)
            names = {"image_in_text": "image", "text_in_image": "text", "both": "both"}
            features |= {name: pair[names[name]] for name in sorted(self.together)}
            states.append(pair["text_tokens"])
        if self.head is not None:
            each = [guessed(self.head, tokens, ids, chosen) for tokens in states]
            features["masked_sum"] = sum(sums for sums, _ in each)
            features["masked_count"] = sum(counts for _, counts in each)
        return features

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        scale, walk = features["scale"][:1], self.walk()
        terms = {  # of each sample; the mean over the global batch is the term
            f"{name}_loss": pair_losses(*pair, scale, gather, walk=walk)
            for name, pair in sides(features, self.cfg.objectives, self.cfg.mixes).items()
        }
        sizes = gather.sizes(len(labels), labels.device)
        count = max(sum(sizes), 1)
        if self.head is not None:
            masked = gather.sum_(features["masked_count"].detach().sum()).clamp(min=1)
            share = self.cfg.masked * count / masked
            terms["masked_loss"] = features["masked_sum"] * share
        means = gather.total(torch.stack([each.sum() for each in terms.values()])) / count
        out = dict(zip(terms, means, strict=True))
        return {**out, "sample_loss": sum(terms.values()).detach()}
