"""Published tables filled with result rows.

A cell names the configuration that reproduces it and takes its number from the result rows of that
configuration: the row of its data set, task and metric, or the mean over a collection.
"""

from pathlib import Path

import yaml

from eval.report import render_names
from eval.report.paper_tables import Cell, Column, PaperTable
from eval.sources.registry import REPOSITORY, Registry
from loaders.errors import DataError

CONFIGS = REPOSITORY / "configs"


def settings(config: str) -> dict:
    """`configs/<config>.yaml` over its parents; sections replace each other as a whole.

    Raises:
        DataError: a file of the chain does not exist.
    """
    path, layers = CONFIGS / f"{config}.yaml", []
    while path:
        if not path.exists():
            raise DataError(f"{path} does not exist, but eval/paper/*.yaml or its child names it")
        layers.append(yaml.safe_load(path.read_text(encoding="utf-8")))
        path = path.parent / layers[-1]["base"] if "base" in layers[-1] else None
    return {key: value for layer in reversed(layers) for key, value in layer.items()}


def join(
    table: PaperTable, found: list[dict], folder: Path, registry: Registry | None = None
) -> PaperTable:
    """Fill `table` in place with our numbers, notes and commands, and return it.

    Args:
        found: result rows (`tasks.outcome.make_rows`). folder: where they are, for the commands.

    Raises:
        DataError: two results of one checkpoint for one measure (other protocol or prompts).
    """
    registry = registry or Registry()
    runs: dict[str, list[dict]] = {}
    for cell in (cell for row in table.rows for cell in row.cells):
        if cell.config and cell.column.task:
            if cell.config not in runs:
                runs[cell.config], note = _last_checkpoint(found, cell.config)
                table.notes += [note] if note else []
            _fill(cell, runs[cell.config], registry)
    if not any(runs.values()) and table.joined:
        table.notes.append(f"{folder} holds no result of these configurations yet.")
    table.notes += _unfillable(table, registry)
    table.commands += _commands(table, runs, folder, registry)
    return table


def _last_checkpoint(found: list[dict], config: str) -> tuple[list[dict], str]:
    """Result rows of the checkpoint of `config` with the highest step (of several, the one that was
    evaluated last), and a note if there was a choice. A row never mixes checkpoints."""
    checkpoints: dict[tuple[str, str], list[dict]] = {}
    for row in found:
        if row["config_name"] == config:
            checkpoints.setdefault((row["run"], row["checkpoint_hash"]), []).append(row)
    if not checkpoints:
        return [], ""
    chosen = max(checkpoints.values(), key=lambda rows: max((r["step"], r["date"]) for r in rows))
    note = (
        f"{config}: results of {len(checkpoints)} checkpoints; shown is the last step, run "
        f"{chosen[0]['run']}, step {chosen[0]['step']} ({chosen[0]['checkpoint_hash'][:8]})."
    )
    return chosen, note if len(checkpoints) > 1 else ""


def _measures(column: Column, registry: Registry) -> list[tuple[str, str]]:
    """(data set, metric) pairs whose mean the column is; empty if its members are unknown."""
    if column.dataset:
        return [(column.dataset, column.metric)]
    members = registry.collections.get(column.collection) or []
    return [(name, registry.datasets[name].tasks[column.task][0]) for name in members]


def _fill(cell: Cell, results: list[dict], registry: Registry) -> None:
    """Set `ours` and `recipe`, or the data sets that are `lacking`."""
    used = []
    for dataset, metric in _measures(cell.column, registry):
        wanted = (dataset, cell.column.task, metric)
        hits = [r for r in results if (r["dataset"], r["task"], r["metric"]) == wanted]
        if cell.column.protocol:
            hits = [
                r for r in hits if render_names.protocol_name(r) in (None, cell.column.protocol)
            ]
        if len(hits) > 1:
            protocols = "; ".join(f"{r['value']:.2f}: {r['protocol']}" for r in hits)
            raise DataError(
                f"{len(hits)} results of {cell.config} for {', '.join(wanted)} that differ in "
                f"protocol or prompts ({protocols}); keep one of them in the folder"
            )
        used += hits
        cell.lacking += [] if hits else [dataset]
    if used and not cell.lacking:
        cell.ours = sum(row["value"] for row in used) / len(used)
        # The run's own word where the row has it: overrides may have changed the recipe.
        cell.recipe = used[0].get("recipe", settings(cell.config).get("recipe", "ours"))


def _unfillable(table: PaperTable, registry: Registry) -> list[str]:
    """Why some columns can have no number of ours."""
    titles: dict[str, list[str]] = {}
    for column in table.columns if table.joined else []:
        name = column.collection or column.dataset
        if column.task and not registry.collections.get(name) and name not in registry.datasets:
            reason = registry.notes.get(name, f"{name} is not in eval/datasets.yaml")
            titles.setdefault(reason, []).append(column.title)
    return [f"No run can fill {'; '.join(names)}: {reason}." for reason, names in titles.items()]


def _commands(
    table: PaperTable, runs: dict[str, list[dict]], folder: Path, registry: Registry
) -> list[str]:
    """What fills the empty cells: per configuration its training, if it has no result yet, and one
    evaluation per task."""
    wanted: dict[str, dict[str, list[str]]] = {}
    for cell in (cell for row in table.rows for cell in row.cells):
        members = [name for name, _ in _measures(cell.column, registry)] if cell.lacking else []
        whole = len(members) > 1 and cell.lacking == members
        for name in [cell.column.collection] if whole else cell.lacking:
            names = wanted.setdefault(cell.config, {}).setdefault(cell.column.task, [])
            if name not in names and (whole or name in registry.datasets):
                names.append(name)
    commands = []
    for config, tasks in wanted.items():
        run = runs[config][0]["run"] if runs[config] else config
        commands += [] if runs[config] else [_training(config)]
        if commands and commands[-1].startswith("#"):
            continue
        beside = folder.parent / run
        place = str(beside) if beside.exists() else f"runs/{run}"
        commands += [
            render_names.command(task, place, names, folder, registry)
            for task, names in tasks.items()
            if names
        ]
    return commands


def _training(config: str) -> str:
    """The training command."""
    content = settings(config)
    command = f"deepspeed train.py --config configs/{config}.yaml"
    if content.get("recipe", "ours") is None:
        command += "  # first decide what the paper leaves open: it lists the keys"
    return command
