"""Runs that go wrong: NaN, a rank that stops, a data worker that dies, a slow machine."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import train as script
from engine.clock import ENOUGH, Clock, slow_line
from engine.watch import diagnose
from tests import multiprocess
from tests.commands import CONFIG, ROOT, Command
from tests.engine import stuck
from tests.multiprocess import wait_for_lines


def train(folder, *overrides):
    """A run in this process: its plan, and its Trainer or the error that ended it."""
    from engine import build, config, dist
    from engine.run import Run
    from loaders.errors import UserError

    settings = ["log.save_every_steps=1", "log.every_steps=2", "data.workers=0"]
    cfg = config.load(CONFIG, [*settings, f"output_dir={folder}", *overrides])
    plan = build.plan(cfg, dist.world_size())
    try:
        return plan, Run(plan, torch.device("cpu")).run()
    except UserError as error:
        return plan, error


def divergence(rank, world_size, folder):
    """What is asserted below, of one rank."""
    from engine import build

    os.chdir(ROOT)
    found = {}
    _, trainer = train(folder / "a", "train.steps=3")
    # Weights and loss are fine, but a moment of AdamW has overflowed on one rank.
    if rank == 1:
        state = next(iter(trainer.engine.optimizer.optimizer.state.values()))
        state["exp_avg_sq"][3] = torch.inf
    trainer.done = 4
    try:
        trainer._save()
    except Exception as failure:
        found["moment"] = str(failure)
    # ZeRO-1 skips an update whose gradient is not finite, so windows are counted.
    plan, error = train(folder / "a", "train.steps=40", "optim.lr=1e30", "optim.grad_clip_norm=0")
    found["windows"] = (type(error).__name__, error.exit_code, str(error))
    share = slice(4 * rank, 4 * rank + 4)
    found["uids"] = [plan.order.global_batch(step)[share].tolist() for step in range(10)]
    found["images"] = [
        build.dataset(plan)[(4, 4 * rank + n, uid)]["image"]
        for n, uid in enumerate(found["uids"][4])
    ]
    # A plain optimizer takes it over into the weights, and the run ends with the first window.
    _, error = train(
        folder / "b", "train.steps=40", "optim.lr=1e30", "optim.grad_clip_norm=0",
        "optim.warmup_steps=0", "deepspeed=ds_configs/zero0_fp32.json",
    )  # fmt: skip
    found["ruined"] = str(error)
    return found


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diverged")
    return folder, multiprocess.run(divergence, 2, folder)


def finite_checkpoints(folder):
    """Names of the checkpoints; each of their weights must be finite."""
    for path in folder.glob("checkpoints/step_*/model.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    return sorted(path.name for path in folder.glob("checkpoints/step_*"))


def test_divergence_ends_the_run_after_three_windows_and_leaves_good_checkpoints(diverged):
    """3 good steps; a step at lr 1e30 leaves weights that are finite but of no use."""
    folder, ranks = diverged
    for rank, found in enumerate(ranks):
        name, code, text = found["windows"]
        assert (name, code) == ("NonFiniteLoss", 4)
        assert "3 logged windows in a row" in text
        assert "First at step 5 (loss nan, gradient norm inf)" in text
        assert "The last good checkpoint is kept: step_0000003" in text
        dump = folder / "a" / f"nonfinite_step_5_rank_{rank}.json"
        assert str(dump) in text
        facts = json.loads(dump.read_text())
        assert (facts["step"], facts["rank"], facts["last_good"]) == (5, rank, "step_0000003")
        uids = found["uids"][4]
        assert [sample["uid"] for sample in facts["samples"]] == uids
        assert [address[2] for address in facts["addresses"]] == uids
        assert ", ".join(map(str, uids)) in text
        assert all(sample["shard"].endswith(".tar") for sample in facts["samples"])
        tensors = torch.load(dump.with_suffix(".pt"), weights_only=True)
        assert tensors["uid"].tolist() == uids
        assert (tensors["image"].numpy() == found["images"]).all()
    assert finite_checkpoints(folder / "a") == ["step_0000002", "step_0000003"]
    assert (folder / "a/checkpoints/LAST_GOOD").read_text() == "step_0000003\n"
    lines = [json.loads(line) for line in (folder / "a/metrics.jsonl").read_text().splitlines()]
    # Both ranks flag both steps of a window; the loss at step 4 itself was still finite.
    assert [(r["step"], r["nonfinite"]) for r in lines[-4:]] == [(4, 0), (6, 4), (8, 4), (10, 4)]


def test_ruined_weights_end_the_run_at_once_and_are_not_saved(diverged):
    folder, ranks = diverged
    for found in ranks:
        assert "weights or optimizer state are not finite. First at step 2" in found["ruined"]
        assert "kept: there is none yet" in found["ruined"]
    assert finite_checkpoints(folder / "b") == []


def test_an_overflowed_optimizer_state_is_not_saved(diverged):
    _, ranks = diverged
    assert all("weights or optimizer state are not finite" in r["moment"] for r in ranks)


def pair(*commands):
    """Two ranks as srun would start them, without a launcher; a command: its main, arguments."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(multiprocess.free_port())
    return [
        Command(*words, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, words in enumerate(commands)
    ]


MINUTES = "0.3"


def scripted(*behaviours):
    return pair(*((stuck.main, behaviour, MINUTES) for behaviour in behaviours))


def training(folder):
    settings = ["train.steps=100000", "data.workers=0", f"timeout_minutes={MINUTES}"]
    command = [script.main, "--config", CONFIG, "--output-dir", str(folder), *settings]
    return pair(command, command)


def test_a_rank_that_does_not_come_is_named_and_nobody_waits_for_ever(tmp_path):
    """Rank 1 of a training is stopped; rank 1 of a small loop sleeps, or fails; rank 0, which
    holds the store, is stopped."""
    cases = {
        "stopped": training(tmp_path), "sleeps": scripted("go", "sleep"),
        "fails": scripted("go", "fail"), "store": scripted("stop", "go"),
    }  # fmt: skip
    try:
        wait_for_lines(tmp_path / "metrics.jsonl", 3, cases["stopped"][0])
        cases["stopped"][1].send_signal(signal.SIGSTOP)
        text = {}
        for name, processes in cases.items():
            waiting = processes[1] if name == "store" else processes[0]
            text[name] = "".join(waiting.communicate(timeout=200))
            assert waiting.returncode == 6, text[name]
        # A rank that wakes up again, or was late itself, finds that the others have gone, and does
        # not wait for them either.
        for name, rank in (("stopped", 1), ("store", 0), ("sleeps", 1)):
            late = cases[name][rank]
            late.send_signal(signal.SIGCONT)
            words = late.communicate(timeout=100)
            assert late.returncode != 0, words
    finally:
        for process in [process for processes in cases.values() for process in processes]:
            process.kill()

    assert "rank 1 gave no sign of life" in text["stopped"]
    assert f"(process {cases['stopped'][1].pid}) was in step" in text["stopped"]
    assert "rank 1 gave no sign of life" in (tmp_path / "log.txt").read_text()
    assert "all ranks are alive, but rank 1 did not come" in text["sleeps"]
    assert "was in step 3, working since" in text["sleeps"]
    assert "tests/engine/stuck.py:" in text["sleeps"]
    assert "(nap)" in text["sleeps"]
    assert "rank 1 ended (rank 1: ValueError: no more)" in text["fails"]
    assert "rank 0 (or the launcher on its node) was stopped or killed" in text["store"]


def note(beat=2, count=9, collective=False, ended=None, **facts):
    return {
        "beat": beat, "count": count, "collective": collective, "ended": ended, "host": "n1",
        "pid": 7, "step": 4, "phase": "logging", "seconds": 60.0, "line": "a.py:3 (f)", **facts,
    }  # fmt: skip


def test_diagnosis_of_notes():
    """Dead before late, late before elsewhere; with all at one place it is the network."""
    first = {rank: note(beat=1) for rank in range(4)}
    alike = {rank: note(collective=True) for rank in range(4)}
    assert "network" in diagnose(first, alike, 4).words
    late = {**alike, 2: note(count=8, phase="waiting for data"), 3: note(count=8)}
    found = diagnose(first, late, 4)
    assert found.all_alive
    assert "ranks 2-3 did not come: rank 2 on n1 (process 7) was in step 4, waiting" in found.words
    elsewhere = diagnose(first, {**alike, 1: note()}, 4)
    assert "rank 1 did not come" in elsewhere.words
    silent = diagnose(first, {**late, 0: note(beat=1)}, 4)
    assert not silent.all_alive
    assert silent.words.startswith("rank 0 gave no sign of life")
    assert "rank 2 never wrote" in diagnose({}, {r: note() for r in (0, 1, 3)}, 4).words
    ended = diagnose(first, {**alike, 1: note(beat=1, ended="DataError: x")}, 4)
    assert ended.words == "rank 1 ended (rank 1: DataError: x)"


def test_clock_warns_of_a_slow_window_only():
    """Ten steps of 8 samples a window, 1 s a step; saves of an hour do not count."""
    now = [0.0]
    clock = Clock(8, 1000, now=lambda: now[0])
    reads = []

    def window(seconds, waits):
        for _ in range(10):
            now[0] += seconds
            clock.tick()
        with clock.paused():
            now[0] += 3600
        facts = clock.read(10, waits)
        reads.append((facts.get("speed_ratio"), slow_line(facts, waits)))

    for _ in range(ENOUGH + 1):
        window(1.0, [0.1, 0.2])
    window(1.25, [0.5, 0.5])
    window(4.0, [1.0, 30.0])
    window(2.5, [1.0, 0.0])
    assert [line for _, line in reads[: ENOUGH + 2]] == [None] * (ENOUGH + 2)
    assert reads[ENOUGH][0] is None
    assert [ratio for ratio, _ in reads[ENOUGH + 1 :]] == pytest.approx([0.8, 0.25, 0.4])
    assert "25 % of the run's median speed; rank 1 waited for data 75 %" in reads[-2][1]
    assert "data is not the reason" in reads[-1][1]
