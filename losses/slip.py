"""SLIP: CLIP and self-supervision of the image tower (Mu et al., arXiv 2112.12750).

    L = L_CLIP(image of the weak view, text) + w L_NT-Xent(first strong view, second strong view)

The second term is SimCLR's (`losses/simclr.py`), on the pooled feature before the projection to the
space of the texts, so it reaches the image tower and its own head only. The released program
(facebookresearch/SLIP at c6faf5d) gathers images and texts without their gradient, which is not
the gradient of this loss on more than one rank; here both terms have the exact one.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from losses import clip
from losses._gather import Gather
from losses._heads import Mlp
from losses._method import CoreOptions, Features
from losses.simclr import nt_xent, project


@dataclass
class Config(CoreOptions):
    """Defaults: those of facebookresearch/SLIP; beside them the core's.

    weight: of the self-supervised term. temperature: divides its cosines. hidden: width of the two
    hidden layers of its head. projection: width of the head's output.
    """

    weight: float = 1.0
    temperature: float = 0.1
    hidden: int = 4096
    projection: int = 256


class Method(clip.Method):
    """Pairs; labels are not used. Four encodings a sample: three images and a text."""

    Config = Config
    images = ("weak", "strong1", "strong2")

    def __init__(self, cfg: Any, dims: dict[str, int]):
        super().__init__(cfg, dims)
        self.head = Mlp([dims["image_width"], cfg.hidden, cfg.hidden, cfg.projection])

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        strong = {
            name: model.encode_image(batch["image"][:, view])["pooled"]
            for view, name in enumerate(self.images[1:], 1)
        }
        return {**super().encode(model, batch), **strong}  # the base encodes the weak view

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        out = super().loss(features, labels, gather)
        first, second = (project(self.head, features[name], gather) for name in self.images[1:])
        loss, each = nt_xent(first, second, self.cfg.temperature, gather, self.walk())
        out["simclr_loss"] = self.cfg.weight * loss
        out["sample_loss"] = out["sample_loss"] + self.cfg.weight * each
        return out
