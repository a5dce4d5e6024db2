"""TensorBoard, wandb and metrics.jsonl of a run that is killed and continued tell one story."""

import json
import os
import signal
import struct
import sys
import time

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import config
from engine.mirrors import chosen
from loaders.errors import ConfigError
from tests import commands, multiprocess
from tests.commands import CONFIG, ROOT

# Lines of the log cover 3 steps, the checkpoint comes after 20: inside a window.
SETTINGS = ["train.steps=32", "log.every_steps=3", "log.save_every_steps=20", "data.workers=0"]
MIRRORS = ["log.report_to=wandb,tensorboard", "log.wandb_project=tests"]
STEPS = [*range(3, 31, 3), 32]


def kill_after_lines(folder, count):
    """Start the run and kill it with all it started, once the log has `count` lines."""
    arguments = [*SETTINGS, *MIRRORS, "--output-dir", str(folder)]
    run = commands.training(*arguments, environment={"WANDB_MODE": "offline"})
    metrics = folder / "metrics.jsonl"
    deadline = time.time() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert run.poll() is None
        assert time.time() < deadline
        time.sleep(0.002)
    family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    run.communicate()


def rest_and_whole(rank, world_size, folder):
    """Continue the killed run, with an evaluation, and make another one without interruption."""
    from engine import build
    from engine.run import Run

    os.chdir(ROOT)
    os.environ["WANDB_MODE"] = "offline"
    for name, overrides in (("cut", [*MIRRORS, "evals.every_steps=32"]), ("whole", [])):
        cfg = config.load(CONFIG, [*SETTINGS, *overrides, f"output_dir={folder / name}"])
        Run(build.plan(cfg, 1), torch.device("cpu"), evaluation if overrides else None).run()


def evaluation(checkpoint):
    row = {"step": 32, "dataset": "cats", "task": "zero_shot", "metric": "top1", "value": 50.0}
    (checkpoint.parents[1] / "evals.jsonl").write_text(json.dumps(row) + "\n")
    return [row]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    kill_after_lines(folder / "cut", 8)
    before = lines(folder / "cut"), (folder / "cut/checkpoints/LAST_GOOD").read_text()
    multiprocess.run(rest_and_whole, 1, folder)
    return folder, before


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(records):
    timed = (
        "time",
        "samples_per_second",
        "data_seconds",
        "eta_seconds",
        "data_share",
        "speed_ratio",
        "memory_gb",
    )
    return [{k: v for k, v in record.items() if k not in timed} for record in records]


def test_the_log_of_a_continued_run_equals_that_of_an_uninterrupted_one(runs):
    """Also in the window that the checkpoint after step 20 cuts in two."""
    folder, (before, kept) = runs
    assert kept == "step_0000020\n"
    assert [record["step"] for record in before][:8] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [record["step"] for record in lines(folder / "cut")] == STEPS
    assert without_times(lines(folder / "cut")) == without_times(lines(folder / "whole"))


def expected_scalars(folder):
    found = {
        (f"train/{key}", record["step"]): value
        for record in lines(folder)
        for key, value in record.items()
        if key not in ("step", "time") and value is not None
    }
    return found | {("eval/cats/zero_shot/top1", 32): 50.0}


def test_tensorboard_holds_every_step_once(runs):
    folder, _ = runs
    events = EventAccumulator(str(folder / "cut/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = [
        ((tag, event.step), event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    ]
    expected = expected_scalars(folder / "cut")
    assert sorted(key for key, _ in found) == sorted(expected)
    single = {key: torch.tensor(value, dtype=torch.float32).item() for key, value in found}
    assert single == {
        key: torch.tensor(float(value), dtype=torch.float32).item()
        for key, value in expected.items()
    }


def wandb_records(path):
    """Records of a .wandb file: LevelDB's log format with protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_wandb_offline_holds_every_step_once(runs):
    folder, _ = runs
    identifier = (folder / "cut/wandb_id").read_text().strip()
    files = list((folder / "cut/wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{identifier}.wandb"]
    found = []
    for record in wandb_records(files[0]):
        if record.WhichOneof("record_type") == "run":
            assert (record.run.run_id, record.run.project) == (identifier, "tests")
        if record.WhichOneof("record_type") == "history":
            values = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            step = int(values["_step"])
            found += [
                ((key, step), json.loads(value))
                for key, value in values.items()
                if key.startswith(("train/", "eval/"))
            ]
    expected = expected_scalars(folder / "cut")
    assert sorted(key for key, _ in found) == sorted(expected)
    assert dict(found) == expected


def test_mirrors_are_named_as_elsewhere():
    assert chosen(None) == []
    assert chosen("wandb,tensorboard") == chosen("wandb, tensorboard") == ["wandb", "tensorboard"]
    cfg = config.load(CONFIG, ["train.steps=1", "log.report_to=[tensorboard]"])
    assert chosen(cfg.log.report_to) == ["tensorboard"]
    with pytest.raises(ConfigError, match="'tensorbord' is not one of tensorboard, wandb"):
        config.load(CONFIG, ["train.steps=1", "log.report_to=tensorbord"])


def test_a_missing_package_is_refused_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ConfigError, match="pip install wandb"):
        config.load(CONFIG, ["train.steps=1", "log.report_to=wandb"])
