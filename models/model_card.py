"""The card of a model on a hub: how to load it, its data, recipe, result rows and licences.

Every number is read from a file: the run's configuration, manifests of its data, result rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from loaders.errors import ConfigError, DataError
from models.formats import load_lines
from models.loaded_run import LoadedRun
from models.provenance import training_git

FILE = "README.md"
EVALS = "evals.jsonl"  # rows of the evaluations during a training
LIBRARIES = {"open_clip": "open_clip", "hf": "transformers", "timm": "timm"}
TASKS = {"open_clip": "zero-shot-image-classification", "hf": "zero-shot-image-classification"}
UNKNOWN = "not stated"


@dataclass(frozen=True)
class Card:
    """What a run does not know of its card.

    `repository` is the name on the hub, `licence` the weights' own, as the hub names it
    (`apache-2.0`), `results` a folder of result rows or None.
    """

    repository: str
    licence: str
    results: Path | None


def write(run: LoadedRun, format_name: str, folder: Path, card: Card) -> None:
    """Write FOLDER/README.md beside an export.

    Raises:
        ConfigError: the export holds a path of this machine. DataError: a file of rows, or a
            manifest, that cannot be read.
    """
    _refuse_paths(run, format_name, folder)
    found = rows(run, card.results)
    parts = [
        f"---\n{_metadata(run, format_name, card, found)}\n---\n",
        f"# {card.repository.rpartition('/')[2]}\n",
        _about(run),
        f"```python\n{load_lines.OF_FORMAT[format_name](card.repository)}\n```\n",
        f"## Results\n\n{_results(found)}\n",
        f"## Data\n\n{_data(run)}\n",
        f"## Recipe\n\n{_recipe(run)}\n",
        f"## Licence\n\nThe weights: `{card.licence}`. Each data set has its own, see above.\n",
    ]
    (folder / FILE).write_text("\n".join(parts), encoding="utf-8")


def rows(run: LoadedRun, results: Path | None) -> list[dict[str, Any]]:
    """Result rows of exactly this checkpoint: of RUN/evals.jsonl and of all `*.jsonl` in `results`.

    Raises:
        DataError: a line that is no JSON, or `results` is no folder.
    """
    if results is not None and not results.is_dir():
        raise DataError(f"--results {results}: no such folder")
    own = run.path.parents[1] / EVALS
    files = [own] if run.path.is_dir() and own.is_file() else []
    files += sorted(results.glob("*.jsonl")) if results else []
    found: dict[tuple, dict[str, Any]] = {}
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if row["checkpoint_hash"] == run.checkpoint_hash:
                    key = (row["dataset"], row["task"], row["metric"], row["prompt_digest"])
                    found[key] = row
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}, line {number}: no result row ({error!r})") from None
    return list(found.values())


def _refuse_paths(run: LoadedRun, format_name: str, folder: Path) -> None:
    """What leads into a folder of this machine leads nowhere on a hub."""
    text, reference = run.model.cfg.text, run.model.cfg.reference
    if reference is not None:
        raise ConfigError(
            "--push-to-hub: a model of the kind reference needs its reference folder, which an "
            f"export names by its path ({reference.folder}) and does not hold"
        )
    own = format_name in ("pt", "safetensors") and text.tokenizer not in ("clip", "rendered")
    bound = any(
        str(folder.resolve()) in path.read_text(encoding="utf-8") for path in folder.glob("*.json")
    )
    if bound or (own and Path(text.tokenizer).exists()):
        raise ConfigError(
            f"--push-to-hub: --format {format_name} refers to a folder of this machine for this "
            "model; use --format hf, which holds everything"
        )


def _metadata(run: LoadedRun, format_name: str, card: Card, found: Sequence[dict]) -> str:
    results = [
        EvalResult(
            task_type=row["task"].replace("_", "-"),
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row["split"],
            metric_type=row["metric"],
            metric_value=row["value"],
        )
        for row in found
    ]
    method = (run.cfg.get("loss") or {}).get("name")
    data = ModelCardData(
        license=card.licence,
        library_name=LIBRARIES.get(format_name),
        pipeline_tag=TASKS.get(format_name),
        tags=["contrastive", *([method] if method else [])],
        model_name=card.repository.rpartition("/")[2],
        eval_results=results or None,
    )
    return data.to_yaml()


def _about(run: LoadedRun) -> str:
    cfg = run.model.cfg
    text = cfg.text.hf_name or cfg.text.name
    towers = f"Image tower `{cfg.image.name}` at {cfg.image.size} pixels, texts by `{text}`"
    method = (run.cfg.get("loss") or {}).get("name", UNKNOWN)
    return (
        f"{towers}, features of {cfg.embed_dim} numbers (`model.kind: {cfg.kind}`, compared by "
        f"`{cfg.similarity}`). Trained with `loss.name: {method}`, this is step "
        f"{run.step if run.step is not None else UNKNOWN}.\n"
    )


def _results(found: Sequence[dict]) -> str:
    if not found:
        return "No result rows of this checkpoint were given.\n"
    lines = ["| data set | task | metric | value | 95 % | n |", "|---|---|---|---:|---|---:|"]
    for row in found:
        interval = "[{:.2f}, {:.2f}]".format(*row["ci95"]) if row.get("ci95") else ""
        cells = row["dataset"], row["task"], row["metric"], f"{row['value']:.2f}", interval
        lines.append(_row(*cells, row["n"]))
    protocols = dict.fromkeys(row["protocol"] for row in found)
    return "\n".join([*lines, "", "Protocols:", "", *(f"- {text}" for text in protocols)]) + "\n"


def _data(run: LoadedRun) -> str:
    sources = list(_sources(run.cfg.get("data") or {}))
    if not sources:
        return "The weights do not say what they were trained on.\n"
    lines = ["| data set | as | samples | licence | source |", "|---|---|---:|---|---|"]
    for key, place in sources:
        facts = _manifest(place)
        values = (facts.get(name, UNKNOWN) for name in ("samples", "license", "source"))
        lines.append(_row(facts.get("name", _name(place)), key, *values))
    return "\n".join(lines) + "\n"


def _sources(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(image_label or image_text, specification) of each source of a run's section `data`."""
    for key in ("image_label", "image_text"):
        given = data.get(key) or []
        for spec in [given] if isinstance(given, str) else given:
            yield from ((key, part) for part in str(spec).split("::"))


def _manifest(place: str) -> dict[str, Any]:
    """What a set's manifest states; nothing where the set is not on this machine or has none."""
    path = Path(place)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "manifest.json").is_file():
            try:
                facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                counts = [shard["samples"] for shard in facts["shards"]]
                return {**facts, "samples": sum(counts)}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{folder / 'manifest.json'}: no manifest ({error!r})") from None
    return {}


def _recipe(run: LoadedRun) -> str:
    trained = training_git(run)
    cfg = {key: value for key, value in run.cfg.items() if key != "output_dir"}
    text = yaml.safe_dump(_without_folders(cfg), sort_keys=False, allow_unicode=True)
    commits = f"Code that trained: {trained}.\n\n" if trained else ""
    return f"{commits}The whole configuration; of paths their last part:\n\n```yaml\n{text}```\n"


def _without_folders(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and re.match(r"[~/]|\.\.?/", value):
        return "::".join(map(_name, value.split("::")))
    return value


def _name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _row(*cells: Any) -> str:
    texts = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(texts)} |"
