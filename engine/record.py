"""The record of a run: what its folder says was done, and what a new start may make of it.

    RUN/config.yaml, ds_config.json   what holds now
    RUN/environment.json              one entry a start that made a step, in order: after which step
                                      it began, what it changed with both values, and with which
                                      code, versions and machines (engine/environment.py)

A start reads all this first and touches nothing. The record changes when its first step is made: a
start that fails before leaves no trace but lines in log.txt.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine import checkpoint, config, disk, dist, environment, identity, run_folder
from engine.build import Plan, rate
from engine.run_folder import CONFIG, DEEPSPEED
from loaders.errors import DataError, UserError
from models.provenance import ENVIRONMENT


@dataclass(frozen=True)
class Start:
    """What a start finds in its folder.

    Args:
        time: of the start. checkpoint: to continue from. done: steps done in it.
        finished: nothing is left to do. changed: key -> values before and now.
        lines: what there is to say about it.
    """

    time: str
    checkpoint: Path | None
    done: int
    finished: bool
    changed: dict[str, tuple[Any, Any]]
    lines: list[str]


def examine(plan: Plan) -> Start:
    """What this start would continue; reads only.

    Raises:
        DataError: the folder holds files of something else, its checkpoint belongs to another
            configuration, or the run is finished and this would be another one.
    """
    folder = Path(plan.cfg.output_dir)
    run_folder.refuse_foreign(folder)
    last = checkpoint.last_good(folder)
    facts = checkpoint.read_facts(last) if last else {}
    if last:
        checkpoint.check_identity(facts, plan.identity(), last)
    done = facts.get("step", 0)
    before = run_folder.configuration(folder)
    changed = _changes(folder, before, plan, facts)
    finished = last is not None and done >= plan.steps
    decisive = {key: values for key, values in changed.items() if not identity.is_free(key)}
    if finished and decisive:
        words = [f"{key}: there {was!r}, now {now!r}" for key, (was, now) in decisive.items()]
        raise DataError(
            f"{folder} is finished after {done} steps with another configuration; its record is "
            "left as it is. Restore the configuration, make the run longer, or choose another "
            "--output-dir. Different: " + "; ".join(words)
        )
    lines = [_said(key, values, done, finished) for key, values in changed.items()]
    if finished:
        lines = [f"finished after {done} steps: {folder}, nothing to do", *lines]
    elif last:
        lines = [f"continuing {folder} after step {done}", *lines, *_rate_line(before, plan, done)]
    return Start(environment.now(), last, done, finished, changed, lines)


def examine_together(plan: Plan) -> Start:
    """`examine` by rank 0, for all ranks; collective, and raises on all of them."""
    outcome: list[Start | UserError | None] = [None]
    if dist.rank() == 0:
        try:
            outcome = [examine(plan)]
        except UserError as error:
            outcome = [error]
    if dist.world_size() > 1:
        torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def write(plan: Plan, start: Start, device: torch.device) -> None:
    """The first step of this start is made: say in the folder what holds from it on; collective.

    Each file is replaced as a whole. Killed between two of them, the next start finds the
    difference again and repeats it.
    """
    machines = environment.machines(device)
    if dist.rank() == 0:
        folder = Path(plan.cfg.output_dir)
        entry = {
            "time": start.time,
            "after_step": start.done,
            "steps": plan.steps,
            "changed": start.changed,
            **environment.facts(),
            "ranks": dist.world_size(),
            "machines": machines,
        }
        starts = {"starts": [*run_folder.starts(folder), entry]}
        _replace(folder / ENVIRONMENT, json.dumps(starts, indent=1))
        _replace(folder / DEEPSPEED, json.dumps(plan.deepspeed, indent=1))
        _replace(folder / CONFIG, OmegaConf.to_yaml(plan.cfg, resolve=True).rstrip("\n"))
    dist.barrier()


def _replace(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != f"{text}\n":
        disk.write_line(path, text)


def _changes(
    folder: Path, before: DictConfig | None, plan: Plan, facts: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Key -> (before, now) of all that differs between the folder's record and this start."""
    if before is None:
        return {}
    now = identity.flat(OmegaConf.to_container(plan.cfg, resolve=True))
    was = identity.flat(OmegaConf.to_container(before, resolve=True))
    prefix = f"{DEEPSPEED}: "
    was |= {
        prefix + key: value
        for key, value in identity.flat(run_folder.read_json(folder / DEEPSPEED) or {}).items()
    }
    now |= {prefix + key: value for key, value in identity.flat(plan.deepspeed).items()}
    starts = run_folder.starts(folder)
    ranks = starts[-1].get("ranks") if starts else facts.get("world_size")
    if ranks:
        was["ranks"], now["ranks"] = ranks, plan.world_size
    pairs = {key: (was.get(key), now.get(key)) for key in [*now, *(was.keys() - now.keys())]}
    # The folder itself may have been moved.
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b and k != "output_dir"}


def _said(key: str, values: tuple[Any, Any], done: int, finished: bool) -> str:
    was, now = values
    if finished:
        return f"not used: {key} {now!r} instead of {was!r}"
    return f"changed from step {done + 1} on: {key} {was!r} -> {now!r}"


def _rate_line(before: DictConfig | None, plan: Plan, done: int) -> list[str]:
    """A warning, if the learning rate leaves the course on which the run was until now."""
    if before is None:
        return []
    try:
        steps, warmup = config.count_steps(before, sum(len(source) for source in plan.sources))
        arguments = steps, warmup, config.learning_rates(before), before.optim.schedule
    except (OmegaConfBaseException, TypeError):  # keys of an older version
        return []
    last, planned, now = rate(done - 1, *arguments), rate(done, *arguments), plan.rate(done)
    if abs(now - planned) <= 1e-9 * max(now, planned):
        return []
    where = f"{planned:.3e} as planned so far" if done < steps else "the end, as planned so far"
    return [
        f"warning: the learning rate {'rises' if now > last else 'goes'} from {last:.3e} at step "
        f"{done} to {now:.3e} at step {done + 1} (instead of {where}): warm-up and decay follow "
        "from the new length and rates"
    ]
