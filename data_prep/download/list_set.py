"""A set of images whose addresses stand in a published list: what gcc.py and yfcc.py share."""

import argparse
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from data_prep.download import img2ds, img2ds_launch, url_list
from data_prep.download import options as download_options
from data_prep.download.options import Options
from data_prep.sets import arguments as set_arguments
from data_prep.sets import set_folder

SAMPLES_PER_SHARD = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the set and of its download."""
    set_arguments.add_arguments(parser, SAMPLES_PER_SHARD)
    download_options.add_arguments(parser)


def check(arguments: argparse.Namespace, local_root: Path | None = None) -> Options:
    """How to download. Raises `ConfigError` or `DataError` for what the command line has wrong.

    `local_root`: folder of the images, where they are not fetched from the network.
    """
    set_arguments.check(arguments)
    img2ds_launch.check_path(arguments.out)
    return download_options.read(arguments, local_root=local_root)


def download(
    arguments: argparse.Namespace,
    options: Options,
    index: Mapping[str, Any],
    about: Mapping[str, Any],
    identity: Mapping[str, Any],
    stated: Mapping[str, Any],
    extra: Mapping[str, Any],
    classes: Sequence[dict] = (),
) -> None:
    """Begin the set of the list that `url_list.build` made, and fetch the images of this part.

    `index`: what `build` returned. `about`: tool, name, source and license of the set. `identity`:
    what the folder must agree on besides the rows and the options. `stated`: what the manifest
    tells of the list besides its counts; `extra`: and of the set. `classes`: of a list with labels,
    which becomes an image_label set. Raises `DataError` as
    `set_folder.begin` and `img2ds.download` do.
    """
    out, size = arguments.out, arguments.samples_per_shard
    counts = {what: index[what] for what in url_list.SUMMARY}
    source = f"{about['source']}; file {index['input']}, sha256 {index['input_sha256']}"
    preparation = set_folder.Preparation(
        **{**about, "source": source},
        kind="image_label" if classes else "image_text",
        date=date.today().isoformat(),
        shards=url_list.shard_count(index, size),
        samples_per_shard=size,
        attempted=index["rows"],
        identity={
            **identity,
            "list_sha256": url_list.digest(out),
            **download_options.identity(options, size),
        },
        extra={"list": {**stated, **counts}, **extra},
    )
    set_folder.begin(out, preparation, classes)
    print(url_list.describe(index, arguments.part, arguments.parts))
    img2ds.download(out, arguments.part, arguments.parts, options)
    print(f"next: python data_prep/verify.py {out}")
