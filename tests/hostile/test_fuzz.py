"""Spoiled inputs by the thousand: only our own errors, no hang, no memory beyond a limit.

800 inputs here; `pytest -m soak tests/hostile/test_fuzz.py` tries 100,000 others each time.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from engine import config
from loaders import tarreader
from loaders.errors import ConfigError, DataError
from loaders.manifest import MissingMember, ShardSet, open_shards, write_manifest
from loaders.printable import printable
from loaders.texts import BadText, read_caption
from loaders.views import BadImage, decoder
from models.formats import weight_files
from tests.hostile import mutations
from tests.hostile.test_config import GOOD
from tests.loaders.conftest import sample, write_tar

SECONDS = 30  # of processor time for one input, which takes milliseconds
MEMORY = 1 << 30  # beyond what is reserved before the first input
SOAK_SEED = int.from_bytes(os.urandom(4), "big")


class Hang(BaseException):
    """One input took too long; no `except Exception` stops it."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """An address space of MEMORY more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        reserved = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (reserved + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def stop(*_: object) -> None:
    """Handler of the alarm."""
    raise Hang


def fuzz(strategy: st.SearchStrategy, check: Callable[[bytes], str], count: int, seed: int | None):
    """Run `check` on `count` inputs; returns how often it gave each word.

    `seed`: None for the same inputs each time.
    """
    words: Counter[str] = Counter()

    def once(data: bytes) -> None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            words[check(data)] += 1
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    previous = signal.signal(signal.SIGPROF, stop)
    try:
        with limits():
            while words.total() < count:  # in parts: hypothesis remembers all inputs of a run
                left = min(count - words.total(), 5000)
                settings = hypothesis.settings(
                    max_examples=left, deadline=None, database=None, derandomize=seed is None,
                    suppress_health_check=list(hypothesis.HealthCheck), print_blob=True,
                )  # fmt: skip
                test = settings(hypothesis.given(strategy)(once))
                if seed is not None:
                    test = hypothesis.seed(seed + words.total())(test)
                test()
    finally:
        signal.signal(signal.SIGPROF, previous)
    return words


def read_all(shards: ShardSet) -> None:
    """Read every part of every sample, as training does."""
    for i in range(len(shards)):
        with contextlib.suppress(BadImage, MissingMember):
            decoder()(shards.read_image(i))
        for choice in ("txt", "json.caption"):
            with contextlib.suppress(BadText):
                read_caption(shards, i, choice)


def refused(error: Exception, name: str) -> str:
    """What every message must be: it names the file and is harmless on a terminal."""
    assert name in str(error)
    text = printable(str(error))
    assert all(c.isprintable() or c in "\n\t" for c in text)
    return "refused"


def check_tars(folder: Path) -> Callable[[bytes], str]:
    path = folder / "spoiled.tar"

    def check(data: bytes) -> str:
        shutil.rmtree(folder / tarreader.INDEX_FOLDER, ignore_errors=True)
        path.write_bytes(data)
        try:
            read_all(open_shards(path, "image_text"))
        except DataError as error:
            return refused(error, path.name)
        finally:
            assert {p.name for p in folder.iterdir()} <= {path.name, tarreader.INDEX_FOLDER}
        return "read"

    return check


def a_set(folder: Path) -> dict:
    """A labelled set of two shards; returns its manifest."""
    classes = [
        {"id": 0, "synset": None, "names": ["cat"]},
        {"id": 1, "synset": "n1", "names": ["b"]},
    ]
    for i in range(2):
        members = sample("a", 1, jpg=mutations.TINY, cls=b"0", json=mutations.CAPTION)
        members += sample("b", 2, jpg=mutations.TINY, cls=b"1", txt=b"text")
        write_tar(folder / "shards" / f"{i}.tar", members)
    return write_manifest(
        folder, "s", "image_label", classes, "source", "license", "2026-01-01", attempted=4
    )


def check_manifests(folder: Path) -> Callable[[bytes], str]:
    def check(data: bytes) -> str:
        (folder / "manifest.json").write_bytes(data)
        try:
            read_all(open_shards(folder))
        except DataError as error:
            return refused(error, "")
        return "read"

    return check


def check_indexes(folder: Path) -> Callable[[bytes], str]:
    stored = next((folder / "shards" / tarreader.INDEX_FOLDER).glob("0.tar*"))

    def check(data: bytes) -> str:
        stored.write_bytes(data)
        try:
            read_all(open_shards(folder))
        except DataError as error:
            return refused(error, "")
        return "read"

    return check


def check_configs(folder: Path) -> Callable[[bytes], str]:
    path = folder / "spoiled.yaml"

    def check(data: bytes) -> str:
        path.write_bytes(data)
        try:
            config.load(path)
        except ConfigError as error:
            return refused(error, path.name)
        return "read"

    return check


def check_weights(folder: Path) -> Callable[[bytes], str]:
    path = folder / "spoiled.pt"

    def check(data: bytes) -> str:
        path.write_bytes(data)
        try:
            weight_files.read(path)
        except DataError as error:
            return refused(error, path.name)
        return "read"

    return check


def checkpoint(folder: Path, **settings: bool) -> bytes:
    content = {
        "model": {"w": torch.arange(6.0), "b": torch.ones(2, 2)},
        "step": 3,
        "args": [1, "x"],
    }
    torch.save(content, folder / "good.pt", **settings)
    return (folder / "good.pt").read_bytes()


# How many of 100 inputs each part gets.
SHARES = {"tars": 50, "manifests": 15, "indexes": 10, "configs": 15, "weights": 10}


def run(part: str, folder: Path, inputs: int, seed: int | None) -> None:
    """Fuzz one part with its share of `inputs`."""
    if part in ("manifests", "indexes"):
        manifest = a_set(folder)
        stored = next((folder / "shards" / tarreader.INDEX_FOLDER).glob("0.tar*")).read_bytes()
    if part == "tars":
        strategy, check = mutations.tars(), check_tars(folder)
    elif part == "manifests":
        strategy, check = mutations.json_texts(manifest), check_manifests(folder)
    elif part == "indexes":
        strategy, check = mutations.mutated([stored], [stored, b"{'descr':"]), check_indexes(folder)
    elif part == "configs":
        strategy, check = mutations.yaml_texts(GOOD), check_configs(folder)
    else:
        both = [checkpoint(folder), checkpoint(folder, _use_new_zipfile_serialization=False)]
        strategy, check = (
            mutations.mutated(both, [b"cos\nsystem\n", b"PK\x03\x04"]),
            check_weights(folder),
        )
    words = fuzz(strategy, check, inputs * SHARES[part] // 100, seed)
    print(f"{part}: {json.dumps(words)}, seed {seed}")
    assert words["read"]  # neither all good nor all refused at the door
    assert words["refused"] or part == "indexes"  # a damaged index is made again


@pytest.mark.parametrize("part", SHARES)
def test_spoiled_inputs_are_read_or_refused(tmp_path, part):
    run(part, tmp_path, 800, None)


@pytest.mark.soak
@pytest.mark.parametrize("part", SHARES)
def test_many_more_spoiled_inputs_are_read_or_refused(tmp_path, part):
    run(part, tmp_path, int(os.environ.get("FUZZ_INPUTS", "100000")), SOAK_SEED)
