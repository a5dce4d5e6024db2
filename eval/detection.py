"""COCO detection transfer: the trained image trunk as backbone of Mask R-CNN with FPN.

    python -m eval.detection --checkpoint RUN --train D/coco_train2017 --val D/coco_val2017 \\
        --output results/

Which detector and schedule stand behind the COCO columns of UniCL's Table 5 is not published. This
is mmdetection's plain 1x recipe (configs/swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco.py,
configs/_base_/schedules/schedule_1x.py): 12 epochs, 16 images a step, short side 800, a learning
rate that falls to a tenth after epochs 8 and 11, linear warm-up, horizontal flips. mmdetection
reports 42.7 box and 39.3 mask AP with a Swin-T trained on ImageNet-1K (configs/swin/README.md); the
row of that model in Table 5 has 42.6 and 39.5.

A run that was interrupted continues with the epoch after the last complete one.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN
from tqdm import tqdm

from eval import cli, protocols
from eval.detector import coco_metrics, mask_rcnn
from eval.detector.instances import Instances, collate
from eval.sources.registry import Registry
from loaders import manifest
from loaders.errors import CommandParser, ConfigError, NonFiniteLoss, run_cli
from loaders.specs import as_path
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
        bar = tqdm(
            loader, desc=f"epoch {epoch + 1}/{args.epochs}", disable=not accelerator.is_main_process
        )
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
            bar.set_postfix(loss=f"{loss.item():.3f}")
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
    bar = tqdm(loader, desc="detection", unit="img", disable=not accelerator.is_main_process)
    for position, (images, _) in zip(mine, bar, strict=True):
        output = model([image.to(accelerator.device) for image in images])[0]
        image_id = data.records[data.indices[position]]["image_id"]
        found += coco_metrics.detections(image_id, output, data.categories)
    gathered = gather_object(found)
    return gathered if accelerator.is_main_process else None


def transfer(
    accelerator: Accelerator, run: weights.LoadedRun, args: argparse.Namespace
) -> cli.Outcome | None:
    """Train a detector on the run's trunk and score it; None off the main process.

    Categories of the two sets meet by name: one that only the training set has is a class of the
    detector, one that only the validation set has is refused.
    """
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
    return cli.Outcome(results, len(training.class_names), protocol, None)


def options_parser() -> argparse.ArgumentParser:
    """Arguments of this command."""
    parser = CommandParser(prog="python -m eval.detection", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--checkpoint", nargs="+", required=True, type=as_path, metavar="RUN")
    parser.add_argument("--train", type=as_path, required=True, help="set of data_prep/coco.py")
    parser.add_argument("--val", type=as_path, required=True, help="set of data_prep/coco.py")
    parser.add_argument("--output", type=as_path, required=True, metavar="DIR", help="result rows")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="images a step, all processes")
    parser.add_argument("--image-size", type=int, default=800, help="short side in pixels")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes per process")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = options_parser().parse_args(argv)
    row = Registry().datasets["coco_detection"]
    accelerator = cli.make_accelerator()
    for folder in args.checkpoint:
        loaded = weights.load(folder)
        outcome = transfer(accelerator, loaded, args)
        if outcome is not None:
            protocols.store(args.output, loaded, row, "detection", outcome)


if __name__ == "__main__":
    run_cli(main)
