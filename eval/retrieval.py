"""Image-text retrieval: `python -m eval.retrieval --checkpoint RUN --datasets quickstart
--output DIR`."""

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
    parser = cli.parser("retrieval", "Image-text retrieval.", class_names=False)
    args = parser.parse_args(argv)
    chosen = cli.choose(args, "retrieval", registry)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import evaluation, retrieval

    evaluation.run(args, chosen, "retrieval", retrieval.evaluate)


if __name__ == "__main__":
    run_cli(main)
