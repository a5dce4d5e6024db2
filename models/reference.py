"""Two towers whose images are enriched by what is near them in a reference set (`kind: reference`).

RA-CLIP (Xie et al., CVPR 2023). Of the paper only the abstract was within reach, and no program was
released, so this is a reconstruction. For an image with features v and its K nearest reference
pairs, of frozen image features u_r and frozen text features w_r,

    A_img = MHA(query v, keys P_u u_r, values P_v u_r)
    A_txt = MHA(query v, keys P_u u_r, values P_w w_r)      keys from images, values from texts
    v'    = v + a_img A_img + a_txt A_txt,    x = normalise(P v')

The gates a_img and a_txt start at 0, so that the first step is exactly that of CLIP. The text tower
is CLIP's. The features v are those before the projection P of the image tower, so that probes,
which read them, see the neighbours as well. The query is the image as the model gets it, crop and
augmentation included; nothing is stored for each training image.
"""

from __future__ import annotations

import copy
import dataclasses

from torch import Tensor, nn, zeros
from torch.nn import functional as F

from loaders.errors import ConfigError
from models import reference_folder
from models.config import ModelConfig
from models.retrieval import Retrieval
from models.two_tower import ImageEncoder, TwoTower


class GatedAttention(nn.Module):
    """gate * MHA(query, keys, values), for keys that are projected already and one query each."""

    def __init__(self, width: int, value_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(value_width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(zeros(1))

    def forward(self, features: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """features (b, W), keys (b, K, W), values (b, K, value_width) -> (b, W)."""
        parts = self.query(features)[:, None], keys, self.value(values)
        query, keys, values = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(query, keys, values)
        return self.gate * self.out(attended.flatten(1))


class Enrichment(nn.Module):
    """v + a_img A_img + a_txt A_txt, the equations above."""

    def __init__(self, width: int, image_width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.keys = nn.Linear(image_width, width, bias=False)
        self.image = GatedAttention(width, image_width, heads)
        self.text = GatedAttention(width, text_width, heads)
        # Of features of unit length these make entries as large as those of the tower's own.
        for part in (self.keys, self.image.value, self.text.value):
            nn.init.normal_(part.weight)
        for part in (self.image, self.text):
            nn.init.xavier_uniform_(part.query.weight)
            nn.init.xavier_uniform_(part.out.weight)

    def forward(self, features: Tensor, image: Tensor, text: Tensor) -> Tensor:
        """features (b, W); u (b, K, d_u) and w (b, K, d_w) of the neighbours -> (b, W)."""
        image, text = image.to(features.dtype), text.to(features.dtype)
        keys = self.keys(image)
        return features + self.image(features, keys, image) + self.text(features, keys, text)


class EnrichedEncoder(ImageEncoder):
    """`ImageEncoder` with a copy of the module; the frozen part is shared."""

    def __init__(self, model: ReferenceModel) -> None:
        super().__init__(model.image, model.image_projection)
        self.enrichment = copy.deepcopy(model.enrichment)
        self.retrieval = model.retrieval

    def forward(self, images: Tensor) -> Tensor:
        own = self.image(images)[0]
        return self.projection(self.enrichment(own, *self.retrieval(images)))


class ReferenceModel(TwoTower):
    """A two-tower model with a reference folder and the module that reads it.

    Attributes:
        retrieval: the frozen part, which is not registered (`models.retrieval`).
        enrichment: the trained part.
    """

    def __init__(self, cfg: ModelConfig) -> None:
        folder = reference_folder.find(cfg.reference)  # before the towers are built
        found = dataclasses.replace(
            cfg.reference, folder=str(folder.path), checksum=folder.checksum
        )
        super().__init__(dataclasses.replace(cfg, reference=found))
        if self.image_width % found.heads:
            raise ConfigError(
                f"model.reference.heads={found.heads} does not divide the image tower's width "
                f"{self.image_width}"
            )
        self.retrieval = Retrieval(folder, found.neighbours, cfg.image.mean, cfg.image.std)
        image_width, text_width = self.retrieval.image.shape[1], self.retrieval.text.shape[1]
        self.enrichment = Enrichment(self.image_width, image_width, text_width, found.heads)

    def pool(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As `TwoTower.pool`; what the neighbours add is in `pooled` alone."""
        own, tokens = self.image(images)
        return self.enrichment(own, *self.retrieval(images)), tokens

    def image_encoder(self) -> nn.Module:
        """As `Model.image_encoder`; the neighbours take part."""
        return EnrichedEncoder(self)
