"""A run folder says what was done from which step on; nothing else ever changes it."""

import dataclasses
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from engine import build, checkpoint, config, environment, identity, record
from loaders.errors import DataError
from tests import multiprocess

ROOT = Path(__file__).parent.parent.parent
CONFIG = str(ROOT / "tests" / "engine" / "tiny.yaml")
SETTINGS = ["log.save_every_steps=3", "log.keep_last=9", "data.workers=0", "optim.warmup_steps=2"]
# What run.json of a checkpoint stated before everything was compared but the keys of a list.
OLD_KEYS = (
    "seed", "loss", "model", "train.global_batch", "data.sampler", "data.ratios",
    "data.block_shards", "data.label_merge", "data.caption_labels", "data.caption",
    "data.templates", "data.augmentation", "data",
)  # fmt: skip


def plan(folder, *overrides, ranks=1):
    settings = [*SETTINGS, "train.steps=6", f"output_dir={folder}", *overrides]
    cfg = config.load(CONFIG, settings)
    return build.plan(cfg, ranks)


def files(folder):
    """Content and time of everything in a folder but the diary."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.txt", ".running")
    }


class WarnedInTheLastStep:
    """In the place of a `StopRequest`: the signal is there when the third step has been made."""

    asked = 0

    @property
    def received(self):
        self.asked += 1
        return signal.SIGUSR1 if self.asked > 3 else 0


def lives(rank, world_size, folder):
    """A run of six steps, and what other starts make of its folder."""
    from engine.run import Run

    os.chdir(ROOT)
    run, found = folder / "run", {}

    def live(*overrides, stop=None):
        before = files(run) if run.exists() else {}
        trainer = error = None
        try:
            trainer = Run(plan(run, *overrides), torch.device("cpu"), stop=stop).run()
        except DataError as failure:
            error = failure.exit_code, str(failure)
        return trainer, error, files(run) == before

    live("train.steps=6")
    found["said first"] = (run / "log.txt").read_text()
    found["again"] = live("train.steps=6")[1:]
    found["another rate"] = live("train.steps=6", "optim.lr=5e-4")[1:]
    found["shorter"] = live("train.steps=5")[1:]
    found["other workers"] = live("train.steps=6", "data.workers=1")[1:]
    found["said by finished starts"] = (run / "log.txt").read_text() == found["said first"]
    found["two ranks"] = dataclasses.asdict(record.examine(plan(run, "train.steps=6", ranks=2)))
    longer = ["train.steps=9", "optim.lr=2e-3", "optim.weight_decay=0.3"]
    halted = SimpleNamespace(received=signal.SIGTERM)
    found["halted"] = live(*longer, stop=halted)[1:]
    trainer = live(*longer)[0]
    found["decay"] = [group["weight_decay"] for group in trainer.engine.optimizer.param_groups]
    found["said"] = (run / "log.txt").read_text()
    found["config"] = yaml.safe_load((run / "config.yaml").read_text())
    (run / "checkpoints" / "LAST_GOOD").write_text("step_0000006\n")  # as if it had been killed
    live(*longer, stop=WarnedInTheLastStep())
    found["said last"] = (run / "log.txt").read_text().splitlines()[-1]
    found["record"] = json.loads((run / "environment.json").read_text())["starts"]
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found["metrics"] = [json.loads(line) for line in lines]
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("lr: 1\n")
    import train

    sys.argv = ["train.py", "--config", CONFIG, "--output-dir", str(foreign), "train.steps=1"]
    try:
        train.main()
    except DataError as error:
        found["foreign"] = str(error)
    found["left in foreign"] = [path.name for path in foreign.iterdir()]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return multiprocess.run(lives, 1, tmp_path_factory.mktemp("lives"))[0]


def test_a_finished_run_repeated_changes_nothing(found):
    assert found["again"] == [None, True]
    assert found["other workers"] == [None, True]
    assert found["said by finished starts"]
    other = found["two ranks"]
    assert other["finished"], "before anything is loaded or converted"
    assert "not used: ranks 2 instead of 1" in other["lines"]


def test_a_finished_run_asked_to_be_another_is_refused_with_the_difference(found):
    (code, words), untouched = found["another rate"]
    assert (code, untouched) == (3, True)
    assert "finished after 6 steps" in words
    assert words.endswith("Different: optim.lr: there 0.001, now 0.0005")
    (_, words), untouched = found["shorter"]
    assert untouched
    assert words.endswith("Different: train.steps: there 6, now 5")


def test_a_start_that_makes_no_step_leaves_the_record_as_it_is(found):
    assert found["halted"] == [None, True]


def test_a_longer_run_says_and_keeps_what_changed_from_which_step_on(found):
    assert found["config"]["optim"]["lr"] == 0.002
    assert "changed from step 7 on: optim.lr 0.001 -> 0.002\n" in found["said"]
    first, second, third = found["record"]
    assert (first["after_step"], first["changed"]) == (0, {})
    assert second["after_step"] == 6
    assert second["changed"] == {
        "train.steps": [6, 9], "optim.lr": [0.001, 0.002], "optim.weight_decay": [0.1, 0.3],
    }  # fmt: skip
    assert (third["after_step"], third["changed"]) == (6, {})
    assert [row["step"] for row in found["metrics"]] == [*range(1, 10)]


def test_a_signal_in_the_last_step_ends_a_finished_run(found):
    """Put back into the queue, its job would start once more for nothing."""
    assert " finished after 9 steps: " in found["said last"]


def test_a_longer_run_warns_how_the_rate_moves(found):
    from engine.schedule import learning_rate

    old = learning_rate(5, 6, 2, 1e-3, 5e-7, 5e-6, "cosine")
    new = learning_rate(6, 9, 2, 2e-3, 5e-7, 5e-6, "cosine")
    assert (
        f"warning: the learning rate rises from {old:.3e} at step 6 to {new:.3e} at step 7"
        in (found["said"])
    )
    assert found["metrics"][5]["lr"] == old
    assert found["metrics"][6]["lr"] == new


def test_the_run_says_with_what_and_when_it_was_made(found):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    for start in found["record"]:
        if (ROOT / ".git").exists():
            assert start["git"]["commit"] == head.stdout.strip()
            assert isinstance(start["git"]["changed"], bool)
        assert torch.__version__.startswith(start["versions"]["torch"].split("+")[0])
        assert start["versions"]["python"] == platform.python_version()
        assert datetime.fromisoformat(start["time"]).tzinfo
        assert start["machines"] == [{"host": socket.gethostname(), "device": "cpu", "ranks": [0]}]
    times = [datetime.fromisoformat(row["time"]) for row in found["metrics"]]
    assert times == sorted(times)
    for line in found["said"].splitlines():
        datetime.strptime(line.split(" ", 1)[0], "%Y-%m-%dT%H:%M:%S")


def test_code_that_is_in_no_checkout_has_no_commit(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=False)
    assert environment.commit(tmp_path) is None  # nothing is committed yet
    (tmp_path / "site-packages").mkdir()
    assert environment.commit(tmp_path / "site-packages") is None


def test_a_warm_up_longer_than_the_run_is_said_in_the_plan(tmp_path):
    words = plan(tmp_path, "optim.warmup_steps=30").describe()
    assert "warning: the warm-up of 30 steps is longer than the run of 6" in words
    assert "its highest rate is 2.00e-04" in words
    assert "warning" not in plan(tmp_path, "optim.warmup_steps=6").describe()


def test_the_optimizer_goes_on_with_the_decay_that_the_start_asked_for(found):
    assert found["decay"] == [0.3, 0.0]


def test_a_foreign_folder_is_refused_before_it_is_locked(found):
    assert "config.yaml is not the configuration of a run" in found["foreign"]
    assert found["left in foreign"] == ["config.yaml"]


FOREIGN = {
    "their configuration": ({"config.yaml": "model: {}\n", "metrics.jsonl": ""}, "config.yaml is"),
    "one of ours, laid there": ({"config.yaml": None}, "there is no ds_config.json of a run"),
    "metrics": ({"metrics.jsonl": '{"epoch": 1, "loss": 2.0}\n'}, "lines without a step"),
    "metrics with steps": ({"metrics.jsonl": '{"step": 1}\n'}, "there is no config.yaml"),
    "checkpoints": ({"checkpoints/step_0000100/model.bin": "x"}, "no run.json"),
    "no facts": (
        {"checkpoints/step_1/run.json": "{}", "checkpoints/LAST_GOOD": "step_1"},
        "run.json is not"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_of_a_run_is_refused(tmp_path, case):
    contents, words = FOREIGN[case]
    for name, text in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            text = OmegaConf.to_yaml(plan(tmp_path / "x").cfg, resolve=True)
        path.write_text(text)
    before = files(tmp_path)
    with pytest.raises(DataError, match=words):
        record.examine(plan(tmp_path))
    assert files(tmp_path) == before


def test_an_empty_folder_and_one_of_other_files_are_new(tmp_path):
    (tmp_path / "slurm-1.out").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    assert record.examine(plan(tmp_path)).lines == []


def test_identity_holds_every_key_that_is_not_listed(tmp_path):
    asked = plan(tmp_path)
    before = asked.identity()
    assert before.keys() >= {*OLD_KEYS}
    values = OmegaConf.to_container(asked.cfg, resolve=True)
    values["data"]["invented"] = values["invented"] = 1
    assert identity.facts(values, before["data"]) == {**before, "data.invented": 1, "invented": 1}
    known = OmegaConf.structured(config.RunConfig)
    for key in (*identity.FREE, *identity.CHANGEABLE):  # none is misspelt
        section, _, name = key.partition(".")
        assert section in known, key
        assert not name or section == "model" or name in known[section], key


def test_a_checkpoint_of_an_older_version_continues(tmp_path):
    now = plan(tmp_path).identity()
    old = {**{key: now[key] for key in OLD_KEYS}, "data.gone": True}
    checkpoint.check_identity({"identity": old}, now, tmp_path)
    checkpoint.check_identity({"identity": now}, {**now, "data.new": 1}, tmp_path)
    with pytest.raises(DataError, match=r"Different: data.sampler: checkpoint 'ratio', now"):
        checkpoint.check_identity({"identity": {**old, "data.sampler": "ratio"}}, now, tmp_path)


def test_the_tables_of_the_document_are_those_of_the_code():
    """docs/training.md lists which keys may change and why, in this order."""
    text = (ROOT / "docs/training.md").read_text()
    text = text.split("## Which keys may change\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    tables = identity.FREE, identity.CHANGEABLE, identity.FREE_DEEPSPEED
    assert rows == [row for table in tables for row in table.items()]
    assert text.count("\n| ") == len(rows) + len(tables)  # and no other row but the heads
