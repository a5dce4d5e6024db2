"""Feature extraction over one or many processes, with a cache on disk that cannot go stale."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from eval import rows
from eval.sources.splits import EvalSplit
from loaders.errors import ConfigError, DataError
from loaders.progress import Progress
from loaders.workers import GuardedLoader
from models import loading
from models.config import ModelConfig
from models.transform import Transform
from models.weights import LoadedRun

Features = dict[str, torch.Tensor]
# Of a model with `similarity: late`; the mask belongs to texts. Both are kept as float32: 16 bits
# would halve the file and move scores by 1e-4, enough to decide between neighbours.
TOKENS = ("token_features", "token_mask")
# Methods (`loss.name`) that train the image tower alone, and of it what is before the projection.
IMAGES_ALONE = frozenset({"cross_entropy", "moco", "simclr", "supcon"})
INITIAL_DEVIATION = 0.02  # of the weights of a random head


def rank_batches(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Sample indices of every batch of `rank`: batch j of the data set goes to rank j mod W.

    All ranks have equally many; one without a batch in the last round gets the last sample alone,
    and its features are to be dropped. So the composition and shape of a batch of the data set do
    not depend on W, nor do its features, to the bit.
    """
    stride = batch_size * world_size
    starts = range(rank * batch_size, -(-n // stride) * stride, stride)
    return [list(range(start, min(start + batch_size, n))) or [n - 1] for start in starts]


@torch.inference_mode()
def encode(
    accelerator: Accelerator,
    dataset,
    encode_batch: Callable[[torch.Tensor], Features],
    batch_size: int,
    workers: int,
    title: str,
) -> Features | None:
    """Features of a map-style `dataset` of tensors: main process {"feature": (n, D), "pooled":
    (n, W)} float32 on the CPU in the order of the data set, other processes None. With what
    `encode_batch` gives of TOKENS: "token_features" (n, N, d), "token_mask" (n, N) of 0 and 1, both
    cut to the longest text.

    Every process must call it. Progress and remaining time are shown by the main process.
    """
    n = len(dataset)
    batches = rank_batches(n, batch_size, accelerator.process_index, accelerator.num_processes)
    # Guarded: within a training, a signal to stop must reach the trainer, not its workers.
    loader = GuardedLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    parts: dict[str, list[torch.Tensor]] = {}
    with Progress(desc=title, unit="sample", total=n, show=accelerator.is_main_process) as bar:
        for batch in loader:
            output = encode_batch(batch.to(accelerator.device, non_blocking=True))
            for name in ("feature", "pooled", *(token for token in TOKENS if token in output)):
                # One round of all ranks is one contiguous stretch of the data set. Ranks must
                # gather equal shapes; rows that only fill up come after the last sample.
                values = output[name].float()
                fill = values.new_zeros(batch_size - len(values), *values.shape[1:])
                gathered = accelerator.gather(torch.cat([values, fill]))
                if accelerator.is_main_process:
                    parts.setdefault(name, []).append(gathered.cpu())
            bar.update(min(batch_size * accelerator.num_processes, n - bar.n))
    if not accelerator.is_main_process:
        return None
    found = {name: torch.cat(kept)[:n] for name, kept in parts.items()}
    if "token_mask" in found:  # texts are padded to the context: what none of them uses goes
        used = int(found["token_mask"].any(dim=0).nonzero().max()) + 1
        found |= {name: found[name][:, :used].contiguous() for name in TOKENS}
    return found


def cached(
    accelerator: Accelerator,
    folder: Path,
    description: dict,
    compute: Callable[[], Features | None],
) -> Features | None:
    """`compute()`, or what it returned last time for an equal `description` (JSON values).

    The file name holds a hash of the whole description. Only the main process reads, writes and
    gets features. Every process must call it.
    """
    text = json.dumps(description, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    hit = [path.exists()]
    broadcast_object_list(hit)
    if hit[0]:
        return load_file(path) if accelerator.is_main_process else None
    features = compute()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(features, partial_file, metadata={"description": text})
        os.replace(partial_file, path)
    return features


@dataclass
class Extractor:
    """One frozen model with its tokenizer, transform and feature cache.

    `method` is the run's `loss.name`, None where nothing says it. `embedding` names the one vector
    of an image that the training compared or classified by.
    """

    accelerator: Accelerator
    run: LoadedRun
    cache: Path | None  # None: nothing is kept
    batch_size: int
    workers: int

    def __post_init__(self) -> None:
        config = ModelConfig.from_dict(self.run.cfg["model"])
        self.late = config.similarity == "late"
        self.method = (self.run.cfg.get("loss") or {}).get("name")
        self.embedding = "pooled" if self.late or self.method in IMAGES_ALONE else "feature"
        self.size = config.image.size
        self.transform = Transform.of(config)
        self.tokenizer = loading.tokenizer(config)
        self.model = self.run.model.to(self.accelerator.device).float().eval()

    def images(self, split: EvalSplit) -> Features | None:
        """Image features of a split: {"feature": (n, D), "pooled": (n, W)} and perhaps TOKENS; see
        `encode`."""
        transform = self.transform
        description = {
            "checkpoint": self.run.checkpoint_hash,
            "kind": "image",
            "transform": [split.resize, split.crop, split.mode, transform.mean, transform.std],
            "dataset": split.content_hash,
        }
        if self.run.reference:
            description["reference"] = self.run.reference

        def encode_batch(images: torch.Tensor) -> Features:
            return self.model.encode_image(transform.normalize(images))

        title = f"{split.row.name} {split.split} images"
        return self._run(description, split, encode_batch, self.workers, title)

    def texts(self, texts: list[str], title: str) -> Features | None:
        """Text features {"feature": (n, D), "pooled": (n, W)} and perhaps TOKENS; see `encode`."""
        description = {
            "checkpoint": self.run.checkpoint_hash,
            "kind": "text",
            "tokenizer": [self.tokenizer.digest, self.tokenizer.context_length],
            "texts": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        }
        tokenized = _Texts(texts, self.tokenizer)
        return self._run(description, tokenized, self.model.encode_text, 0, title)

    def _run(self, description, dataset, encode_batch, workers, title) -> Features | None:
        if self.late:
            description["tokens"] = "float32"
        compute = partial(
            encode, self.accelerator, dataset, encode_batch, self.batch_size, workers, title
        )
        if self.cache is None:
            return compute()
        return cached(self.accelerator, self.cache, description, compute)

    def classes(self, names: list[str], templates: list[str]) -> tuple[Features, int]:
        """What stands for the classes `names` when images are compared with them
        (`eval.tasks.scores.compare`), and how many candidates in a row are one class: a vector
        each, or, of a model that compares tokens, the prompts of each.

        Every process must call it; the features are the main process's.
        """
        if self.late:
            return self.prompts(names, templates), len(templates)
        return {"feature": self.class_weights(names, templates)}, 1

    def class_weights(self, names: list[str], templates: list[str]) -> torch.Tensor | None:
        """Zero-shot classifier (K, D): per class the mean over templates of the normalised text
        features, normalised again (as in the UniCL and CLIP evaluators).

        Main process only, others get None. Every process must call it.
        Raises ConfigError for a model that compares tokens, which has no such weights.
        """
        if self.late:
            raise ConfigError(
                f"{self.run.name}: model.similarity=late compares tokens, and no vector stands for "
                "a class; give --head-init random"
            )
        features = self.prompts(names, templates)
        if features is None:
            return None
        per_template = features["feature"].view(len(names), len(templates), -1)
        return F.normalize(F.normalize(per_template, dim=-1).mean(dim=1), dim=-1)

    def prompts(self, names: list[str], templates: list[str]) -> Features | None:
        """As `texts`, of the templates of the first name, then of the second, and so on."""
        texts = [template.replace("{}", name) for name in names for template in templates]
        return self.texts(texts, "class prompts")


class _Texts(Dataset):
    """Texts, tokenized batch by batch: all of them, drawn as pictures, would not fit in memory."""

    def __init__(self, texts: list[str], tokenizer: Callable[[list[str]], torch.Tensor]) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    def __len__(self) -> int:
        return len(self._texts)

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return list(self._tokenizer([self._texts[i] for i in indices]))


def finite_images(
    extractor: Extractor, splits: Mapping[str, EvalSplit]
) -> dict[str, Features] | None:
    """Image features of the splits by name; None off the main process. Every process must call it.

    Raises DataError for features that are not finite, which nothing can be fitted to.
    """
    features = {name: extractor.images(split) for name, split in splits.items()}
    if features["test"] is None:
        return None
    for name, found in features.items():
        if not all(value.isfinite().all() for value in found.values()):
            row = splits[name].row
            raise DataError(f"{row.name}: image features are not finite, the run has diverged")
    return features


def initial_head(
    extractor: Extractor, test: EvalSplit, names: list[str], start: str
) -> tuple[torch.Tensor | None, str | None]:
    """Weights (K, D) to start from for the K classes `names`, `text` (with the templates of `test`)
    or `random`, and the digest of the prompts.

    Every process must call it; the text features are the main process's.
    """
    if start == "text":
        class_texts, templates = test.row.class_texts(names), test.templates()
        digest = rows.prompt_digest(class_texts, templates)
        return extractor.class_weights(class_texts, templates), digest
    generator = torch.Generator().manual_seed(0)
    shape = (len(names), extractor.model.embed_dim)
    return torch.randn(shape, generator=generator) * INITIAL_DEVIATION, None
