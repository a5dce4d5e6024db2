"""Data preparation: sharding of ImageNet, overhead of the download wrapper, checking of shards.

    python -m benchmarks.data_prep [--quick]

Runs the three parts one after the other; each may be run alone (data_prep_imagenet, …_download,
…_verify).
"""

from collections.abc import Iterator

from benchmarks import data_prep_download, data_prep_imagenet, data_prep_verify, harness


def rows(quick: bool) -> Iterator[dict]:
    """Rows of all parts."""
    for part in (data_prep_imagenet, data_prep_download, data_prep_verify):
        yield from part.rows(quick)


if __name__ == "__main__":
    harness.main("data_prep", rows)
