"""The class table of the claims study, and the parts of its Open Clip Art."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.clipart.concepts import Called, Concepts, called_drawing, called_emoji, singulars
from data_prep.clipart.emoji import Emoji
from data_prep.clipart.openclipart import (
    PNG_ROOT,
    SPLIT_SEED,
    candidates,
    drop_lookalikes,
    normalise_title,
    read_images,
    read_metadata,
)
from data_prep.clipart.packages import OPENCLIPART_PNG
from data_prep.clipart.wordnet import words_of
from data_prep.clipart.write import Sample

EMOJI_PER_CLASS = 60  # flags and faces are a third of all emoji
# Percent of the titles' hash, from the side that quickstart.py holds out: what is held out there is
# in the test part here, too.
TEST_PERCENT, VALIDATION_PERCENT = 30, 10
SAME_TITLE = 40  # 216 playing cards are called "card"; such titles stay in train


@dataclass(frozen=True)
class Table:
    """Classes: concept → id, and the name of each id; `concepts` assigns drawings to them."""

    ids: Mapping[str, int]
    names: Sequence[str]
    concepts: Concepts

    @property
    def entries(self) -> list[dict]:
        """The classes (id, synset, names) in id order, as manifests have them."""
        synsets = {label: concept for concept, label in self.ids.items()}
        return [
            {"id": label, "synset": synsets[label], "names": [name]}
            for label, name in enumerate(self.names)
        ]

    def label(self, called: Called) -> int | None:
        """Class id of a drawing, None without one."""
        looked = self.concepts.look_up(called)
        return self.ids.get(self.concepts.assign(looked, set(self.ids)))


def make_table(concepts: Concepts, emoji: Sequence[Called], drawings: Sequence[Called]) -> Table:
    """The classes that emoji and drawings share (concepts.py), in the order of their names."""
    concepts.believe([*emoji, *drawings])
    chosen = concepts.choose(emoji, drawings)
    said = Counter()
    for called in (*emoji, *drawings):
        said.update(singulars(words_of(called.title)[-1:]))
    names = {}
    for concept in sorted(chosen):
        names[concept] = concepts.name(concept, said, taken=set(names.values()))
    ordered = sorted(chosen, key=lambda concept: names[concept])
    ids = {concept: label for label, concept in enumerate(ordered)}
    return Table(ids, [names[concept] for concept in ordered], concepts)


def labelled_emoji(emoji: Iterable[Emoji], table: Table) -> list[tuple[Emoji, int]]:
    """(emoji, class id) of those that have a class; of a large class, `EMOJI_PER_CLASS` by hash.

    A Unicode subgroup that names a class has all emoji of it: the suit of hearts, filed with the
    games, is no clothing.
    """
    emoji = [(entry, called_emoji(entry)) for entry in emoji]
    own = defaultdict(set)
    for folder in {folder for _, called in emoji for folder in called.folders}:
        own[table.ids.get(table.concepts.believed.get(folder))].add((folder,))
    groups = defaultdict(list)
    for entry, called in emoji:
        label = table.label(called)
        if label is not None and called.folders in own.get(label, {called.folders}):
            groups[label].append(entry)
    kept = []
    for label, entries in sorted(groups.items()):
        entries.sort(key=lambda entry: hashlib.blake2b(entry.key.encode()).digest())
        kept += [(entry, label) for entry in entries[:EMOJI_PER_CLASS]]
    return kept


def read_drawings(svg: Path) -> tuple[dict[str, tuple[str, str]], int]:
    """(path → (title, caption) of the usable drawings, number of all) of Open Clip Art."""
    drawings = read_metadata(svg)
    return candidates(drawings), len(drawings)


def part_of(title: str) -> str:
    """ "train", "val" or "test": a hash of the normalised title decides."""
    key = f"{SPLIT_SEED}/{normalise_title(title)}".encode()
    percent = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) % 100
    if percent < TEST_PERCENT:
        return "test"
    return "val" if percent < TEST_PERCENT + VALIDATION_PERCENT else "train"


def drawing_samples(
    drawings: Mapping[str, tuple[str, str]], png: Path, table: Table
) -> dict[str, list[Sample]]:
    """Samples of the parts train, val and test; none looks like one of a later part.

    No title group, image or rendering is in two parts, as in openclipart.py. Outside train, a
    drawing whose class train lacks has no label: probes and neighbours could not know it.
    """
    images = read_images(png, drawings)
    groups = Counter(normalise_title(title) for title, _ in drawings.values())
    parts = {"train": [], "val": [], "test": []}
    seen = set()
    for path, (title, caption) in drawings.items():
        digest, jpeg = images.get(path, ("", None))
        if jpeg is None or digest in seen or jpeg in seen:
            continue
        seen.update((digest, jpeg))
        part = "train" if groups[normalise_title(title)] > SAME_TITLE else part_of(title)
        label = table.label(called_drawing(path, caption))
        origin = f"{PNG_ROOT}{path}.png"
        parts[part].append(Sample(jpeg, caption, label, OPENCLIPART_PNG.label, origin, title))
    parts["train"] = drop_lookalikes(parts["train"], parts["val"] + parts["test"])
    parts["val"] = drop_lookalikes(parts["val"], parts["test"])
    parts["val"] = labelled_as(parts["train"], parts["val"])
    parts["test"] = labelled_as(parts["train"], parts["test"])
    return parts


def labelled_as(train: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """`samples`, those without a label whose class does not occur in `train`."""
    known = {sample.label for sample in train}
    return [sample if sample.label in known else replace(sample, label=None) for sample in samples]


def naming(captions: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """How many captions have each class name among their words, a plural s aside; "" for any."""
    found = Counter()
    wanted = [(name, tuple(name.split(" "))) for name in names]
    for caption in captions:
        words = [word.removesuffix("s") for word in words_of(caption)]
        said = [
            name
            for name, parts in wanted
            if any(
                [word.removesuffix("s") for word in parts] == words[i : i + len(parts)]
                for i in range(len(words))
            )
        ]
        found.update(said)
        found[""] += bool(said)
    return {name: found[name] for name in ["", *names]}
