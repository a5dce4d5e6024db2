"""k-nearest-neighbour classification: `python -m eval.knn --checkpoint RUN --datasets cifar-10
--output DIR`.

The weighted vote of DINO's evaluator (facebookresearch/dino, eval_knn.py, after Wu et al. 2018):
the 20 training images with the highest cosine vote for their class with weight exp(cosine / 0.07).
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
    args = cli.parser("knn", "k-nearest neighbours on frozen features.").parse_args(argv)
    chosen = cli.choose(args, "knn", registry)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import evaluation, knn

    evaluation.run(args, chosen, "knn", knn.evaluate)


if __name__ == "__main__":
    run_cli(main)
