"""What --dry-run and the start find in the data itself, before anything is trained."""

import json
from pathlib import Path

import pytest

from loaders.errors import DataError
from tests.loaders.conftest import sample, write_tar
from tests.loaders.test_arrays import npy, table

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


def test_views_and_texts_by_name(tmp_path, monkeypatch):
    """As SLIP has three image views and ALIP two texts."""
    from engine import build
    from loaders import tokenizers
    from loaders.batch import make_loader
    from losses import unicl

    monkeypatch.setattr(unicl.Method, "images", ("weak", "strong1", "strong2"))
    monkeypatch.setattr(unicl.Method, "texts", ("caption", "synthetic"))

    def texts(i):
        return {"txt": f"raw {i}".encode(), "json": json.dumps({"made": [f"made {i}"]}).encode()}

    settings = ["data.augmentation={weak: none, strong1: slip_strong, strong2: slip_strong}"]
    settings += ["data.caption.caption.from=txt", "data.caption.synthetic.from=[json.made]"]
    plan = make_plan(tmp_path, texts, *settings, "data.image_label=null")
    assert "  image views: weak none, strong1 slip_strong, strong2 slip_strong\n" in plan.describe()
    assert "  texts of pairs: caption of txt; synthetic of json.made\n" in plan.describe()
    dataset, encode = build.dataset(plan), tokenizers.build("clip", 12)
    pictures = {}
    for batch in make_loader(dataset, plan.order, 0, 1, 8, 0, 4, workers=0):
        assert batch["image"].shape == (8, 3, 3, 32, 32)
        for uid, images, ids in zip(batch["uid"], batch["image"], batch["text"], strict=True):
            index = dataset.locate(int(uid))[1]
            expected = encode([f"raw {index}", f"made {index}"])
            assert ids.tolist() == expected[:, : ids.shape[1]].tolist()
            assert (expected[:, ids.shape[1] :] == 0).all(), "nothing but padding is cut"
            assert (images[0] == pictures.setdefault(index, images[0])).all(), "the plain view"
            assert not (images[1] == images[2]).all()
    facts = plan.identity()
    assert facts["data.augmentation"]["strong1"] == "slip_strong"
    assert facts["data.caption"]["synthetic"] == {"from": ["json.made"]}
    other = make_plan(tmp_path, texts, *settings, "data.caption.caption.min_words=2")
    assert other.identity()["data.caption"] != facts["data.caption"]


def test_a_text_that_no_sample_has_is_refused_before_anything_is_built(tmp_path):
    from engine import build

    plan = make_plan(tmp_path, lambda i: {"txt": b"a"}, "data.caption.text.from=[txt, json.made]")
    words = r"data\.caption\.text\.from: json\.made: none of the 9 samples tried of pairs has it"
    with pytest.raises(DataError, match=words + ".*join a table with data_prep.annotate, or name"):
        build.describe_parts(plan)


PYRAMID = [
    "loss={name: pyramidclip}", "data.image_label=null", "data.augmentation=clip",
    "data.caption={summary: {from: txt}, caption: {from: txt}, tags: {from: txt}}",
    "model.image.kwargs=null",
    "model.image={name: vit_tiny_patch16_224, kwargs: {depth: 2, embed_dim: 16, num_heads: 2}}",
    "model.regions={width: 3, count: 2, blocks: 1}",
]  # fmt: skip


def test_objects_are_asked_for_read_as_the_model_says_and_missed_before_anything_is_built(tmp_path):
    from engine import build
    from loaders.batch import make_loader

    def texts(i, rows=3):
        return {"txt": b"a cat", "objects.npy": npy(table(rows))}

    plan = make_plan(tmp_path / "a", texts, *PYRAMID)
    (batch, *_) = make_loader(build.dataset(plan), plan.order, 0, 1, 8, 0, 1, workers=0)
    assert batch["objects"].shape == (8, 2, 3)
    assert batch["objects_mask"].all()
    assert "parameters: image tower" in build.describe_parts(plan)
    without = make_plan(tmp_path / "b", lambda i: {"txt": b"a cat"}, *PYRAMID)
    for part in (build.describe_parts, build.dataset):
        with pytest.raises(DataError, match=r"no_objects as all of them; .*--arrays objects="):
            part(without)
    four = [setting for setting in PYRAMID if "regions" not in setting]
    four = make_plan(tmp_path / "b", lambda i: {"txt": b"a cat"}, *four, "loss.objects=false")
    (batch, *_) = make_loader(build.dataset(four), four.order, 0, 1, 8, 0, 1, workers=0)
    assert "objects" not in batch
    wide = make_plan(tmp_path / "a", texts, *PYRAMID, "model.regions.width=4")
    with pytest.raises(DataError, match="array_width as all of them"):
        build.dataset(wide)


def test_each_batch_of_one_source(tmp_path):
    from engine import config
    from engine.build import plan as make

    members = [m for i in range(30) for m in sample(f"{i}", i, txt=b"a text")]
    write_tar(tmp_path / "pairs" / "0.tar", members)
    settings = [f"data.image_text={tmp_path}/pairs", "data.sampler=one_source", "train.steps=60"]
    plan = make(config.load(CONFIG, [*settings, "data.ratios={pairs: 1, emoji_train: 2}"]), 1)
    done = plan.order.steps_of(60)
    assert sum(done) == 60
    said = f"each global batch of one source; of 60 steps {done[0]} of emoji_train, {done[1]} of"
    assert said in plan.describe()
    assert f"passes: {8 * done[0] / len(plan.sources[0]):.2f}, {8 * done[1] / 30:.2f}" in (
        plan.describe()
    )
    assert {len({int(uid) < len(plan.sources[0]) for uid in plan.order.global_batch(step)})
            for step in range(60)} == {1}  # fmt: skip


def test_keys_of_an_older_run_mean_what_they_meant(tmp_path):
    """What a checkpoint states of views and texts, written before they could have names."""
    facts = make_plan(tmp_path, lambda i: {"txt": b"a"}).identity()
    assert {key: value for key, value in facts.items() if key.startswith("data.")} == {
        "data.sampler": "balanced", "data.ratios": None, "data.block_shards": 16,
        "data.label_merge": "disjoint", "data.caption_labels": "unique", "data.caption": "txt",
        "data.templates": "clipart", "data.augmentation": "clipart",
    }  # fmt: skip
