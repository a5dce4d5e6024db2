"""Data workers that die, hang, or meet signals meant for the trainer."""

import multiprocessing
import os
import signal
import time

import psutil
import pytest
import torch
from torch.utils.data._utils import signal_handling

from loaders import order as order_module
from loaders.batch import TripletDataset, make_loader
from loaders.errors import DataError
from loaders.labels import LabelSpace
from loaders.manifest import open_shards
from loaders.texts import TextOptions
from loaders.views import decode
from loaders.workers import GuardedLoader, ReadingNotes, end_workers
from tests import commands
from tests.commands import ROOT
from tests.multiprocess import wait_for_lines


class Fatal:
    """A view that does something else than look at one certain picture."""

    def __init__(self, picture, deed):
        self.pixels, self.deed = picture.tobytes(), deed

    def __call__(self, picture):
        if picture.tobytes() == self.pixels:
            self.deed()
        return torch.zeros(3, 4, 4, dtype=torch.uint8)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hung():
    time.sleep(600)


def fails():
    raise RuntimeError("decoder: bad state")


def captions(deed, choose):
    """The shipped captions; `deed` happens at the picture with the uid that `choose` picks."""
    shards = open_shards(str(ROOT / "data" / "quickstart" / "openclipart_train"))
    source = order_module.Source(shards.name, shards.kind, shards.shard_sizes)
    streams = order_module.plan_streams([source], "balanced")
    order = order_module.Order([source], streams, 8, seed=1)
    uid = choose(order)
    dataset = TripletDataset(
        [shards], LabelSpace([shards]), [Fatal(decode(shards.read_image(uid)), deed)],
        TextOptions(["{}"]), lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64), seed=0,
    )  # fmt: skip
    return dataset, order, uid


@pytest.mark.parametrize(("deed", "words"), [(killed, "Killed"), (hung, "timed out after 3")])
def test_a_data_worker_that_dies_or_hangs_is_named_with_its_sample(deed, words):
    dataset, order, uid = captions(deed, lambda order: int(order.global_batch(1)[3]))
    notes = ReadingNotes(2)
    loader = make_loader(dataset, order, 0, 1, 8, 0, 4, 2, notes, timeout=3)
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    error = notes.explain(caught.value, dataset.sources)
    end_workers()
    assert not multiprocessing.active_children()
    assert isinstance(error, DataError)
    assert error.exit_code == 3
    shards = dataset.sources[0]
    assert f"{shards.shard_of(uid)}, sample {shards.key(uid)!r}" in str(error)
    assert str(error).count(", sample ") == 1
    assert words in str(error)
    advice = "leave the shard out" if deed is hung else "fewer data.workers"
    assert advice in str(error)
    assert notes.explain(RuntimeError("CUDA out of memory"), dataset.sources) is None


def test_a_training_whose_data_worker_is_killed_ends_with_its_sample(tmp_path):
    """Whatever the trainer does when the kernel takes a worker, it ends by itself, with code 3."""
    run = commands.training("--output-dir", tmp_path, "train.steps=100000", "data.workers=2")
    wait_for_lines(tmp_path / "metrics.jsonl", 2, run)
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    text = run.communicate(timeout=100)[1]
    assert run.returncode == 3, text
    last = text.splitlines()[-1]
    # Torch finds out by a signal, or, if the loader looks first, by asking each worker.
    words = (
        f"(pid {workers[1].pid}) is killed by signal",
        f"(pid(s) {workers[1].pid}) exited unexp",
    )
    assert last.startswith(tuple(f"error: DataLoader worker {way}" for way in words))
    assert f"Worker {workers[1].pid} was " in last
    assert f"Worker {workers[0].pid}" not in last
    assert last in (tmp_path / "log.txt").read_text()


def test_a_sample_whose_decoding_fails_is_named():
    dataset, _, uid = captions(fails, lambda order: 5)
    shards = dataset.sources[0]
    place = f"{shards.shard_of(uid)}, sample {shards.key(uid)!r}: RuntimeError: decoder: bad state"
    with pytest.raises(DataError) as caught:
        dataset[0, 0, uid]
    assert str(caught.value) == place


class BrokenCable(Exception):
    """An error that only this file knows."""


def late_death():
    """Make the first step of a training fail, and its worker die while that is told."""
    from engine import loop, watch

    def fail(self):
        raise BrokenCable("the first error")

    def stop(self, why=None):
        os.kill(int(self.trainer.notes.table[0, 0]), signal.SIGKILL)
        time.sleep(0.5)  # a death is noticed between two lines

    def train(self):
        batches = self._batches()
        next(batches)
        self.watch.trainer, watch.Watch.stop = self, stop
        fail(self)

    loop.Trainer.train = train


def test_a_worker_that_dies_while_an_error_is_told_changes_nothing(tmp_path):
    """Torch's handler would raise in the midst of it, and the exit would wait for the others."""
    run = commands.train(
        "--output-dir", tmp_path, "train.steps=9", "data.workers=2",
        prepare=late_death, timeout=100,
    )  # fmt: skip
    assert run.returncode == 1
    assert "BrokenCable: the first error" in run.stderr.splitlines()[-1]
    assert "DataLoader" not in run.stderr
    assert "error: the first error" in (tmp_path / "log.txt").read_text()


def test_a_connection_broken_by_a_death_is_explained_by_it():
    """The trainer may read from a dying worker before the kernel tells that it is dead."""
    dataset, order, _ = captions(lambda: None, lambda order: 5)
    notes = ReadingNotes(2)
    batches = iter(make_loader(dataset, order, 0, 1, 8, 0, 4, 2, notes))
    next(batches)
    assert notes.explain(FileNotFoundError("a file"), dataset.sources) is None
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = int(notes.table[1, 0])
    os.kill(pid, signal.SIGKILL)
    error = notes.explain(ConnectionResetError(104, "Connection reset by peer"), dataset.sources)
    assert str(error).startswith(f"DataLoader worker (pid {pid}) is killed by signal: Killed. ")
    assert f"Worker {pid} was " in str(error)
    end_workers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_that_come_while_a_worker_starts_do_not_end_it(monkeypatch, number):
    """Between the fork and the worker's own first line torch's handler of TERM would end it."""
    real = signal_handling._set_worker_signal_handlers

    def start():
        real()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", start)
    loader = GuardedLoader(range(8), batch_size=4, num_workers=2)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {number}
