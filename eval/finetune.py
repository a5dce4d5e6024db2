"""Fine-tuning of the image tower: `python -m eval.finetune --checkpoint RUN --datasets cifar-10
--epochs 10 --output results/`.

Whole tower and projection are trained with a linear head on the normalised image feature, whose
logits are scaled by the model's own temperature. With `--head-init text` the head starts as the
class texts, so that training starts from the zero-shot classifier. The recipe is ours: AdamW with
decay 0.05 but on norms, biases and what the tower exempts, cosine to 0, 64 images a step,
random-resized crop and flip. All sets that list a linear probe have what it needs.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from eval.sources.registry import REGISTRY
from loaders.errors import CommandParser, ConfigError, run_cli

LEARNING_RATE = 1e-4


def options_parser() -> CommandParser:
    """Arguments of this command."""
    parser = cli.parser("finetune", "Fine-tuning of the image tower.", templates=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=LEARNING_RATE)
    parser.add_argument("--head-init", choices=("text", "random"), default="text")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: Sequence[str] | None = None, registry: Path | str = REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    args = options_parser().parse_args(argv)
    if args.templates and args.head_init == "random":
        raise ConfigError("--templates is for a head from text, and --head-init is random")
    chosen = cli.choose(args, "finetune", registry, listed="linear_probe")
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import evaluation, finetune

    evaluation.run_protocols(args, chosen, partial(finetune.evaluate, args=args))


if __name__ == "__main__":
    run_cli(main)
