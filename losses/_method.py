"""The contract of a method. A method is one file `losses/<name>.py` with `Config` and `Method`.

The engine calls `encode` once per micro-batch and `loss` once on the features of all of them.
Gradient caching, gathering, checkpoints and logging live outside; a method gets them for free
as long as `loss` sees the batch only through what `encode` and `targets` returned and through the
labels. What a method remembers between steps lives in buffers that are equal on all ranks.
"""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from losses._block import Walk
from losses._gather import Gather

Features = dict[str, Tensor]
PER_SAMPLE = ("sample_loss", "positives")  # of what `loss` returns, also where b = 1


@dataclasses.dataclass
class NoOptions:
    """Configuration of a method that has no options."""


@dataclasses.dataclass
class CoreOptions:
    """keep_mib: memory per rank for logits that a CPU keeps for the backward pass, in MiB."""

    keep_mib: int = 64


class Method(nn.Module):
    """Base of all methods: one image view, one text view, normalised features.

    Class attributes:
        Config: dataclass of the method's own configuration keys.
        images, texts: names of the image and text views that the loader must deliver, in the order
            of `batch["image"][:, v]` and `batch["text"][:, t]`.
        mixes: True when `loss` blends its targets by `features["mix"]` (`losses._mixing`). Not
            inherited: a method that changes another's `encode` or `loss` says it itself.
        texts_differ: True when the text views are texts of different kinds, so that `data.caption`
            must give each a source of its own.
        blends_neighbours: True when `encode` blends each sample with its neighbour (position xor
            1), so that a micro-batch must be of even size.
        needs_labels: True when a batch without image-label samples makes no sense.
        needs_pairs: True when a batch without image-text pairs makes no sense.
        needs_parameters: True when `encode` reads `batch["augmentation"]`, so that every recipe of
            `data.augmentation` must report what it did.
        teacher: True when the method learns from an average of its own weights (`targets`).
        smallest_batch: samples that a global batch needs at least.

    Attributes:
        precision: type of the weights in the forward pass, set by the engine.
    """

    Config: ClassVar[type] = NoOptions
    images: ClassVar[tuple[str, ...]] = ("image",)
    texts: ClassVar[tuple[str, ...]] = ("text",)
    texts_differ: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    blends_neighbours: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_pairs: ClassVar[bool] = False
    needs_parameters: ClassVar[bool] = False
    teacher: ClassVar[bool] = False
    smallest_batch: ClassVar[int] = 1
    precision: torch.dtype = torch.float32

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__()
        self.cfg = cfg

    @classmethod
    def check_model(cls, model: Any) -> None:
        """Refuse a model that this method cannot train, before anything is built.

        Args:
            model: a `models.config.ModelConfig`.

        Raises:
            ValueError: names the key of `model:` and what it has to be.
        """

    def walk(self) -> Walk:
        """How the core walks the logits of a method whose options are `CoreOptions` or more."""
        return Walk(self.cfg.keep_mib * 2**20, precision=self.precision)

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        """Per-sample tensors of one micro-batch, each with first dimension b.

        Args:
            model: a `models.base.Model` (`encode_image`, `encode_text`, `scale`).
            batch: tensors on the device, described in docs/design.md ("Batch").

        Returns:
            `image` (b, D) and `text` (b, D), l2-normalised; `scale` (b,), the multiplier
            repeated, so that its gradient reaches the model through the same path as that
            of any feature (see gradient caching in engine/step.py).
        """
        image = model.encode_image(batch["image"][:, 0])["feature"]
        text = text_features(model, batch)
        return {"image": image, "text": text, "scale": model.scale().expand(len(image))}

    def targets(self, teacher: nn.Module, batch: dict[str, Tensor]) -> Features:
        """What the teacher says of one micro-batch, for `loss`; asked for if `teacher` is True.

        Called without gradient, once per micro-batch: gradient caching does not repeat it.

        Args:
            teacher: `teacher.model` and `teacher.method` are averages of the student's, in
                evaluation mode.
            batch: as in `encode`.

        Returns:
            Tensors with first dimension b, under names that `encode` does not use.
        """
        raise NotImplementedError

    def decay(self, step: int) -> float:
        """How much of the teacher stays when it moves towards the weights after `step`; in [0, 1].

        Args:
            step: number of the step, from 0.
        """
        raise NotImplementedError

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        """Loss of the global batch, given this rank's share of it.

        Called exactly **once** per optimizer step, however the batch is cut, so it may move a
        history or a running mean. A step that loss scaling skips under fp16 counts as a step: it
        moves histories, queues and the teacher, in the same way on every rank.

        Args:
            features: what `encode` and `targets` returned, micro-batches concatenated.
            labels: (b,) int64: class id >= 0, -1 image-text pair, <= -2 equal captions.
            gather: the ranks that share the batch.

        Returns:
            Scalars named `*_loss` (they are summed; the mean over ranks is the global loss);
            optionally `sample_loss` (b,) and `positives` (b,) for the log; and any other scalars
            to be logged under their names, the same names in every step and on every rank.
        """
        raise NotImplementedError

    def forward(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        """`loss`, called as a module so that DeepSpeed's parameter hooks run."""
        return self.loss(features, labels, gather)

    def step_end(self) -> None:
        """Called once after each optimizer step, before the teacher moves (queues)."""


def text_features(model: nn.Module, batch: dict[str, Tensor] | Tensor, view: int = 0) -> Tensor:
    """Features of a text view, equal texts encoded once unless the tower has dropout.

    Image-label samples of one class and template have equal texts, and so equal features, whose
    gradients add up. Which texts are distinct was found by `loaders.text_shapes` before the batch
    travelled, because a device would have to be waited for.

    Args:
        batch: what `Method.encode` is given; or (b, L) int64 token ids, which a method has made or
            altered itself, and which are encoded as they are.
        view: the number of the view in `Method.texts`.

    Returns:
        (b, D) of unit length.
    """
    if isinstance(batch, Tensor):
        return model.encode_text(batch)["feature"]
    # With dropout equal texts get masks of their own.
    if "distinct_text" not in batch or (model.training and model.text_has_dropout):
        return model.encode_text(batch["text"][:, view])["feature"]
    distinct = model.encode_text(batch["distinct_text"][view])["feature"]
    return distinct[batch["text_index"][:, view]]


def multiplier(logarithm: Tensor, highest: float) -> Tensor:
    """exp of a learnt logarithm of any shape, at least 1 and at most `highest`; float32 or wider.

    The gradient passes the bounds, so that a value that overshoots comes back.
    """
    logarithm = logarithm.to(torch.promote_types(logarithm.dtype, torch.float32))
    value = logarithm.detach()
    return (logarithm + (value.clamp(0, math.log(highest)) - value)).exp()


def scalars(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The items of what `Method.loss` returned that are one number each, as tensors of shape ()."""
    return {
        name: value.reshape(())
        for name, value in out.items()
        if name not in PER_SAMPLE and value.numel() == 1
    }


def loss_terms(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars named `*_loss`, whose sum is the loss."""
    return {name: value for name, value in scalars(out).items() if name.endswith("_loss")}


def zero_like_graph(features: Features) -> Tensor:
    """A scalar 0 that depends on all features, so that every rank runs the same backward."""
    return sum((f.sum() * 0 for f in features.values() if f.is_floating_point()), torch.zeros(()))
