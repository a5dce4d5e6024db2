"""Evaluation: zero-shot against CLIP_benchmark, ELEVATER's probe on cached features, and the
memory of retrieval.

    python -m benchmarks.evaluation [--quick]

Runs the three parts one after the other; each may be run alone (evaluation_zero_shot, …_probe,
…_retrieval).
"""

from collections.abc import Iterator

from benchmarks import evaluation_probe, evaluation_retrieval, evaluation_zero_shot, harness


def rows(quick: bool) -> Iterator[dict]:
    """Rows of all parts."""
    for part in (evaluation_zero_shot, evaluation_probe, evaluation_retrieval):
        yield from part.rows(quick)


if __name__ == "__main__":
    harness.main("evaluation", rows)
