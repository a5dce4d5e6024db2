"""Lives of one run: each starts the same command, and all but the last are killed.

Ranks are forked from a server that has everything imported, so that a life costs a second or two.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.commands import CONFIG
from tests.engine.test_train import trace
from tests.kill import rank
from tests.multiprocess import fork_server, free_port

RANKS = 2
KEEP = 2
SAVE = 3
EVALUATE = 12
STEPS = 33
IMAGES = 150  # of the set that is evaluated: more than one batch on each rank, the last not full
# With a shorter time-out a surviving rank waits less until it reads the others' notes twice.
SETTINGS = (
    f"train.steps={STEPS}", f"log.save_every_steps={SAVE}", f"log.keep_last={KEEP}",
    "timeout_minutes=0.3",
    f"evals.every_steps={EVALUATE}", "evals.tasks={zero_shot: [drawn]}",
)  # fmt: skip


@dataclass
class Kill:
    """What ends a life.

    Args:
        signal: SIGKILL, SIGUSR1 or SIGTERM. everyone: sent to all processes, or to one rank.
        point: a name in `rank.POINTS`; or else a moment of the clock:
        steps: so many steps after the start, and seconds: so much later.
    """

    signal: int
    everyone: bool
    point: str | None = None
    steps: int = 0
    seconds: float = 0.0
    rank: int = 0

    @property
    def victim(self) -> int:
        """The rank that is killed, if it is one."""
        return rank.POINTS[self.point].rank if self.point else self.rank

    def __str__(self) -> str:
        moment = self.point or f"{self.steps} steps and {self.seconds:.2f} s"
        who = "all" if self.everyone else f"rank {self.victim}"
        return f"{signal.Signals(self.signal).name} to {who}: {moment}"


class Run:
    """A run folder, what its ranks recorded, and how its lives ended.

    Args:
        registry: of the sets that it evaluates, in place of `eval/datasets.yaml`.
    """

    def __init__(
        self, folder: Path, *settings: str, out: Path | None = None, registry: Path | None = None
    ):
        self.out, self.notes, self.registry = out or folder / "run", folder / "notes", registry
        self.notes.mkdir(parents=True)
        self.arguments = ["--config", CONFIG, "--output-dir", str(self.out), *settings]

    def live(self, kill: Kill | None = None) -> list[int]:
        """Start all ranks, kill them as told, and return their exit codes."""
        (self.notes / "struck").unlink(missing_ok=True)
        before = self.recorded()
        life = {
            "arguments": self.arguments, "ranks": RANKS, "port": free_port(),
            "notes": str(self.notes), "registry": self.registry,
        }  # fmt: skip
        if kill:
            life |= {"point": kill.point, "signal": kill.signal, "everyone": kill.everyone}
        processes = _start(life)
        try:
            if kill and not kill.point:
                while self.recorded() < before + kill.steps and _alive(processes):
                    time.sleep(0.005)
                time.sleep(kill.seconds)
                _send(kill, processes)
            _join(processes)
            return [process.exitcode for process in processes]
        finally:
            with contextlib.suppress(ProcessLookupError):  # data workers of a killed rank
                os.killpg(processes[0].pid, signal.SIGKILL)
            for process in processes:
                process.join()

    def recorded(self) -> int:
        """Steps that rank 0 made, in all lives."""
        path = self.notes / "trace_0.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def struck(self) -> bool:
        """Whether the last life reached its point."""
        return (self.notes / "struck").exists()

    def attempts(self, of: int) -> list[dict]:
        """Every step that a rank made, in order, those that were lost by a kill too."""
        lines = (self.notes / f"trace_{of}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def output(self) -> str:
        """What all lives printed."""
        return "".join(p.read_text() for p in sorted(self.notes.glob("output_*.txt")))

    def last_words(self) -> str:
        """The end of what each rank printed."""
        return "".join(p.read_text()[-3000:] for p in sorted(self.notes.glob("output_*.txt")))

    def last_good(self) -> int:
        """The step that LAST_GOOD names; 0 where there is none."""
        pointer = self.out / "checkpoints" / "LAST_GOOD"
        return int(pointer.read_text().removeprefix("step_")) if pointer.exists() else 0


def check_checkpoints(run: Run) -> None:
    """Whatever is called step_* is whole: every part can be read, and says the right step."""
    root = run.out / "checkpoints"
    for folder in root.glob("step_*"):
        names = {path.name for path in folder.iterdir()}
        assert names == {
            "mp_rank_00_model_states.pt", "model.safetensors", "run.json",
            *(f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(RANKS)),
        }, f"{folder}: {names}"  # fmt: skip
        step = int(folder.name.removeprefix("step_"))
        assert json.loads((folder / "run.json").read_text())["step"] == step
        assert load_file(folder / "model.safetensors")
        for path in folder.glob("*.pt"):
            assert torch.load(path, weights_only=False, map_location="cpu")
    if run.last_good():
        assert (root / f"step_{run.last_good():07d}").is_dir()


def check_equal(run: Run, whole: Run) -> None:
    """A finished run with its kills against the uninterrupted one, to the last bit."""
    assert [row["step"] for row in trace(run.out)] == list(range(1, STEPS + 1))
    for row, expected in zip(trace(run.out), trace(whole.out), strict=True):
        assert row == expected
    for of in range(RANKS):
        expected = {row["step"]: row for row in whole.attempts(of)}
        assert len(expected) == len(whole.attempts(of)) == STEPS
        seen = run.attempts(of)
        for row in seen:
            assert row == expected[row["step"]], of
        assert {row["step"] for row in seen} == set(expected)
    check_weights(run, whole, STEPS)
    # An evaluation that was cut off is not made again: the run goes on behind its checkpoint.
    rows, expected = _evaluations(run), _evaluations(whole)
    assert expected
    assert [row for row in expected if row in rows] == rows
    left = sorted(path.name for path in (run.out / "checkpoints").glob("*step_*"))
    # The last one but one was perhaps saved because of a signal.
    assert len(left) == KEEP
    assert left[0].startswith("step_")
    assert left[1] == f"step_{STEPS:07d}"


def check_weights(run: Run, whole: Run, step: int) -> None:
    """The weights of a step, to the last bit."""
    name = f"checkpoints/step_{step:07d}/model.safetensors"
    first, second = (load_file(r.out / name) for r in (run, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def kill_all(folder: Path, whole: Run, kills: list[Kill]) -> list[str]:
    """Go through kills, on one run folder after the other; returns how each life ended."""
    ended: list[str] = []
    places = (folder / f"cut{number}" for number in range(len(kills)))
    runs = (Run(place, *SETTINGS, registry=whole.registry) for place in places)
    run = next(runs)
    for kill in kills:
        missed = True
        while missed:  # a run may end before its kill: then the next one gets it
            before = run.last_good()
            codes = run.live(kill)
            where = f"{kill}: exit codes {codes}, after step {before}"
            print(where, flush=True)
            check_checkpoints(run)
            assert run.last_good() >= before, where
            finished = codes == [0] * RANKS and run.last_good() == STEPS
            missed = finished and not (kill.point and run.struck())
            if finished:
                check_equal(run, whole)
                shutil.rmtree(run.out)
                assert not missed or before, f"{where}: not in a whole run"
                run = next(runs)
        check_end(kill, codes, where, run)
        ended.append(where)
    if run.notes.exists() and run.recorded():
        assert run.live() == [0] * RANKS, run.output()[-5000:]
        check_checkpoints(run)
        check_equal(run, whole)
    return ended


def check_end(kill: Kill, codes: list[int], where: str, run: Run) -> None:
    """Nothing but the kill ended this life."""
    where += "\n" + run.last_words()
    if not kill.point and not kill.steps and 3 in codes:
        # A rank whose partner died before they met says so, or is ended by the launcher.
        assert "did not arrive" in where or "left while this rank waited" in where, where
        codes = [6 if code == 3 else code for code in codes]
    if kill.signal == signal.SIGKILL:
        victims = codes if kill.everyone else [codes[kill.victim]]
        assert set(victims) == {-signal.SIGKILL}, where
        # A rank that lost its partner ends by itself; in the rendezvous the launcher ends it.
        alone = {6} if kill.point and rank.POINTS[kill.point].alone else {0, 6, -signal.SIGTERM}
        assert set(codes) <= alone | {-signal.SIGKILL}, where
    elif kill.point:
        assert codes == [0] * RANKS, where
    else:  # perhaps before the signal is caught, on one rank or on both
        by_launcher = set() if kill.steps else {-signal.SIGKILL}
        assert set(codes) <= {0, 6, -kill.signal, -signal.SIGTERM} | by_launcher, where


def random_kills(count: int, seed: int) -> list[Kill]:
    """Kills at moments of the clock: a quarter while the run starts, the others in its steps."""
    generator = random.Random(seed)
    kills = []
    for number in range(count):
        start = number % 4 == 3
        kills.append(
            Kill(
                signal=generator.choice(
                    [signal.SIGKILL, signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM]
                ),
                everyone=generator.random() < 0.6,
                steps=0 if start else generator.randrange(1, 3 * SAVE),
                seconds=generator.uniform(0, 2) if start else generator.uniform(0, 0.4),
                rank=generator.randrange(RANKS),
            )
        )
    return kills


def _start(life: dict) -> list:
    context = fork_server()
    processes = []
    for number in range(RANKS):
        leader = processes[0].pid if processes else None
        processes.append(context.Process(target=rank.main, args=(number, leader, life)))
        processes[-1].start()
    return processes


def _alive(processes: list) -> bool:
    return all(process.is_alive() for process in processes)


def _send(kill: Kill, processes: list) -> None:
    with contextlib.suppress(ProcessLookupError):
        if kill.everyone:
            os.killpg(processes[0].pid, kill.signal)
        else:
            os.kill(processes[kill.rank].pid, kill.signal)


def _join(processes: list) -> None:
    """Wait as a launcher does: when a rank has failed, the others are stopped after a while."""
    deadline = time.monotonic() + 300
    while _alive(processes) and time.monotonic() < deadline:
        wait([process.sentinel for process in processes], timeout=1)
    patience = 60 if any(process.exitcode for process in processes) else 120
    for process in processes:
        process.join(patience)
    for process in processes:
        if process.is_alive():
            process.terminate()
            process.join(10)
            process.kill()
            process.join()


def _evaluations(run: Run) -> list[tuple]:
    path = run.out / "evals.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["dataset"], row["metric"], row["value"]) for row in rows]
