"""Concepts of captions, with a small spaCy pipeline that is trained here on annotated captions."""

import random
from collections import Counter
from itertools import islice

import pytest
import spacy
from spacy.lookups import Lookups
from spacy.tokens import Doc
from spacy.training import Example

from data_prep.checks import concepts
from data_prep.report import report
from data_prep.verify import verify
from loaders.errors import DataError
from tests.data_prep.verify_parts import begin, put
from tests.loaders.conftest import sample

# A word is text/POS/dependency/head (position)/lemma; then the noun entities, as by hand.
ANNOTATED = [
    (
        "a/DET/det/2/a black/ADJ/amod/2/black dog/NOUN/ROOT/2/dog on/ADP/prep/2/on "
        "the/DET/det/5/the beach/NOUN/pobj/3/beach",
        ["dog", "beach"],
    ),
    (
        "two/NUM/nummod/1/two dogs/NOUN/nsubj/2/dog chase/VERB/ROOT/2/chase "
        "soccer/NOUN/compound/4/soccer balls/NOUN/dobj/2/ball",
        ["dog", "soccer ball"],
    ),
    (
        "she/PRON/nsubj/1/she eats/VERB/ROOT/1/eat ice/NOUN/compound/3/ice cream/NOUN/dobj/1/cream",
        ["ice cream"],
    ),
    (
        "a/DET/det/1/a photo/NOUN/ROOT/1/photo of/ADP/prep/1/of them/PRON/pobj/2/they",
        ["photo"],
    ),
    (
        "the/DET/det/3/the Golden/PROPN/compound/3/Golden Gate/PROPN/compound/3/Gate "
        "Bridge/PROPN/ROOT/3/Bridge at/ADP/prep/3/at night/NOUN/pobj/4/night",
        ["golden gate bridge", "night"],
    ),
    (
        "cats/NOUN/ROOT/0/cat and/CCONJ/cc/0/and dogs/NOUN/conj/0/dog",
        ["cat", "dog"],
    ),
    (
        "my/PRON/poss/1/my cat/NOUN/nsubj/2/cat sleeps/VERB/ROOT/2/sleep on/ADP/prep/2/on "
        "a/DET/det/6/a kitchen/NOUN/compound/6/kitchen table/NOUN/pobj/3/table",
        ["cat", "kitchen table"],
    ),
    (
        "red/ADJ/amod/1/red flowers/NOUN/ROOT/1/flower in/ADP/prep/1/in "
        "glass/NOUN/compound/4/glass vases/NOUN/pobj/2/vase",
        ["flower", "glass vase"],
    ),
    (
        "it/PRON/nsubj/1/it rains/VERB/ROOT/1/rain",
        [],
    ),
    (
        "children/NOUN/nsubj/1/child play/VERB/ROOT/1/play in/ADP/prep/1/in "
        "the/DET/det/4/the snow/NOUN/pobj/2/snow",
        ["child", "snow"],
    ),
    (
        "women/NOUN/nsubj/1/woman ride/VERB/ROOT/1/ride horses/NOUN/dobj/1/horse",
        ["woman", "horse"],
    ),
    (
        "a/DET/det/1/a Dog/NOUN/ROOT/1/dog with/ADP/prep/1/with its/PRON/poss/4/its "
        "bone/NOUN/pobj/2/bone",
        ["dog", "bone"],
    ),
]


def parts(annotated):
    """Words, parts of speech, dependencies, heads and lemmas of an annotated caption."""
    word, pos, dep, head, lemma = zip(*(w.split("/") for w in annotated.split()), strict=True)
    return list(word), list(pos), list(dep), [int(h) for h in head], list(lemma)


CAPTIONS = [(" ".join(parts(text)[0]), entities) for text, entities in ANNOTATED]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a pipeline (morphologizer, parser, lemma table) that knows the captions."""
    spacy.util.fix_random_seed(0)
    nlp = spacy.blank("en")
    tok2vec = {
        "@architectures": "spacy.HashEmbedCNN.v2",
        "pretrained_vectors": None,
        "width": 32,
        "depth": 2,
        "embed_size": 200,
        "window_size": 1,
        "maxout_pieces": 2,
        "subword_features": True,
    }
    nlp.add_pipe("morphologizer", config={"model": {"tok2vec": tok2vec}})
    nlp.add_pipe("parser", config={"model": {"tok2vec": tok2vec}, "min_action_freq": 1})
    lookups = Lookups()
    table = lookups.add_table("lemma_lookup")
    examples = []
    for text, _ in ANNOTATED:
        words, pos, deps, heads, lemmas = parts(text)
        table.update(zip(words, lemmas, strict=True))
        reference = Doc(nlp.vocab, words, pos=pos, deps=deps, heads=heads)
        examples.append(Example(nlp.make_doc(" ".join(words)), reference))
    optimizer = nlp.initialize(lambda: examples)
    optimizer.learn_rate = 0.01
    for _ in range(60):
        nlp.update(examples, sgd=optimizer, drop=0.0)
    nlp.add_pipe("lemmatizer", config={"mode": "lookup"}).initialize(lookups=lookups)
    path = tmp_path_factory.mktemp("model") / "captions"
    nlp.to_disk(path)
    return path


def test_the_pipeline_has_learnt_the_annotation(model):
    nlp = concepts.load(str(model))
    for text, _ in ANNOTATED:
        words, pos, deps, heads, lemmas = parts(text)
        doc = nlp(" ".join(words))
        assert [t.pos_ for t in doc] == pos
        assert [t.dep_ for t in doc] == deps
        assert [t.head.i for t in doc] == heads
        assert [t.lemma_ for t in doc] == lemmas


@pytest.mark.parametrize(("caption", "entities"), CAPTIONS)
def test_noun_entities_of_a_caption(model, caption, entities):
    assert concepts.noun_entities(concepts.load(str(model))(caption)) == entities


def test_counts_equal_those_by_hand_with_one_and_two_processes(model):
    order = random.Random(1)
    chosen = [order.choice(CAPTIONS) for _ in range(995)]
    truth = Counter(entity for _, entities in chosen for entity in entities)
    assert concepts.count((text for text, _ in chosen), str(model), 1, len(chosen)) == truth
    taken = []
    lines = (taken.append(text) or text for text, _ in chosen)
    zones = iter(lambda: list(islice(lines, 10)), [])
    counted = concepts._count_zones(zones, str(model), 2)
    number, counts = next(counted)
    assert len(taken) <= 60  # millions of captions are not read ahead
    for more, found in counted:
        number += more
        counts += found
    assert (number, counts) == (995, truth)


def test_words_are_forgotten_from_zone_to_zone(model):
    nlp = concepts.load(str(model))
    known = len(nlp.vocab.strings)
    for zone in range(20):
        texts = [f"a black dog on the beach{zone}x{n}" for n in range(5)]
        assert concepts._count_zone(nlp, texts)["dog"] == 5
    assert len(nlp.vocab.strings) - known < 20


def test_a_concept_occurs_more_than_five_times(model):
    """Five times is not enough, six times is."""
    texts = [CAPTIONS[0][0]] * 5 + [CAPTIONS[3][0]] * 6 + [CAPTIONS[5][0]]
    counts = concepts.count(texts, str(model))
    assert counts == {"dog": 6, "beach": 5, "photo": 6, "cat": 1}
    assert concepts.frequent(counts) == {"dog": 6, "photo": 6}


def test_the_report_fills_its_columns(model, tmp_path):
    texts = [CAPTIONS[1][0]] * 6 + [CAPTIONS[4][0]] * 7 + [CAPTIONS[10][0]] * 5
    members = []
    for n, text in enumerate(texts):
        members += sample(f"00000{n:04d}", n, txt=text.encode())
    begin(tmp_path / "D", shards=1)
    put(tmp_path / "D", 0, members)
    verify(tmp_path / "D")
    (facts,) = report([tmp_path / "D"], str(model), 1, tmp_path / "R")
    assert facts["table_1"] == {
        "images": 18,
        "concepts": 4,
        "vocabulary": 7,  # dog, soccer ball, golden gate bridge, night
        "images_per_concept": 4.5,
        "most_common_concepts": {
            "golden gate bridge": 7,
            "night": 7,
            "dog": 6,
            "soccer ball": 6,
        },
    }
    text = (tmp_path / "R" / "report.md").read_text()
    assert "| toy | 18 | 4 | 7 | 4 | this set |" in text
    assert "To fill the row" not in text


def test_a_missing_or_incomplete_model_is_said():
    with pytest.raises(DataError, match="python -m spacy download en_no_such_model"):
        concepts.load("en_no_such_model")
    with pytest.raises(DataError, match=r"no DEP \(it needs a parser\)"):
        concepts.noun_entities(spacy.blank("en")("a dog"))
