"""Every scalar that a method returns is logged, as the mean over ranks and the window."""

import json
import math
import os
import re
from collections import defaultdict
from datetime import datetime

import pytest
import torch

from engine.log import format_line
from engine.meter import TAKEN, Meter
from losses import multitask
from tests import multiprocess
from tests.commands import CONFIG, ROOT

SETTINGS = (
    "loss={name: multitask}", "train.steps=7", "log.every_steps=3", "log.save_every_steps=4",
    "data.workers=0",
)  # fmt: skip


class Talkative(multitask.Method):
    """Two terms and a scalar; notes all three, and may return another set of names later."""

    def loss(self, features, labels, gather):
        out = super().loss(features, labels, gather)
        out["largest_logit"] = features["logits"].max().reshape(1)
        for name in ("classification_loss", "contrastive_loss", "largest_logit"):
            SEEN[name].append(float(out[name]))
        for name, first in RENAMED.items():
            if len(SEEN["largest_logit"]) >= first:
                out[name] = out.pop("largest_logit")
        return out


SEEN, RENAMED = defaultdict(list), {}  # new name of the scalar: from which step on


class Killed:
    """In the place of a `StopRequest`: ends the run after its fifth step."""

    asked = 0

    @property
    def received(self):
        self.asked += 1
        if self.asked > 5:
            raise InterruptedError
        return 0


def runs(rank, world_size, folder):
    """A run, one that is killed inside a window and continued, and two that are refused."""
    from engine import build, config
    from engine.meter import Meter
    from engine.run import Run
    from loaders.errors import ConfigError

    os.chdir(ROOT)
    multitask.Method = Talkative

    def live(name, *overrides, stop=None):
        cfg = config.load(CONFIG, [*SETTINGS, f"output_dir={folder / name}", *overrides])
        Run(build.plan(cfg, world_size), torch.device("cpu"), stop=stop).run()

    live("whole")
    found = {"seen": {name: list(values) for name, values in SEEN.items()}}
    with pytest.raises(InterruptedError):
        live("cut", stop=Killed())
    live("cut")
    for name, first in (("largest", 2), ("lr", 1)):
        SEEN.clear()
        RENAMED.clear()
        RENAMED[name] = first
        with pytest.raises(ConfigError) as error:
            live(name)
        found[name] = str(error.value)

    old = {"rows": [[2.0, 6.0, 8.0, *[0.0] * 8], [2.0, 4.0, 8.0, *[0.0] * 8]]}
    meter, labels = Meter(torch.device("cpu")), torch.tensor([-1, -1, 3, 3])
    meter.restore(old)
    out = {"loss": torch.tensor(8.0), "a": torch.tensor(rank + 1.0)}
    meter.add(out, labels, 0, torch.tensor(False))
    found["old"] = meter.read()[0]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meter")
    return folder, multiprocess.run(runs, 2, folder)


def lines(folder):
    """Of metrics.jsonl, without what a clock or the machine says."""
    timed = (
        "time",
        "samples_per_second",
        "data_seconds",
        "eta_seconds",
        "data_share",
        "memory_gb",
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def test_terms_and_scalars_are_means_over_ranks_and_window(found):
    folder, ranks = found
    records = lines(folder / "whole")
    assert [record["step"] for record in records] == [3, 6, 7]
    for name, first in ranks[0]["seen"].items():
        assert len(first) == 7
        both = [sum(pair) / 2 for pair in zip(first, ranks[1]["seen"][name], strict=True)]
        means = [sum(both[:3]) / 3, sum(both[3:6]) / 3, both[6]]
        assert [record[name] for record in records] == pytest.approx(means, rel=1e-12), name
    for record in records:
        assert record.keys() <= {*TAKEN, *ranks[0]["seen"]}
        terms = record["classification_loss"] + record["contrastive_loss"]
        assert terms == pytest.approx(record["loss"], rel=1e-6)


def test_the_line_of_a_record_is_short_and_starts_with_the_clock(found):
    """One log for console and log.txt; what a line leaves out is in metrics.jsonl."""
    folder, _ = found
    said = (folder / "whole" / "log.txt").read_text().splitlines()
    said = [line for line in said if " step " in line]
    assert len(said) == 3
    for line, record in zip(said, lines(folder / "whole"), strict=True):
        clock, rest = line.split(" ", 1)
        assert datetime.fromisoformat(clock)
        assert record["floor"] == 0  # this method has none, so none is shown
        words = f"step {record['step']}/7, loss {record['loss']:.4f}"
        assert rest.startswith(f"{words}, lr {record['lr']:.2e}, ")
    assert re.search(r", [1-9]\d* samples/s, ETA \d+:\d\d, \d+\.\d GB$", said[1])


def test_the_longest_line_is_short_too():
    record = {"step": 123_456, "loss": 12.34567, "floor": 10.12345, "lr": 1.2345e-4}
    record |= {"samples_per_second": 123_456.7, "eta_seconds": 999 * 3600 + 59 * 60, "extra": 1.0}
    record |= {"memory_gb": 123.4}
    words = (
        "step 123456/999999, loss 12.346 (floor 10.12), lr 1.23e-04, 123457 samples/s, "
        "ETA 999:59:00, 123 GB"
    )
    assert format_line(record, 999_999) == words
    assert len(f"2026-01-01T00:00:00 {words}") < 120
    record |= {"loss": math.nan, "floor": 0.0, "samples_per_second": 3.2e7, "memory_gb": 0.52}
    assert "loss nan, lr" in format_line(record, 999_999)
    assert format_line(record, 999_999).endswith("3.2e+07 samples/s, ETA 999:59:00, 0.5 GB")


def test_a_run_killed_inside_a_window_logs_the_same_scalars(found):
    folder, _ = found
    assert json.loads((folder / "cut/window.jsonl").read_text().splitlines()[0])["step"] == 4
    assert "after step 4" in (folder / "cut/log.txt").read_text()
    assert lines(folder / "cut") == lines(folder / "whole")  # floats to the last bit


def test_names_of_scalars_are_fixed_and_their_own(found):
    before = "classification_loss, contrastive_loss, largest_logit"
    now = before.removesuffix("_logit")
    for each in found[1]:
        assert f"returned the scalars {now}, and in its first step {before};" in each["largest"]
        assert "returned scalars named lr, which the log holds already" in each["lr"]


def test_a_window_of_an_earlier_version_goes_on(found):
    """Its loss counts its steps; a scalar that it does not know counts those since."""
    _, ranks = found
    for each in ranks:
        assert each["old"]["loss"] == (6 + 4 + 8 + 8) / 6
        assert each["old"]["a"] == 1.5


def test_each_half_of_the_batch_has_its_floor():
    """The mean of log |P(i)| over its rows, also behind a window of an earlier version."""
    labels, positives = torch.tensor([7, -1, 7, -2, -2]), torch.tensor([4, 1, 4, 2, 3])
    out = {"loss": torch.tensor(1.0), "sample_loss": torch.rand(5), "positives": positives}
    meter = Meter(torch.device("cpu"))
    # Twelve sums, of a step of two rows of labels with 8 positives each, and a scalar.
    meter.restore(
        {"rows": [[1, 1, 2, 2 * math.log(8), 16, 2, 1, 0, 0, 0, 0, 1, 5]], "scalars": ["a"]}
    )
    meter.add({**out, "a": torch.tensor(7.0)}, labels, 0, torch.tensor(False))
    first, _ = meter.read()
    assert first["floor"] == pytest.approx((2 * math.log(8) + math.log(4 * 4 * 2 * 3)) / 7)
    assert first["a"] == 6
    meter.add({**out, "a": torch.tensor(7.0)}, labels, 0, torch.tensor(False))
    record, _ = meter.read()
    assert record["floor_image_label"] == pytest.approx(math.log(4))
    assert record["floor_image_text"] == pytest.approx((math.log(2) + math.log(3)) / 3)
    assert record["floor"] == pytest.approx(math.log(4 * 4 * 2 * 3) / 5)
