"""Text views by name: where their texts come from, how one is drawn, and what is refused."""

import itertools
import json
import random
from collections import Counter

import pytest

from loaders import caption_recipes, captions
from loaders.batch import TripletDataset
from loaders.errors import ConfigError, DataError
from loaders.labels import LabelSpace, caption_group
from loaders.manifest import open_shards
from loaders.texts import BadText, TextOptions
from loaders.views import build_train
from tests.loaders.conftest import sample, write_tar
from tests.loaders.test_batch import MEAN, STD, assert_equal, gather, letters, make_order, read_back

PLACES = ("caption", "other", "summary")


def options(value, views=PLACES):
    source, recipes = caption_recipes.read(value, views)
    return TextOptions(["a {}.", "the {}."], source, len(views), recipes)


def shards_of(folder, *abouts, text="raw text"):
    """A set with one sample for each dictionary of its `.json` (None: it has none)."""
    members = []
    for number, about in enumerate(abouts):
        parts = {} if about is None else {"json": json.dumps(about).encode()}
        members += sample(f"k{number}", number, txt=text.encode(), **parts)
    return open_shards(write_tar(folder / "pairs" / "0.tar", members))


def drawn(shards, index, value, count, views=PLACES):
    chosen = options(value, views)
    return [captions.draw(shards, index, chosen, random.Random(seed))[0] for seed in range(count)]


def test_what_the_configuration_says():
    assert caption_recipes.read("json.c", ("a", "b")) == ("json.c", ())
    value = {
        "caption": {"from": ["txt", "json.rewrites"], "min_words": 2},
        "other": {"from": "txt", "augment": "eda"},
        "summary": {"from": ["json.summary"]},
    }
    source, recipes = caption_recipes.read(value, PLACES)
    assert source == "txt"
    assert [recipe.view for recipe in recipes] == list(PLACES)
    assert [recipe.sources for recipe in recipes] == [
        ("txt", "json.rewrites"), ("txt",), ("json.summary",)
    ]  # fmt: skip
    assert [(r.augment, r.min_words) for r in recipes] == [(None, 2), ("eda", 0), (None, 0)]
    assert str(recipes[0]) == "caption of txt or json.rewrites"
    assert str(recipes[1]) == "other of txt, eda"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "data.caption=None: give 'txt' or 'json.KEY'"),
        (["txt"], r"data\.caption=\['txt'\]: give"),
        ({"text": "txt"}, "no view text and caption, other, summary has no recipe; this method's"),
        ({"caption": {"from": ["txt"]}, "other": {"from": ["txt"]}}, "summary has no recipe; .*as "
         r"data\.caption\.NAME, or one for all as data\.caption=RECIPE"),
        ({"caption": "txt"}, r"data\.caption\.caption='txt': a text view is \{from:"),
        ({"caption": {}}, r"data\.caption\.caption=\{\}: a text view is"),
        ({"caption": {"from": ["txt"], "words": 2}}, r"a text view is .* augment and min_words"),
        ({"caption": {"from": []}}, "at least one source, and none twice"),
        ({"caption": {"from": ["txt", "txt"]}}, "at least one source, and none twice"),
        ({"caption": {"from": ["text"]}}, r"data\.caption\.caption\.from='text': give 'txt'"),
        ({"caption": {"from": [7]}}, r"data\.caption\.caption\.from=7: give 'txt'"),
        ({"caption": {"from": None}}, r"data\.caption\.caption\.from=None: give 'txt'"),
        ({"caption": {"from": "txt", "augment": "aeda"}}, r"caption\.augment='aeda'; one of eda"),
        ({"caption": {"from": "txt", "min_words": -1}}, "min_words=-1 must be a whole number"),
        ({"caption": {"from": "txt", "min_words": True}}, "min_words=True must be"),
        ({"caption": {"from": "txt", "min_words": "2"}}, "min_words='2' must be"),
    ],
)  # fmt: skip
def test_wrong_recipes_are_refused_in_words(value, words):
    views = PLACES if not isinstance(value, dict) or "has no recipe" in words else ("caption",)
    with pytest.raises(ConfigError, match=words):
        caption_recipes.read(value, views)


def test_entries_of_all_sources_are_drawn_uniformly_and_short_ones_give_way(tmp_path):
    """LaCLIP: P(original) = (1 + number of too short rewrites) / (M + 1)."""
    rewrites = ["first rewrite", "second rewrite", "short", "  third  rewrite "]
    shards = shards_of(tmp_path, {"rewrites": rewrites})
    value = {"text": {"from": ["txt", "json.rewrites"], "min_words": 2}}
    counts = Counter(texts[0] for texts in drawn(shards, 0, value, 5000, ("text",)))
    expected = {"raw text": 2000, "first rewrite": 1000, "second rewrite": 1000}
    assert counts.keys() == expected.keys() | {"third  rewrite"}
    for text, count in counts.items():
        assert abs(count - expected.get(text, 1000)) < 5 * 1000**0.5
    value["text"]["min_words"] = 0
    assert "short" in {texts[0] for texts in drawn(shards, 0, value, 100, ("text",))}


def test_a_short_first_source_stays_and_a_list_of_it_gives_one(tmp_path):
    shards = shards_of(tmp_path, {"c": ["one", "two"], "rewrites": "word"}, text="raw")
    value = {"text": {"from": ["json.c", "json.rewrites"], "min_words": 3}}
    counts = Counter(texts[0] for texts in drawn(shards, 0, value, 2000, ("text",)))
    assert counts.keys() == {"one", "two"}
    assert abs(counts["one"] - 1000) < 5 * 1000**0.5


def test_which_samples_are_bad(tmp_path):
    abouts = [{"r": ["", 5, "rewrite"]}, {"r": []}, {"r": {"a": 1}}, None]
    shards = shards_of(tmp_path, *abouts)
    later = {"text": {"from": ["txt", "json.r"]}}
    first = {"text": {"from": ["json.r", "txt"]}}
    for index in range(4):
        found = {texts[0] for texts in drawn(shards, index, later, 40, ("text",))}
        assert found == ({"raw text", "rewrite"} if index == 0 else {"raw text"})
    reasons = []
    for index in (1, 2, 3):
        with pytest.raises(BadText) as caught:
            drawn(shards, index, first, 1, ("text",))
        reasons.append(caught.value.reason)
    assert reasons == ["no_caption", "caption_not_text", "no_caption"]
    members = sample("k", txt=b"fine", json=b"{broken")
    broken = open_shards(write_tar(tmp_path / "broken" / "0.tar", members))
    with pytest.raises(BadText, match="bad_json"):
        drawn(broken, 0, later, 1, ("text",))
    assert drawn(broken, 0, {"text": {"from": "txt"}}, 1, ("text",)) == [["fine"]]


def test_views_are_drawn_one_by_one(tmp_path):
    """The same recipe for two views repeats a caption as often as chance does."""
    shards = shards_of(tmp_path, {"c": ["one", "two", "three"], "summary": "short"})
    recipe = {"from": ["json.c"]}
    value = {"caption": recipe, "other": recipe, "summary": {"from": ["json.summary"]}}
    pairs = Counter(tuple(texts[:2]) for texts in drawn(shards, 0, value, 9000))
    assert len(pairs) == 9
    assert all(abs(count - 1000) < 5 * 1000**0.5 for count in pairs.values())
    one_for_all = TextOptions(["{}"], "json.c", views=3)
    texts, first = captions.draw(shards, 0, one_for_all, random.Random(1))
    assert sorted(texts) == ["one", "three", "two"]
    assert first == texts[0]


def dataset_of(sources, value, **settings):
    views = [build_train("clip", 16, MEAN, STD)]
    return TripletDataset(
        sources, LabelSpace(sources), views, options(value), letters, seed=3, **settings
    )


VALUE = {
    "caption": {"from": ["txt", "json.rewrites"]},
    "other": {"from": ["txt"], "augment": "eda"},
    "summary": {"from": ["json.summary"]},
}


@pytest.fixture
def sources(tmp_path, labelled):
    abouts = [{"rewrites": [f"re {n}", f"{n} re"], "summary": f"s {n}"} for n in range(14)]
    return [open_shards(labelled), shards_of(tmp_path, *abouts, text="a cat on it")]


def test_classes_give_a_prompt_to_every_view_and_pairs_what_each_recipe_says(sources):
    dataset = dataset_of(sources, VALUE, caption_labels="by_text")
    prompts, others = set(), set()
    for step in range(40):
        made = dataset[step, 0, 0]
        prompts.add(tuple(read_back(row) for row in made["text"]))
        made = dataset[step, 1, 11 + 4]
        first, second, third = (read_back(row) for row in made["text"])
        assert first in {"a cat on it", "re 4", "4 re"}
        assert third == "s 4"
        assert made["label"] == caption_group(first)
        others.add(second)
    assert prompts == set(itertools.product(("a cat.", "the cat."), repeat=3))
    assert {"a on cat it", "a cat it"} & others
    assert len(others) > 5


def test_ranks_workers_and_micro_batches_change_nothing(sources):
    dataset, order = dataset_of(sources, VALUE), make_order(sources)
    alone = gather(dataset, order)
    assert_equal(gather(dataset, order, micro_batch=4, workers=2), alone)
    assert_equal(gather(dataset, order, world_size=4, micro_batch=1), alone)


def test_the_label_of_a_group_is_of_the_text_before_it_was_augmented(tmp_path):
    shards = shards_of(tmp_path, {"summary": "s"}, text="a cat on it")
    value = {**VALUE, "caption": {"from": ["txt"], "augment": "eda"}}
    value = {**value, "other": {"from": ["txt"]}}
    dataset = dataset_of([shards], value, caption_labels="by_text")
    made = [dataset[step, 0, 0] for step in range(20)]
    assert len({read_back(one["text"][0]) for one in made}) > 3
    assert {one["label"] for one in made} == {caption_group("a cat on it")}


@pytest.mark.parametrize(
    ("view", "source", "words"),
    [
        ("summary", "json.summary",
         r"data\.caption\.summary\.from: json\.summary: none of the 9 samples tried of pairs has "
         r"it \(the sample holds '\.jpg', '\.json', '\.txt', its \.json the keys 'caption'\); join "
         r"a table with data_prep\.annotate, or name what is there: json\.caption, txt"),
        ("caption", ["txt", "json.rewrites"],
         r"data\.caption\.caption\.from: json\.rewrites: none of the 9 samples tried"),
    ],
)  # fmt: skip
def test_a_source_that_no_sample_has_is_refused_before_a_run(tmp_path, view, source, words):
    shards = shards_of(tmp_path, *[{"caption": "c"}] * 9)
    plain = {"from": ["txt"]}
    value = {name: {"from": source} if name == view else plain for name in PLACES}
    with pytest.raises(DataError, match=words):
        dataset_of([shards], value).try_sources()


def test_one_sample_in_many_is_enough_and_labelled_sets_need_none(tmp_path, labelled):
    abouts = [{"summary": "s"} if number == 7 else {} for number in range(9)]
    shards = shards_of(tmp_path, *abouts)
    captions.check_sources(
        shards, options({name: {"from": "json.summary"} for name in PLACES}).recipes
    )
    value = {name: {"from": ["txt", "json.summary"]} for name in PLACES}
    dataset_of([open_shards(labelled), shards], value).try_sources()


def test_many_bad_samples_in_a_row_are_told_by_the_key_of_their_view(tmp_path):
    abouts = [{"summary": "s"} if number == 99 else {"caption": "c"} for number in range(100)]
    shards = shards_of(tmp_path, *abouts)
    dataset = dataset_of([shards], {**VALUE, "caption": {"from": ["txt"]}})
    words = (
        r"no_caption as all.*; data\.caption\.summary\.from=json\.summary finds no caption.* "
        r"use data\.caption\.summary\.from=json\.caption or data\.caption\.summary\.from=txt$"
    )
    with pytest.raises(DataError, match=words):
        dataset.try_sources()
