"""Linear probe on frozen features: `python -m eval.linear_probe --checkpoint RUN --datasets
quickstart --output DIR`.

Protocols (`--protocol`), each with rows of its own task name:

- `standardised` (linear_probe): logistic regression on standardised features; the default, and what
  the quickstart runs.
- `clip` (linear_probe_clip): CLIP's (Radford et al. 2021, appendix A.3): the same on the features
  as they come, with the validation split where the set has one.
- `elevater` (linear_probe_elevater): `eval/tasks/elevater_probe.py`.

With `--shots 5 20 50 --seeds 0 1 2` the training set is cut to so many samples a class and the task
name ends in `_5shot`.
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

PROTOCOLS = ("standardised", "clip", "elevater")


def options_parser() -> CommandParser:
    """Arguments of this command."""
    parser = cli.parser("linear_probe", "Linear probe on frozen features.", templates=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="standardised")
    parser.add_argument("--shots", type=int, nargs="+", help="training samples a class")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the subsets (default: 0 1 2)")
    parser.add_argument("--head-init", choices=("text", "random"), help="elevater (default: text)")
    return parser


def main(argv: Sequence[str] | None = None, registry: Path | str = REGISTRY) -> None:
    """Command line; `registry` is another datasets.yaml."""
    args = options_parser().parse_args(argv)
    if args.seeds and not args.shots:
        raise ConfigError("--seeds draws few-shot subsets: it needs --shots")
    if args.head_init and args.protocol != "elevater":
        raise ConfigError("--head-init belongs to --protocol elevater")
    if args.templates and (args.protocol != "elevater" or args.head_init == "random"):
        raise ConfigError("--templates is for a head from text: --protocol elevater")
    args.seeds, args.head_init = args.seeds or [0, 1, 2], args.head_init or "text"
    chosen = cli.choose(args, "linear_probe", registry)
    # Late: torch and the towers take ten seconds, and the answers above should not.
    from eval.tasks import elevater_probe, evaluation, linear_probe

    if args.protocol == "standardised" and not args.shots:
        evaluation.run(args, chosen, "linear_probe", linear_probe.evaluate)
        return
    task = elevater_probe if args.protocol == "elevater" else linear_probe
    evaluation.run_protocols(args, chosen, partial(task.evaluate_protocol, options=args))


if __name__ == "__main__":
    run_cli(main)
