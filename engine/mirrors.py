"""TensorBoard and Weights & Biases as mirrors of metrics.jsonl and evals.jsonl.

The two files are the truth. After a resume a mirror holds every step once: TensorBoard is told from
which step on to forget what an earlier attempt wrote, and wandb is given what it does not have yet.
"""

import importlib.util
import json
import math
import secrets
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from loaders.errors import ConfigError

PACKAGES = ("tensorboard", "wandb")


def chosen(report_to: Any) -> list[str]:
    """The mirrors that `log.report_to` names: null, `wandb,tensorboard`, or a list.

    Raises:
        ConfigError: an unknown name, or a package that is not installed.
    """
    if OmegaConf.is_config(report_to):
        report_to = OmegaConf.to_container(report_to)
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to or [])
    names = [str(name).strip() for name in names]
    for name in names:
        if name not in PACKAGES:
            raise ConfigError(f"log.report_to: {name!r} is not one of {', '.join(PACKAGES)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.report_to={name} needs a package that is not installed: pip install {name}"
            )
    return names


class Mirrors:
    """The mirrors that `log.report_to` asks for; training goes on without one that fails later.

    Args:
        cfg: the configuration of the run. folder: the run folder. step: how many steps are done.
        tell: called with a line when a mirror is left out.
    """

    def __init__(self, cfg: DictConfig, folder: Path, step: int, tell: Callable[[str], None]):
        self.tell = tell
        opened = {"tensorboard": _TensorBoard, "wandb": _Wandb}
        self.open = {
            name: opened[name](cfg, folder, step, tell) for name in chosen(cfg.log.report_to)
        }

    def record(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, as `train/KEY`."""
        self._all("write", record["step"], _training(record))

    def evaluated(self, row: dict[str, Any]) -> None:
        """A line of evals.jsonl, as `eval/DATASET/TASK/METRIC`."""
        self._all("write", row["step"], _evaluation(row))

    def close(self, failed: bool) -> None:
        """Everything is on disk, or sent, when this returns."""
        self._all("close", failed)

    def _all(self, method: str, *arguments: Any) -> None:
        for name, mirror in list(self.open.items()):
            try:
                getattr(mirror, method)(*arguments)
            except Exception as error:  # whatever another project's writer raises
                del self.open[name]
                self.tell(
                    f"warning: {name} failed ({type(error).__name__}: {error}) and gets no more "
                    "records in this attempt; metrics.jsonl has them all"
                )


class _TensorBoard:
    def __init__(self, cfg: DictConfig, folder: Path, step: int, tell: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        # A killed process loses what is not flushed, even of steps that are never run again.
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Wandb:
    """One wandb run per run folder; its id is in RUN/wandb_id.

    On a resume wandb.ai keeps what it has and is sent the later steps. A run in offline mode has no
    such memory, and what a killed process had not written is lost, so such a run is written anew
    from the beginning and replaces the offline folders of earlier attempts.
    """

    def __init__(self, cfg: DictConfig, folder: Path, step: int, tell: Callable[[str], None]):
        import wandb

        # Late, because a configuration is checked without torch.
        from engine.dist import first_line

        start = partial(
            wandb.init,
            project=cfg.log.wandb_project,
            name=cfg.name,
            id=_identifier(folder / "wandb_id"),
            resume="allow",
            dir=folder,
            config=OmegaConf.to_container(cfg, resolve=True),
            settings=wandb.Settings(console="off"),  # log.txt has it
        )
        try:
            self.run = start()
        except wandb.errors.CommError as error:  # a requeued run must not end for that
            tell(
                f"warning: wandb does not answer ({first_line(error)}); this attempt is "
                f"written to {folder / 'wandb'} for `wandb sync`"
            )
            wandb.teardown()  # its service still holds the id
            self.run = start(mode="offline")
        except wandb.errors.Error as error:
            raise ConfigError(
                f"log.report_to=wandb: {error}; `wandb login` stores a key, WANDB_MODE=offline "
                "writes into the run folder for `wandb sync` later"
            ) from None
        if self.run.offline:
            own = Path(self.run.dir).parent
            for old in own.parent.glob(f"offline-run-*-{self.run.id}"):
                if old != own:
                    shutil.rmtree(old)
        self.next = self.run.step
        for done, values in _history(folder, step):
            self.write(done, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        if step >= self.next:
            self.run.log(values, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _identifier(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()


def _training(record: dict[str, Any]) -> dict[str, float]:
    return {
        f"train/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


def _evaluation(row: dict[str, Any]) -> dict[str, float]:
    value = row["value"]
    shown = value is not None and math.isfinite(value)
    return {f"eval/{row['dataset']}/{row['task']}/{row['metric']}": value} if shown else {}


def _history(folder: Path, step: int) -> list[tuple[int, dict[str, float]]]:
    """What the run has recorded so far, up to `step`, in order."""
    found: dict[int, dict[str, float]] = {}
    for name, values in (("metrics.jsonl", _training), ("evals.jsonl", _evaluation)):
        path = folder / name
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            record = json.loads(line)
            if record["step"] <= step:
                found.setdefault(record["step"], {}).update(values(record))
    return sorted(found.items())
