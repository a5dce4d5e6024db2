"""LaCLIP with several texts at once (Fan et al., "Improving CLIP training with language rewrites",
arXiv 2305.20088).

Every image has M + 1 texts, its caption and M rewrites of it, each made in the style of one of M
examples. LaCLIP draws one of them in each step, and its loss is CLIP's: that is `loss.name=clip`
with a recipe of captions (`configs/laclip_vit_base_gcc12m.yaml`). The form here takes all of them:

    L_MT = 1/(M + 1) sum_m CLIP(images, texts m)

so that in term m the negatives of an image are the texts of the other images in the same style.
Images are encoded once. The paper describes this form at its end, no program of it was released,
and the equation, both of whose directions are averaged over m, is quoted from memory.

M = 4 as there, and the styles are the names of the text views, which `data.caption` gives their
sources: {original: {from: [txt]}, chatgpt: {from: [json.chatgpt]}, …}.
"""

import torch
from torch import Tensor, nn

from losses import unicl
from losses._gather import Gather
from losses._method import Features, text_features


class Method(unicl.Method):
    """Pairs; labels are not used, and an image-label sample gets five prompts."""

    texts = ("original", "chatgpt", "bard", "coco", "human")
    texts_differ = True

    def encode(self, model: nn.Module, batch: dict[str, Tensor]) -> Features:
        image = model.encode_image(batch["image"][:, 0])["feature"]
        texts = {name: text_features(model, batch, v) for v, name in enumerate(self.texts)}
        return {"image": image, **texts, "scale": model.scale().expand(len(image))}

    def loss(self, features: Features, labels: Tensor, gather: Gather) -> dict[str, Tensor]:
        own = torch.full_like(labels, -1)
        terms = [self._contrast(features, features[name], own, gather) for name in self.texts]
        return {
            "contrastive_loss": torch.stack([term.loss for term in terms]).mean(),
            "sample_loss": torch.stack([term.sample_loss for term in terms]).mean(0),
        }
