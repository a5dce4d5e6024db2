"""Fixtures that make real shards."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def encoded(seed: int, size: tuple[int, int] = (40, 32), form: str = "JPEG") -> bytes:
    """A random but smooth picture as bytes of an image file."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(file, form)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT):
    """A tar with these members, written by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, seed: int = 0, **parts: bytes) -> list[tuple[str, bytes]]:
    """Members of a sample: a picture unless `jpg` is given, and the other parts."""
    parts = {"jpg": encoded(seed)} | parts
    return [(f"{key}.{extension}", data) for extension, data in parts.items()]


@pytest.fixture
def labelled(tmp_path):
    """Foreign labelled set: two shards of 6 and 5 samples, 3 classes in classnames.txt."""
    folder = tmp_path / "labelled"
    for shard, count in enumerate((6, 5)):
        members = []
        for i in range(count):
            n = 100 * shard + i
            members += sample(f"{n:09d}", n, cls=str(n % 3).encode())
        write_tar(folder / f"{shard:05d}.tar", members)
    (folder / "classnames.txt").write_text("cat\ndog, big\nhot+rod\n")
    return folder


@pytest.fixture
def captioned(tmp_path):
    """Foreign caption set as img2dataset writes it: two shards of 7; some samples have .cls."""
    folder = tmp_path / "captioned"
    for shard in range(2):
        members = []
        for i in range(7):
            n = 1000 * shard + i
            parts = {"json": f'{{"caption": "json {n}"}}'.encode(), "txt": f"text {n}".encode()}
            if i % 2:
                parts["cls"] = b"1"
            members += sample(f"{n:09d}", 500 + n, **parts)
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder
