"""Two, three and four real gloo ranks against one process that holds the whole batch."""

import numpy as np
import pytest
import torch

import losses
from tests.losses import dense
from tests.losses.on_ranks import gradients_of, make_batch, results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    ranks = [found["methods"] for found in results(world_size)]
    for name in losses.names():
        single = gradients_of(name, slice(None), keep_mib=0)
        values = [rank[name]["loss"] for rank in ranks]
        np.testing.assert_allclose(np.mean(values), single["loss"].item(), rtol=1e-10)
        for key, expected in single.items():
            if key == "loss":
                continue
            parts = [rank[name][key] for rank in ranks]
            if key == "scale":  # one parameter: the engine averages its gradient over ranks
                actual, expected = sum(p.sum() for p in parts) / world_size, expected.sum()
            elif key.startswith("parameter"):  # of the method, averaged as well
                actual = np.mean(parts, axis=0)
            else:  # a feature row lives on one rank; averaging divides it by the world size
                actual = np.concatenate(parts) / world_size
            np.testing.assert_allclose(
                actual, expected.numpy(), rtol=1e-9, atol=1e-12, err_msg=f"{name} {key}"
            )


def test_single_process_reference_is_the_dense_formula():
    image, text, _, labels = make_batch()
    expected = dense.unicl(image, text, labels, torch.tensor(12.0).double())
    np.testing.assert_allclose(gradients_of("unicl", slice(None))["loss"].item(), expected.item())


def test_rank_without_pairs_joins_the_collectives():
    (first, loss), (second, other) = (found["empty"] for found in results(2))
    assert loss == other > 0
    assert np.abs(first[[0, 1, 3]]).sum() > 0
    assert np.abs(second).sum() == 0
