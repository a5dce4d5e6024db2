"""Easy data augmentation of texts (Wei and Zou, EMNLP 2019), as DeCLIP uses it for a second text.

DeCLIP's released code draws one of three operations for each caption: a word is replaced by a
synonym, two words change places, or each word is deleted with probability 0.1. EDA's fourth one,
the insertion of a synonym, is not used there, and neither here.

Synonyms are those of WordNet 3.0 that this repository holds: the nouns of the ImageNet releases
(prompts/wordnet_lemmas.tsv). All of WordNet has verbs, adjectives and more nouns; a text without a
word of the table, plurals among them, is left as it is by the first operation.
"""

import random
from functools import cache
from pathlib import Path

LEMMAS = Path(__file__).resolve().parent.parent / "prompts" / "wordnet_lemmas.tsv"
DELETED = 0.1  # of the words; textaugment's default, which DeCLIP uses
# Lemmas of the table that are hardly ever the noun (vitamin A, operating room) in a caption: as in
# EDA, stop words are not replaced.
_STOP_WORDS = frozenset({"", "a", "being", "have", "or", "same", "still", "someone"})


def eda(text: str, rng: random.Random) -> str:
    """`text` after one of the three operations, each drawn with probability 1/3.

    Words are what white space parts. At least one word is left; of a single word nothing is
    deleted. All randomness is `rng`'s.
    """
    operation = rng.choice((replace_synonym, swap_words, delete_words))
    return " ".join(operation(text.split(), rng))


def replace_synonym(words: list[str], rng: random.Random) -> list[str]:
    """One word that has synonyms is replaced, wherever it stands, by one of them."""
    table = synonyms()
    known = sorted({word for word in words if word.lower() in table})
    if not known:
        return words
    word = rng.choice(known)
    other = rng.choice(table[word.lower()])
    return [other if one == word else one for one in words]


def swap_words(words: list[str], rng: random.Random) -> list[str]:
    """Two words, drawn uniformly, change places."""
    if len(words) < 2:
        return words
    swapped = list(words)
    one, other = rng.sample(range(len(words)), 2)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return swapped


def delete_words(words: list[str], rng: random.Random) -> list[str]:
    """Each word is deleted with probability DELETED; if all were, one of them is kept."""
    if len(words) < 2:
        return words
    return [word for word in words if rng.random() >= DELETED] or [rng.choice(words)]


@cache
def synonyms() -> dict[str, tuple[str, ...]]:
    """Lower-case noun -> the other words of all synsets that it belongs to, lower case, sorted.

    As in EDA, a synonym is a word without punctuation; it may be several words.
    """
    found: dict[str, set[str]] = {}
    for line in LEMMAS.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        lemmas = {_plain(word) for word in line.split("\t")[1].split(", ")}
        for word in lemmas:
            found.setdefault(word, set()).update(lemmas - {word})
    return {
        word: tuple(sorted(others))
        for word, others in found.items()
        if others and word not in _STOP_WORDS
    }


def _plain(word: str) -> str:
    spaced = word.lower().replace("-", " ")
    return " ".join("".join(c for c in spaced if c.isalpha() or c == " ").split())
