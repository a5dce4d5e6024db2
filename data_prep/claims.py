"""Build the sets of the claims study from pinned Debian and npm packages.

    python data_prep/claims.py [--out data/claims] [--cache DIR]

Writes training, validation and test sets of emoji and of Open Clip Art with one class table,
further sets for evaluation (other emoji styles, icons, stamps) with the same classes, and
Fashion-MNIST with its own; `report.json` counts them and says how far the two sources share their
classes. Nothing of this is part of the repository: some licences allow no more than evaluation at
your place (docs/data.md). It needs apt-get, npm and node, and downloads 390 MB.
"""

# ruff: noqa: E402  (started as a script, the repository must be put on the path first)
import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OUT = REPOSITORY / "data" / "claims"
sys.path.insert(0, str(REPOSITORY))

from data_prep.clipart import claims_packages as sources
from data_prep.clipart import fashion, packages, stamps
from data_prep.clipart.claims_classes import (
    Table,
    drawing_samples,
    labelled_emoji,
    make_table,
    naming,
    read_drawings,
)
from data_prep.clipart.claims_packages import Source
from data_prep.clipart.concepts import Called, Concepts, called_drawing, called_emoji
from data_prep.clipart.emoji import (
    EMOJI_TEST,
    Emoji,
    fluent_samples,
    noto_samples,
    parse_emoji_test,
    twemoji_samples,
)
from data_prep.clipart.iconify import emoji_samples, icon_samples
from data_prep.clipart.packages import Package, read_members
from data_prep.clipart.wordnet import WordNet
from data_prep.clipart.write import Sample, write_set
from loaders.errors import run_cli
from loaders.specs import as_path

EMOJI_STYLES = {
    "emoji_val": sources.EMOJIONE,
    "emoji_openmoji": sources.OPENMOJI,
    "emoji_contrast": sources.FLUENT_CONTRAST,
    "emoji_streamline": sources.STREAMLINE,
}
ICONS = {
    "icons_game": sources.GAME_ICONS,
    "icons_material": sources.MATERIAL,
    "icons_tabler": sources.TABLER,
    "icons_park": sources.ICON_PARK,
}
ACCURACIES = (10, 30, 60, 90)  # percent, for which the report says what can be seen
LICENCES = {source.package.label: source.licence for source in sources.ALL}


class Builder:
    """Fetches packages, writes sets and remembers what was written."""

    def __init__(self, out: Path, cache: Path) -> None:
        self.out, self.cache = out, cache
        self.counts: dict[str, dict] = {}

    def fetch(self, package: Package) -> Path:
        """Path of a package's archive."""
        return packages.fetch(package, self.cache)

    def write(
        self, name: str, kind: str, samples: Sequence[Sample], classes: list[dict], attempted: int
    ) -> None:
        """Write a set; its sources and licences are those of its samples."""
        found = list(dict.fromkeys(sample.package for sample in samples))
        manifest = write_set(
            self.out / name,
            kind=kind,
            samples=samples,
            classes=classes,
            source="; ".join(found),
            license="; ".join(dict.fromkeys(LICENCES[label] for label in found)),
            attempted=attempted,
        )
        labels = Counter(sample.label for sample in samples if sample.label is not None)
        self.counts[name] = {
            "samples": manifest["num_samples"],
            "labelled": labels.total(),
            "classes": len(labels),
            "per_class": [labels[entry["id"]] for entry in classes],
            "half_widths": {p: half_widths(labels.values(), p) for p in ACCURACIES},
            "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
            "license": manifest["license"],
        }


def half_widths(per_class: Iterable[int], accuracy: float) -> dict[str, float]:
    """Half of the 95 % intervals of `top1` and of `mean_per_class`, in points.

    `per_class`: test images of each class that occurs; `accuracy`: percent, the same in each class.
    The normal approximation, over the choice of test images: 1.96 times the root of the variance of
    a mean of Bernoulli variables, and of the mean of the classes' means.
    """
    counts = list(per_class)
    if not counts:
        return {"top1": 0.0, "mean_per_class": 0.0}
    spread = 1.96 * math.sqrt(accuracy * (100 - accuracy))
    return {
        "top1": round(spread / math.sqrt(sum(counts)), 1),
        "mean_per_class": round(spread * math.sqrt(sum(1 / n for n in counts)) / len(counts), 1),
    }


def read_classes(builder: Builder) -> tuple[Table, list[Emoji], dict[str, tuple[str, str]], int]:
    """(class table, all emoji, usable drawings by path, number of all drawings)."""
    unicode_data = builder.fetch(packages.UNICODE_DATA)
    (text,) = (data for _, data in read_members(unicode_data, EMOJI_TEST.__eq__))
    emoji = parse_emoji_test(text.decode())
    drawings, tried = read_drawings(builder.fetch(packages.OPENCLIPART_SVG))
    concepts = Concepts(WordNet.read(builder.fetch(sources.WORDNET.package)))
    called = [called_drawing(path, caption) for path, (_, caption) in drawings.items()]
    return make_table(concepts, list(map(called_emoji, emoji)), called), emoji, drawings, tried


def build_emoji(builder: Builder, table: Table, emoji: list[Emoji]) -> None:
    """Write the emoji styles: four for training, one for validation, the others for tests."""
    chosen = labelled_emoji(emoji, table)
    resvg = builder.fetch(sources.RESVG.package)

    def style(source: Source) -> list[Sample]:
        return emoji_samples(source, builder.fetch(source.package), chosen, resvg)

    def write(name: str, samples: list[Sample], styles: int = 1) -> None:
        builder.write(name, "image_label", samples, table.entries, styles * len(chosen))

    train = [
        *noto_samples(builder.fetch(packages.NOTO_EMOJI), chosen),
        *fluent_samples(builder.fetch(packages.FLUENT_3D), chosen),
        *style(sources.NOTO_V1),
        *style(sources.FIREFOX),
    ]
    write("emoji_train", train, styles=4)
    write("emoji_twemoji", list(twemoji_samples(builder.fetch(packages.TWEMOJI), chosen)))
    for name, source in EMOJI_STYLES.items():
        write(name, style(source))


def build_openclipart(
    builder: Builder, table: Table, drawings: dict[str, tuple[str, str]], tried: int
) -> dict[str, dict[str, int]]:
    """Write the parts of Open Clip Art; returns for each how many captions name each class."""
    parts = drawing_samples(drawings, builder.fetch(packages.OPENCLIPART_PNG), table)
    for part, samples in parts.items():
        builder.write(f"openclipart_{part}", "image_text", samples, table.entries, tried)
    return {
        part: naming([sample.text for sample in samples], table.names)
        for part, samples in parts.items()
    }


def build_stamps(builder: Builder, table: Table) -> None:
    """Write `stamps`: their captions and folders give the classes."""
    samples, tried = stamps.stamp_samples(builder.fetch(packages.TUXPAINT_STAMPS))
    labelled = []
    for sample in samples:
        folders = sample.origin.removeprefix(stamps.ROOT).split("/")[:-1]
        label = table.label(Called(sample.text, tuple(folders[::-1])))
        labelled.append(replace(sample, label=label))
    builder.write("stamps", "image_text", labelled, table.entries, tried)


def build_icons(builder: Builder, table: Table) -> None:
    """Write the icon sets."""
    resvg = builder.fetch(sources.RESVG.package)
    for name, source in ICONS.items():
        archive = builder.fetch(source.package)
        samples = icon_samples(source, archive, table.concepts, table.ids, resvg)
        builder.write(name, "image_label", samples, table.entries, len(samples))


def build_fashion(builder: Builder) -> None:
    """Write Fashion-MNIST's three parts."""
    for part, samples in fashion.fashion_samples(
        builder.fetch(sources.FASHION_MNIST.package)
    ).items():
        classes = fashion.class_table()
        builder.write(f"fashion_{part}", "image_label", samples, classes, len(samples))


def build(out: Path, cache: Path) -> dict:
    """Write all sets below `out`; returns the report."""
    builder = Builder(out, cache)
    table, emoji, drawings, tried = read_classes(builder)
    build_emoji(builder, table, emoji)
    named = build_openclipart(builder, table, drawings, tried)
    build_stamps(builder, table)
    build_icons(builder, table)
    build_fashion(builder)
    (out / "ATTRIBUTION.md").write_text(sources.attribution(), encoding="utf-8")
    report = {"classes": table.entries, "sets": builder.counts, "captions_naming": named}
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (out / "report.json").write_text(text, encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=as_path, default=OUT, help="default: data/claims")
    parser.add_argument(
        "--cache",
        type=as_path,
        default=packages.default_cache(),
        help=f"downloaded packages (default: ${packages.CACHE_VARIABLE}, else data/.cache)",
    )
    arguments = parser.parse_args()
    report = build(arguments.out, arguments.cache)
    for name, found in report["sets"].items():
        print(
            f"{name}: {found['samples']} samples, {found['labelled']} with one of "
            f"{found['classes']} classes, {found['bytes'] / 1e6:.1f} MB, {found['license']}"
        )
    for part, counts in report["captions_naming"].items():
        print(f"openclipart_{part}: {counts['']} captions name a class of the emoji")


if __name__ == "__main__":
    run_cli(main)
