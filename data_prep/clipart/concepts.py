"""Classes that emoji and Open Clip Art share, by one rule, and which drawing belongs to which.

The words that stand with a drawing are looked up in WordNet. A concept can be a class when an emoji
is called so (by its name or its Unicode subgroup) and so are `MIN_SAID` drawings of Open Clip Art
(by title, keyword or folder). A drawing has the nearest class above what it is called: a tulip is a
flower where tulips are no class. Classes with too few drawings are given up, the most special
first, and their drawings fall to the next class above.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.clipart.emoji import Emoji
from data_prep.clipart.wordnet import WordNet, words_of
from loaders.errors import DataError

MIN_SAID = 3
MIN_EMOJI = 1
MIN_DRAWINGS = 4
MAX_WORDS = 3  # of a noun: "ice cream cone"
# Icons of desktops are named after what a program does, and not after what they show.
DESKTOP_ICONS = "computer/icons/"
# What follows these words is beside the point: "house with garden".
BESIDE = re.compile(
    r" (with|without|and|of|in|on|behind|over|at|for|from|to|above|under|by|like|as|or) .*$"
)


@dataclass(frozen=True)
class Called:
    """What a drawing is called: by its title, by its folders, by its keywords or subgroup."""

    title: str
    folders: tuple[str, ...]  # the innermost first
    keywords: tuple[str, ...] = ()


def called_emoji(emoji: Emoji) -> Called:
    """The name of an emoji, which its Unicode subgroup helps out; "dog face" is a dog."""
    name = emoji.name
    if emoji.subgroup.startswith("animal-"):
        name = name.removesuffix(" face")
    # "animal-mammal" says mammal, "musical-instrument" itself; "transport-ground" says where, and
    # "light & video" two things.
    if "&" in emoji.subgroup or emoji.subgroup.startswith(("transport-", "place-")):
        return Called(name, ())
    return Called(name, (), (emoji.subgroup.replace("-", " "),))


def called_drawing(path: str, caption: str) -> Called:
    """Title and keywords of a caption "title, keyword, …" and the folders of the drawing.

    The outermost folder only counts where it is the only one, and keywords that repeat the names
    of folders do not count: both are filing, such as "computer" on every icon of a desktop.
    """
    if path.startswith(DESKTOP_ICONS):
        return Called("", ())
    title, *keywords = caption.split(", ")
    folders = PurePosixPath(path).parent.parts
    filing = singulars(words_of(" ".join(folders)))
    kept = [keyword for keyword in keywords if not filing.issuperset(words_of(keyword))]
    return Called(title, tuple((folders[1:] or folders)[::-1]), tuple(kept))


def singulars(words: Iterable[str]) -> set[str]:
    """The words, and those that end in s also without it."""
    return {form for word in words for form in (word, word.removesuffix("s"))}


class Concepts:
    """Looks up what drawings are called, and assigns them to classes."""

    def __init__(self, wordnet: WordNet) -> None:
        self.wordnet = wordnet
        self._heads: dict[str, tuple[str, ...]] = {}

    def of_phrase(self, phrase: str, context: frozenset[str]) -> str | None:
        """The concept that a phrase names by its last words, the longest that are a noun.

        "Hot dog" is no dog, since WordNet knows "hot dog". Of several meanings the one counts whose
        kinds share most words with `context`, then the more frequent one. None without a noun, or
        when it means nothing that can be seen.
        """
        if phrase not in self._heads:
            self._heads[phrase] = self._meanings(phrase)
        found = self._heads[phrase]
        shared = [len(context & self.wordnet.words_above(sense)) for sense in found]
        return found[shared.index(max(shared))] if found else None

    def _meanings(self, phrase: str) -> tuple[str, ...]:
        text = re.sub(r"\(.*?\)|[’']s\b", "", phrase.lower()).split(":")[0]
        words = words_of(BESIDE.sub("", re.sub(r"[-_]", " ", text)))
        if words and words[-1] in self.wordnet.adverbs:
            return ()  # "arrow right": the word says where, not what
        for start in range(max(0, len(words) - MAX_WORDS), len(words)):
            senses = self.wordnet.senses(" ".join(words[start:]))
            if senses:
                return tuple(self.wordnet.visible(senses))
        return ()

    def look_up(self, called: Called) -> tuple[list[str], list[str], list[str]]:
        """(title, folders, keywords) of `called` as concepts; what names none is left out."""
        words = words_of(" ".join([*called.folders, *called.keywords]))
        context = frozenset(singulars(words))
        parts = ([called.title], called.folders, called.keywords)
        looked = ([self.of_phrase(phrase, context) for phrase in part] for part in parts)
        return tuple([concept for concept in part if concept] for part in looked)

    def nearest(self, concept: str, classes: set[str]) -> str | None:
        """The class among what `concept` is a kind of, the nearest first."""
        return next((kind for kind in self.wordnet.kinds_of(concept) if kind in classes), None)

    def assign(self, looked: Sequence[Sequence[str]], classes: set[str]) -> str | None:
        """The class of a drawing, from what `look_up` returned; None when its words disagree.

        Title and innermost folder with a class must not contradict each other: one is a kind of
        the other, and then the more special counts. Keywords may make the folder's class more
        special; alone they must agree.
        """
        title, folders, keywords = (
            list(dict.fromkeys(filter(None, (self.nearest(c, classes) for c in part))))
            for part in looked
        )
        said = title[:1] + folders[:1]
        if said:
            found = self._most_special(said)
            if found is not None and not title:
                finer = [self._most_special([found, keyword]) for keyword in keywords]
                finer = self._all_special([found, *filter(None, finer)])
                found = finer[0] if len(finer) == 1 else found
            return found
        agreed = self._all_special(keywords)
        return agreed[0] if len(agreed) == 1 else None

    def name(self, concept: str, titles: Counter[str], taken: set[str]) -> str:
        """The noun of a class that most `titles` (last words) end in, the first of equal ones.

        Nouns that are `taken` are passed over. Raises `DataError` when none is left.
        """
        nouns = [noun.lower() for noun in self.wordnet.synsets[concept].lemmas]
        free = [noun for noun in nouns if noun not in taken]
        if not free:
            raise DataError(f"{concept}: every noun of it ({', '.join(nouns)}) names another class")
        return max(free, key=lambda noun: (titles[noun.split(" ")[-1]], -free.index(noun)))

    def _all_special(self, found: Sequence[str]) -> list[str]:
        """Those of `found` of which no other is a kind."""
        kinds = self.wordnet.kinds_of
        return [
            one
            for one in dict.fromkeys(found)
            if not any(one != other and one in kinds(other) for other in found)
        ]

    def _most_special(self, found: Sequence[str]) -> str | None:
        special = self._all_special(found)
        return special[0] if len(special) == 1 else None

    def choose(self, emoji: Sequence[Called], drawings: Sequence[Called]) -> set[str]:
        """The concepts that are classes for these emoji and drawings (the rule of this module)."""
        looked = [[self.look_up(called) for called in side] for side in (emoji, drawings)]
        said = [
            Counter(concept for found in side for concept in {*found[0], *found[1], *found[2]})
            for side in looked
        ]
        classes = {concept for concept in said[0] if said[1][concept] >= MIN_SAID}
        adjectives = self.wordnet.adjectives  # "square", "game": as often as not no thing
        classes = {c for c in classes if self.wordnet.name(c) not in adjectives}
        least = (MIN_EMOJI, MIN_DRAWINGS)
        while True:
            counts = [Counter(self.assign(found, classes) for found in side) for side in looked]
            few = {c for c in classes if any(n[c] < m for n, m in zip(counts, least, strict=True))}
            if not few:
                return classes
            deepest = max(len(self.wordnet.kinds_of(concept)) for concept in few)
            classes -= {c for c in few if len(self.wordnet.kinds_of(c)) == deepest}
