"""The traffic that `benchmarks.scaling_model` predicts is the one that was counted."""

import json

import pytest

from benchmarks import harness, scaling_model

COUNTED = [
    json.loads(line) for line in (harness.RESULTS / "loss_ranks.jsonl").read_text().splitlines()
]
RANKS = sorted({row["ranks"] for row in COUNTED if "grid" in row})


@pytest.mark.parametrize("ranks", RANKS)
def test_traffic_equals_the_counts(ranks):
    rows = {row["name"]: row for row in COUNTED if row["ranks"] == ranks and "grid" in row}
    batch, width = rows["features received / (B D), ours"]["B"], 512
    ours, peer = (
        scaling_model.traffic(side, ranks, batch, width) for side in ("ours", "open_clip")
    )
    for side, moved in (("ours", ours), ("open_clip", peer)):
        value = rows[f"features received / (B D), {side}"]["value"]
        assert moved.features / (batch * width * 4) == pytest.approx(value, abs=6e-5)
    value = rows["all bytes received, ours / open_clip"]["value"]
    assert (ours.features + ours.rest) / peer.features == pytest.approx(value, abs=6e-5)


def test_every_number_of_ranks_up_to_64_was_compared():
    assert {2, 4, 8, 16, 64} <= set(RANKS)
