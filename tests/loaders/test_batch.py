"""Samples and batches: pure functions of (seed, step, position); bad samples; no leaks."""

import random
import signal

import numpy as np
import pytest
import torch

from loaders import order as order_module
from loaders import tokenizers
from loaders.batch import (
    ATTEMPTS,
    BadSample,
    BadSampleCounter,
    StepBatches,
    TripletDataset,
    collate,
    make_loader,
)
from loaders.errors import ConfigError, DataError, TooManyBadSamples
from loaders.labels import LabelSpace, caption_group
from loaders.manifest import open_shards
from loaders.texts import TextOptions
from loaders.views import IDENTITY_PARAMETERS, build_eval, build_train, decode
from tests.loaders.conftest import sample, write_tar

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 8
OPTIONS = TextOptions(["a {}.", "the {}.", "one {}."])


def letters(texts):
    """Stand-in tokenizer that can be read back: code points, 16 to a text."""
    return torch.tensor([[ord(c) for c in text[:16].ljust(16)] for text in texts])


def read_back(row):
    return "".join(chr(c) for c in row.tolist()).rstrip()


def make_dataset(sources, recipe="unicl_release", views=1, texts=OPTIONS, **options):
    views = [build_train(recipe, 16, MEAN, STD) for _ in range(views)]
    options = {"seed": 3, "tokenizer": letters} | options
    return TripletDataset(sources, LabelSpace(sources), views, texts, **options)


def make_order(sources):
    facts = [order_module.Source(s.name, s.kind, s.shard_sizes) for s in sources]
    return order_module.Order(facts, order_module.plan_streams(facts, "balanced"), BATCH, seed=1)


@pytest.fixture
def sources(labelled, captioned):
    return [open_shards(labelled), open_shards(captioned)]


def gather(dataset, order, world_size=1, micro_batch=BATCH, workers=0, start=0, end=3):
    """Global batches of the steps, put together from all ranks and micro-batches."""
    steps = {step: [] for step in range(start, end)}
    for rank in range(world_size):
        arguments = (rank, world_size, micro_batch, start, end, workers)
        for batch in make_loader(dataset, order, *arguments):
            assert len(batch["uid"]) == micro_batch
            steps[batch["step"]].append(batch)
    names = ("image", "text", "label", "uid", "source", "seed", "step_seed")
    return [{n: torch.cat([b[n] for b in batches]) for n in names} for batches in steps.values()]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_shapes_and_contents(sources):
    dataset, order = make_dataset(sources, views=2, texts=TextOptions(["a {}."], views=3)), None
    order = make_order(sources)
    batch = next(iter(make_loader(dataset, order, 0, 1, BATCH, 5, 6, 0)))
    assert (batch["image"].shape, batch["image"].dtype) == ((BATCH, 2, 3, 16, 16), torch.uint8)
    assert (batch["text"].shape, batch["text"].dtype) == ((BATCH, 3, 16), torch.int64)
    assert batch["step"] == 5
    assert batch["bad"] == []
    assert batch["uid"].tolist() == order.global_batch(5).tolist()
    names = {0: "cat", 1: "dog big", 2: "hot rod"}
    for row, uid in enumerate(batch["uid"].tolist()):
        source, index = dataset.locate(uid)
        assert (source, index) == ((0, uid) if uid < 11 else (1, uid - 11))
        assert dataset.uid(source, index) == uid
        assert batch["source"][row] == source
        shards = sources[source]
        label = int(shards.labels[index]) if source == 0 else -1
        assert batch["label"][row] == label
        texts = {read_back(t) for t in batch["text"][row]}
        assert texts == ({f"a {names[label]}."} if source == 0 else {shards.read_text(index)})
        assert not torch.equal(batch["image"][row, 0], batch["image"][row, 1])


def test_plain_views_show_the_right_pictures(sources):
    view = build_eval(16, 16)
    dataset = TripletDataset(sources, LabelSpace(sources), [view], OPTIONS, letters, seed=0)
    for uid in range(len(dataset)):
        source, index = dataset.locate(uid)
        expected = view(decode(sources[source].read_image(index)))
        assert torch.equal(dataset[0, 0, uid]["image"][0], expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(sources, workers):
    dataset, order = make_dataset(sources), make_order(sources)
    alone = gather(dataset, order, micro_batch=4)
    assert_equal(gather(dataset, order, micro_batch=4, workers=workers), alone)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_ranks_and_micro_batches_change_nothing(sources, world_size, micro_batch):
    dataset, order = make_dataset(sources), make_order(sources)
    assert_equal(gather(dataset, order, world_size, micro_batch), gather(dataset, order))


def test_resuming_is_a_seek(sources):
    dataset, order = make_dataset(sources), make_order(sources)
    assert_equal(gather(dataset, order, start=2, end=4), gather(dataset, order, end=4)[2:])


def test_what_is_drawn_depends_on_seed_step_and_position(sources):
    dataset = make_dataset(sources)
    first = dataset[0, 0, 0]
    assert torch.equal(dataset[np.int64(0), np.int64(0), np.int64(0)]["image"], first["image"])
    for other in (dataset[1, 0, 0], dataset[0, 1, 0], make_dataset(sources, seed=4)[0, 0, 0]):
        assert not torch.equal(other["image"], first["image"])
    prompts = {read_back(dataset[step, 0, 0]["text"][0]) for step in range(30)}
    assert prompts == {"a cat.", "the cat.", "one cat."}


def test_seeds_of_samples_and_of_steps(sources, spoiled):
    """Of samples all different, of a step one; functions of (seed, step, position)."""
    dataset, order = make_dataset(sources, "clip"), make_order(sources)
    batches = gather(dataset, order, world_size=2, micro_batch=2, end=4)
    for batch in batches:
        assert (batch["seed"].dtype, batch["step_seed"].dtype) == (torch.int64, torch.int64)
        assert len(batch["seed"].unique()) == BATCH
        assert len(batch["step_seed"].unique()) == 1
        assert batch["seed"].min() >= 0 <= batch["step_seed"].min()
    steps = {int(batch["step_seed"][0]) for batch in batches}
    assert len(steps) == 4
    assert steps.isdisjoint(set(torch.cat([batch["seed"] for batch in batches]).tolist()))
    other = gather(make_dataset(sources, "clip", seed=4), order, end=1)[0]
    assert not (other["seed"] == batches[0]["seed"]).any()
    assert other["step_seed"][0] != batches[0]["step_seed"][0]
    seed = dataset[5, 2, 0]["seed"]
    assert seed == dataset[5, 2, 3]["seed"], "not of the sample, but of its place"
    replaced = make_dataset(spoiled, "clip")
    assert replaced[5, 2, 11]["bad"]
    assert replaced[5, 2, 11]["seed"] != seed == replaced[5, 2, 0]["seed"]


def test_views_that_report_give_their_parameters_to_the_batch(sources):
    order, dataset = make_order(sources), make_dataset(sources, "uniclip", views=2)
    batch = dataset_batch(dataset, order)
    assert (batch["image"].shape, batch["image"].dtype) == ((BATCH, 2, 3, 16, 16), torch.uint8)
    shape = (BATCH, 2, len(IDENTITY_PARAMETERS))
    assert (batch["augmentation"].shape, batch["augmentation"].dtype) == (shape, torch.float32)
    assert len(batch["augmentation"].flatten(0, 1).unique(dim=0)) == 2 * BATCH
    assert "augmentation" not in dataset_batch(make_dataset(sources, "slip_strong"), order)
    views = [build_train(recipe, 16, MEAN, STD) for recipe in ("uniclip", "clip")]
    with pytest.raises(ConfigError, match=r"data\.augmentation: some image views report"):
        TripletDataset(sources, LabelSpace(sources), views, OPTIONS, letters, seed=0)


def dataset_batch(dataset, order):
    return next(iter(make_loader(dataset, order, 0, 1, BATCH, 0, 1, 0)))


def test_every_tensor_of_a_sample_is_stacked(sources):
    samples = [make_dataset(sources)[0, position, position] for position in range(3)]
    objects = [{**one, "objects": torch.full((2, 5), n)} for n, one in enumerate(samples)]
    assert collate(objects)["objects"].tolist() == [[[n] * 5] * 2 for n in range(3)]
    assert "objects" not in collate(samples)


def test_the_trainer_s_generators_are_left_alone(sources):
    dataset, order = make_dataset(sources), make_order(sources)

    def draws():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    expected = []
    for load in (False, True):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        if load:
            gather(dataset, order)
        expected.append(draws())
    assert expected[0] == expected[1]


def test_captions_never_carry_the_class(captioned):
    shards = open_shards(captioned)
    assert (shards.labels == 1).sum() == 6  # `.cls` is there, for evaluation
    dataset = make_dataset([shards], "clip")
    assert {dataset[0, 0, uid]["label"] for uid in range(14)} == {-1}
    dataset = make_dataset([shards], "clip", caption_labels="by_text")
    for uid in range(14):
        assert dataset[0, 0, uid]["label"] == caption_group(shards.read_text(uid)) <= -2
    with pytest.raises(ConfigError, match="caption_labels"):
        make_dataset([shards], caption_labels="always")


def test_captions_from_json(captioned):
    dataset = make_dataset([open_shards(captioned)], texts=TextOptions(["{}"], "json.caption"))
    assert read_back(dataset[0, 0, 8]["text"][0]) == "json 1001"


def test_the_real_tokenizer(sources):
    tokenizer = tokenizers.build("clip", 12)
    dataset = make_dataset(sources, "clip", tokenizer=tokenizer)
    assert torch.equal(dataset[0, 0, 12]["text"], tokenizer(["text 1"]))


@pytest.fixture
def spoiled(tmp_path, labelled):
    """A caption set where 4 of 8 samples are bad, beside a good labelled one."""
    bad = {"zero_bytes": {"jpg": b""}, "not_an_image": {"jpg": b"<html>404</html>"}}
    bad |= {"empty_caption": {"txt": b" "}, "caption_not_utf8": {"txt": b"\xff\xfe"}}
    members = []
    for n, reason in enumerate([*bad, *["good"] * 4]):
        members += sample(reason + str(n), n, **({"txt": b"fine"} | bad.get(reason, {})))
    path = write_tar(tmp_path / "spoiled" / "0.tar", members)
    return [open_shards(labelled), open_shards(path)]


def test_bad_samples_are_replaced_from_their_source_and_reported(spoiled):
    dataset = make_dataset(spoiled, "clip")
    for position, reason in enumerate(
        ["zero_bytes", "not_an_image", "empty_caption", "caption_not_utf8"]
    ):
        got = dataset[7, position, 11 + position]
        assert got["bad"][0] == BadSample(
            "spoiled", spoiled[1].shards[0].path, f"{reason}{position}", reason
        )
        assert got["source"] == 1
        assert got["uid"] in range(15, 19)
        assert read_back(got["text"][0]) == "fine"
        again = make_dataset(spoiled, "clip")[7, position, 11 + position]
        assert torch.equal(again["image"], got["image"])
        assert (again["uid"], again["bad"]) == (got["uid"], got["bad"])
    batch = collate([dataset[7, position, 11 + position] for position in range(8)])
    assert len(batch["bad"]) >= 4
    assert len({dataset[step, 0, 11]["uid"] for step in range(40)}) == 4


def test_bad_samples_are_the_same_for_any_workers(spoiled):
    dataset, order = make_dataset(spoiled), make_order(spoiled)
    lists = []
    for workers in (0, 2):
        loader = make_loader(dataset, order, 0, 1, 4, 0, 4, workers)
        lists.append([bad for batch in loader for bad in batch["bad"]])
    assert lists[0] == lists[1]
    assert lists[0]


def test_a_source_of_only_bad_samples_ends(tmp_path):
    members = [("one.txt", b"no image"), *sample("two", jpg=b"junk", txt=b"x")]
    shards = open_shards(write_tar(tmp_path / "0.tar", members))
    with pytest.raises(DataError, match=rf"{ATTEMPTS} bad samples in a row.*0\.tar.*leave it out"):
        make_dataset([shards])[0, 0, 0]


def test_counter_stops_above_the_fraction():
    counter = BadSampleCounter(max_fraction=0.1, min_samples=100)
    for n in range(60):
        counter.update([BadSample("gcc", f"{n}.tar", f"k{n}", "truncated")], seen=10)
    counter.update([BadSample("yfcc", "y.tar", "k", "zero_bytes")], seen=0)
    assert (counter.bad, counter.seen, len(counter.first)) == (61, 600, 50)
    assert counter.counts == {("gcc", "truncated"): 60, ("yfcc", "zero_bytes"): 1}
    counter.check(99, 99)  # too few to judge
    counter.check(60, 600)  # exactly the fraction
    with pytest.raises(TooManyBadSamples) as caught:
        counter.check(61, 600)
    text = str(caught.value)
    assert caught.value.exit_code == 5
    for part in ("61 bad among 600", "gcc: 60 truncated", "yfcc: 1 zero", "49.tar sample 'k49'"):
        assert part in text
    assert "50.tar" not in text


@pytest.mark.parametrize(("world_size", "micro_batch"), [(3, 1), (2, 3), (1, 16)])
def test_a_batch_that_cannot_be_cut_is_refused(sources, world_size, micro_batch):
    with pytest.raises(ConfigError, match="global batch 8 is not a multiple"):
        StepBatches(make_order(sources), 0, world_size, micro_batch, 0, 1)


def test_lengths_and_slices(sources):
    order = make_order(sources)
    batches = StepBatches(order, 1, 2, 2, 3, 6)
    assert len(batches) == len(list(batches)) == 6
    uids = order.global_batch(3)
    first = next(iter(batches))
    assert first == [(3, 4, uids[4]), (3, 5, uids[5])]
    assert all(type(number) is int for address in first for number in address)


class Signals(torch.utils.data.Dataset):
    """Tells how a worker treats signals and threads."""

    tokenizer = None

    def __getitem__(self, _):
        ignored = [signal.getsignal(s) == signal.SIG_IGN for s in (signal.SIGINT, signal.SIGUSR1)]
        return ignored, torch.get_num_threads()


def test_workers_leave_signals_to_the_trainer(sources, monkeypatch):
    monkeypatch.setattr("loaders.batch.collate", lambda samples, tokenizer: samples)
    loader = make_loader(Signals(), make_order(sources), 0, 1, BATCH, 0, 1, workers=1)
    assert next(iter(loader))[0] == ([True, True], 1)
