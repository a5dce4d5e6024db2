"""One rank of train.py as it is, except that it records its steps and may die at a named point."""

import functools
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """A moment inside the program.

    Args:
        target: `module:attribute`, a function that the program calls.
        when: before the call, after it, or half: the file that it wrote is cut in the middle,
            or half of the files in the folder that it deletes are gone.
        path: only a call with an argument that ends so, or a file object of that name.
        rank: whose moment it is.
        alone: whether the other rank notices by itself that this one is gone. In the rendezvous
            of a group it waits for `timeout_minutes`, or until the launcher ends it.
    """

    target: str
    when: str = "before"
    path: str = ""
    rank: int = 0
    alone: bool = True


POINTS = {
    "model part half": Point("torch:save", "half", "model_states.pt"),
    "optimizer part half": Point("torch:save", "half", "optim_states.pt", rank=1),
    "weights half": Point("engine.checkpoint:save_file", "half"),
    "after the second rename": Point("os:replace", "after", "LAST_GOOD"),
    "reading a checkpoint": Point("torch:load", path="optim_states.pt", rank=1),
    "cutting metrics.jsonl": Point("os:replace", path="metrics.jsonl"),
    "group joined": Point("deepspeed:initialize", rank=1, alone=False),
    "backward pass": Point("torch.autograd:backward", rank=1),
    "parts written": Point("engine.deepspeed_engine:full_state", rank=1),
    "optimizer part whole": Point("torch:save", "after", "optim_states.pt"),
    "weights whole": Point("engine.checkpoint:save_file", "after"),
    "run.json half": Point("engine.checkpoint:_write_facts", "half"),
    "run.json whole": Point("engine.checkpoint:_write_facts", "after"),
    "between the two renames": Point("os:replace", path="LAST_GOOD"),
    "before the pruning": Point("engine.checkpoint:_prune"),
    "pruned half": Point("shutil:rmtree", "half", ".old"),
    "after the pruning": Point("engine.checkpoint:_prune", "after"),
    "loading for evaluation": Point("models.weights:load", rank=1),
    "evaluating": Point("eval.tasks.features:Extractor.images"),
    "features gathered": Point("accelerate:Accelerator.gather"),
    "rows of an evaluation": Point("os:replace", path="evals.jsonl"),
}


def main(rank: int, leader: int | None, life: dict) -> None:
    """Run train.py as `rank` of a group of processes led by the process `leader`.

    Args:
        life: `arguments` of train.py, `ranks`, `port`, `notes` (folder for traces and output),
            `registry` (of the sets to evaluate, or None for the shipped one),
            and optionally `point`, `signal`, `everyone`: what happens at that point.
    """
    _join_group(leader)
    notes = Path(life["notes"])
    output = os.open(notes / f"output_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life["ranks"]),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(life["port"]),
    }  # fmt: skip
    import torch

    import train
    from eval import in_training
    from loaders.errors import run_cli

    if life["registry"]:
        in_training.select = functools.partial(in_training.select, registry=life["registry"])
    torch.set_num_threads(1)
    # As in a process of its own: data workers are forked from their rank.
    multiprocessing.set_start_method("fork", force=True)
    _record(notes / f"trace_{rank}.jsonl")
    point = POINTS.get(life.get("point"))
    if point and point.rank == rank:
        _arm(point, life, notes)
    sys.argv = ["train.py", *life["arguments"]]
    run_cli(train.main)


def _join_group(leader: int | None) -> None:
    """One process group for all ranks and their data workers, so that one signal reaches all."""
    for _ in range(500):
        try:
            return os.setpgid(0, leader or 0)
        except PermissionError:  # the leader has not made its group yet
            time.sleep(0.01)
    raise TimeoutError(f"no process group {leader}")


def _record(path: Path) -> None:
    """Append step, sample ids, learning rate and this rank's loss of every step that it makes."""
    from engine.step import Stepper

    real, file = Stepper.__call__, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    @functools.wraps(real)
    def call(self, step, micro_batches):
        out = real(self, step, micro_batches)
        record = {
            "step": step + 1,
            "uids": [uid for batch in micro_batches for uid in batch["uid"].tolist()],
            "lr": self.engine.optimizer.param_groups[0]["lr"],
            "loss": float(out["loss"]),
        }
        os.write(file, (json.dumps(record) + "\n").encode())
        return out

    Stepper.__call__ = call


def _arm(point: Point, life: dict, notes: Path) -> None:
    """Wrap the function of a point so that its first call sends the signal of this life."""
    module, _, attribute = point.target.partition(":")
    owner = importlib.import_module(module)
    *parents, name = attribute.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real: Callable = getattr(owner, name)

    def call(*args, **kwargs):
        path = _path_of(args, point.path)
        deletes = name == "rmtree"
        if path is None or (deletes and not os.path.isdir(path)):
            return real(*args, **kwargs)
        setattr(owner, name, real)
        if point.when == "after" or (point.when == "half" and not deletes):
            value = real(*args, **kwargs)
        if point.when == "half":
            _halve(Path(path))
        _strike(life, notes)
        return real(*args, **kwargs) if point.when == "before" or deletes else value

    setattr(owner, name, call)


def _halve(path: Path) -> None:
    """Cut a file in the middle, or delete every second file of a folder."""
    if path.is_file():
        return os.truncate(path, path.stat().st_size // 2)
    for file in sorted(path.iterdir())[::2]:
        file.unlink()


def _path_of(args: tuple, ending: str) -> str | None:
    """The last argument that is a path, or an open file, with this ending; "" needs none."""
    names = [getattr(a, "name", a) if hasattr(a, "write") else a for a in args]
    paths = [str(n) for n in names if isinstance(n, str | Path) and str(n).endswith(ending)]
    return paths[-1] if paths else None if ending else ""


def _strike(life: dict, notes: Path) -> None:
    (notes / "struck").touch()
    send = os.killpg if life["everyone"] else os.kill
    send(0 if life["everyone"] else os.getpid(), life["signal"])
