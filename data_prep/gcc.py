"""Download GCC-3M or GCC-12M (Conceptual Captions) from its published list into tar shards.

    python data_prep/gcc.py --tsv Train_GCC-training.tsv --out /data/gcc3m
    python data_prep/gcc.py --tsv cc12m.tsv --out /data/gcc12m --dataset gcc12m

The lists have no header; GCC-3M has the columns caption, url, and GCC-12M url, caption. The order
is found from the content; with --dataset another order is an error. Lines are split at the tab
and nothing is read as quoting, so a caption that begins with a double quote stays whole. A tab in
a caption becomes a blank. The same command continues an interrupted download.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.download import list_set, url_list
from data_prep.download.list_input import read_lines
from data_prep.download.list_rows import NOT_UTF8, Notes, Rejected, Row, editor_line
from loaders.errors import DataError, run_cli
from loaders.specs import as_path

_CHECKED_LINES = 1000
_HEADERS = {b"caption\turl", b"url\tcaption", b'"caption"\t"url"', b'"url"\t"caption"'}
_URL_START = re.compile(rb"\s*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_TERMS = (
    "the list: may be freely used for any purpose, provided as is, acknowledgement of Google "
    "appreciated (LICENSE of {repository}); each image: the rights of its owner, see its source"
)


@dataclass(frozen=True)
class Published:
    """A list of Conceptual Captions as Google publishes it."""

    title: str
    url_first: bool
    source: str
    repository: str

    @property
    def columns(self) -> str:
        return "url, caption" if self.url_first else "caption, url"


DATASETS = {
    "gcc3m": Published(
        "GCC-3M",
        False,
        "Conceptual Captions (Sharma et al., ACL 2018), "
        "https://ai.google.com/research/ConceptualCaptions/download",
        "https://github.com/google-research-datasets/conceptual-captions",
    ),
    "gcc12m": Published(
        "GCC-12M",
        True,
        "Conceptual 12M (Changpinyo et al., CVPR 2021), "
        "https://github.com/google-research-datasets/conceptual-12m",
        "https://github.com/google-research-datasets/conceptual-12m",
    ),
}


def find_order(path: Path) -> bool:
    """True if the first column of a list holds the urls, False if the last one does.

    Looks at the first 1000 lines with two columns. Raises `DataError` if neither does, and if
    most lines have more columns (a list with hashes or labels).
    """
    lines = first = last = wide = 0
    example = b""
    for _, line in read_lines([path], show=False):
        fields = line.strip(b"\t").split(b"\t")
        if len(fields) < 2 or line.lower() in _HEADERS:
            continue
        starts = bool(_URL_START.match(fields[0]))
        ends = bool(_URL_START.match(fields[-1]))
        lines, wide = lines + 1, wide + (len(fields) > 2)
        first, last = first + (starts and not ends), last + (ends and not starts)
        example = example or line
        if lines == _CHECKED_LINES:
            break
    if 2 * wide > lines:
        raise DataError(
            f"{path}: {wide} of the first {lines} lines have more than two columns, such as "
            f"{example[:200]!r}; this is not a list of urls and captions (one with hashes or "
            "labels?); use the plain list"
        )
    if first == last:
        raise DataError(
            f"{path}: neither column holds the urls in the first {lines} lines with a tab, such "
            f"as {example[:200]!r}; GCC-3M has caption, url and GCC-12M url, caption"
        )
    return first > last


def find_dataset(paths: Sequence[Path], named: str | None) -> str:
    """Which list `paths` are by the order of their columns; `DataError` if not `named`."""
    orders = {path: find_order(path) for path in paths}
    found = {order: key for key, d in DATASETS.items() for order in [d.url_first]}
    for path, url_first in orders.items():
        key, wanted = found[url_first], named or found[orders[paths[0]]]
        if key != wanted:
            raise DataError(
                f"{path}: the columns are {DATASETS[key].columns}: this is the order of "
                f"{DATASETS[key].title}, but {DATASETS[wanted].title} "
                f"{'was named' if named else f'is that of {paths[0]}'}; use --dataset {key} for it"
            )
        print(f"{path}: columns {DATASETS[key].columns}, the order of {DATASETS[key].title}")
    return found[orders[paths[0]]]


def read_pairs(paths: Sequence[Path], url_first: bool, notes: Notes) -> Iterator[Row | Rejected]:
    """Rows of lists with two columns, the line number over all files as `row`.

    The caption is what stands before or after the tab, byte for byte. If there are more tabs the
    url is at its end of the line, and the rest is the caption with blanks for tabs.
    """
    for row, line in read_lines(paths, starts=notes.starts if len(paths) > 1 else None):
        if line.lower() in _HEADERS:
            print(
                f"line {editor_line(row, notes.starts)}: a header ({line.decode()}), skipped",
                file=sys.stderr,
            )
            notes.counts["header lines skipped"] += 1
            continue
        try:
            fields = line.decode("utf-8").split("\t")
        except UnicodeDecodeError:
            yield Rejected(row, NOT_UTF8, line)
            continue
        if len(fields) > 2:
            fields = line.decode("utf-8").strip("\t").split("\t")
            notes.counts["captions with a tab, now a blank"] += 1
        if len(fields) < 2:
            yield Rejected(row, "one column only" if line.strip() else "blank line", line)
        elif url_first:
            yield Row(row, fields[0], " ".join(fields[1:]), line)
        else:
            yield Row(row, fields[-1], " ".join(fields[:-1]), line)


def main() -> None:
    """Command line: build the list, begin the set, download."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tsv",
        type=as_path,
        action="append",
        required=True,
        help="published list; may be repeated",
    )
    parser.add_argument("--dataset", choices=DATASETS, help="default: by the order of the columns")
    list_set.add_arguments(parser)
    arguments = parser.parse_args()
    options = list_set.check(arguments)
    key = find_dataset(arguments.tsv, arguments.dataset)
    published = DATASETS[key]
    index = url_list.build(
        arguments.out,
        lambda notes: read_pairs(arguments.tsv, published.url_first, notes),
        arguments.tsv,
        {"dataset": key},
        arguments.samples_per_shard,
    )
    about = {
        "tool": "data_prep/gcc.py",
        "name": key,
        "source": published.source,
        "license": _TERMS.format(repository=published.repository),
    }
    list_set.download(arguments, options, index, about, identity={}, stated={}, extra={})


if __name__ == "__main__":
    run_cli(main)
