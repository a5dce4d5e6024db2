"""Classes that emoji and Open Clip Art share, by one rule, and which drawing belongs to which.

The words that stand with a drawing are looked up in WordNet. A word counts in its most frequent
sense, and in another only where words beside it support that one. A folder, or a Unicode subgroup,
is believed when most of what is filed there and WordNet knows is a kind of it: "horses", and not
"office". A concept can be a class when an emoji is called so (by its name or a believed subgroup)
and so are `MIN_SAID` drawings of Open Clip Art (by title, keyword or believed folder). A drawing
has the nearest class above what it is called: a tulip is a flower where tulips are no class.
Classes with too few drawings are given up, the most special first, and their drawings fall to the
next class above.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data_prep.clipart.emoji import Emoji
from data_prep.clipart.wordnet import ANIMAL, FOOD, PLANT, WordNet, words_of
from loaders.errors import DataError

MIN_SAID = 3
MIN_EMOJI = 1
MIN_DRAWINGS = 4
BELIEVED = 0.5  # share of the titles in a folder that must be kinds of what its name says
MAX_WORDS = 3  # of a noun: "ice cream cone"
# Icons of desktops are named after what a program does, and not after what they show.
DESKTOP_ICONS = "computer/icons/"
# What follows these words is beside the point: "house with garden".
BESIDE = re.compile(
    r" (with|without|and|of|in|on|behind|over|at|for|from|to|above|under|by|like|as|or) .*$"
)
# Who does something with a thing is not the thing: "person rowing boat".
BUSY = re.compile(r"\b(person|people|man|men|woman|women|boy|girl|face) \w+ing .*$")


@dataclass(frozen=True)
class Called:
    """What a drawing is called: by its title, by its folders, by its keywords or subgroup."""

    title: str
    folders: tuple[str, ...]  # the innermost first; of an emoji, the Unicode subgroup
    keywords: tuple[str, ...] = ()


def called_emoji(emoji: Emoji) -> Called:
    """The name of an emoji, which its Unicode subgroup helps out; "dog face" is a dog."""
    name = emoji.name
    if emoji.subgroup.startswith("animal-"):
        name = name.removesuffix(" face")
    # "transport-ground" says where, and "light & video" two things.
    if "&" in emoji.subgroup or emoji.subgroup.startswith(("transport-", "place-")):
        return Called(name, ())
    return Called(name, (emoji.subgroup.replace("-", " "),))


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
        self.believed: dict[str, str] = {}  # folder → what it says
        self._heads: dict[str, tuple[tuple[str, ...], str, bool]] = {}

    def of_phrase(self, phrase: str, context: frozenset[str]) -> str | None:
        """The concept that a phrase names by its last words, the longest that are a noun.

        "Hot dog" is no dog, since WordNet knows "hot dog". Of several senses that can be seen the
        one counts whose kinds share most words with `context`, then the more frequent one, but food
        before the plant it is of: a drawing called "peach" shows the fruit.

        Where `context` supports no sense, an adjective ("simple", which is also a herb) means
        nothing, and a word whose most frequent sense cannot be seen only counts where it is the
        first noun of a concept: "heart", and not "volume" for a book. None without a noun.
        """
        found, noun, frequent = self._meanings(phrase)
        shared = [len(context & self.wordnet.words_above(sense)) for sense in found]
        if not found:
            return None
        if not max(shared) and not frequent:
            if noun.replace(" ", "_") in self.wordnet.adjectives:
                return None
            named = (sense for sense in found if self.wordnet.name(sense) == noun)
            return next(named, None)
        best = [sense for sense, n in zip(found, shared, strict=True) if n == max(shared)]
        if self.wordnet.synsets[best[0]].file == PLANT:
            best = [s for s in best if self.wordnet.synsets[s].file == FOOD] or best
        return best[0]

    def frequent(self, phrase: str) -> bool:
        """Whether the most frequent sense of a phrase can be seen, and it is no adjective."""
        return self._meanings(phrase)[2]

    def _meanings(self, phrase: str) -> tuple[tuple[str, ...], str, bool]:
        """(senses that can be seen, the noun in the singular, what `frequent` says)."""
        if phrase not in self._heads:
            self._heads[phrase] = self._read(phrase)
        return self._heads[phrase]

    def _read(self, phrase: str) -> tuple[tuple[str, ...], str, bool]:
        text = re.sub(r"\(.*?\)|[’']s\b", "", phrase.lower()).split(":")[0]
        text = BUSY.sub(r"\1", re.sub(r"[-_]", " ", text))
        words = words_of(BESIDE.sub("", text))
        if words and words[-1] in self.wordnet.adverbs:
            return (), "", False  # "arrow right": the word says where, not what
        for start in range(max(0, len(words) - MAX_WORDS), len(words)):
            noun = self.wordnet.singular(" ".join(words[start:]))
            if noun is not None:
                senses = self.wordnet.senses(noun)
                visible = tuple(self.wordnet.visible(senses))
                adjective = noun.replace(" ", "_") in self.wordnet.adjectives
                return visible, noun, senses[0] in visible and not adjective
        return (), "", False

    def look_up(self, called: Called) -> tuple[list[str], list[str], list[str]]:
        """(title, folders, keywords) of `called` as concepts; what names none is left out.

        Of the folders, those that are believed.
        """
        said = Counter()
        for phrase in (called.title, *called.folders, *called.keywords):
            said.update(singulars(words_of(phrase)))

        def concept(phrase: str) -> str | None:
            beside = said - Counter(singulars(words_of(phrase)))
            return self.of_phrase(phrase, frozenset(beside))

        parts = (
            [concept(called.title)],
            [self.believed.get(folder) for folder in called.folders],
            [concept(keyword) for keyword in called.keywords],
        )
        return tuple([found for found in part if found] for part in parts)

    def believe(self, drawings: Iterable[Called]) -> None:
        """Find the folders whose drawings are what the folder says, for `look_up`.

        Of the titles that WordNet knows, `BELIEVED` or more must agree with the folder's name.
        """
        titles = defaultdict(list)
        for called in drawings:
            title = self.look_up(called)[0]
            for folder in called.folders:
                titles[folder] += title
        for folder, found in titles.items():
            # "Animal mammal" is mammals among the animals.
            says = self.of_phrase(folder, frozenset(words_of(folder)[:-1]))
            if says and found:
                agreed = sum(self.agree(title, says) for title in found)
                if agreed >= BELIEVED * len(found):
                    self.believed[folder] = says

    def agree(self, concept: str, kind: str) -> bool:
        """Whether `concept` is a kind of `kind`, or both are animals or both are plants.

        Folk names and biology disagree: for WordNet an ant is no bug, and a rose no flower.
        """
        files = {self.wordnet.synsets[one].file for one in (concept, kind)}
        return kind in self.wordnet.kinds_of(concept) or files in ({ANIMAL}, {PLANT})

    def nearest(self, concept: str, classes: set[str]) -> str | None:
        """The class among what `concept` is a kind of, the nearest first."""
        return next((kind for kind in self.wordnet.kinds_of(concept) if kind in classes), None)

    def assign(self, looked: Sequence[Sequence[str]], classes: set[str]) -> str | None:
        """The class of a drawing, from what `look_up` returned; None when its words disagree.

        A title that WordNet knows decides, unless the innermost believed folder disagrees. Without
        one the folder does, which keywords may make more special; without either the keywords
        must agree.
        """
        title, folders, _ = looked
        if title and folders and not self.agree(title[0], folders[0]):
            return None
        special, filed, more = (
            list(dict.fromkeys(filter(None, (self.nearest(c, classes) for c in part))))
            for part in looked
        )
        if title:
            return self._most_special(special + filed[:1]) if special or filed else None
        if filed:
            finer = [self._most_special([filed[0], keyword]) for keyword in more]
            finer = self._all_special([filed[0], *filter(None, finer)])
            return finer[0] if len(finer) == 1 else filed[0]
        agreed = self._all_special(more)
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
