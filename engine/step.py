"""One optimizer step on the global batch: in one piece, or by exact gradient caching.

With K micro-batches per rank the step is not K small contrastive losses. All features are first
computed without a graph, the loss of the whole batch gives the gradient of each feature, and each
micro-batch is then encoded again with a graph, through which its cached gradient goes back (Gao et
al., GradCache, arXiv 2101.06983). The update equals that of one large batch. Two details decide
this: DeepSpeed must not divide by K (`scale_wrt_gas=False`), and the second encoding must see the
same random numbers, which it does because they are a function of (seed, step, rank, micro-batch).

The first micro-batches keep their graphs and are not encoded again: with k of K kept, K - k
forward passes are repeated. One graph is always kept, because it takes no more memory than the
graphs that the second encoding makes one by one; a memory budget allows more. These micro-batches
are encoded after all others, so that their graphs wait for nothing but the loss, and they are the
first whose graphs are freed.

A teacher's targets are computed once per micro-batch and join the features before the loss. After
the update its average moves towards the new weights.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from engine.teacher import whole
from losses._gather import Gather
from losses._method import Features, loss_terms

Batch = dict[str, Tensor]


class Stepper:
    """Runs optimizer steps of a DeepSpeed engine over a `TrainModule`.

    Args:
        engine: the DeepSpeed engine; its accumulation steps are the number of micro-batches.
        gather: the ranks that share the global batch.
        seed: the seed of the run; the random numbers of a step depend on it, the step, the rank and
            the micro-batch.
        graph_bytes: memory of a rank for the graphs of micro-batches that are not encoded again;
            one is kept in any case.
    """

    def __init__(self, engine, gather: Gather, seed: int, graph_bytes: int = 0):
        self.engine, self.gather, self.seed = engine, gather, seed
        self.graph_bytes = graph_bytes
        self.kept: int | None = None  # how many graphs to keep; the first micro-batch decides

    def __call__(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """One update.

        Args:
            step: number of the step, from 0.
            micro_batches: this rank's share, with normalised images on the device.

        Returns:
            What the method's `loss` returned, without gradient, and `loss`, the sum of its
            `*_loss` items: the mean over ranks is the global loss.
        """
        run = self._whole if len(micro_batches) == 1 else self._cached
        out = run(step, micro_batches)
        module = self.engine.module
        module.method.step_end()
        if module.teacher is not None:
            module.teacher.update(module, module.method.decay(step))
        return {key: value.detach() for key, value in out.items()}

    def _whole(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        self._seed(step, 0)
        out = self.engine(micro_batches[0], self.gather)
        out["loss"] = total_loss(out)
        self.engine.backward(out["loss"])
        self.engine.step()
        return out

    def _cached(self, step: int, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        encoded = self._encode(step, micro_batches)
        features = [{key: value.detach() for key, value in item.items()} for item in encoded]
        targets = [self.engine.module.targets(batch) for batch in micro_batches]
        out, gradients, of_parameters = self._loss_gradients(features, targets, micro_batches)
        for number, batch in enumerate(micro_batches):
            again, encoded[number] = encoded[number], None  # its backward pass frees its graph
            if number >= self.kept:
                self._seed(step, number)
                again = self.engine(batch)
            surrogate = sum((again[key] * grads[number]).sum() for key, grads in gradients.items())
            if number == 0:  # parameters that the loss itself uses get their gradient once
                surrogate = surrogate + surrogate_of_parameters(of_parameters)
            self.engine.backward(surrogate, scale_wrt_gas=False)
            self.engine.step()
            del again, surrogate
        return out

    def _encode(self, step: int, micro_batches: Sequence[Batch]) -> list[Features]:
        """Features of all micro-batches; those of the first ones have their graphs."""
        pieces = len(micro_batches)
        if self.kept is None:
            self._seed(step, 0)
            with frozen_statistics(self.engine.module):
                self.kept = self._affordable(micro_batches[0], pieces)
        found: list[Features] = [{}] * pieces
        for number in range(self.kept, pieces):
            self._seed(step, number)
            with torch.no_grad(), frozen_statistics(self.engine.module):
                found[number] = self.engine(micro_batches[number])
        for number in range(self.kept):
            self._seed(step, number)
            found[number] = self.engine(micro_batches[number])
        return found

    def _affordable(self, batch: Batch, pieces: int) -> int:
        """How many of `pieces` graphs the budget holds; ranks agree on the smallest number."""
        if not self.graph_bytes:
            return 1
        size = saved_bytes(lambda: self.engine(batch), self.engine.module)
        mine = max(1, min(pieces, self.graph_bytes // max(size, 1)))
        device = batch["label"].device
        return pieces - int(self.gather.max_(torch.tensor([pieces - mine], device=device)))

    def _loss_gradients(
        self, features: list[Features], targets: list[Features], micro_batches: Sequence[Batch]
    ):
        """The loss on all features, its gradient by feature and micro-batch, and by parameter."""
        whole = _joined(features)
        for value in whole.values():
            value.requires_grad_(value.is_floating_point())
        method, labels = self.engine.module.method, torch.cat([b["label"] for b in micro_batches])
        out = method({**whole, **_joined(targets)}, labels, self.gather)
        out["loss"] = total_loss(out)
        keys = [key for key, value in whole.items() if value.requires_grad]
        parameters = [p for p in method.parameters() if p.requires_grad]
        # torch.autograd.grad instead of backward, because DeepSpeed's hooks must not see this pass.
        grads = torch.autograd.grad(
            out["loss"], [whole[key] for key in keys] + parameters, allow_unused=True
        )
        sizes = [len(b["label"]) for b in micro_batches]
        of_features = {
            key: grad.split(sizes)
            for key, grad in zip(keys, grads, strict=False)
            if grad is not None
        }
        pairs = zip(parameters, grads[len(keys) :], strict=True)
        return out, of_features, [(p, grad) for p, grad in pairs if grad is not None]

    def _seed(self, step: int, micro_batch: int) -> None:
        text = f"{self.seed} {step} {self.gather.rank} {micro_batch}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "big"))


def _joined(pieces: list[Features]) -> Features:
    """Features of several micro-batches as those of one."""
    return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}


def total_loss(out: dict[str, Tensor]) -> Tensor:
    """Sum of the items named `*_loss` that are scalars."""
    return sum(loss_terms(out).values())


def surrogate_of_parameters(pairs: list[tuple[nn.Parameter, Tensor]]) -> Tensor | int:
    """A scalar whose gradient by each parameter is the tensor beside it; collective under ZeRO-3.

    There the pass that found the gradients has let go of parameters that a method holds itself,
    not a layer of it: they are empty now, and an empty product would lose their gradient.
    """
    with whole([p for p, grad in pairs if p.shape != grad.shape]):
        return sum((p * grad).sum() for p, grad in pairs)


def saved_bytes(run: Callable[[], object], module: nn.Module) -> int:
    """Bytes that the graph of `run()` holds for its backward pass, without weights; each storage
    counts once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}
    held = []  # keeps every storage alive until the end, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(seen.values())


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are during a forward pass that is repeated
    later. Those in evaluation mode, as a teacher's, do not move anyway."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in module.modules() if isinstance(m, kind) and m.training]
    counted = [norm for norm in norms if norm.num_batches_tracked is not None]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in counted]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for norm, count in zip(counted, counts, strict=True):
        norm.num_batches_tracked.copy_(count)
