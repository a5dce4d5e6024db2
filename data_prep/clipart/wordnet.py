"""WordNet's nouns: which concepts a word can mean, and what kind of thing a concept is.

Read from the files of Debian's package `wordnet-base` (WordNet 3.0, format: its manual wndb(5)).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from data_prep.clipart.packages import read_members

FOLDER = "usr/share/wordnet/"
FILES = ("index.noun", "data.noun", "noun.exc", "index.adj", "index.adv")
# WordNet's files of concepts (lexnames(5WN)) that hold what a drawing can show. Persons are left
# out: whom a drawing shows is the artist's word, and the sources disagree on whom they draw. File
# 03 has the heads of the other files, such as animal and plant.
VISIBLE = {
    "03": "", "05": "animal", "06": "artifact", "08": "body", "13": "food", "17": "object",
    "20": "plant", "25": "shape",
}  # fmt: skip
HEADS = "03"
ANIMAL, FOOD, PLANT = "05", "13", "20"
RANK = 4  # a noun's rarer meanings are not looked at: "sport", the mutant, is its fifth
HYPERNYM = "@"  # of kinds; "@i" leads from a named individual ("Tigris") to its kind
# The regular plurals of WordNet's own look-up, morphy(7WN).
PLURALS = (
    ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"), ("s", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """A concept: its WordNet id (n and eight digits), file, nouns, ids of what it is a kind of."""

    id: str
    file: str
    lemmas: tuple[str, ...]
    parents: tuple[str, ...]


class WordNet:
    """Nouns of WordNet: what they can mean, and what kind of thing that is."""

    def __init__(self, index: str, data: str, exceptions: str, adjectives: str, adverbs: str):
        self._senses = dict(map(_parse_index, _lines(index)))
        self.synsets = {synset.id: synset for synset in map(_parse_synset, _lines(data))}
        self._exceptions = dict(line.split()[:2] for line in exceptions.splitlines() if line)
        self.adjectives = {line.split(" ", 1)[0] for line in _lines(adjectives)}
        self.adverbs = {line.split(" ", 1)[0] for line in _lines(adverbs)}
        self.kinds_of = lru_cache(maxsize=None)(self._kinds_of)
        self.words_above = lru_cache(maxsize=None)(self._words_above)

    @classmethod
    def read(cls, package: Path) -> "WordNet":
        """WordNet of the package `wordnet-base`."""
        wanted = [FOLDER + name for name in FILES]
        found = dict(read_members(package, wanted.__contains__))
        return cls(*(found[name].decode() for name in wanted))

    def senses(self, noun: str) -> tuple[str, ...]:
        """Ids of the concepts that `noun` (words joined by spaces) names, the most frequent first.

        A plural names what its singular does.
        """
        form = self.singular(noun)
        return () if form is None else self._senses[form.replace(" ", "_")]

    def singular(self, noun: str) -> str | None:
        """The noun as WordNet has it, in lower case; None when it has not."""
        forms = self._singulars(noun.lower().replace(" ", "_"))
        return next((form.replace("_", " ") for form in forms if form in self._senses), None)

    def visible(self, senses: Sequence[str]) -> list[str]:
        """Those of the first `RANK` senses that a drawing can show, less individuals (Africa)."""
        found = [self.synsets[sense] for sense in senses[:RANK]]
        return [synset.id for synset in found if synset.file in VISIBLE and synset.parents]

    def name(self, concept: str) -> str:
        """The first noun of a concept, in lower case."""
        return self.synsets[concept].lemmas[0].lower()

    def _singulars(self, noun: str) -> list[str]:
        forms = [noun]
        if noun in self._exceptions:
            forms.append(self._exceptions[noun])
        forms += [noun.removesuffix(end) + new for end, new in PLURALS if noun.endswith(end)]
        return forms

    def _kinds_of(self, concept: str) -> tuple[str, ...]:
        """The concept, then what it is a kind of, nearest first; each once."""
        found, layer = {}, [concept]
        while layer:
            found |= dict.fromkeys(layer)
            layer = [parent for c in layer for parent in self.synsets[c].parents]
        return tuple(found)

    def _words_above(self, concept: str) -> frozenset[str]:
        """The nouns of the kinds above a concept, and the name of its file, which it may head."""
        file = self.synsets[concept].file
        above = self.kinds_of(concept)[file != HEADS :]
        nouns = {noun.lower() for kind in above for noun in self.synsets[kind].lemmas}
        return frozenset(nouns | {VISIBLE.get(file, "")})


def _lines(text: str) -> list[str]:
    """Lines without the licence text, which is indented."""
    return [line for line in text.splitlines() if line and not line.startswith(" ")]


def _parse_index(line: str) -> tuple[str, tuple[str, ...]]:
    fields = line.split()
    count = int(fields[2])
    return fields[0], tuple(f"n{offset}" for offset in fields[-count:])


def _parse_synset(line: str) -> Synset:
    fields = line.partition(" | ")[0].split()
    words = int(fields[3], 16)
    lemmas = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2])
    pointers = fields[5 + 2 * words :]
    triples = zip(pointers[::4], pointers[1::4], strict=False)
    parents = tuple(f"n{offset}" for symbol, offset in triples if symbol == HYPERNYM)
    return Synset(f"n{fields[0]}", fields[1], lemmas, parents)


def words_of(text: str) -> list[str]:
    """Lower-case words of letters: "Guitar_jarno-1" → guitar, jarno."""
    return re.findall(r"[^\W\d_]+", text.lower())
