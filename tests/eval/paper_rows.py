"""Made-up result rows and a registry for the tests of published tables."""

from pathlib import Path
from types import SimpleNamespace

from eval.report import paper_join, paper_tables

EVERY = [(p, t) for p in paper_tables.papers() for t in paper_tables.table_ids(p)]
MEMBERS = ["first", "second", "third"]


def result(config_name, dataset, task, metric, value, **changes):
    row = {"dataset": dataset, "split": "test", "n": 50, "classes": 10, "metric": metric}
    row |= {"value": value, "ci95": [value - 1, value + 1], "task": task, "protocol": "a protocol"}
    row |= {"checkpoint_hash": f"hash of {config_name}", "step": 100, "run": f"run_{config_name}"}
    row |= {"config_name": config_name, "date": "2026-01-01T00:00:00+00:00"}
    return row | {"prompt_digest": f"texts of {dataset}"} | changes


def make_registry():
    """What joining reads of a registry, for the UniCL tables; elevater20 has three members."""
    both = {"zero_shot": ["top1"], "linear_probe": ["top1"]}
    tasks = dict.fromkeys(["imagenet1k", "cifar-10", "cifar-100", *MEMBERS], both)
    tasks["second"] = {"zero_shot": ["mean_per_class", "top1"]}
    tasks["coco_detection"] = {"detection": ["box_map", "mask_map"]}
    return SimpleNamespace(
        collections={"elevater20": MEMBERS, "unicl14": [], "unicl18": []},
        notes=dict.fromkeys(["unicl14", "unicl18"], "its members are not known"),
        datasets={
            name: SimpleNamespace(tasks=value, folder=lambda split: Path("data/eval") / split)
            for name, value in tasks.items()
        },
    )


def filled(paper, table, found, registry, folder=Path("out/results")):
    return paper_join.join(paper_tables.load(paper, table), found, folder, registry)


def cell_of(table, row, column):
    cells = next(r.cells for r in table.rows if r.id == row)
    return next(c for c in cells if c.column.id == column)
