"""Fine-tuning of the image tower, the task of `eval.finetune`.

Whole tower and projection are trained with a linear head on the normalised image feature, whose
logits are scaled by the model's own temperature. With a head from text it starts as the
class texts, so that training starts from the zero-shot classifier. The recipe is ours: AdamW with
decay 0.05 but on norms, biases and what the tower exempts, cosine to 0, 64 images a step,
random-resized crop and flip.
"""

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from eval.sources import common_classes
from eval.sources.registry import EvalDataset
from eval.sources.splits import EvalSplit
from eval.tasks import elevater_metrics, features
from eval.tasks.features import Extractor, initial_head
from eval.tasks.outcome import Outcome
from loaders import views
from loaders.errors import ConfigError, NonFiniteLoss
from loaders.progress import Progress
from models.base import Model

BATCH = 64
WEIGHT_DECAY = 0.05


class Classifier(nn.Module):
    """Image encoder and linear head: normalised images (b, 3, H, W) -> logits (b, K)."""

    def __init__(self, model: Model, head: Tensor) -> None:
        super().__init__()
        self.encoder = model.image_encoder()
        self.head = nn.Linear(head.shape[1], head.shape[0])
        self.head.weight.data.copy_(head)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("scale", model.scale().detach())

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.head(nn.functional.normalize(self.encoder(images), dim=-1))

    def no_weight_decay(self) -> set[str]:
        """Names that do not decay, beside norms and biases."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}


class TrainingViews(Dataset):
    """Random views of a split; an index is (epoch, sample), and decides the view with the seed."""

    def __init__(self, split: EvalSplit, targets: np.ndarray, seed: int) -> None:
        """`targets` of `split` as `common_classes.meet` gives them: (n,), or (n, K) of 0 and 1."""
        self.split, self.targets, self.seed = split, targets, seed
        # Sizes only: the statistics belong to the recipe that erases, which this is not.
        self.view = views.build_train("paper", split.crop, (0.0,) * 3, (1.0,) * 3)

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, i = index
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, epoch, i)))
            view = self.view(self.split.image(i))
        return view, torch.as_tensor(self.targets[i])


def rank_batches(
    n: int, epochs: int, seed: int, rank: int, ranks: int
) -> list[list[tuple[int, int]]]:
    """(epoch, sample) of every step on `rank`: its share of the batches of seeded permutations.

    The last batch of an epoch may be smaller; what does not divide by `ranks` is left out.
    """
    steps = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(hash((seed, epoch)))
        order = torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, BATCH):
            batch = order[start : start + BATCH]
            batch = batch[: len(batch) // ranks * ranks]
            if batch:
                steps.append([(epoch, i) for i in batch[rank::ranks]])
    return steps


def train(
    accelerator: Accelerator,
    model: Classifier,
    data: TrainingViews,
    normalize,
    args: argparse.Namespace,
    workers: int,
) -> list[float]:
    """Train `model` in place; returns the loss of every step on this process.

    `normalize`: uint8 views -> the model's input. Targets that are float are several labels an
    image, for a binary cross-entropy per class.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    if BATCH % ranks:
        raise ConfigError(f"{BATCH} images a step do not divide by {ranks} processes")
    model.to(accelerator.device)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=WEIGHT_DECAY)
    batches = rank_batches(len(data.targets), args.epochs, args.seed, rank, ranks)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    several = data.targets.ndim == 2
    measure = nn.BCEWithLogitsLoss() if several else nn.CrossEntropyLoss()
    torch.manual_seed(hash((args.seed, rank)))  # dropped paths
    wrapped.train()
    losses = []
    title = f"{data.split.row.name} fine-tuning"
    for images, targets in Progress(
        loader, desc=title, unit="step", show=accelerator.is_main_process
    ):
        images, targets = images.to(accelerator.device), targets.to(accelerator.device)
        loss = measure(wrapped(normalize(images)), targets)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"{title}: loss {loss.item()} in step {len(losses) + 1}; lower --lr ({args.lr:g})"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def evaluate(
    extractor: Extractor, row: EvalDataset, args: argparse.Namespace
) -> Iterator[tuple[str, Outcome]]:
    """Fine-tune on the training split, score the last epoch on the test split.

    The head has one output for each class of `common_classes.meet`: all that were trained.
    """
    accelerator = extractor.accelerator
    splits, classes = common_classes.open_splits(row, ("train",), extractor.size)
    names, truth, test = classes.names, classes.targets["test"], splits["test"]
    head, digest = initial_head(extractor, test, names, args.head_init)
    if head is None:  # every process starts from the same weights: DDP sends the main one's
        head = torch.zeros(len(names), extractor.model.embed_dim)
    model = Classifier(extractor.model, head)
    normalize = extractor.transform.normalize
    data = TrainingViews(splits["train"], classes.targets["train"], args.seed)
    train(accelerator, model, data, normalize, args, extractor.workers)
    model.eval()

    def logits(images: Tensor) -> features.Features:
        scores = model(normalize(images))
        return {"feature": scores, "pooled": scores}

    found = features.encode(
        accelerator, test, logits, extractor.batch_size, extractor.workers, f"{row.name} test"
    )
    if found is None:
        return
    scores = found["feature"].numpy()
    measured = {
        name: elevater_metrics.with_interval(name, scores, truth)
        for name in row.tasks["linear_probe"]
    }
    protocol = (
        f"whole image tower, head from {args.head_init}, AdamW {args.lr:g}, decay {WEIGHT_DECAY}, "
        f"cosine, {args.epochs} epochs of {len(data.targets)}, {BATCH} a step, random-resized "
        f"crop, flip, seed {args.seed}, last epoch: {len(test)} test"
    )
    yield "finetune", Outcome(measured, len(names), protocol, digest)
