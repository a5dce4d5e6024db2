"""ALIP: its worked values, dense sums over samples, CLIP as its special case, and its memory."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

import losses
from engine import config
from loaders.errors import ConfigError
from losses._gather import Gather
from losses.alip import GATES, gate_weights
from tests.losses import virtual
from tests.losses.small import leaves

NAMES = ("image", "caption", "synthetic")


def build(histories=(1, 1, 1), **options):
    method = losses.build("alip", options).double()
    for gate, value in zip(GATES, histories, strict=True):
        getattr(method, f"history_{gate}").fill_(value)
    return method


def histories_of(method):
    return [getattr(method, f"history_{gate}").item() for gate in GATES]


def total(out):
    return out["caption_loss"] + out["synthetic_loss"]


def numbers(values):
    return torch.as_tensor(values, dtype=torch.float64)


def directions(*degrees):
    angles = numbers(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def worked(scale=1.0):
    """Three samples in the plane."""
    return {
        "image": directions(0, 90, 180), "caption": directions(10, 60, 270),
        "synthetic": directions(5, 100, 170), "scale": torch.full((3,), scale).double(),
    }  # fmt: skip


def run(method, features):
    return method(features, torch.zeros(len(features["image"]), dtype=torch.int64), Gather())


def close(found, expected):
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=0, atol=2e-10)


def test_worked_values_from_the_start():
    method = build()
    out = run(method, worked())
    close(histories_of(method), [0.9952953032, 0.9961694439, 0.9998860340])
    close(out["caption_loss"], 0.2897781439925738)
    close(out["synthetic_loss"], 0.26866595797954806)
    close(out["sample_loss"].mean(), 0.5584441019721218)
    language = numbers([1, 0.6322301940, 0.0965313974])
    of_caption = language * numbers([1, 0.7708294931, 0.1363760838])
    of_synthetic = language * numbers([1, 0.9702936105, 0.9702936105])
    caption = numbers([0.5738283397, 0.5854941796, 0.7725563511])
    synthetic = numbers([0.4008688519, 0.5902748553, 0.4593615872])
    close(out["sample_loss"], of_caption * caption + of_synthetic * synthetic)
    close(out["caption_weight"], of_caption.mean())
    close(out["synthetic_weight"], of_synthetic.mean())
    close(total(run(build(), worked(1 / 0.07))), 0.002128950485934018)


def test_worked_values_with_histories():
    """A weight above 1 takes a sample whose texts disagree and whose image agrees with one."""
    method = build((0.5, 0.6, 0.7))
    close(total(run(method, worked())), 0.8068734000898852)
    close(histories_of(method), [0.5002953032, 0.6001694439, 0.7028860340])
    x, t, c, _ = worked().values()
    cosines = torch.stack([(t * c).sum(1), (x * t).sum(1), (x * c).sum(1)])
    found = gate_weights(cosines, numbers(histories_of(method)), 2.0, 2.0)
    language = 0.2597886244
    close(found[0], [1, 1, language * 0.3010921582])
    close(found[1], [1, 1, language * 1.7574140486])


def dense_alip(features, histories, language, description, momentum):
    """(loss, histories) sample by sample, the weights Python numbers."""
    x, t, c, scale = (features[name] for name in (*NAMES, "scale"))
    count, scale = len(x), scale[0]
    pairs = zip((t, x, x), (c, t, c), strict=True)
    cosines = [[torch.dot(a, b).item() for a, b in zip(*pair, strict=True)] for pair in pairs]
    histories = [
        momentum * history + (1 - momentum) * sum(values) / count
        for history, values in zip(histories, cosines, strict=True)
    ]
    loss = 0.0
    for i in range(count):
        lead = [values[i] - history for values, history in zip(cosines, histories, strict=True)]
        for text, own in ((t, lead[1]), (c, lead[2])):
            weight = math.exp(language * lead[0] + description * own) if lead[0] < 0 else 1.0
            to_texts = torch.logsumexp(scale * (text @ x[i]), 0)
            to_images = torch.logsumexp(scale * (x @ text[i]), 0)
            half_sum = 0.5 * (to_texts + to_images) - scale * torch.dot(x[i], text[i])
            loss = loss + weight * half_sum / count
    return loss, histories


def case(seed):
    """Features of a random batch, and the method's numbers."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    size = rng.randint(1, 20), rng.choice([2, 6, 16])
    features = {name: F.normalize(torch.randn(size).double(), dim=1) for name in NAMES}
    features["scale"] = torch.full((size[0],), rng.choice([1.0, 14.3, 100.0])).double()
    options = {
        "language": rng.choice([0.0, 0.5, 2.0]), "description": rng.choice([0.0, 2.0, 4.0]),
        "momentum": rng.choice([0.0, 0.5, 0.99]),
    }  # fmt: skip
    return features, [rng.uniform(-0.5, 1) for _ in GATES], options


@pytest.mark.parametrize("block", range(6))
def test_values_and_gradients_equal_dense_float64(block):
    for seed in range(10 * block, 10 * block + 10):
        features, histories, options = case(seed)
        ours, theirs = leaves(features), leaves(features)
        method = build(histories, **options)
        out = run(method, ours)
        expected, moved = dense_alip(theirs, histories, **options)
        torch.testing.assert_close(total(out), expected, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out["sample_loss"].mean(), total(out), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(histories_of(method), moved, rtol=1e-12, atol=1e-12)
        gradients = [
            torch.autograd.grad(value, list(copies.values()))
            for value, copies in ((total(out), ours), (expected, theirs))
        ]
        for name, actual, wanted in zip(ours, *gradients, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11, msg=f"{seed} {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case_of", ["no gates", "equal texts"])
def test_without_gates_and_with_equal_texts_it_is_clip_twice(case_of, dtype):
    """Of equal texts from the first step on every gate is shut, though cosines are rounded."""
    for seed in range(20):
        features = {name: value.to(dtype) for name, value in case(seed)[0].items()}
        method = losses.build("alip").to(dtype)
        if case_of == "no gates":
            method = losses.build("alip", {"language": 0.0, "description": 0.0}).to(dtype)
        else:
            features["synthetic"] = features["caption"]
        for _ in range(3):
            out = run(method, features)
        pairs = [{**features, "text": features[name]} for name in NAMES[1:]]
        clip = sum(run(losses.build("clip"), pair)["contrastive_loss"] for pair in pairs)
        torch.testing.assert_close(total(out), clip, rtol=1e-5, atol=1e-5)
        assert out["caption_weight"] == out["synthetic_weight"] == 1


def test_weights_are_one_exactly_where_the_texts_agree():
    torch.manual_seed(0)
    cosines = torch.rand(3, 500).double() * 2 - 1
    histories = numbers([0.1, 0.2, -0.3])
    language, _ = gate_weights(cosines, histories, 2.0, 0.0)
    weights = gate_weights(cosines, histories, 2.0, 2.0)
    agree = cosines[0] >= 0.1
    assert agree.any()
    assert ((language == 1) == agree).all()
    assert (language > 0).all()
    assert (language <= 1).all()
    for weight in weights:
        assert (weight[agree] == 1).all()
        assert (weight[~agree] / language[~agree]).max() > 1.5


def test_a_mean_approaches_what_stays():
    """After n steps of a constant cosine S a mean is S + (1 - S) 0.99^n."""
    angle = math.degrees(math.acos(0.2))
    features = {
        "image": directions(0, 0), "caption": directions(0, 0),
        "synthetic": directions(angle, angle), "scale": torch.ones(2).double(),
    }  # fmt: skip
    method, expected = build(), {1: 0.992, 10: 0.9235056600070435, 100: 0.4928258730185834}
    for step in range(1, 101):
        run(method, features)
        if step in expected:
            close(histories_of(method), [expected[step], 1, expected[step]])
    kept = {f"history_{gate}": (1,) for gate in GATES}
    assert {name: tuple(value.shape) for name, value in method.state_dict().items()} == kept


def on_rank(rank, features, shares):
    """Two steps of this rank's share; what the method remembers."""
    own, method = slice(sum(shares[:rank]), sum(shares[: rank + 1])), build()
    for _ in range(2):
        mine = {name: value[own] for name, value in features.items()}
        method(mine, torch.zeros(shares[rank], dtype=torch.int64), Gather())
    return histories_of(method)


def test_all_ranks_remember_the_means_of_the_global_batch():
    features, method = case(7)[0], build()
    shares = [1, len(features["image"]) - 3, 2]
    for _ in range(2):
        run(method, features)
    for found in virtual.run(on_rank, 3, features, shares):
        torch.testing.assert_close(found, histories_of(method), rtol=1e-12, atol=1e-12)
    assert len({*histories_of(method), 1.0}) == 4


def test_texts_of_one_source_are_refused():
    path = "configs/quickstart_captions.yaml"
    words = r"data\.caption=txt: loss\.name=alip .*caption: \{from: SOURCE\}, synthetic: \{from: S"
    with pytest.raises(ConfigError, match=words):
        config.load(path, ["loss.name=alip"])
    sources = ["data.caption.caption.from=txt", "data.caption.synthetic.from=json.title"]
    assert config.load(path, ["loss.name=alip", *sources]).loss.name == "alip"


def test_momentum_is_checked():
    with pytest.raises(ValueError, match=r"momentum=1.0 is not in \[0, 1\)"):
        losses.build("alip", {"momentum": 1.0})
