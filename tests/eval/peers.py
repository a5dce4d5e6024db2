"""CLIP_benchmark's view of a two-tower model and of our transform."""

import torch
from clip_benchmark.datasets import builder
from torch import nn
from torch.utils.data import DataLoader

from loaders import tokenizers, views
from tests.eval.conftest import MODEL, SIZE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Peer(nn.Module):
    """The two methods that CLIP_benchmark calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def encode_image(self, images):
        return self.model.encode_image(images)["feature"]

    def encode_text(self, ids):
        return self.model.encode_text(ids)["feature"]


def tokenizer():
    return tokenizers.build("clip", MODEL["text"]["context_length"])


def open_webdataset(root, collate=None):
    """Loader of CLIP_benchmark over ROOT/test, whose `dataset` has classes and templates."""
    view = views.build_eval(SIZE, SIZE)

    def transform(image):
        return views.normalize(view(image.convert("RGB")), MEAN, STD)

    data = builder.build_wds_dataset("toy", transform, data_dir=str(root))
    return DataLoader(data, batch_size=8, collate_fn=collate)


def pairs(batch):
    """Images as a tensor, captions as lists."""
    return torch.stack([image for image, _ in batch]), [texts for _, texts in batch]
