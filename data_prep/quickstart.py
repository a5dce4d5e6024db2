"""Build the quick-start data from pinned Debian and npm packages.

    python data_prep/quickstart.py [--out data/quickstart] [--cache DIR] [--stamps]

Writes `emoji_train`, `emoji_twemoji`, `openclipart_train` and `openclipart_test` (64-pixel JPEGs in
tar shards, a manifest and a provenance table each) beside the licence texts. The repository ships
the result, so this is needed only to check it or to change it. `--stamps` writes `stamps` instead,
an evaluation set whose licence (GPL-2) keeps it out of the repository.
"""

# ruff: noqa: E402  (started as a script, the repository must be put on the path first)
import argparse
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = REPOSITORY / "data" / "quickstart"
sys.path.insert(0, str(REPOSITORY))

from data_prep.clipart import packages
from data_prep.clipart.classes import class_table
from data_prep.clipart.emoji import fluent_samples, noto_samples, read_emoji, twemoji_samples
from data_prep.clipart.openclipart import openclipart_samples
from data_prep.clipart.stamps import stamp_samples
from data_prep.clipart.write import write_set
from loaders.errors import run_cli
from loaders.specs import as_path


def build_emoji(out: Path, cache: Path) -> list[dict]:
    """Write `emoji_train` (Noto, Fluent 3D) and `emoji_twemoji`; returns their manifests."""
    emoji = read_emoji(packages.fetch(packages.UNICODE_DATA, cache))
    train = [
        *noto_samples(packages.fetch(packages.NOTO_EMOJI, cache), emoji),
        *fluent_samples(packages.fetch(packages.FLUENT_3D, cache), emoji),
    ]
    test = list(twemoji_samples(packages.fetch(packages.TWEMOJI, cache), emoji))
    classes = class_table()
    return [
        write_set(
            out / "emoji_train",
            kind="image_label",
            samples=train,
            classes=classes,
            source=f"{packages.NOTO_EMOJI.label}; {packages.FLUENT_3D.label}",
            license="Apache-2.0 (Noto), MIT (Fluent 3D); see ../LICENSES",
            attempted=2 * len(emoji),
        ),
        write_set(
            out / "emoji_twemoji",
            kind="image_label",
            samples=test,
            classes=classes,
            source=packages.TWEMOJI.label,
            license="CC-BY-4.0 (Twemoji); see ../LICENSES",
            attempted=len(emoji),
        ),
    ]


def build_openclipart(out: Path, cache: Path) -> list[dict]:
    """Write `openclipart_train` and `openclipart_test`; returns their manifests."""
    train, test, attempted = openclipart_samples(
        packages.fetch(packages.OPENCLIPART_SVG, cache),
        packages.fetch(packages.OPENCLIPART_PNG, cache),
    )
    return [
        write_set(
            out / name,
            kind="image_text",
            samples=samples,
            classes=class_table(),
            source=f"{packages.OPENCLIPART_PNG.label}; {packages.OPENCLIPART_SVG.label}",
            license="public domain; see ../LICENSES",
            attempted=attempted,
        )
        for name, samples in (("openclipart_train", train), ("openclipart_test", test))
    ]


def build_stamps(out: Path, cache: Path) -> list[dict]:
    """Write `stamps`; returns its manifest in a list."""
    samples, attempted = stamp_samples(packages.fetch(packages.TUXPAINT_STAMPS, cache))
    manifest = write_set(
        out / "stamps",
        kind="image_text",
        samples=samples,
        classes=class_table(),
        source=packages.TUXPAINT_STAMPS.label,
        license="GPL-2: evaluation only, not part of this repository",
        attempted=attempted,
    )
    return [manifest]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=as_path, default=SHIPPED, help="default: data/quickstart")
    parser.add_argument(
        "--cache",
        type=as_path,
        default=packages.default_cache(),
        help=f"downloaded packages (default: ${packages.CACHE_VARIABLE}, else data/.cache)",
    )
    parser.add_argument("--stamps", action="store_true", help="write the set `stamps` only")
    arguments = parser.parse_args()
    if arguments.stamps:
        manifests = build_stamps(arguments.out, arguments.cache)
    else:
        manifests = build_emoji(arguments.out, arguments.cache)
        manifests += build_openclipart(arguments.out, arguments.cache)
        if arguments.out.resolve() != SHIPPED:
            shutil.copytree(SHIPPED / "LICENSES", arguments.out / "LICENSES", dirs_exist_ok=True)
    for manifest in manifests:
        size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
        print(f"{manifest['name']}: {manifest['num_samples']} samples, {size:.1f} MB")


if __name__ == "__main__":
    run_cli(main)
