"""Vectors of a data set in memory-mapped files, made once, and the search in them.

A folder for each checkpoint and content of a data set:

    description.json       what it is of
    images.npy             (n, D) float16 of unit length; NaN where a picture cannot be read
    captions.npy           (m, D) float16 of the distinct captions
    caption_places.npy     (m, 2) sample and number of each
    predicted_*.npy        (n,) class that fits best, -1 where a picture cannot be read

What is not whole yet is called `.part` and has the number of its rows in `.rows`: a command that
was interrupted goes on from there.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.explorer.collection import Collection
from eval.explorer.encoder import Encoder
from loaders.progress import Progress

SAVE_SECONDS = 10.0  # of work that a power cut may cost
PIECE = 4096  # rows that are compared at a time: as float32 they stay in a processor's cache
FORM = 1  # of the files


@dataclass(frozen=True)
class Index:
    """What one checkpoint makes of a data set.

    Attributes:
        images: (n, D) float16; captions: (m, D) float16, None without captions.
        places: (m, 2) int64, sample and number of each caption.
        weights: (K, D) float32 of the classes, None without classes.
        predicted: (n,) int32, the class that fits best; None where no sample has a label.
    """

    images: np.ndarray
    captions: np.ndarray | None
    places: np.ndarray
    weights: Tensor | None
    predicted: np.ndarray | None


def nearest(
    rows: np.ndarray, query: Tensor, count: int, without: int | None = None
) -> list[tuple[int, float]]:
    """The `count` rows of (n, D) with the largest product with `query` (D,), and the products.

    `without`: a row that does not count, that of the query itself; rows of NaN never count.
    """
    scores = torch.empty(len(rows))
    for start in range(0, len(rows), PIECE):
        piece = torch.from_numpy(rows[start : start + PIECE]).float()
        torch.mv(piece, query, out=scores[start : start + PIECE])
    scores.nan_to_num_(nan=-torch.inf)
    if without is not None:
        scores[without] = -torch.inf
    best = scores.topk(min(count, len(scores)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [(i, score) for i, score in pairs if score > -torch.inf]


def open_index(
    output: Path, collection: Collection, encoder: Encoder, templates: list[str]
) -> Index:
    """The index of a data set by a checkpoint in OUTPUT, made where it is not there or not whole.

    Raises DataError for features that are not finite.
    """
    facts = {**encoder.description, "data": collection.source.content_hash, "form": FORM}
    text = json.dumps(facts, sort_keys=True)
    folder = output / hashlib.sha256(text.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        (folder / "description.json").write_text(text, encoding="utf-8")
        title = f"{collection.name}, {encoder.name}"
        images = filled(
            folder / "images.npy",
            (len(collection), encoder.width),
            lambda start: encoder.image_batches(collection, start),
            f"{title}: pictures",
        )
        captions, places = _captions(folder, collection, encoder, title)
        weights = encoder.class_weights(collection, templates) if collection.classes else None
        predicted = None
        if weights is not None and (collection.labels >= 0).any():
            digest = hashlib.sha256(json.dumps([collection.classes, templates]).encode())
            path = folder / f"predicted_{digest.hexdigest()[:16]}.npy"
            predicted = _predicted(path, images, weights, f"{title}: classes")
    return Index(images, captions, places, weights, predicted)


def filled(
    path: Path,
    shape: tuple[int, int],
    batches: Callable[[int], Iterator[np.ndarray]],
    title: str,
) -> np.ndarray:
    """The array (n, D) float16 in the file `path`, mapped; what is missing of it is made.

    Args:
        batches: gives the rows from a number on, batch by batch.
        title: for the progress bar.
    """
    if not path.exists():
        part, rows_file = path.with_suffix(".part"), path.with_suffix(".rows")
        done = int(rows_file.read_text()) if rows_file.exists() and part.exists() else 0
        rows = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float16, shape)
        saved = time.monotonic()
        bar = Progress(total=shape[0], initial=done, desc=title, unit="row")
        try:
            for batch in batches(done):
                rows[done : done + len(batch)] = batch
                done += len(batch)
                bar.update(len(batch))
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(rows, rows_file, done)
                    saved = time.monotonic()
        finally:
            bar.close()
            _save(rows, rows_file, done)
        os.replace(part, path)
        rows_file.unlink()
    return _mapped(path)


def _captions(
    folder: Path, collection: Collection, encoder: Encoder, title: str
) -> tuple[np.ndarray | None, np.ndarray]:
    """Vectors of the captions and their places."""
    path, places_path = folder / "captions.npy", folder / "caption_places.npy"
    if places_path.exists() and (path.exists() or not len(_mapped(places_path))):
        places = _mapped(places_path)
        return (_mapped(path) if len(places) else None), places
    found, places = collection.distinct_captions()
    _store(places_path, places)
    if not found:
        return None, places
    shape = (len(found), encoder.width)
    rows = filled(
        path, shape, lambda start: encoder.text_batches(found, start), f"{title}: captions"
    )
    return rows, places


def _predicted(path: Path, images: np.ndarray, weights: Tensor, title: str) -> np.ndarray:
    """The class that fits each picture best (n,), -1 where it cannot be read."""
    if not path.exists():
        best = torch.empty(len(images), dtype=torch.int32)
        for start in Progress(range(0, len(images), PIECE), desc=title, unit="piece"):
            piece = torch.from_numpy(images[start : start + PIECE]).float()
            found = (piece @ weights.T).argmax(dim=1).int()
            best[start : start + PIECE] = torch.where(piece[:, 0].isnan(), -1, found)
        _store(path, best.numpy())
    return _mapped(path)


def _save(rows: np.memmap, rows_file: Path, done: int) -> None:
    """The rows first: after a power cut there are at least as many as the file says."""
    rows.flush()
    scratch = rows_file.with_suffix(".tmp")
    scratch.write_text(str(done))
    os.replace(scratch, rows_file)


def _store(path: Path, array: np.ndarray) -> None:
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        np.save(file, array)
    os.replace(scratch, path)


def _mapped(path: Path) -> np.ndarray:
    """Mapped so that torch, which knows no read-only arrays, may take it; nothing is written."""
    return np.load(path, mmap_mode="c", allow_pickle=False).view(np.ndarray)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other command makes the same index."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
