"""Samples that could not be used: their record, their count, and what to say of many in a row."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loaders.errors import TooManyBadSamples
from loaders.manifest import OversizedMember, ShardSet
from loaders.manifest_file import is_text
from loaders.tarheaders import shown
from loaders.tarreader import ARRAYS, READ_EXTENSIONS, listed, member_extensions
from loaders.texts import ABSENT

_PLAIN_KEY = re.compile(r"[\w.-]{1,60}")  # of a `.json`, to be typed on a command line
_LIKELY = ("caption", "text", "txt")  # in the name of a key that holds captions


class BadSample(NamedTuple):
    """A sample that could not be used: source name, tar, key, and the reason in a word."""

    source: str
    shard: str
    key: str
    reason: str


class BadSampleCounter:
    """Counts bad samples by (source, reason), keeps the first 50, and says when to stop.

    Args:
        max_fraction: of the samples seen, e.g. 0.05.
        min_samples: below this many seen, nothing is judged.
    """

    def __init__(self, max_fraction: float, min_samples: int = 1000) -> None:
        self.max_fraction, self.min_samples = max_fraction, min_samples
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: list[BadSample] = []
        self.bad = self.seen = 0

    def update(self, bad: Iterable[BadSample], seen: int) -> None:
        """Count the bad samples of a batch of `seen` samples."""
        for sample in bad:
            self.bad += 1
            self.counts[sample.source, sample.reason] += 1
            if len(self.first) < 50:
                self.first.append(sample)
        self.seen += seen

    def check(self, total_bad: int, total_seen: int) -> None:
        """Raise `TooManyBadSamples` if the totals (over all ranks) exceed the fraction."""
        if total_seen < self.min_samples or total_bad <= self.max_fraction * total_seen:
            return
        counts = "".join(f"\n  {s}: {n} {reason}" for (s, reason), n in self.counts.most_common())
        first = "".join(f"\n  {s.shard} sample {s.key!r}: {s.reason}" for s in self.first)
        raise TooManyBadSamples(
            f"{total_bad} bad among {total_seen} samples, more than the fraction "
            f"{self.max_fraction} that data.max_bad_fraction allows; replace the shards "
            "named below, or raise it. Counts of this rank:"
            f"{counts}\nFirst ones of this rank:{first}"
        )


def describe_failure(
    shards: ShardSet, index: int, bad: Sequence[BadSample], caption: tuple[str, str]
) -> str:
    """What to tell of a source whose samples were bad, one after another.

    `index`: the last of them, whose tar may be walked; `caption`: key and value of the
    configuration that say where its caption was looked for.
    """
    last, reasons = bad[-1], Counter(sample.reason for sample in bad)
    what = (
        f"{shards.name}: {len(bad)} bad samples in a row, the last: {last.shard}, sample "
        f"{last.key!r}, {last.reason}"
    )
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common())
    what += f" (in all: {counts})" if len(reasons) > 1 else " as all of them"
    if reasons.keys() <= ABSENT:
        return f"{what}; {_explain_caption(shards, index, *caption)}"
    for name in ARRAYS:
        if reasons.keys() == {f"no_{name}"}:
            return (
                f"{what}; the method needs an array of each sample as a member .{name}.npy; join "
                f"them with python data_prep/annotate.py IN --arrays {name}=FOLDER --out OUT"
            )
    if reasons.keys() == {"array_width"}:
        return f"{what}; its rows have another width than the model's configuration states"
    if reasons.keys() == {"no_image"}:
        extensions = member_extensions(last.shard, last.key)
        return f"{what}; it holds {listed(extensions)}. Read are {READ_EXTENSIONS}; rename them"
    return f"{what}; check that shard, or leave it out"


def _explain_caption(shards: ShardSet, index: int, key: str, source: str) -> str:
    """Where a sample may have its caption, when `source` has none."""
    holding, ways, keys = what_it_holds(shards, index)
    ways = [way for way in ways if way != source]
    what = f"{key}={source} finds no caption: {holding}"
    if ways:
        return f"{what}; use " + " or ".join(f"{key}={way}" for way in ways[:3])
    if keys:
        return f"{what}; use {key}=json.KEY with the key that holds the caption"
    return f"{what}. Read are {READ_EXTENSIONS}; write the shards again with such names"


def what_it_holds(shards: ShardSet, index: int) -> tuple[str, list[str], list[str]]:
    """What there is of a sample: in words, likely caption sources, and keys of its texts."""
    try:
        content = shards.read_json(index) or {}
    except (ValueError, OversizedMember):
        content = {}
    keys = [key for key, value in content.items() if _PLAIN_KEY.fullmatch(key) and _text(value)]
    likely = [f"json.{k}" for word in _LIKELY for k in keys if word in k.lower()]
    extensions = member_extensions(shards.shard_of(index), shards.key(index))
    ways = dict.fromkeys([*likely, *(["txt"] if "txt" in extensions else [])])
    what = f"the sample holds {listed(extensions)}"
    if content:
        names = ", ".join(map(shown, list(content)[:10]))
        what += f", its .json the keys {names}" + ", …" * (len(content) > 10)
    return what, list(ways), keys


def _text(value: object) -> bool:
    """Whether a value of a `.json` is a text, or a list with one."""
    several = value if isinstance(value, list) else [value]
    return any(is_text(one) and one.strip() for one in several)
