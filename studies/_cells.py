"""The cells of a study, and what their folders say: what is done, what is missing, what it cost.

    OUT/runs/ARM-seedS/       run folder of train.py
    OUT/results/              result rows of all cells; a row's `run` is ARM-seedS
    OUT/cells/ARM-seedS/      output.txt, usage.jsonl; finished.json, or failure.txt until then
    OUT/report/               what studies.report drew

Nothing else is remembered: a folder that is copied to another place goes on there. A finished cell
stays finished when its run folder is deleted: finished.json has what is asked of it.
"""

import hashlib
import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open

from engine import config, identity
from eval import rows
from loaders.errors import ConfigError
from studies import _evaluations
from studies._study import Study, find_config, nearest

REFERENCE = "model.reference.checksum"


@dataclass
class Cell:
    """An arm with a seed; `overrides` are all that go behind its configuration."""

    arm: str
    seed: int
    config: Path
    overrides: list[str]
    output: Path
    evaluations: list[_evaluations.Planned]

    @property
    def name(self) -> str:
        """As result rows call the run."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.output / "runs" / self.name

    @property
    def notes(self) -> Path:
        """The folder of what the study says about the cell."""
        return self.output / "cells" / self.name

    @property
    def results(self) -> Path:
        """The folder of the result rows."""
        return self.output / "results"

    @cached_property
    def cfg(self) -> DictConfig:
        """Its checked configuration."""
        return config.load(self.config, self.overrides)

    def steps(self) -> int | None:
        """Optimizer steps of the run; None where only the data say how long an epoch is."""
        return config.count_steps(self.cfg, 0)[0] or None

    def done_steps(self) -> int:
        """Steps in the last checkpoint, or in that of a finished run that was deleted."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return self.finished().get("steps", 0)
        return int(checkpoint.name.removeprefix("step_"))

    def checkpoint(self) -> Path | None:
        """The last good checkpoint."""
        root = self.run / "checkpoints"
        try:
            folder = root / (root / "LAST_GOOD").read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return folder if (folder / "model.safetensors").is_file() else None

    def trained(self) -> bool:
        """Whether the run is finished, and is the one that the study describes."""
        if self.differing():
            return False
        if self.checkpoint() is None:
            return bool(self.finished())
        starts = _json(self.run / "environment.json").get("starts", [])
        planned = starts[-1]["steps"] if starts else None
        return planned is not None and self.done_steps() >= planned

    def differing(self) -> dict[str, tuple[Any, Any]]:
        """Key -> (in the run, in the study) of what decides a sample or an update."""
        path = self.run / "config.yaml"
        if path.is_file():
            was = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        elif self.finished():
            was = self.finished()["config"]
        else:
            return {}
        was, now = (
            identity.flat(cfg)
            for cfg in (was, OmegaConf.to_container(self.cfg, resolve=True))
        )  # fmt: skip
        # The run writes down which reference it found; a study need not say it beforehand.
        if now.get(REFERENCE) is None:
            was.pop(REFERENCE, None)
        keys = [key for key in [*now, *(was.keys() - now.keys())] if not identity.is_free(key)]
        return {k: (was.get(k), now.get(k)) for k in keys if was.get(k) != now.get(k)}

    def finished(self) -> dict:
        """What `finish` kept of a run folder that is gone; empty where it did not."""
        return _json(self.notes / "finished.json")

    def finish(self) -> None:
        """Keep what is asked of a cell all of whose rows are there."""
        speeds = [r["samples_per_second"] for r in self.records() if "samples_per_second" in r]
        kept = {
            "steps": self.done_steps(),
            "checkpoint_hash": self.checkpoint_hash(),
            "parameters": self.parameters(),
            "samples_per_second": statistics.median(speeds) if speeds else None,
            "config": OmegaConf.to_container(self.cfg, resolve=True),
        }
        path = self.notes / "finished.json"
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def checkpoint_hash(self) -> str:
        """SHA-256 of the weights of the last checkpoint, as result rows have it."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return self.finished()["checkpoint_hash"]
        with open(checkpoint / "model.safetensors", "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def parameters(self) -> int:
        """Numbers in the model, from the head of the checkpoint's safetensors file."""
        checkpoint = self.checkpoint()
        if checkpoint is None:
            return self.finished()["parameters"]
        with safe_open(checkpoint / "model.safetensors", "numpy") as file:
            names = [name for name in file.keys() if name.startswith("model.")]  # noqa: SIM118
            return sum(math.prod(file.get_slice(name).get_shape()) for name in names)

    def rows(self) -> list[dict]:
        """Result rows of the last checkpoint; none before the run is finished."""
        if not self.trained():
            return []
        return _evaluations.read_rows(self.results, self.name, self.checkpoint_hash())

    def lacking(self) -> list[tuple[_evaluations.Planned, list[str]]]:
        """Evaluations that have no rows yet, with the sets that they lack."""
        found = self.rows()
        pairs = [(one, one.lacking(found)) for one in self.evaluations]
        return [(one, names) for one, names in pairs if names]

    def records(self) -> list[dict]:
        """Lines of the run's metrics.jsonl; one that a kill has cut off is left out."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def training_seconds(self) -> float | None:
        """Samples of the run over the median speed of its log; None before it is finished."""
        if not self.trained():
            return None
        speeds = [r["samples_per_second"] for r in self.records() if "samples_per_second" in r]
        speed = statistics.median(speeds) if speeds else self.finished().get("samples_per_second")
        return self.done_steps() * self.cfg.train.global_batch / speed if speed else None

    def usage(self) -> list[dict]:
        """What its processes took, one dictionary each; see `studies._work`."""
        path = self.notes / "usage.jsonl"
        return rows.read_rows(path) if path.is_file() else []


def make(
    study: Study,
    path: Path,
    planned: list[_evaluations.Planned],
    output: Path,
    only: list[str] | None = None,
    seeds: list[int] | None = None,
    changes: list[str] | None = None,
) -> list[Cell]:
    """The cells of a study, seed by seed, so that the first seed of all arms comes first.

    Args:
        path: the study's file. only, seeds: which arms and seeds; all by default. changes:
            overrides of every run behind those of the file.

    Raises:
        ConfigError: an arm or seed that the study does not have, or a configuration that
            `engine.config` refuses; it names the arm.
    """
    for arm in only or ():
        if arm not in study.arms:
            raise nearest(arm, study.arms, "arm")
    for seed in seeds or ():
        if seed not in study.seeds:
            raise ConfigError(f"--seeds {seed}: {path} has {', '.join(map(str, study.seeds))}")
    cells = []
    for seed in seeds or study.seeds:
        for name, arm in study.arms.items():
            if only and name not in only:
                continue
            overrides = [*study.overrides, *arm.overrides, *(changes or ())]
            try:
                cell = Cell(
                    name, seed, find_config(arm.config, path),
                    [*overrides, f"name={name}", f"seed={seed}"], output,
                    [one for one in planned if one.task not in arm.without],
                )  # fmt: skip
                cell.overrides.append(f"output_dir={cell.run}")
                _ = cell.cfg  # read now, so that nothing starts before all are right
            except ConfigError as error:
                raise ConfigError(f"{path}: arm {name}: {error}") from None
            cells.append(cell)
    return cells


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
