"""The options of every command that prepares a set: where to, in what shards, which part."""

import argparse

from data_prep.sets import set_folder
from loaders.specs import as_path


def add_arguments(parser: argparse.ArgumentParser, samples_per_shard: int) -> None:
    """`--out`, `--samples-per-shard` with this default, and `--part K --parts N`: this process
    prepares the shards s = K mod N (a SLURM array)."""
    parser.add_argument("--out", type=as_path, required=True, help="folder of the data set")
    parser.add_argument(
        "--samples-per-shard", type=int, default=samples_per_shard, help="default: %(default)s"
    )
    parser.add_argument("--part", type=int, default=0, help="number of this part, from 0")
    parser.add_argument("--parts", type=int, default=1, help="number of parts (array tasks)")


def check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` for values that cannot work, `DataError` if `--out` holds other files.

    To be called before anything is read: what is wrong with the command line is said at once.
    """
    set_folder.check_part(arguments.part, arguments.parts)
    set_folder.check_shard_size(arguments.samples_per_shard)
    set_folder.check_folder(arguments.out)
