"""Looking up the nearest pairs of a reference folder: a frozen encoder and an exact search."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.reference_folder import ReferenceFolder

# Features of this size and less stay on the device; larger ones come to it in parts at each search,
# and the host then waits for the indices of the neighbours, whose rows it has to fetch.
DEVICE_BYTES = 8 * 2**30
SCORES = 2**24  # inner products that are alive at a time
_LAST = 2**31 - 1


class Retrieval:
    """The nearest reference pairs of images.

    Deliberately no `nn.Module`: what is not registered is in no optimizer and no checkpoint, is
    not sharded, cast or switched to training by anybody, and a copy of a model (a teacher) shares
    it. It moves to the device of the images by itself.

    Args:
        folder: with the encoder and the features. neighbours: pairs to look up.
        mean, std: statistics with which the images are normalised that it is given.
    """

    def __init__(
        self,
        folder: ReferenceFolder,
        neighbours: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.neighbours = neighbours
        with torch.random.fork_rng(devices=[]):  # weights that are replaced at once
            self.encoder, self.cfg = folder.encoder()
        self.image, self.text = folder.features()
        ours, theirs = torch.tensor([mean, std]), torch.tensor([self.cfg.mean, self.cfg.std])
        self.factor = (ours[1] / theirs[1]).view(3, 1, 1)
        self.shift = ((ours[0] - theirs[0]) / theirs[1]).view(3, 1, 1)

    def __deepcopy__(self, memo: dict) -> Retrieval:
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the pairs whose image features have the largest inner products with the images'.

        Args:
            images: (b, 3, H, W) normalised, on any device.

        Returns:
            Image features (b, K, d_u) and text features (b, K, d_w) of the neighbours, float16, the
            nearest first; of equally near ones the one with the smaller index.
        """
        self._move(images.device)
        queries = self.queries(images)
        found = nearest(queries, self.image, self.neighbours)
        return _rows(self.image, found), _rows(self.text, found)

    @torch.no_grad()
    def queries(self, images: Tensor) -> Tensor:
        """Unit-length features (b, d_u) float32 of normalised images (b, 3, H, W).

        The images get the size and the statistics of the encoder. Its weights are float32; under
        16 bits its products run in the type of the images, by autocast.
        """
        half = images.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(images.device.type, enabled=False):
            scaled = images.float() * self.factor + self.shift
            if scaled.shape[-1] != self.cfg.size:
                sides = (self.cfg.size, self.cfg.size)
                scaled = F.interpolate(scaled, sides, mode="bicubic", antialias=True)
        with torch.autocast(images.device.type, images.dtype if half else None, enabled=half):
            pooled, _ = self.encoder(scaled)
        return F.normalize(pooled.float(), dim=-1)

    def _move(self, device: torch.device) -> None:
        if self.factor.device == device:
            return
        self.encoder.to(device)
        self.factor, self.shift = self.factor.to(device), self.shift.to(device)
        if self.image.nbytes + self.text.nbytes <= DEVICE_BYTES:
            self.image, self.text = self.image.to(device), self.text.to(device)


def nearest(queries: Tensor, rows: Tensor, count: int) -> Tensor:
    """Rows with the largest inner products; all are looked at.

    Queries are rounded to float16, as the rows of a folder are. Products of such numbers are exact
    in float32, and in TF32, which a GPU may take for it; they are summed in float32.

    Args:
        queries: (b, d) float. rows: (R, d) float16, on the queries' device or the CPU; they are
            taken in parts of `SCORES` / b. count: K <= R.

    Returns:
        Indices (b, K) int64 on the queries' device, the best first, of equals the smaller first.
    """
    size = max(1, SCORES // len(queries))
    queries = queries.half().float()
    best = queries.new_empty((len(queries), 0), dtype=torch.int64)
    with torch.autocast(queries.device.type, enabled=False):
        for start in range(0, len(rows), size):
            part = rows[start : start + size].to(queries.device).float()
            ranked = torch.cat([best, _ranks(queries @ part.T, start)], dim=1)
            best = ranked.topk(min(count, ranked.shape[1]), dim=1).values
    return _LAST - (best & 0xFFFFFFFF)


def _ranks(scores: Tensor, start: int) -> Tensor:
    """Integers (b, C) that order as (score, -index), where column 0 has the index `start`.

    torch's topk takes any of equal values; these are never equal. The bits of a float32 order as
    the number does, once those of negative numbers are turned around.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = torch.where(bits < 0, bits ^ _LAST, bits).long()
    index = torch.arange(start, start + scores.shape[1], device=scores.device)
    return (order << 32) + (_LAST - index)


def _rows(features: Tensor, found: Tensor) -> Tensor:
    """features[found], on the device of `found`."""
    return features[found.to(features.device)].to(found.device)
