"""Two and three real gloo ranks against one process that holds the whole batch."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import losses
from losses._gather import Gather
from tests import multiprocess
from tests.losses import dense

# Unequal label mixes and unequal numbers of rows per rank.
ROWS = {2: [9, 9], 3: [5, 11, 2]}
LABELS = [0, 0, -1, 3, -1, -1, 0, 3, -1, -1, -1, 7, 7, 0, -2, -2, 3, 0]
DIMS = {"embed_dim": 6, "image_width": 6, "text_width": 6, "num_classes": 8}


def make_batch():
    torch.manual_seed(7)
    image, text, second = (F.normalize(torch.randn(18, 6).double(), dim=1) for _ in range(3))
    return image, text, second, torch.tensor(LABELS)


def gradients_of(name, rows, keep_mib=64):
    """Loss and gradients of method `name` on the given rows of the batch."""
    image, text, second, labels = make_batch()
    method = losses.build(name, {"keep_mib": keep_mib} if name in ("unicl", "clip") else {}, DIMS)
    leaves = {
        "image": image[rows], "text": text[rows], "first": image[rows], "second": second[rows],
        "logits": torch.cat([image, text[:, :2]], 1)[rows],
        "scale": torch.full((len(image[rows]),), 12.0).double(),
    }  # fmt: skip
    leaves = {key: value.clone().requires_grad_() for key, value in leaves.items()}
    out = method(leaves, labels[rows], Gather())
    loss = sum(value for key, value in out.items() if key.endswith("_loss") and value.ndim == 0)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, grads, strict=True))
    return {"loss": loss, **{k: v for k, v in named.items() if v is not None}}


def on_rank(rank, world_size, names):
    starts = np.cumsum([0, *ROWS[world_size]])
    rows = slice(int(starts[rank]), int(starts[rank + 1]))
    return {name: gradients_of(name, rows) for name in names}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one_process(world_size):
    names = losses.names()
    ranks = multiprocess.run(on_rank, world_size, names)
    for name in names:
        single = gradients_of(name, slice(None), keep_mib=0)
        values = [rank[name]["loss"] for rank in ranks]
        np.testing.assert_allclose(np.mean(values), single["loss"].item(), rtol=1e-10)
        for key, expected in single.items():
            if key == "loss":
                continue
            parts = [rank[name][key] for rank in ranks]
            if key == "scale":  # one parameter: the engine averages its gradient over ranks
                actual, expected = sum(p.sum() for p in parts) / world_size, expected.sum()
            else:  # a feature row lives on one rank; averaging divides it by the world size
                actual = np.concatenate(parts) / world_size
            np.testing.assert_allclose(
                actual, expected.numpy(), rtol=1e-9, atol=1e-12, err_msg=f"{name} {key}"
            )


def test_single_process_reference_is_the_dense_formula():
    image, text, _, labels = make_batch()
    expected = dense.unicl(image, text, labels, torch.tensor(12.0).double())
    np.testing.assert_allclose(gradients_of("unicl", slice(None))["loss"].item(), expected.item())


def empty_rank(rank, world_size):
    """Rank 1 holds image-label samples only: multitask's contrastive part has no row there."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(4, 6), dim=1).requires_grad_()
    labels = torch.tensor([-1, -1, 2, -1] if rank == 0 else [0, 1, 2, 3])
    features = {
        "image": image, "text": image * 1.0, "logits": torch.zeros(4, 8, requires_grad=True),
        "scale": torch.ones(4),
    }  # fmt: skip
    out = losses.build("multitask", {}, DIMS)(features, labels, Gather())
    (gradient,) = torch.autograd.grad(out["contrastive_loss"], image)
    return gradient, out["contrastive_loss"]


def test_rank_without_pairs_joins_the_collectives():
    (first, loss), (second, other) = multiprocess.run(empty_rank, 2)
    assert loss == other > 0
    assert np.abs(first[[0, 1, 3]]).sum() > 0
    assert np.abs(second).sum() == 0
