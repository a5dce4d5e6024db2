"""Training of Mask R-CNN on the trained trunk and its score, for `eval.detection`."""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

from eval.detector import coco_metrics, mask_rcnn
from eval.detector.instances import Instances, collate
from eval.tasks.outcome import Outcome
from loaders import manifest
from loaders.errors import ConfigError, NonFiniteLoss
from loaders.progress import Progress
from models import weights
from models.config import ModelConfig

WARM_UP_START = 1e-3
SEED = 0


def rate_factor(step: int, steps_per_epoch: int, epochs: int, warm_up: int) -> float:
    """Learning rate of `step` (from 0) as a share of the full one: linear warm-up from 0.001, a
    tenth after 8/12 of the epochs, a hundredth after 11/12."""
    epoch = step // steps_per_epoch
    passed = sum(epoch >= round(epochs * part / 12) for part in (8, 11))
    grown = min(1.0, WARM_UP_START + (1 - WARM_UP_START) * step / warm_up)
    return grown * 0.1**passed


def train(
    accelerator: Accelerator,
    model: MaskRCNN,
    data: Instances,
    args: argparse.Namespace,
    state: Path,
) -> str:
    """Train in place; `state` is the file of the last complete epoch. Returns the recipe's words.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite; `state` keeps the epoch before.
    """
    ranks = accelerator.num_processes
    if args.batch_size % ranks:
        raise ConfigError(f"--batch-size {args.batch_size} is no multiple of {ranks} processes")
    model.to(accelerator.device)
    optimizer, warm_up, words = mask_rcnn.optimizer(model)
    generator = torch.Generator()
    loader = DataLoader(
        data,
        args.batch_size // ranks,
        shuffle=True,
        num_workers=args.workers,
        collate_fn=collate,
        generator=generator,
    )
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = len(loader)
    rates = [group["lr"] for group in optimizer.param_groups]
    for epoch in range(load(state, model, optimizer), args.epochs):
        # Orders, flips and sampled proposals of an epoch do not depend on where a run began.
        generator.manual_seed(SEED + epoch)
        torch.manual_seed(SEED + epoch * ranks + accelerator.process_index)
        wrapped.train()
        title = f"epoch {epoch + 1}/{args.epochs}"
        bar = Progress(loader, desc=title, unit="step", show=accelerator.is_main_process)
        for i, (images, targets) in enumerate(bar):
            factor = rate_factor(epoch * steps + i, steps, args.epochs, warm_up)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            losses = wrapped(images, targets)
            loss = sum(losses.values())
            if not torch.isfinite(loss):
                raise NonFiniteLoss(
                    f"detection: {', '.join(f'{k} {float(v):.3g}' for k, v in losses.items())} in "
                    f"epoch {epoch + 1}, step {i + 1}; {state} holds the epoch before"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if accelerator.is_main_process:
            save(state, model, optimizer, epoch + 1)
        accelerator.wait_for_everyone()
    return f"{words}, warm-up {warm_up} steps"


def save(path: Path, model: MaskRCNN, optimizer, epochs: int) -> None:
    """Weights, optimizer and the number of complete epochs, by atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs}
    torch.save(content, partial)
    os.replace(partial, path)


def load(path: Path, model: MaskRCNN, optimizer) -> int:
    """Complete epochs in `path`, whose weights and optimizer are loaded; 0 without the file."""
    if not path.is_file():
        return 0
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    print(f"{path}: continuing after {content['epochs']} epochs")
    return content["epochs"]


@torch.inference_mode()
def detect(
    accelerator: Accelerator, model: MaskRCNN, data: Instances, workers: int
) -> list[dict] | None:
    """COCO result entries of all images, main process only; the ranks share the images."""
    mine = range(accelerator.process_index, len(data), accelerator.num_processes)
    subset = torch.utils.data.Subset(data, mine)
    loader = DataLoader(subset, 1, num_workers=workers, collate_fn=collate)
    model.eval()
    found: list[dict] = []
    bar = Progress(desc="detection", unit="img", total=len(data), show=accelerator.is_main_process)
    for position, (images, _) in zip(mine, loader, strict=True):
        output = model([image.to(accelerator.device) for image in images])[0]
        image_id = data.records[data.indices[position]]["image_id"]
        found += coco_metrics.detections(image_id, output, data.categories)
        bar.update(min(accelerator.num_processes, len(data) - bar.n))  # the others do as many
    bar.close()
    gathered = gather_object(found)
    return gathered if accelerator.is_main_process else None


def transfer(
    accelerator: Accelerator, run: weights.LoadedRun, args: argparse.Namespace
) -> Outcome | None:
    """Train a detector on the run's trunk and score it; None off the main process.

    Categories of the two sets meet by name: one that only the training set has is a class of the
    detector, one that only the validation set has is refused.
    """
    if (kind := run.model.cfg.kind) != "two_tower":
        raise ConfigError(
            f"{run.name}: detection takes an image tower with maps at several strides, which a "
            f"model of kind {kind} has not; give a run with model.kind=two_tower"
        )
    training = Instances(args.train, True)
    validation = Instances(args.val, False, training.class_names)
    image = ModelConfig.from_dict(run.cfg["model"]).image
    torch.manual_seed(SEED)
    model = mask_rcnn.build(
        run.model.image, image.name, len(training.class_names), image.mean, image.std,
        args.image_size,
    )  # fmt: skip
    # A head trained on other images, or on classes in another order, is not continued.
    data = hashlib.sha256((args.train / manifest.MANIFEST).read_bytes()).hexdigest()
    name = f"{run.checkpoint_hash[:16]}_{data[:16]}"
    name += f"_{args.epochs}_{args.batch_size}_{args.image_size}.pt"
    words = train(accelerator, model, training, args, args.output / ".detection" / name)
    found = detect(accelerator, model, validation, args.workers)
    if found is None:
        return None
    ids = [validation.records[i]["image_id"] for i in validation.indices]
    results = coco_metrics.mean_precision(validation.ground_truth(), found, ids)
    protocol = (
        f"Mask R-CNN with FPN (torchvision), {args.epochs} epochs of {len(training)} images, "
        f"{args.batch_size} a step, {words}, a tenth after 8/12 and 11/12 of the epochs, short "
        f"side {args.image_size}, flips; mmdetection's 1x recipe, the paper's is not published; "
        f"AP over IoU 0.50:0.95 on {len(validation)} images"
    )
    return Outcome(results, len(training.class_names), protocol, None)
