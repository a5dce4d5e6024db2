"""A model for looking at: unit vectors of words and of pictures."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from eval.explorer.collection import Collection
from eval.tasks.features import Extractor
from loaders import views
from loaders.errors import ConfigError, DataError
from loaders.workers import GuardedLoader


class Encoder:
    """One checkpoint. Several threads may ask.

    Attributes:
        name: of the run, with its step.
        width: D, of the vectors.
        description: what decides the vectors of pictures and captions, for the index.
    """

    def __init__(self, extractor: Extractor) -> None:
        """Raises ConfigError for a model that compares tokens: the one vector that it has for an
        image is not trained, and an index would need a vector for every patch and word."""
        run = extractor.run
        if extractor.late:
            raise ConfigError(
                f"{run.name}: model.similarity=late compares tokens, and no vector stands for a "
                "picture or a text; eval.retrieval and eval.plots show what such a model finds"
            )
        self.extractor = extractor
        self.name = run.name if run.step is None else f"{run.name}, step {run.step}"
        self.width = extractor.model.embed_dim
        self.description = {
            "checkpoint": run.checkpoint_hash,
            "reference": run.reference,
            "transform": [extractor.size, extractor.transform.mean, extractor.transform.std],
            "tokenizer": [extractor.tokenizer.digest, extractor.tokenizer.context_length],
        }
        self._view = views.build_eval(extractor.size, extractor.size)
        self._lock = threading.Lock()

    def texts(self, texts: list[str]) -> Tensor:
        """(n, D) float32 of unit length, of n texts that fit into a batch."""
        with self._lock:
            return self._encode(self.extractor.model.encode_text, self.extractor.tokenizer(texts))

    def image(self, image: Image.Image) -> Tensor:
        """(D,) float32 of unit length. Raises `views.BadImage` for one too long and narrow."""
        with self._lock:
            return self._images(self._view(image)[None])[0]

    def text_batches(self, texts: list[str], start: int) -> Iterator[np.ndarray]:
        """Vectors (b, D) of the texts from `start` on, batch by batch."""
        for first in range(start, len(texts), self.extractor.batch_size):
            yield self.texts(texts[first : first + self.extractor.batch_size]).numpy()

    def image_batches(self, collection: Collection, start: int) -> Iterator[np.ndarray]:
        """Vectors (b, D) of the pictures from `start` on, batch by batch; NaN for one that cannot
        be read."""
        loader = GuardedLoader(
            _Pictures(collection, self._view, self.extractor.size, start),
            batch_size=self.extractor.batch_size,
            num_workers=self.extractor.workers,
        )
        for images, readable in loader:
            vectors = self._images(images)
            if not vectors.isfinite().all():
                raise DataError(
                    f"{self.name}: image features are not finite, the run has diverged; take an "
                    "earlier checkpoint (RUN/checkpoints/step_*)"
                )
            vectors[~readable] = torch.nan
            yield vectors.numpy()

    def class_weights(self, collection: Collection, templates: list[str]) -> Tensor:
        """(K, D) of unit length, as in zero-shot evaluation."""
        names = collection.row.class_texts(collection.classes)
        return self.extractor.class_weights(names, templates).float().cpu()

    def _images(self, images: Tensor) -> Tensor:
        values = self.extractor.transform.normalize(images)
        return self._encode(self.extractor.model.encode_image, values)

    def _encode(self, encode: Callable[[Tensor], dict[str, Tensor]], batch: Tensor) -> Tensor:
        with torch.inference_mode():
            found = encode(batch.to(self.extractor.accelerator.device))["feature"].float().cpu()
        return found.clone()  # one that may be written to


class _Pictures(Dataset):
    """Pictures from `start` on: uint8 (3, size, size), and whether it could be read."""

    def __init__(self, collection: Collection, view, size: int, start: int) -> None:
        self._source, self._view = collection.source, view
        self._blank, self._start = torch.zeros(3, size, size, dtype=torch.uint8), start

    def __len__(self) -> int:
        return len(self._source) - self._start

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            return self._view(self._source.image(self._start + i)), True
        except (LookupError, views.BadImage):
            return self._blank, False
