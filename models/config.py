"""The `model:` section of a run's configuration, as dataclasses that refuse unknown keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config_parts import (
    AugmentationConfig,
    ReferenceConfig,
    RegionsConfig,
    Section,
    require,
)

# ImageNet's channel statistics, which UniCL and ELEVATER use (not CLIP's own).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Of the evaluation transform (loaders.views.build_eval), which every export describes.
INTERPOLATION = "bicubic"

# Kind of model -> the texts that it can be built with (`model.text.name`) -> its class, which
# `models.build` imports.
_TWO, _REFERENCE = "models.two_tower:TwoTower", "models.reference:ReferenceModel"
KINDS = {
    "two_tower": {"transformer": _TWO, "hf": _TWO},
    "one_tower": {
        "transformer": "models.joint_tower:JointTower",
        "pixels": "models.pixel_tower:PixelTower",
    },
    "reference": {"transformer": _REFERENCE, "hf": _REFERENCE},
}
SIMILARITIES = ("cosine", "late")
TEXT_TOWERS = ("transformer", "hf", "pixels")
RENDERED = "rendered"  # the tokenizer that draws a text (loaders.render)
HF_POOLINGS = ("first", "mean")


@dataclass(frozen=True)
class ImageConfig(Section):
    """Image tower: a preset of `models.image_timm` or any timm name.

    `size` is the side of the square input in pixels, `kwargs` go to `timm.create_model`, and
    `mean` and `std` are the channel statistics of RGB values in [0, 1].
    """

    name: str = "swin_tiny"
    size: int = 224
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    where = "model.image"

    def __post_init__(self) -> None:
        self.require_positive("size")
        for name in ("mean", "std"):
            value = getattr(self, name)
            require(len(value) == 3, f"{self.where}.{name} needs three numbers, got {value!r}")
            object.__setattr__(self, name, tuple(float(item) for item in value))
        require(min(self.std) > 0, f"{self.where}.std must be positive, got {self.std!r}")
        object.__setattr__(self, "kwargs", dict(self.kwargs or {}))


@dataclass(frozen=True)
class TextConfig(Section):
    """Text tower: `transformer` (CLIP's, as UniCL uses it), `hf` (a Hugging Face encoder), or
    `pixels`: texts are drawn by `tokenizer: rendered` and read by the image tower.

    `width`, `layers`, `heads` and `vocab_size` describe the transformer; an `hf` tower takes them
    from its own configuration. In `kind: one_tower` (see `ModelConfig`) `transformer` is no tower
    but words for the one there is. `hf_name` is a model name or folder; `hf_config` is a mapping
    with `model_type`, for an encoder from scratch. `pretrained` chooses between the stored weights
    and a fresh start for `hf_name`. `pooling` is the first token's state or the mean over tokens
    that are not padding. Of all keys `pixels` has `name` and `tokenizer` alone.
    """

    name: str = "transformer"
    width: int = 512
    layers: int = 12
    heads: int = 8
    context_length: int = 77
    vocab_size: int = 49408
    tokenizer: str = "clip"
    hf_name: str | None = None
    hf_config: Mapping[str, Any] | None = None
    pretrained: bool = True
    pooling: str = "first"

    where = "model.text"

    def __post_init__(self) -> None:
        require(
            self.name in TEXT_TOWERS,
            f"{self.where}.name must be one of {TEXT_TOWERS}, got {self.name!r} "
            "(for a Hugging Face model write name: hf and hf_name: ...)",
        )
        require(
            (self.name == "pixels") == (self.tokenizer == RENDERED),
            f"{self.where}: name: {self.name} does not go with tokenizer: {self.tokenizer}; texts "
            f"as pictures have name: pixels and tokenizer: {RENDERED}, both",
        )
        self.require_positive("width", "layers", "heads", "context_length", "vocab_size")
        require(
            self.width % self.heads == 0,
            f"{self.where}.width ({self.width}) must be divisible by heads ({self.heads})",
        )
        require(
            self.pooling in HF_POOLINGS,
            f"{self.where}.pooling must be one of {HF_POOLINGS}, got {self.pooling!r}",
        )
        sources = (self.hf_name is not None) + (self.hf_config is not None)
        if self.name == "hf":
            require(sources == 1, f"{self.where}: give exactly one of hf_name and hf_config")
        else:
            require(sources == 0, f"{self.where}: hf_name and hf_config need name: hf")


SECTIONS = {
    "image": ImageConfig,
    "text": TextConfig,
    "regions": RegionsConfig,
    "augmentation": AugmentationConfig,
    "reference": ReferenceConfig,
}
# Sections that may be absent -> the kind of model that they belong to.
PARTS = {"regions": "two_tower", "augmentation": "two_tower", "reference": "reference"}


@dataclass(frozen=True)
class ModelConfig(Section):
    """The whole model.

    `kind` is what its encoders are (`models.build`), `similarity` how an image and a text are
    compared wherever a model is used: by the cosine of their features, or token by token (`late`,
    FILIP's late interaction) by features of `token_dim` numbers for each of their tokens.
    `augmentation` is the part that is told what was done to an image; without it the model has
    none. In `one_tower` with `text.name: transformer` words go through the blocks of the image
    trunk, whose width, layers and heads the text section repeats; `two_projections` gives images
    and texts one each (two towers always have that).
    `reference` belongs to the kind of that name, and to no other.

    `logit_scale_init` is the stored, logarithmic value: UniCL's release starts at 1.0
    (multiplier e), CLIP at ln(1/0.07) = 2.659260036932778. `logit_scale_min` and
    `logit_scale_max` bound the multiplier itself (CLIP: at most 100); None means no bound.
    """

    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    logit_scale_init: float = 1.0
    logit_scale_min: float | None = None
    logit_scale_max: float | None = None
    kind: str = "two_tower"
    similarity: str = "cosine"
    token_dim: int | None = None
    regions: RegionsConfig | None = None
    augmentation: AugmentationConfig | None = None
    two_projections: bool = False
    reference: ReferenceConfig | None = None

    where = "model"

    def __post_init__(self) -> None:
        for name, section in SECTIONS.items():
            value = getattr(self, name)
            missing = value is None and name in PARTS
            if not missing and not isinstance(value, section):
                object.__setattr__(self, name, section.from_dict(value))
        self.require_positive("embed_dim")
        for name, known in (("kind", tuple(KINDS)), ("similarity", SIMILARITIES)):
            value = getattr(self, name)
            require(value in known, f"{self.where}.{name} must be one of {known}, got {value!r}")
        require(
            self.text.name in KINDS[self.kind],
            f"{self.where}.kind={self.kind} does not go with model.text.name={self.text.name}; "
            + ", ".join(f"{kind} takes {' or '.join(names)}" for kind, names in KINDS.items()),
        )
        self._check_parts()
        self._check_token_dim()
        self._check_joint()
        for name in ("logit_scale_min", "logit_scale_max"):
            bound = getattr(self, name)
            require(
                bound is None or bound > 0,
                f"{self.where}.{name} must be positive or null, got {bound!r}",
            )
        low, high = self.logit_scale_min, self.logit_scale_max
        require(
            low is None or high is None or low < high,
            f"{self.where}.logit_scale_min={low!r} must be less than logit_scale_max={high!r}",
        )

    def _check_parts(self) -> None:
        for name, kind in PARTS.items():
            require(
                getattr(self, name) is None or self.kind == kind,
                f"{self.where}.{name} belongs to {self.where}.kind={kind}, and this is "
                f"{self.kind!r}; leave it out",
            )
        require(
            self.kind != "reference" or self.reference is not None,
            f"{self.where}.kind=reference needs model.reference={{folder: DIR}}, a folder made by "
            "python -m eval.reference",
        )

    def _check_token_dim(self) -> None:
        late = self.similarity == "late"
        require(
            not late or self.kind == "two_tower",
            f"{self.where}.similarity=late compares the tokens of kind: two_tower; with "
            f"{self.where}.kind={self.kind} use similarity: cosine",
        )
        require(
            not late or self.token_dim is not None,
            f"{self.where}.similarity=late needs {self.where}.token_dim, the width of the features "
            "of the tokens (256 in FILIP)",
        )
        require(
            late or self.token_dim is None,
            f"{self.where}.token_dim={self.token_dim!r} belongs to {self.where}.similarity=late; "
            f"with {self.similarity} no token is compared, so leave it out",
        )
        if late:
            self.require_positive("token_dim")

    def _check_joint(self) -> None:
        """What is asked of words that go through the blocks of the image trunk."""
        joint = (self.kind, self.text.name) == ("one_tower", "transformer")
        require(
            not joint or self.text.tokenizer == "clip",
            f"{self.where}.kind=one_tower tells words from padding by the end token of "
            f"model.text.tokenizer=clip, the one it knows, got {self.text.tokenizer!r}",
        )
        require(
            joint or not self.two_projections,
            f"{self.where}.two_projections belongs to kind: one_tower with text.name: transformer; "
            "leave it out, two towers have a projection each",
        )

    def without_pretrained(self) -> ModelConfig:
        """The same architecture without starting weights, for a checkpoint that replaces them."""
        kwargs = {key: value for key, value in self.image.kwargs.items() if key != "pretrained"}
        return dataclasses.replace(
            self,
            image=dataclasses.replace(self.image, kwargs=kwargs),
            text=dataclasses.replace(self.text, pretrained=False),
        )
