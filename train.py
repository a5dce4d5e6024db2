"""Train a model of the UniCL family under DeepSpeed.

    deepspeed train.py --config configs/quickstart_unicl.yaml
    torchrun --nproc_per_node 2 train.py --config configs/quickstart_unicl.yaml optim.lr=1e-3
    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=8 slurm/train.sbatch configs/NAME.yaml

The same --output-dir continues a run that was stopped. Exit codes: 0 done, 2 wrong usage or
configuration, 3 data or setup refused, 4 non-finite loss, 5 too many bad samples, 6 a rank lost.
"""

import argparse
import os
import sys
from pathlib import Path

from loaders.errors import CommandParser, run_cli


def parse_arguments() -> argparse.Namespace:
    """Command line of this file."""
    parser = CommandParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a YAML file of configs/")
    parser.add_argument("--output-dir", help="run folder; default: output_dir of the configuration")
    parser.add_argument("--deepspeed_config", help="a JSON file of ds_configs/")
    parser.add_argument("--dry-run", action="store_true", help="check, print the plan and stop")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher; not needed"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    return parser.parse_intermixed_args()


def main() -> None:
    """Parse, check, and hand over to `engine.run`."""
    arguments = parse_arguments()
    # Imports are late so that --help and a wrong key answer at once.
    from engine import config

    overrides = list(arguments.overrides)
    if arguments.output_dir is not None:
        overrides.append(f"output_dir={arguments.output_dir}")
    if arguments.deepspeed_config is not None:
        overrides.append(f"deepspeed={arguments.deepspeed_config}")
    cfg = config.load(arguments.config, overrides, need_data=True)

    from engine.signals import StopRequest

    # The imports below and the start take up to minutes, and preemption does not wait for them.
    stop = None if arguments.dry_run else StopRequest()

    from loaders.left_out import left_out

    evaluate = None
    with left_out("wandb"):  # timm imports it for a function that nobody calls here
        if (
            cfg.evals.every_steps
        ):  # first, because it says what is missing before DeepSpeed is loaded
            from functools import partial

            from eval import in_training

            chosen = in_training.select(cfg.evals.tasks)
            evaluate = partial(in_training.evaluate, chosen=chosen)
        from engine import build, dist, launch, record

    launch.map_environment(os.environ)
    plan = build.plan(cfg, world_size=int(os.environ["WORLD_SIZE"]))
    if arguments.dry_run:
        if os.environ["RANK"] == "0":
            print(plan.describe(), *record.examine(plan).lines, sep="\n")
            print(build.describe_parts(plan))
        return

    if os.environ["RANK"] == "0":
        from engine.run_lock import RunLock

        record.examine(plan)  # a folder of something else, or of another run, gets no lock either
        # Before the ranks meet: a second job on the same folder ends here, and its ranks with it.
        RunLock(Path(cfg.output_dir), lambda line: print(line, file=sys.stderr, flush=True))

    from engine.run import Run

    device = dist.initialise(cfg.timeout_minutes)
    Run(plan, device, evaluate, stop).run()
    dist.finish()
    stop.ignore()


if __name__ == "__main__":
    run_cli(main)
