"""OTTER's targets and loss against the published algorithm as plain sums over probabilities."""

import math
import random
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from engine import config
from loaders.errors import ConfigError
from losses import _transport, otter
from losses._block import WALK, Walk
from losses._gather import Gather
from losses.otter import Config, otter_loss, similarities
from tests.losses import dense, virtual

E4 = (
    torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-0.8, 0.6]], dtype=torch.float64),
    torch.tensor([[0.8, 0.6], [0, 1], [-0.6, 0.8], [-1, 0]], dtype=torch.float64),
)
E3 = tuple(side[:3] for side in E4)
SCALE = math.exp(3.9)  # where both multipliers start


def published(image, text, cfg):
    """M^v and M^t (N, N) as the released program finds them, but for a real mask."""
    found = []
    for first, second in ((image, text), (text, image)):
        likeness = cfg.image_weight * image @ image.T + cfg.text_weight * text @ text.T
        kernel = ((likeness + first @ second.T) / cfg.regularisation).exp()
        kernel.fill_diagonal_(0)
        kernel = kernel / kernel.sum()
        for _ in range(cfg.iterations):
            kernel = kernel / kernel.sum(1, keepdim=True) / len(kernel)
            kernel = kernel / kernel.sum(0, keepdim=True) / len(kernel)
        found.append(kernel / kernel.sum(1, keepdim=True))
    return found


def published_loss(image, text, scale, second, targets, alpha):
    """InfoNCE (C), and KL (D) at the second multiplier; the loss of both forms."""
    pairs, contrastive, divergence, entropy = torch.eye(len(image)).double(), 0, 0, 0
    for target, logits in zip(targets, (image @ text.T, text @ image.T), strict=True):
        contrastive -= (pairs * (scale * logits).log_softmax(1)).sum(1).mean()
        divergence -= (target * (second * logits).log_softmax(1)).sum(1).mean()
        entropy -= (target * target.clamp(min=1e-300).log()).sum(1).mean()
    released = alpha * contrastive + (1 - alpha) * (divergence - entropy)
    return contrastive, divergence - entropy, released, released + (1 - alpha) * entropy


def our_targets(image, text, cfg, gather=None, elements=None, keep=0):
    """M^v, and the columns of M^t, on the rows of this rank."""
    gather = gather or Gather()
    sizes = gather.sizes(len(image), image.device)
    kernel = similarities(image, text, cfg, gather, sizes, keep)
    kernel.height = max(1, (elements or _transport.ELEMENTS) // sum(sizes))
    rows, columns = _transport.potentials(kernel, cfg.iterations, gather)
    logarithm = torch.cat([stripe.clone() for _, stripe in kernel])
    return (logarithm + rows[:, :, None] + columns[:, None]).exp()


def features_of(image, text, scale, teacher=None):
    teacher_image, teacher_text = teacher or (image.detach(), text.detach())
    scale = torch.as_tensor(scale, dtype=torch.float64).expand(len(image))
    return {
        "image": image, "text": text, "scale": scale,
        "teacher_image": teacher_image, "teacher_text": teacher_text,
    }  # fmt: skip


def ours(image, text, scale, second=None, teacher=None, walk=WALK, **options):
    """The paper's form, or with `second` the released one."""
    features = features_of(image, text, scale, teacher)
    if second is not None:
        second = torch.as_tensor(second, dtype=torch.float64)
    return otter_loss(features, Config(**options), Gather(), second, walk)


WORKED = {
    (1.0, 5): (
        [[0, 0.4614969704, 0.5385030296], [0.5398003834, 0, 0.4601996166],
         [0.4585594568, 0.5414405432, 0]],
        [[0, 0.5412369297, 0.4587630703], [0.4601717823, 0, 0.5398282177],
         [0.5386789782, 0.4613210218, 0]],
    ),
    (0.15, 5): (
        [[0, 0.9774420800, 0.0225579200], [0.5027741386, 0, 0.4972258614],
         [0.0009503246, 0.9990496754, 0]],
        [[0, 0.9860739742, 0.0139260258], [0.4632170821, 0, 0.5367829179],
         [0.2301667500, 0.7698332500, 0]],
    ),
    (0.15, 2000): (
        [[0, 0.2560375087, 0.7439624913], [0.7439624913, 0, 0.2560375087],
         [0.2560375087, 0.7439624913, 0]],
        # Converged, the problem and its transpose have one solution.
        [[0, 0.7439624913, 0.2560375087], [0.2560375087, 0, 0.7439624913],
         [0.7439624913, 0.2560375087, 0]],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("regularisation", "iterations"), WORKED)
def test_worked_targets(regularisation, iterations):
    cfg = Config(regularisation=regularisation, iterations=iterations)
    of_images, of_texts = our_targets(*E3, cfg)
    for found, expected in zip(
        (of_images, of_texts.T), WORKED[regularisation, iterations], strict=True
    ):
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.sum(1), torch.ones(3).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("regularisation", "scale", "contrastive", "divergence", "expected"),
    [
        (1.0, 1.0, 1.782338238475, 1.242036943399, 1.512187590937),
        (0.15, SCALE, 11.856867934263, 37.876461488698, 24.866664711481),
    ],
)
def test_worked_values(regularisation, scale, contrastive, divergence, expected):
    for alpha, value in ((0.5, expected), (1.0, contrastive), (0.0, divergence)):
        options = {"regularisation": regularisation, "alpha": alpha}
        loss, each, entropy = ours(*E3, scale, scale, **options)
        assert abs(loss.item() - value) < 1e-11
        assert abs(each.mean().item() - value) < 1e-11
        # The paper's form differs by a constant, both entropies.
        paper, *_ = ours(*E3, scale, **options)
        assert abs(paper.item() - value - (1 - alpha) * 2 * entropy.item()) < 1e-11


def test_the_pair_is_left_out_of_the_rows_of_every_rank():
    """The third and fourth sample, which the second of two ranks holds."""

    def second_rows(rank):
        own = slice(2 * rank, 2 * rank + 2)
        return our_targets(E4[0][own], E4[1][own], Config(), Gather())

    for found in (virtual.run(second_rows, 2)[1], our_targets(*E4, Config())[:, 2:]):
        third = torch.tensor([0, 0.0909, 0, 0.9091]).double()
        torch.testing.assert_close(found[0, 0], third, rtol=0, atol=5e-5)
        assert found[0, 1, 3] == found[1, 1, 3] == 0


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_the_published_algorithm_in_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        size, width = rng.randint(2, 40), rng.choice([2, 5, 16])
        cfg = Config(
            alpha=rng.choice([0.0, 0.3, 0.5, 1.0]),
            regularisation=rng.choice([0.15, 0.5, 1.0, 20.0]),
            iterations=rng.choice([0, 1, 5, 30]),
            image_weight=rng.choice([0.0, 0.7, 1.0]),
            text_weight=rng.choice([0.0, 1.0, 1.3]),
        )
        image, text, *teacher = (
            F.normalize(torch.randn(size, width).double(), dim=1) for _ in range(4)
        )
        scales = torch.tensor([rng.choice([1.0, 14.3, 100.0]), rng.choice([2.0, 49.4])]).double()
        walk = Walk(rng.choice([0, 100, 2**20]), (rng.randint(1, 20), rng.randint(1, 20)))
        targets = published(*teacher, cfg)
        both = our_targets(*teacher, cfg, elements=rng.choice([1, 50, 2**20]), keep=walk.keep_bytes)
        for found, expected in zip((both[0], both[1].T), targets, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
        for released in (False, True):
            leaves, copies = (
                [value.clone().requires_grad_() for value in (image, text, *scales)] for _ in "ab"
            )
            second = leaves[3] if released else None
            features = features_of(*leaves[:3], teacher)
            loss, each, _ = otter_loss(features, cfg, Gather(), second, walk)
            other = copies[3] if released else copies[2]
            *_, of_release, of_paper = published_loss(*copies[:3], other, targets, cfg.alpha)
            expected = of_release if released else of_paper
            torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(each.mean(), expected, rtol=1e-10, atol=1e-11)
            count = 4 if released else 3
            for mine, reference in zip(
                torch.autograd.grad(3 * loss, leaves[:count]),
                torch.autograd.grad(3 * expected, copies[:count]),
                strict=True,
            ):
                torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


def test_belief_in_the_pairs_alone_is_clip_in_both_directions():
    expected = dense.unicl(*E3, torch.full((3,), -1), torch.tensor(2.0).double())
    loss, *_ = ours(*E3, 2.0, alpha=1.0)
    assert abs(loss.item() - 2 * expected.item()) < 1e-12
    assert abs(loss.item() - 2 * 0.806810129068) < 1e-11


def test_without_iterations_it_is_the_softmax_of_the_similarities():
    cfg = Config(iterations=0, regularisation=0.3)
    image, text = E3
    own = torch.eye(3, dtype=torch.bool)
    found = our_targets(*E3, cfg)
    for target, cross in ((found[0], image @ text.T), (found[1].T, text @ image.T)):
        logits = (image @ image.T + text @ text.T + cross) / 0.3
        expected = logits.masked_fill(own, -math.inf).softmax(1)
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-15)


def test_two_samples_are_matched_with_each_other():
    pair = tuple(side[:2] for side in E3)
    swap = torch.tensor([[0, 1], [1, 0]], dtype=torch.float64)
    for found in our_targets(*pair, Config()):
        torch.testing.assert_close(found, swap, rtol=0, atol=1e-15)
    loss, _, entropy = ours(*pair, 1.0, 1.0, alpha=0.0)
    assert abs(loss.item() - 2 * 0.893722219494) < 1e-11
    assert abs(entropy.item()) < 1e-15


def test_strong_regularisation_is_label_smoothing():
    loss, *_ = ours(*E3, 1.0, 1.0, regularisation=1e9)
    smoothed, *_ = ours(*E3, 1.0, regularisation=1e9)
    assert abs(loss.item() - 1.515857724582) < 1e-8
    assert abs(smoothed.item() - 2.209004905142) < 1e-8


def test_equal_embeddings():
    same = F.normalize(torch.ones(3, 4).double(), dim=1)
    loss, *_ = ours(same, same, 7.0, 7.0)
    assert abs(loss.item() - 1.504077396776) < 1e-12  # log 3 + log 1.5


@pytest.mark.parametrize("iterations", [0, 5, 200])
def test_a_likeness_of_the_teacher_raises_its_own_target(iterations):
    torch.manual_seed(0)
    likeness, unit = torch.rand(4, 4).double(), torch.eye(4).double()
    raised = likeness.clone()
    raised[0, 2] += 0.1
    found = []
    for matrix in (likeness, raised):
        kernel = _transport.Kernel(matrix, unit, 0, 0)
        rows, columns = _transport.potentials(kernel, iterations, Gather())
        found.append(rows[:, 0] + columns[:, 2] + matrix[0, 2])
    assert (found[1] > found[0]).all()


def test_no_gradient_reaches_the_teacher():
    teacher = [side.clone().requires_grad_() for side in E3]
    image, text = (side.clone().requires_grad_() for side in E3)
    loss, *_ = otter_loss(features_of(image, text, 3.0, teacher), Config(), Gather())
    gradients = torch.autograd.grad(loss, [image, text, *teacher], allow_unused=True)
    assert gradients[2:] == (None, None)
    assert all(gradient.abs().max() > 0 for gradient in gradients[:2])


def test_a_weak_regularisation_in_float32():
    """Similarities over l reach 1,500; their exponentials do not exist in any type."""
    torch.manual_seed(0)
    sides = [F.normalize(torch.randn(30, 8).double(), dim=1) for _ in range(2)]
    cfg = Config(regularisation=0.002)
    exact, found = our_targets(*sides, cfg), our_targets(*(side.float() for side in sides), cfg)
    assert found.dtype == torch.float32
    torch.testing.assert_close(exact[0].sum(1), torch.ones(30).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-2)


def test_no_matrix_of_the_size_of_the_batch_squared(monkeypatch):
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes() // 4)
            return out

    size, width, stripe = 400, 4, 4000
    monkeypatch.setattr(_transport, "ELEMENTS", stripe)
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(size, width), dim=1) for _ in range(2))
    features = features_of(image.requires_grad_(), text.requires_grad_(), 5.0)
    with Watch():
        loss, *_ = otter_loss(features, Config(), Gather(), walk=Walk(0, (50, 50)))
        loss.backward()
    assert 2 * stripe <= largest < size * size / 10


def test_a_batch_of_one_is_refused():
    path = Path(__file__).parents[2] / "configs/quickstart_otter.yaml"
    with pytest.raises(ConfigError, match=r"train\.global_batch=1: .* at least 2"):
        config.load(path, ["train.global_batch=1"])
    alone = tuple(side[:1] for side in E3)
    with pytest.raises(ValueError, match=r"train\.global_batch to at least 2"):
        ours(*alone, 1.0)


def test_the_teacher_moves_as_in_the_released_program():
    """There it moves before a step, for the first time when it equals the student."""
    method = losses.build("otter")
    for number, expected in ((10, 0.55), (100, 0.918182), (1000, 0.991089)):
        assert abs(method.decay(number - 2) - expected) < 5e-7
    assert method.decay(8990 - 2) == method.decay(10**6) == 0.999
    assert method.decay(8980) < 0.999


def test_the_second_multiplier_is_bounded_and_comes_back():
    method = losses.build("otter", {"form": "released"}).double()
    for value, scale in ((3.9, SCALE), (7.0, 100.0), (-2.0, 1.0)):
        method.log_scale.data.fill_(value)
        method.zero_grad()
        expected = ours(*E3, 2.0, scale)[0]
        out = method(features_of(*E3, 2.0), torch.zeros(3, dtype=torch.int64), Gather())
        torch.testing.assert_close(out["contrastive_loss"], expected, rtol=1e-6, atol=0)
        out["contrastive_loss"].backward()
        assert method.log_scale.grad.abs() > 0


@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.5}, {"regularisation": 0.0}, {"iterations": -1}, {"momentum": 2}, {"form": "x"}],
)
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        otter.Config(**options)
