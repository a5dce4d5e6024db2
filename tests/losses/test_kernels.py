"""The Triton kernels against whole matrices in float64, on a CPU.

Triton's interpreter runs the kernels on tensors of a CPU, if it is switched on before Triton is
imported: this file, run as a module, works through all cases in one process of its own and prints
their errors. The interpreter multiplies exactly, and it cuts a bfloat16 off where a GPU rounds it.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from losses import _block, _classes, _core
from losses._gather import Gather

pytest.importorskip("triton")

from losses import _kernels, _kernels_classes

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Case:
    """One block: what `KernelTiles` gets, and constants of `losses._kernels` that cut it smaller.

    Attributes:
        kind: "bfloat16" or "float32".
        excluded: "" nothing, "pairs", or all pairs of some "rows", some "columns" or of "all".
    """

    n: int
    m: int
    width: int
    scale: float
    kind: str
    excluded: str = ""
    bias: float = -10.0
    constants: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        words = [self.kind, f"{self.n}x{self.m}x{self.width}", f"scale{self.scale:g}"]
        words += [self.excluded] if self.excluded else []
        return "-".join([*words, *(name for name, _ in self.constants)])


KINDS = ("bfloat16", "float32")
# Several slabs of 48 rows, of few columns where they have a scratch, and walks over many blocks.
SLABS = (("SLAB", 48), ("SCRATCH", 48 * 72 * 4), ("WALKS", 1))
CASES = [
    *(Case(70, 131, 24, 14.3, kind, "pairs") for kind in KINDS),
    *(Case(100, 170, 6, 100.0, kind, "pairs", constants=SLABS) for kind in KINDS),
    Case(1, 5, 1, 400.0, "bfloat16", bias=0.0),
    Case(1, 5, 1, 400.0, "float32", "all"),
    Case(130, 1, 130, 100.0, "bfloat16", "columns"),
    Case(130, 1, 130, 100.0, "float32", "rows", bias=3.0),
    Case(0, 4, 6, 1.0, "bfloat16"),
    Case(4, 0, 6, 1.0, "float32"),
    Case(20, 33, 512, 400.0, "bfloat16", "rows"),
    Case(33, 20, 512, 400.0, "float32", "columns"),
    Case(33, 20, 96, 14.3, "float32", "rows"),
    Case(150, 200, 96, 100.0, "bfloat16", "pairs"),
    Case(140, 150, 96, 1.0, "float32"),
]
# In the interpreter G loses up to 2^-7 of each number. Float32 has 3e-5 between numbers of 400.
GRADIENT = {"bfloat16": 2.0**-7, "float32": 4e-5}
NORMALISER = 6e-5


@pytest.fixture(scope="module")
def found():
    """What `measure` and the others below return, by the name of the case."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.losses.test_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_dense_float64(found, case):
    errors = found[case.name]
    assert (errors.pop("empty") > 0) == (case.excluded in ("rows", "columns", "all"))
    for name, error in errors.items():
        bound = GRADIENT[case.kind] if "gradient" in name else NORMALISER
        assert error <= (1e-6 if name == "softplus" else bound), (name, error)


@pytest.mark.parametrize("result", ["contrast", "normalisers", "sigmoid_sum"])
def test_the_core_is_the_same_on_tiles_and_on_kernels(found, result):
    errors = found[result]
    assert errors.pop("blocks") == 1
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_sums_by_class_equal_dense_float64(found, kind):
    errors = found["classes"][kind]
    assert errors.pop("ids") == 0
    assert errors.pop("counts") == 0
    assert max(errors.values()) < 2e-6, errors


def test_gradients_of_bfloat16_are_no_worse_than_those_of_a_dense_loss(found):
    assert found["accuracy"]["kernels"] <= found["accuracy"]["dense"]


def test_nan_reaches_the_normalisers(found):
    assert found["nan"] == {"rows": 1, "columns": 5}


def test_a_row_without_pairs_in_a_block_keeps_those_far_below(found):
    assert found["far_below"]["error"] < 1e-5


def test_slabs_cover_a_million_rows_within_the_scratch():
    x = torch.empty((2**20, 1024), dtype=torch.bfloat16, device="meta")
    tiles = _kernels.KernelTiles(x, x[: 2**20 - 3], torch.empty((), device="meta"))
    slabs = list(tiles._slabs(weights=True))
    assert sum(slab.n * slab.m for slab in slabs) == len(tiles.x) * len(tiles.y)
    assert len({(slab.rows.start, slab.columns.start) for slab in slabs}) == len(slabs)
    for slab in slabs:
        made = slab.products, slab.weights
        assert sum(part.untyped_storage().nbytes() for part in made) <= _kernels.SCRATCH
    # What the forward pass keeps for the columns, see the module.
    assert 4 * slabs[0].blocks(_kernels.SUMS)[0] * len(tiles.y) <= 256 * 2**20


def test_types_that_no_kernel_takes_are_refused():
    x, half = torch.ones(2, 3), torch.ones(2, 3).half()
    for pair in ((x.double(), x.double()), (half, half), (x, x.bfloat16())):
        with pytest.raises(TypeError, match="bfloat16 or float32"):
            _kernels.KernelTiles(*pair, torch.ones(()))


# What runs in the process with the interpreter.


def make_ids(case: Case):
    """Ids that exclude what the case says; None for nothing."""
    sides = [torch.randint(-2, 9, (count,)) for count in (case.n, case.m)]
    # Far beyond 32 bits, and equal to 7 in their low halves.
    sides = [torch.where(side == 8, 2**32 + 7, side) for side in sides]
    if case.excluded in ("rows", "all"):
        sides[1][:] = 7
        sides[0][: 1 + case.n // 10] = 7
    if case.excluded in ("columns", "all"):
        sides[0][:] = 7
        sides[1][: 1 + case.m // 10] = 7
    if case.excluded == "rows":
        sides[0][-1] = -1
    return tuple(sides) if case.excluded else None


def make(case: Case):
    """KernelTiles of the case, its x and y, and its logits in float64, -inf where excluded."""
    for name, value in case.constants:
        setattr(_kernels, name, value)
    dtype = torch.bfloat16 if case.kind == "bfloat16" else torch.float32
    torch.manual_seed(case.n + case.m)
    x, y = (F.normalize(torch.randn(k, case.width), dim=1).to(dtype) for k in (case.n, case.m))
    logits = case.scale * x.double() @ y.double().T
    ids = make_ids(case)
    if ids is not None:
        out = (ids[0][:, None] == ids[1]) & (ids[0] >= 0)[:, None]
        logits.masked_fill_(out, -math.inf)
    return _kernels.KernelTiles(x, y, torch.tensor(case.scale), ids), x, y, logits


def softmax(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax over `dim`, 0 where everything is -inf; its logarithmic normaliser."""
    if 0 in logits.shape:
        return logits, logits.new_full((logits.shape[1 - dim],), -math.inf)
    normaliser = logits.logsumexp(dim, keepdim=True)
    finite = normaliser.masked_fill(normaliser == -math.inf, 0)
    return (logits - finite).exp(), normaliser.squeeze(dim)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest difference; 0 where both are -inf."""
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    difference = torch.where(actual == expected.float(), 0.0, (actual.double() - expected).abs())
    return max(difference.flatten().tolist(), default=0.0)


def gradient_errors(name: str, found: tuple[Tensor, Tensor], weights: Tensor, x, y) -> dict:
    """Errors of G y and G^T x per sum of the sizes of its terms, as rounding G makes them."""
    x, y, sizes = x.double(), y.double(), weights.abs()
    result = {}
    for side, actual, expected, terms in (
        ("x", found[0], weights @ y, sizes @ y.abs()),
        ("y", found[1], weights.T @ x, sizes.T @ x.abs()),
    ):
        largest = max(terms.flatten().tolist(), default=0.0)
        result[f"{name}_gradient_{side}"] = distance(actual, expected) / (largest or 1.0)
    return result


def measure(case: Case) -> dict[str, float]:
    """Errors of all results of the kernels, and how many rows and columns have no pair."""
    tiles, x, y, logits = make(case)
    (by_row, rows), (by_column, columns) = softmax(logits, 1), softmax(logits, 0)
    r, c = tiles.forward()
    result = {"rows": distance(r, rows), "columns": distance(c, columns)}
    g, h = torch.randn(case.n), torch.randn(case.m)
    g[::3], h[1::4] = 0.0, 0.0
    weights = g[:, None].double() * by_row + h.double() * by_column
    # What a loss makes of a normaliser of nothing may be anything.
    g[rows == -math.inf], h[columns == -math.inf] = math.nan, math.inf
    result |= gradient_errors("softmax", tiles.backward(r, c, g, h), weights, x, y)

    bias = torch.tensor(case.bias)
    shifted = logits + case.bias
    total = torch.logaddexp(shifted, torch.zeros_like(shifted)).sum()
    result["softplus"] = distance(tiles.softplus_sum(bias), total) / max(float(total), 1e-9)
    weights = 1 / (1 + (-shifted).exp())
    *gradients, total = tiles.sigmoid_gradients(bias)
    result["sigmoid_gradient_sum"] = distance(total, weights.sum()) / max(float(total), 1e-9)
    result |= gradient_errors("sigmoid", tuple(gradients), weights, x, y)
    empty = int((rows == -math.inf).sum() + (columns == -math.inf).sum())
    return {**result, "empty": empty if logits.numel() else 0}


def core_errors(call) -> dict[str, float]:
    """Differences of results and gradients of the core between its tiles and the kernels.

    Args:
        call: function of (x, y, scale) that returns differentiable results.
    """
    torch.manual_seed(3)
    x, y = (F.normalize(torch.randn(40, 24), dim=1) for _ in range(2))
    leaves = [t.requires_grad_() for t in (x, y, torch.tensor([20.0]))]
    blocks = []

    def on_kernels(x, y, scale, excluded, walk):
        blocks.append(_kernels.KernelTiles(x, y, scale, excluded))
        return blocks[-1]

    runs, chosen = [], _block.backend
    for backend, of_classes in ((chosen, _classes), (on_kernels, _kernels_classes)):
        _block.backend = backend
        _block.of_classes = _core.of_classes = lambda x, chosen=of_classes: chosen
        results = call(*leaves)
        total = sum((result * torch.arange(1, result.numel() + 1)).sum() for result in results)
        runs.append([*results, *torch.autograd.grad(total, leaves)])
    _block.backend = chosen
    _block.of_classes = _core.of_classes = lambda x: _classes
    errors = {
        str(k): distance(b.detach(), a.detach().double()) / float(a.detach().abs().max())
        for k, (a, b) in enumerate(zip(*runs, strict=True))
    }
    return {**errors, "blocks": len(blocks)}


def class_errors(dtype: torch.dtype) -> dict[str, float]:
    """Largest errors of `losses._kernels_classes` over batches that cut its blocks, relative to
    the largest value."""
    worst: dict[str, float] = {}
    # One class of all, more members than a step takes, classes of one, groups of equal captions.
    batches = [
        torch.zeros(37, dtype=torch.int64),
        torch.arange(5),
        torch.full((9,), -1),
        torch.randint(-4, 3, (150,)),
        torch.tensor([2**40, 5, -1, 2**40, -7, -1, -7]),
    ]
    for labels in batches:
        count, width = len(labels), 300 if len(labels) > 100 else 7
        ids, counts = _kernels_classes.numbered(labels)
        same = (labels[:, None] == labels) & (labels != -1) | torch.eye(count, dtype=torch.bool)
        found = {"ids": ((ids[:, None] == ids) != same).sum(), "counts": 0.0}
        found["counts"] = (counts[ids] - same.sum(1)).abs().max() + abs(counts.sum() - count)
        x, table = torch.randn(count, width).to(dtype), torch.randn(count, width)
        weights, scale, grad = torch.randn(count), torch.tensor(3.0), torch.randn(count, width)
        wide, member = x.double(), same.double()
        for name, w in (("means", None), ("weighted", weights)):
            exact = (
                member
                @ (wide if w is None else wide * w.double()[:, None])
                / member.sum(1)[:, None]
            )
            found[name] = _error(_kernels_classes.means(x, ids, counts.clamp(min=1), w)[ids], exact)
        picked = table[ids].double()
        found["dots"] = _error(_kernels_classes.dots(x, table, ids), (wide * picked).sum(1))
        for name, w in (("plain", None), ("all", weights)):
            exact = grad.double() + picked * (1.0 if w is None else w.double()[:, None])
            made, total = _kernels_classes.finish(grad.clone(), scale, x, table, ids, w)
            found[name] = _error(made, 3 * exact)
            found[f"{name}_total"] = abs(float(total - (wide * exact).sum())) / count
        made, total = _kernels_classes.finish(grad.clone(), scale)
        found["scaled"] = _error(made, 3 * grad.double()) + (total is not None)
        worst = {name: max(float(value), worst.get(name, 0.0)) for name, value in found.items()}
    return worst


def _error(found: Tensor, exact: Tensor) -> float:
    assert found.dtype == torch.float32
    return float((found.double() - exact).abs().max() / exact.abs().max())


def accuracy() -> dict[str, float]:
    """Error of the gradient at scale 100, to float64, by kernels and by a dense loss in bfloat16.

    The dense one has what autocast gives: logits of bfloat16 features come out as bfloat16.
    """
    torch.manual_seed(0)
    x, noise = (F.normalize(torch.randn(96, 64), dim=1) for _ in range(2))
    y, scale = F.normalize(0.3 * x + noise, dim=1), torch.tensor(100.0)
    own = torch.arange(96)

    def gradient(x, logits):
        loss = F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)
        return torch.autograd.grad(loss, x)[0]

    exact = x.double().requires_grad_()
    expected = gradient(exact, scale * exact @ y.double().T)
    leaf = x.clone().requires_grad_()
    dense = gradient(leaf, (scale * (leaf.bfloat16() @ y.bfloat16().T)).float())
    tiles = _kernels.KernelTiles(x.bfloat16(), y.bfloat16(), scale)
    ones = torch.full((96,), 1 / 96)
    actual = scale * (tiles.backward(*tiles.forward(), ones, ones)[0] - 2 / 96 * y)
    size = expected.abs().max()
    return {
        "dense": float((dense - expected).abs().max() / size),
        "kernels": float((actual - expected).abs().max() / size),
    }


def count_nan() -> dict[str, int]:
    """Rows and columns whose normaliser is NaN where one row of x (7, D) is."""
    x, y = torch.randn(7, 8), torch.randn(5, 8)
    x[3] = math.nan
    rows, columns = _kernels.KernelTiles(x, y, torch.tensor(10.0)).forward()
    return {"rows": int(rows.isnan().sum()), "columns": int(columns.isnan().sum())}


def far_below() -> dict[str, float]:
    """Error of a row whose pairs of the first block are excluded, and 120 above all its others."""
    _kernels.WALKS = 1
    x, y = torch.ones(2, 1), torch.cat([torch.zeros(64, 1), -torch.ones(36, 1)])
    ids = torch.tensor([7, -1]), torch.tensor([7] * 64 + [-1] * 36)
    rows, _ = _kernels.KernelTiles(x, y, torch.tensor(120.0), ids).forward()
    return {"error": abs(float(rows[0]) - (-120.0 + math.log(36)))}


def measure_all() -> dict[str, dict[str, float]]:
    labels = torch.randint(-1, 5, (40,))
    ids = torch.arange(40), torch.arange(40)
    constants = {name: getattr(_kernels, name) for name in ("SLAB", "SCRATCH", "WALKS")}
    bias = torch.tensor(-3.0)
    result = {
        "contrast": core_errors(lambda x, y, s: [_core.contrast(x, y, labels, s, Gather()).loss]),
        "normalisers": core_errors(lambda x, y, s: _core.normalisers(x, y, s, Gather(), ids)),
        "sigmoid_sum": core_errors(lambda x, y, s: [_core.sigmoid_sum(x, y, s, bias, Gather())]),
        "classes": {str(t).split(".")[1]: class_errors(t) for t in (torch.float32, torch.bfloat16)},
        "accuracy": accuracy(),
        "nan": count_nan(),
        "far_below": far_below(),
    }
    for case in CASES:
        vars(_kernels).update(constants)
        result[case.name] = measure(case)
    return result


if __name__ == "__main__":
    # NumPy, which the interpreter computes with, warns of log(0) and of an overflow to infinity.
    warnings.simplefilter("ignore", RuntimeWarning)
    print(json.dumps(measure_all()))
