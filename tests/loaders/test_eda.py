"""EDA's operations: what each may change, how often, and from which random numbers."""

import random
from collections import Counter

from loaders import eda

TEXT = "a dog and a cat beside the red thing"


def test_the_three_operations_are_equally_likely(monkeypatch):
    counts = Counter()
    for name in ("replace_synonym", "swap_words", "delete_words"):
        monkeypatch.setattr(eda, name, lambda words, rng, name=name: counts.update([name]) or words)
    rng = random.Random(0)
    for _ in range(3000):
        assert eda.eda(TEXT, rng) == TEXT
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in counts.values())
    assert len(counts) == 3


def test_a_synonym_stands_for_every_occurrence_of_one_word():
    words = [*TEXT.split(), "dog"]
    drawn = Counter()
    for seed in range(400):
        changed = eda.replace_synonym(words, random.Random(seed))
        places = [i for i, (a, b) in enumerate(zip(words, changed, strict=True)) if a != b]
        replaced = {words[i] for i in places}
        assert len(replaced) == 1 <= len(places)
        word = replaced.pop()
        assert [i for i, one in enumerate(words) if one == word] == places
        assert len({changed[i] for i in places}) == 1
        drawn[word, changed[places[0]]] += 1
    # WordNet 3.0, n02084071: dog, domestic dog, Canis familiaris.
    assert {("dog", "domestic dog"), ("dog", "canis familiaris")} <= drawn.keys()
    assert {word for word, _ in drawn} >= {"dog", "cat"}
    assert "a" not in {word for word, _ in drawn}, "stop words stay"


def test_synonyms_are_the_other_words_of_the_synsets_of_a_word():
    rows = [line for line in eda.LEMMAS.read_text().splitlines() if line.startswith("n")]
    expected = set()
    for row in rows:
        words = row.split("\t")[1].lower().split(", ")
        if "sofa" in words:
            expected |= set(words) - {"sofa"}
    assert set(eda.synonyms()["sofa"]) == expected == {"couch", "lounge"}
    assert len(eda.synonyms()) > 20_000


def test_words_change_places():
    words, moved = TEXT.split(), Counter()
    for seed in range(900):
        swapped = eda.swap_words(words, random.Random(seed))
        assert sorted(swapped) == sorted(words)
        places = [i for i, (a, b) in enumerate(zip(words, swapped, strict=True)) if a != b]
        assert len(places) in (0, 2)  # "a" may change place with "a"
        moved.update(places)
    assert moved.keys() == set(range(len(words)))
    assert max(moved.values()) < 2 * min(moved.values())


def test_a_tenth_of_the_words_is_deleted():
    words = [str(n) for n in range(20)]
    kept = [eda.delete_words(words, random.Random(seed)) for seed in range(2000)]
    assert all(sorted(one, key=int) == one for one in kept)
    left = sum(map(len, kept)) / (2000 * 20)
    assert abs(left - 0.9) < 5 * (0.09 / 40_000) ** 0.5
    assert {len(eda.delete_words(["a", "b"], random.Random(s))) for s in range(500)} == {1, 2}


def test_few_words_and_a_pure_function():
    for seed in range(60):
        assert eda.eda("qwertz", random.Random(seed)) == "qwertz"
        assert eda.eda("", random.Random(seed)) == ""
        assert eda.eda(TEXT, random.Random(seed)) == eda.eda(TEXT, random.Random(seed))
    assert len({eda.eda(TEXT, random.Random(seed)) for seed in range(60)}) > 20
