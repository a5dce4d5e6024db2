"""Heads over ranks against torch's own layers on the whole batch in one process."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from losses import _heads
from losses._gather import Gather
from losses._heads import BatchNormOverRanks, Mlp
from tests import multiprocess

WIDTHS = [5, 7, 6, 3]
SHARES = ([7, 4], [1, 10], [0, 11])  # rows per rank
STEPS = 3


def batch(step):
    """Features (11, 5) far from 0, and the weights (11, 3) of a loss that is no mean."""
    generator = torch.Generator().manual_seed(step)
    features = torch.randn(11, 5, generator=generator).double() * 0.1 + 3
    return features, torch.randn(11, 3, generator=generator).double()


def head(last_norm):
    torch.manual_seed(3)
    made = Mlp(WIDTHS, last_norm=last_norm)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also weights and biases of norms
    return made.double()


def of_torch(mlp):
    """The same layers, made of torch's."""
    layers = []
    for number, (linear, norm) in enumerate(zip(mlp.layers, mlp.norms, strict=True)):
        layers.append(copy.deepcopy(linear))
        if isinstance(norm, BatchNormOverRanks):
            layers.append(nn.BatchNorm1d(linear.out_features).double())
            layers[-1].load_state_dict(norm.state_dict(), strict=False)
        if number < len(mlp.layers) - 1:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def in_order(mlp):
    """Its parameters as they come in `of_torch`."""
    pairs = zip(mlp.layers, mlp.norms, strict=True)
    return [p for pair in pairs for part in pair for p in part.parameters()]


def values(run, parameters, features, weights, ranks):
    """Output, gradient of the features and of all parameters, of a sum over the global batch."""
    features = features.clone().requires_grad_()
    out = run(features)
    # The mean over ranks is the global loss, as for every method.
    loss = (out.square() * weights).sum() * ranks
    gradients = torch.autograd.grad(loss, [features, *parameters])
    return [out.detach(), *gradients]


def on_rank(rank, world_size):
    found = []
    for share in SHARES:
        rows = slice(sum(share[:rank]), sum(share[: rank + 1]))
        for last_norm in (False, True):
            mlp, gather = head(last_norm), Gather()
            for step in range(STEPS):
                features, weights = (tensor[rows] for tensor in batch(step))
                seen = values(
                    lambda x, mlp=mlp, gather=gather: mlp(x, gather),
                    in_order(mlp), features, weights, world_size,
                )  # fmt: skip
            found.append((seen, [b for _, b in mlp.named_buffers()]))
    return found


def expected(last_norm):
    reference = of_torch(head(last_norm))
    for step in range(STEPS):
        seen = values(reference, list(reference.parameters()), *batch(step), 1)
    running = [b for n, b in reference.named_buffers() if not n.endswith("tracked")]
    return [tensor.numpy() for tensor in seen], [buffer.numpy() for buffer in running]


def compare(actual, wanted):
    assert len(actual) == len(wanted)
    for number, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11, err_msg=str(number))


@pytest.mark.parametrize("piece", [2**18, 1, 4 * 7])  # all rows at once, one by one, a few
@pytest.mark.parametrize("last_norm", [False, True])
def test_one_rank_equals_torch(last_norm, piece, monkeypatch):
    monkeypatch.setattr(_heads, "PIECE", piece)
    mlp = head(last_norm)
    for step in range(STEPS):
        seen = values(lambda x: mlp(x, Gather()), in_order(mlp), *batch(step), 1)
    wanted, running = expected(last_norm)
    compare([tensor.numpy() for tensor in seen], wanted)
    compare([buffer.numpy() for buffer in mlp.buffers()], running)
    features, _ = batch(9)
    reference = of_torch(mlp).eval()
    torch.testing.assert_close(mlp.eval()(features), reference(features), rtol=1e-12, atol=1e-12)


def test_two_ranks_of_unequal_shares_equal_torch_on_the_whole_batch():
    both = multiprocess.run(on_rank, 2)
    cases = [(share, last_norm) for share in SHARES for last_norm in (False, True)]
    for number, (_, last_norm) in enumerate(cases):
        wanted, running = expected(last_norm)
        (first, ours), (second, others) = (found[number] for found in both)
        for buffer, other, reference in zip(ours, others, running, strict=True):
            np.testing.assert_array_equal(buffer, other)
            np.testing.assert_allclose(buffer, reference, rtol=1e-10)
        compare(np.concatenate([first[0], second[0]]), wanted[0])
        # The engine averages over ranks: parameters directly, features through the towers.
        compare(np.concatenate([first[1], second[1]]) / 2, wanted[1])
        compare([(a + b) / 2 for a, b in zip(first[2:], second[2:], strict=True)], wanted[2:])


def test_statistics_are_float32_whatever_the_features_and_survive_a_large_mean():
    torch.manual_seed(0)
    norm = BatchNormOverRanks(4).bfloat16()
    for name, buffer in list(norm.named_buffers()):  # as DeepSpeed leaves them
        setattr(norm, name, buffer.float())
    x = torch.randn(64, 4)
    out = norm(x.bfloat16(), Gather())
    assert out.dtype == norm.running_var.dtype == torch.float32
    torch.testing.assert_close(out, nn.BatchNorm1d(4)(x.bfloat16().float()), rtol=1e-5, atol=1e-5)
    far = BatchNormOverRanks(4)(x + 1e4, Gather())  # here E[x^2] - E[x]^2 has no digit left
    exact = nn.BatchNorm1d(4).double()((x + 1e4).double())
    torch.testing.assert_close(far.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_graph_holds_one_matrix_of_each_hidden_layer(kind):
    """What its linear layer made of the rows, in the type of the weights; not what came after."""
    mlp, inputs = Mlp([5, 7, 6, 3], last_norm=True).to(kind), []
    for layer in mlp.layers:
        layer.register_forward_hook(
            lambda _layer, given, _out: inputs.append(StorageWeakRef(given[0].untyped_storage()))
        )
    features = torch.randn(11, 5, requires_grad=True)
    out = mlp(features, Gather())
    # Only the features are still there, which bfloat16 has as a copy.
    assert [item.expired() for item in inputs] == [False, True, True]
    # What is computed again is what was there: the gradients are those of torch's layers.
    weights = batch(0)[1]
    (ours,) = torch.autograd.grad((out * weights).sum(), features)
    reference, wide = of_torch(mlp.double()), features.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad((reference(wide) * weights).sum(), wide)
    assert (ours - theirs).norm() < (1e-5 if kind == torch.float32 else 0.05) * theirs.norm()


def test_without_norms_no_ranks_are_needed():
    mlp = Mlp([5, 4, 3], norm=False)
    features = torch.randn(2, 5)
    plain = nn.Sequential(mlp.layers[0], nn.ReLU(), mlp.layers[1])
    assert torch.equal(mlp(features), plain(features))
    assert not list(mlp.buffers())
