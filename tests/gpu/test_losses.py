"""Every method, and the kernels of the loss, on a GPU against float64."""

import pytest
import torch

import losses
from losses._core import contrast
from losses._gather import Gather
from tests.gpu import methods
from tests.losses import dense

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SCALES = (1 / 0.07, 100.0)


@pytest.mark.parametrize("name", losses.names())
def test_method_equals_float64(name, figures):
    loss, gradient = methods.worst(name, CUDA)
    figures |= {"error of the loss": loss, "of a gradient": gradient}
    assert loss < 1e-5
    assert gradient < 1e-3


@pytest.mark.parametrize("name", losses.names())
def test_method_is_finite_in_bfloat16(name, figures):
    """Towers, heads and images in bfloat16, as DeepSpeed has them."""
    exact = methods.passes(name, torch.float64, torch.device("cpu"))
    found = methods.passes(name, torch.bfloat16, CUDA)
    assert found.keys() == exact.keys()
    assert all(bool(value.isfinite().all()) for value in found.values())
    figures["error of the loss"] = abs(float(found["loss"] / exact["loss"]) - 1)
    assert figures["error of the loss"] < 0.1


def features(rows: int, columns: int, width: int) -> list[torch.Tensor]:
    """Unit vectors in float64 on the CPU, the second half near the first."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    count = min(rows, columns)
    y[:count] += x[:count]
    return [torch.nn.functional.normalize(side, dim=1) for side in (x, y)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_contrastive_core_equals_float64_and_is_finite(dtype, scale, figures):
    x, y = features(1500, 1500, 192)
    labels = torch.where(torch.arange(1500) % 2 == 0, torch.arange(1500) % 40, -1)
    sides = [side.to(dtype).double().requires_grad_() for side in (x, y)]  # what the core sees
    expected = dense.unicl(*sides, labels, torch.tensor(scale, dtype=torch.float64))
    expected.backward()
    mine = [side.detach().to(CUDA, dtype).requires_grad_() for side in sides]
    multiplier = torch.tensor([scale], device=CUDA, requires_grad=True)
    loss = contrast(*mine, labels.to(CUDA), multiplier, Gather()).loss
    loss.backward()
    values = [loss, multiplier.grad, *(side.grad for side in mine)]
    assert all(bool(value.isfinite().all()) for value in values)
    errors = [
        float((a.grad.cpu().double() - b.grad).norm() / b.grad.norm())
        for a, b in zip(mine, sides, strict=True)
    ]
    figures |= {"error of the loss": abs(float(loss) / float(expected) - 1)}
    figures |= {"of a gradient": max(errors)}
    assert figures["error of the loss"] < 1e-3
    assert max(errors) < 2e-2  # bfloat16 products, and gradients of the features' type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_replayed_losses_do_not_disturb_each_other(dtype, figures):
    """Two calls of one shape whose backward passes come later, in the other order and scaled."""
    rows, scale = 700, torch.tensor([20.0], device=CUDA)
    calls = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(-1, 40, (rows,), generator=generator)
        x, y = (
            torch.nn.functional.normalize(
                torch.randn(rows, 96, generator=generator, dtype=torch.float64), dim=1
            )
            for _ in range(2)
        )
        exact = [side.to(dtype).double().requires_grad_() for side in (x, y)]
        dense.unicl(*exact, labels, torch.tensor(20.0, dtype=torch.float64)).backward()
        mine = [side.detach().to(CUDA, dtype).requires_grad_() for side in exact]
        found = contrast(*mine, labels.to(CUDA), scale, Gather())
        calls.append((exact, mine, found, labels))
    for exact, mine, found, labels in reversed(calls):
        (3 * found.loss).backward()
        positives = ((labels[:, None] == labels) & (labels >= 0)).sum(1).clamp(min=1)
        assert torch.equal(found.positives.cpu(), positives)
        assert torch.allclose(found.sample_loss.mean(), found.loss, rtol=1e-5)
        for side, right in zip(mine, exact, strict=True):
            error = float((side.grad.cpu().double() / 3 - right.grad).norm() / right.grad.norm())
            figures["of a gradient"] = max(error, figures.get("of a gradient", 0.0))
    assert figures["of a gradient"] < 1e-2


# Rows and columns of whole blocks, of parts of them, and of more than one slab; narrow and wide.
SHAPES = ((64, 64, 64), (257, 129, 96), (1000, 3000, 512), (9000, 520, 256), (300, 300, 1024))


def masked(x, y, scale, excluded):
    """S in float64, -inf where a pair is left out."""
    logits = scale * x @ y.t()
    if excluded is not None:
        rows, columns = excluded
        logits = logits.masked_fill(
            (rows[:, None] == columns[None]) & (rows[:, None] >= 0), -torch.inf
        )
    return logits


@pytest.mark.parametrize("excluding", [False, True], ids=["all", "excluding"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_kernels_equal_float64(products, shape, excluding, figures):
    kernels = pytest.importorskip("losses._kernels")
    rows, columns, _ = shape
    x, y = (side.to(products).double() for side in features(*shape))
    scale = torch.tensor(20.0, dtype=torch.float64)
    excluded = None
    if excluding:
        excluded = (torch.arange(rows) % 7, torch.arange(columns) % 11 - 1)
    logits = masked(x, y, scale, excluded)
    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    generator = torch.Generator().manual_seed(1)
    g, h = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (rows, columns))
    weights = g[:, None] * (logits - row_lse[:, None]).exp()
    weights += h[None] * (logits - column_lse[None]).exp()

    moved = [x.to(CUDA, products), y.to(CUDA, products), scale.to(CUDA, torch.float32)]
    ids = excluded and tuple(side.to(CUDA) for side in excluded)
    tiles = kernels.KernelTiles(*moved, ids)
    found = tiles.forward()
    gradients = tiles.backward(*found, g.to(CUDA, torch.float32), h.to(CUDA, torch.float32))
    assert torch.equal(found[0], tiles.forward()[0]), "equal to the last bit from call to call"
    for name, value, exact in (
        ("row normalisers", found[0], row_lse), ("column normalisers", found[1], column_lse),
    ):  # fmt: skip
        figures[name] = float((value.double().cpu() - exact).abs().max())
        assert figures[name] < 2e-2  # TF32 products; bfloat16 ones are exact
    for name, value, exact in zip(
        ("of x", "of y"), gradients, (weights @ y, weights.t() @ x), strict=True
    ):
        figures[name] = float((value.double().cpu() - exact).norm() / exact.norm())
        assert figures[name] < 2e-2


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_sigmoid_kernels_equal_float64(products, figures):
    kernels = pytest.importorskip("losses._kernels")
    x, y = (side.to(products).double() for side in features(500, 700, 256))
    scale, bias = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    logits = scale * x @ y.t() + bias
    weights = logits.sigmoid()
    moved = [x.to(CUDA, products), y.to(CUDA, products), scale.to(CUDA, torch.float32)]
    tiles = kernels.KernelTiles(*moved)
    offset = bias.to(CUDA, torch.float32)
    total = float(tiles.softplus_sum(offset))
    exact = torch.nn.functional.softplus(logits).sum()
    figures["sum"] = abs(total / float(exact) - 1)
    assert figures["sum"] < 1e-2
    wanted = (weights @ y, weights.t() @ x, weights.sum())
    for name, value, right in zip(
        ("of x", "of y", "of the bias"), tiles.sigmoid_gradients(offset), wanted, strict=True
    ):
        figures[name] = float((value.double().cpu() - right).norm() / right.norm())
        assert figures[name] < 2e-2
