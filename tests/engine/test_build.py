"""What --dry-run and the start find in the data itself, before anything is trained."""

import json
from pathlib import Path

import pytest

from loaders.errors import DataError
from tests.loaders.conftest import sample, write_tar

CONFIG = str(Path(__file__).parent / "tiny.yaml")


def make_plan(folder, texts, *settings):
    """Plan of a run on nine pairs; `texts(i)` gives the members of sample i beside the image."""
    from engine import build, config

    members = [m for i in range(9) for m in sample(f"{i}", i, **texts(i))]
    write_tar(folder / "pairs" / "0.tar", members)
    settings = [f"data.image_text={folder}/pairs", "train.steps=2", *settings]
    return build.plan(config.load(CONFIG, settings), world_size=1)


def listing(count):
    """`texts` with a list of `count(i)` captions."""
    return lambda i: {"json": json.dumps({"captions": ["text"] * count(i)}).encode()}


def test_the_plan_says_how_many_captions_an_image_has(tmp_path):
    cases = (
        (lambda i: 5, "1 shards, 5 captions an image (first 8 samples), one drawn each time\n"),
        (lambda i: 2 + i, "1 shards, 2 to 9 captions an image (first 8 samples), one drawn"),
        (lambda i: i % 2, "pairs: 9 samples in 1 shards\n"),
    )
    for number, (count, words) in enumerate(cases):
        folder = tmp_path / str(number)
        plan = make_plan(folder, listing(count), "data.caption=json.captions")
        assert words in plan.describe()


@pytest.mark.parametrize("build_part", ["describe_parts", "dataset"])
def test_what_no_sample_has_is_found_before_the_first_step(tmp_path, build_part):
    """As --dry-run (`describe_parts`) and the trainer (`dataset`) ask for it."""
    from engine import build

    plan = make_plan(tmp_path, lambda i: {"json": b'{"caption": "a cat", "url": "u"}'})
    assert "pairs: 9 samples in 1 shards" in plan.describe()
    with pytest.raises(DataError, match=r"no_caption as all.*; use data\.caption=json\.caption$"):
        getattr(build, build_part)(plan)


def test_lines_that_become_captions_are_other_data(tmp_path):
    """The tars are the same, the texts that a run draws are not."""
    before = make_plan(tmp_path, lambda i: {"txt": b"a cat\na dog"})
    (tmp_path / "pairs" / "dataset_type.txt").write_text("retrieval\n")
    after = make_plan(tmp_path, lambda i: {"txt": b"a cat\na dog"})
    assert before.identity()["data"] != after.identity()["data"]
    assert before.sources[0].fingerprint == after.sources[0].fingerprint


def test_a_file_of_templates_is_known_by_its_content(tmp_path):
    plans = []
    for name, content in (("a", ["a {}."]), ("b", ["a {}."]), ("c", ["the {}."])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        setting = f"data.templates={tmp_path}/{name}.json"
        plans.append(make_plan(tmp_path, lambda i: {"txt": b"a cat"}, setting).identity())
    assert plans[0] == plans[1] != plans[2]
    named = make_plan(tmp_path, lambda i: {"txt": b"a cat"}, "data.templates=clip_80").identity()
    assert named["data.templates"] == "clip_80"


def test_a_method_that_asks_for_two_texts_gets_them(tmp_path, monkeypatch):
    """Two prompts drawn independently; both captions of an image, in either order."""
    from engine import build
    from loaders import tokenizers
    from loaders.batch import make_loader
    from loaders.texts import load_templates
    from losses import unicl

    monkeypatch.setattr(unicl.Method, "texts", ("first", "second"))

    def texts(i):
        return {"json": json.dumps({"captions": [f"first {i}", f"second {i}"]}).encode()}

    plan = make_plan(tmp_path, texts, "data.caption=json.captions")
    assert ", 2 captions an image (first 8 samples), 2 drawn each time\n" in plan.describe()
    dataset, encode = build.dataset(plan), tokenizers.build("clip", 12)
    orders, repeated = set(), set()
    for batch in make_loader(dataset, plan.order, 0, 1, 8, 0, 9, workers=0):
        assert batch["text"].shape == (8, 2, 12)
        for uid, label, ids in zip(batch["uid"], batch["label"], batch["text"], strict=True):
            drawn = [tuple(row) for row in ids.tolist()]
            if label < 0:
                index = dataset.locate(int(uid))[1]
                both = encode([f"first {index}", f"second {index}"]).tolist()
                assert sorted(drawn) == sorted(map(tuple, both))
                orders.add(drawn[0] == tuple(both[0]))
            else:
                names = plan.labels.names(int(label))
                prompts = [t.format(n) for t in load_templates("clipart") for n in names]
                assert {*drawn} <= {*map(tuple, encode(prompts).tolist())}
                repeated.add(drawn[0] == drawn[1])
    assert orders == repeated == {True, False}
