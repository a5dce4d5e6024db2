"""What became of a data set: yield and reasons, sizes, captions, and the figures of Table 1.

    python data_prep/report.py D [D2 ...] [--captions-model en_core_web_sm] [--workers N]
        --output DIR

Writes DIR/report.md, report.json and report.png. A set need not be complete: what is finished is
counted. The concepts of caption sets need spaCy and one of its English models
(--captions-model), some 600 captions a second and core; without it their columns stay empty.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.checks import concepts
from data_prep.checks.report_collect import Source, collect, iterate_captions, open_source
from data_prep.sets import set_folder
from loaders.errors import run_cli
from loaders.specs import as_path

_TOP_CONCEPTS = 20

# Table 1 of UniCL (arXiv 2204.03610): images, concepts, vocabulary, images per concept; then the
# names of the same set here, without punctuation. CIFAR rows are of the training split.
PUBLISHED = {
    "CIFAR-10": ("50k", 10, 10, 5000, {"cifar10", "cifar10train"}),
    "CIFAR-100": ("50k", 100, 105, 500, {"cifar100", "cifar100train"}),
    "ImageNet-1K": ("1.3M", 1_000, 1_233, 1300, {"imagenet1k", "imagenet1ktrain"}),
    "ImageNet-22K": ("14.2M", 21_841, 14_733, 650, {"imagenet22k"}),
    "GCC-3M": ("3.3M", 17_135, 7_953, 193, {"gcc3m", "cc3m"}),
    "GCC-12M": ("12M", 584_261, 98_347, 21, {"gcc12m", "cc12m"}),
    "YFCC-14M": ("14M", 650_236, 214_380, 22, {"yfcc14m", "yfcc14mopenai"}),
}
PAPER = "UniCL, arXiv 2204.03610, Table 1"


def published(name: str) -> str | None:
    """Name in Table 1 of the set that is called `name` here; None if it has none there."""
    plain = re.sub(r"[\W_]", "", name.casefold())
    return next((title for title, row in PUBLISHED.items() if plain in row[-1]), None)


def table_1(source: Source, facts: dict, model: str | None, workers: int) -> dict:
    """Images, concepts, vocabulary and images per concept; and what they come from: `counts`, the
    images of each concept, and for captions `most_common_concepts`.

    image_label: concepts are the classes with images, the vocabulary the words of their first
    names. image_text: concepts are the noun entities that spaCy's `model` finds more than 5 times
    in the captions, the vocabulary the words of these; None without a model.
    """
    common: dict[str, int] = {}
    if facts["kind"] == "image_label":
        present = [n for n, images in enumerate(facts["class_images"]) if images]
        names = [source.classes[n]["names"][0] for n in present]
        counts = [facts["class_images"][n] for n in present]
    elif model and facts["captions"]:
        total = facts["captions"]["count"]
        found = concepts.frequent(concepts.count(iterate_captions(source), model, workers, total))
        names, counts = list(found), list(found.values())
        common = dict(list(found.items())[:_TOP_CONCEPTS])
    else:
        names = counts = None
    return {
        "images": facts["kept"],
        "concepts": None if names is None else len(names),
        "vocabulary": None if names is None else concepts.vocabulary(names),
        "images_per_concept": facts["kept"] / len(names) if names else None,
        "counts": counts or [],
        "most_common_concepts": common,
    }


def report(outs: list[Path], model: str | None, workers: int, output: Path) -> list[dict]:
    """Gather, write the three files to `output`, and return the facts of every set.

    Raises `DataError` if a folder is no data set, is damaged, or the model cannot be loaded.
    """
    if model:
        concepts.load(model)  # it may not be there, and that is better said at once
    sets = []
    for out in outs:
        source = open_source(out)
        facts = collect(source)
        sets.append(facts | {"table_1": table_1(source, facts, model, workers), "model": model})
    # Late: --help and a missing folder should not wait for matplotlib.
    from data_prep.checks.report_figures import draw

    output.mkdir(parents=True, exist_ok=True)
    draw(sets, output / "report.png")
    set_folder.replace_file(output / "report.md", markdown(sets))
    for facts in sets:
        del facts["table_1"]["counts"]
        if (title := published(facts["name"])) is not None:
            keys = ("images", "concepts", "vocabulary", "images_per_concept")
            row = dict(zip(keys, PUBLISHED[title], strict=False))
            facts["published"] = {"name": title, **row, "source": PAPER}
    text = json.dumps({"sets": sets}, indent=1, ensure_ascii=False) + "\n"
    set_folder.replace_file(output / "report.json", text)
    return sets


def markdown(sets: list[dict]) -> str:
    """The report as Markdown."""
    lines = ["# Data sets", "", *_overview(sets), "", *_table_1_lines(sets)]
    for facts in sets:
        lines += ["", f"## {_cell(facts['name'])}", "", *_details(facts)]
    return "\n".join([*lines, "", "![Histograms](report.png)", ""])


def _overview(sets: list[dict]) -> list[str]:
    rows = [
        (
            facts["name"],
            _number(facts["attempted"]),
            _number(facts["kept"]),
            _share(facts["yield"]),
            f"{facts['bytes'] / 1e9:.3f} GB",
            facts["date"],
            "closed" if facts["closed"] else "not closed: run data_prep/verify.py",
        )
        for facts in sets
    ]
    head = ("set", "attempted", "kept", "yield", "size", "begun", "state")
    return _table(head, rows)


def _table_1_lines(sets: list[dict]) -> list[str]:
    rows = []
    for facts in sets:
        own = facts["table_1"]
        per = own["images_per_concept"]
        cells = [_number(own[key]) for key in ("images", "concepts", "vocabulary")]
        rows.append((facts["name"], *cells, _number(per and round(per)), "this set"))
        if (title := published(facts["name"])) is not None:
            images, *numbers, _ = PUBLISHED[title]
            rows.append((title, images, *map(_number, numbers), PAPER))
    head = ("set", "images", "concepts", "vocabulary", "images per concept", "source")
    lines = ["## Statistics of the paper's Table 1", "", *_table(head, rows), ""]
    if any(facts["kind"] == "image_text" for facts in sets):
        lines += [
            "Concepts of captions are the noun entities that occur more than "
            f"{concepts.MORE_THAN} times. The vocabulary is the number of distinct words in the "
            "names of the concepts; the words of whole captions are counted below. (So read, "
            "the published figures agree with each other: GCC-3M has fewer words than concepts.)"
        ]
    for facts in sets:
        if facts["table_1"]["concepts"] is None and facts["captions"]:
            lines += [
                "",
                f"To fill the row of {_cell(facts['name'])}: `python data_prep/report.py "
                f"{facts['folder']} --captions-model en_core_web_sm --output DIR`",
            ]
    return lines


def _details(facts: dict) -> list[str]:
    lines = [
        f"{facts['kind']}, {_number(facts['shards'])} shards in `{facts['folder']}`. "
        f"Source: {facts['source']}. Licence: {facts['license']}."
    ]
    if facts["attempted"] != facts["planned"]:
        lines += ["", f"Not complete: {_number(facts['planned'])} rows are planned."]
    if facts["retried"] is not None:
        lines += [
            "",
            f"Rows that were tried again: {_number(facts['retried'])}, of which "
            f"{_number(facts['recovered'])} gave an image.",
        ]
    lines += _list_lines(facts["list"])
    if facts["reasons"]:
        rows = [
            (reason, _number(n), _share(n / facts["attempted"]))
            for reason, n in facts["reasons"].items()
        ]
        lines += ["", *_table(("not kept because", "rows", "of all attempted"), rows)]
    if facts["advice"]:
        lines += ["", facts["advice"]]
    for key, numbers in facts["verified"].items():
        if numbers:
            count = len(numbers) if isinstance(numbers, list) else numbers
            lines += ["", f"{key.replace('_', ' ').capitalize()}: {_number(count)}."]
    if facts["sizes"]:
        rows = [
            (name.replace("_", " "), *map(_number, by.values()))
            for name, by in facts["sizes"].items()
        ]
        head = ("pixels", *(f"{q} %" for q in next(iter(facts["sizes"].values()))))
        lines += ["", *_table(head, rows)]
    if facts["repeated_files"]:
        lines += [
            "",
            f"Of {_number(facts['repeated_files']['images'])} downloaded files "
            f"{_number(facts['repeated_files']['repeated'])} repeat another one byte by byte.",
        ]
    return lines + _caption_lines(facts["captions"])


def _list_lines(index: dict) -> list[str]:
    rejected = {**index.get("rejected", {}), "duplicate": index.get("duplicates", 0)}
    parts = [f"{reason}: {_number(n)}" for reason, n in rejected.items() if n]
    return ["", f"Lines of the list that were left out: {', '.join(parts)}."] if parts else []


def _caption_lines(captions: dict | None) -> list[str]:
    if captions is None:
        return []
    lines = [
        "",
        f"{_number(captions['count'])} captions, {captions['mean_words']:.1f} words on average, "
        f"{_number(captions['empty'])} empty; {_number(captions['distinct_words'])} distinct words",
    ]
    if captions["most_common"]:
        rows = [(text, _number(n)) for text, n in captions["most_common"]]
        lines += ["", *_table(("most common caption", "times"), rows)]
    return lines


def _table(head: tuple, rows: list[tuple]) -> list[str]:
    lines = [head, ("---",) + ("---:",) * (len(head) - 1), *rows]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in lines]


def _cell(text: str) -> str:
    short = " ".join(str(text).split())
    return (short[:99] + "…" if len(short) > 100 else short).replace("|", "\\|")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=as_path, nargs="+", help="folders of the sets")
    parser.add_argument("--captions-model", help="spaCy pipeline for the concepts of captions")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=as_path, required=True, help="folder of the report")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    sets = report(arguments.folders, arguments.captions_model, arguments.workers, arguments.output)
    print("\n".join(_overview(sets)))
    print(f"written: {arguments.output}/report.md, report.json, report.png")


if __name__ == "__main__":
    run_cli(main)
