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
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from eval.detector.categories import read_categories
from eval.sources.registry import Registry
from loaders.errors import CommandParser, run_cli
from loaders.specs import as_path


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
    cli.require(args.checkpoint)
    for folder in (args.train, args.val):
        read_categories(folder)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.detector import transfer
    from eval.tasks import evaluation
    from models import weights

    accelerator = evaluation.make_accelerator()
    for folder in args.checkpoint:
        loaded = weights.load(folder)
        outcome = transfer.transfer(accelerator, loaded, args)
        if outcome is not None:
            evaluation.store(args.output, loaded, row, "detection", outcome)


if __name__ == "__main__":
    run_cli(main)
