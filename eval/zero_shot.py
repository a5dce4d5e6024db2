"""Zero-shot classification: `python -m eval.zero_shot --checkpoint RUN --datasets quickstart
--output DIR`.

Two published protocols, `--protocol`: `unicl` (UniCL's ImageNet evaluator: resize 256, crop 224, 81
templates) and `elevater` (ELEVATER's toolkit: resize 224, the templates of each set, 80 for
ImageNet). Both average normalised prompt features and normalise again; what is scored is the
softmax of 100 x cosine, whose order within an image is that of the cosine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python put eval/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval import cli
from eval.sources.registry import REGISTRY
from loaders.errors import run_cli


def main(argv: Sequence[str] | None = None, registry: Path | str = REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    parser = cli.parser("zero_shot", "Zero-shot classification.", templates=True)
    parser.add_argument(
        "--protocol",
        choices=["unicl", "elevater"],
        help="for sets with both (ImageNet; default: the first in eval/datasets.yaml)",
    )
    args = parser.parse_args(argv)
    chosen = cli.choose(args, "zero_shot", registry, protocol=args.protocol)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import evaluation, zero_shot

    evaluation.run(args, chosen, "zero_shot", zero_shot.evaluate)


if __name__ == "__main__":
    run_cli(main)
