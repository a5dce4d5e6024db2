"""A small prepared set, and replacing its shards; for the tests of verify.py."""

import json
import subprocess
import sys
from pathlib import Path

from data_prep.sets import set_folder
from data_prep.sets.shard_writer import permutation, write_shards
from tests.loaders.conftest import encoded, write_tar

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = [{"id": 0, "synset": "n1", "names": ["cat"]}, {"id": 1, "synset": None, "names": ["dog"]}]
SIZE = 4  # samples per shard


def begin(out, kind="image_text", shards=3, **identity):
    preparation = set_folder.Preparation(
        tool="data_prep/toy.py",
        name="toy",
        kind=kind,
        source="made up",
        license="CC0",
        date="2026-01-31",
        shards=shards,
        samples_per_shard=SIZE,
        attempted=shards * SIZE,
        identity=identity or {"seed": 1},
        extra={"note": "ü"},
    )
    return set_folder.begin(out, preparation, CLASSES if kind == "image_label" else ())


def members(i):
    extension, form = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")][i % 3]
    return {extension: encoded(i, form=form), "txt": f"bild ü {i}".encode(), "json": b'{"n": 1}'}


def make(out):
    """A complete caption set of 3 shards with 4 samples each."""
    begin(out)
    write_shards(out, permutation(3 * SIZE, 0), members)
    return out


def put(out, shard, parts, successes=None, **stats):
    """Replace a shard by a tar of these members, with its statistics."""
    name = set_folder.shard_name(shard)
    write_tar(out / "shards" / f"{name}.tar", parts)
    keys = len({member.split(".")[0] for member, _ in parts})
    content = {"count": SIZE, "successes": keys if successes is None else successes, **stats}
    (out / "shards" / f"{name}_stats.json").write_text(json.dumps(content))


def run(out, *arguments, timeout=60):
    command = [sys.executable, REPOSITORY / "data_prep" / "verify.py", out, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)
