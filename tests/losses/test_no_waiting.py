"""No loss makes the host wait for the device: no operator whose result decides a shape or a branch.

On a CPU such an operator costs nothing, so they are refused by name. The tiles of a CPU, which look
at a maximum, are left out; a GPU has kernels in their place.
"""

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import losses
from losses import _block
from losses._gather import Gather
from losses._tiles import Tiles
from tests.losses.on_ranks import build, leaves_of, make_batch

REFUSED = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_static", "argwhere",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2",
    "masked_select", "masked_scatter", "bincount", "histc", "repeat_interleave",
    "lift_fresh", "lift_fresh_copy",  # a tensor made of Python numbers is copied to the device
}  # fmt: skip
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.item}


class Waits(AssertionError):
    """An operator that waits for the device."""


class NoOperatorWaits(TorchDispatchMode):
    """Refuses the operators of REFUSED, and indices that are masks."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [
            index
            for index in (args[1] if name in ("index", "index_put", "index_put_") else ())
            if index is not None and index.dtype in (torch.bool, torch.uint8)
        ]
        if name in REFUSED or masks:
            raise Waits(f"{function}")
        return function(*args, **(kwargs or {}))


class NoTensorIsRead(TorchFunctionMode):
    """Refuses methods that read a tensor into Python without an operator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in READS:
            raise Waits(f"{function}")
        return function(*args, **(kwargs or {}))


class Unwatched:
    """The tiles of a CPU, outside of the two modes."""

    def __init__(self, x, y, scale, excluded, walk):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            self.tiles = Tiles(x, y, scale, excluded, walk.tile, walk.keep_bytes)

    def __getattr__(self, name):
        def call(*args):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                return getattr(self.tiles, name)(*args)

        return call


@pytest.fixture
def ranks(request, monkeypatch):
    """One process, or rank 0 of a group whose other ranks do not exist."""
    monkeypatch.setattr(_block, "backend", Unwatched)
    if request.param > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    if request.param > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("ranks", [1, 4], indirect=True)  # 4: a grid of 2 x 2
def test_loss_and_gradients(name, ranks):
    leaves, labels = leaves_of(slice(None)), make_batch()[-1]
    method, gather = build(name), Gather(equal_rows=True)
    with NoOperatorWaits(), NoTensorIsRead():
        out = method(leaves, labels, gather)
        loss = sum(value for key, value in out.items() if key.endswith("_loss") and value.ndim == 0)
        loss.backward()
        method.step_end()
    assert any(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize(
    "wait",
    [
        lambda x, labels: x[labels >= 0],
        lambda x, labels: x.index_put((labels >= 0,), x[0]),
        lambda x, labels: torch.unique(labels, return_inverse=True),
        lambda x, labels: labels.max().item(),
        lambda x, labels: bool((labels < 0).any()),
        lambda x, labels: float(x.sum()),
        lambda x, labels: labels.tolist(),
        lambda x, labels: torch.where(labels < 0),
        lambda x, labels: torch.tensor([3.0]),
        lambda x, labels: x.masked_select(labels >= 0),
    ],
)
def test_what_waits_is_refused(wait):
    with pytest.raises(Waits), NoOperatorWaits(), NoTensorIsRead():
        wait(torch.randn(4), torch.tensor([0, -1, 2, 2]))


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_ranks_of_unknown_numbers_of_rows_must_ask(ranks):
    with pytest.raises(Waits), NoOperatorWaits(), NoTensorIsRead():
        losses.build("clip")(leaves_of(slice(None)), make_batch()[-1], Gather())
