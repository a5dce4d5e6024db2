"""Validation split, search of the regularisation, and the optimum of both regressions."""

import json

import numpy as np
import pytest
import yaml
from scipy import optimize
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression

from eval import linear_probe as command_line
from eval.tasks import linear_probe
from loaders.errors import ConfigError, DataError


def test_validation_is_a_fifth_of_every_class_and_spares_small_ones():
    labels = np.repeat([4, 7, 9, 11], [20, 5, 4, 1])
    held_out = linear_probe.validation_mask(labels)
    assert {c: int(held_out[labels == c].sum()) for c in (4, 7, 9, 11)} == {4: 4, 7: 1, 9: 0, 11: 0}
    np.testing.assert_array_equal(held_out, linear_probe.validation_mask(labels))
    assert (held_out != linear_probe.validation_mask(labels, seed=1)).any()
    with pytest.raises(DataError, match="no class has 5"):
        linear_probe.validation_mask(np.repeat([0, 1], 4))


def test_search_prefers_strong_regularisation_for_noise_and_none_for_separable_data():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    signal = random.normal(size=(120, 20))
    signal[:, 0] += 2.5 * labels
    chosen = linear_probe.search_c(signal, labels)
    held_out = linear_probe.validation_mask(labels)

    def score(c):
        model = linear_probe.probe(c).fit(signal[~held_out], labels[~held_out])
        return model.score(signal[held_out], labels[held_out])

    assert chosen in linear_probe.C_GRID
    assert score(chosen) >= max(score(c) for c in linear_probe.C_GRID[::16])
    assert score(chosen) > score(1e-6) or chosen == 1e-6


def test_probe_standardises_by_the_training_part():
    random = np.random.default_rng(0)
    scale = np.logspace(-2, 2, 6)
    noise = random.normal(size=(200, 6))
    x, y = noise * scale + 3, noise[:, :3].argmax(axis=1)
    new = random.normal(size=(50, 6)) * scale * 2
    standard = LogisticRegression(C=0.05, solver="newton-cholesky", tol=1e-10)
    standard.fit((x - x.mean(axis=0)) / x.std(axis=0), y)
    expected = standard.predict_proba((new - x.mean(axis=0)) / x.std(axis=0))
    got = linear_probe.probe(0.05).fit(x, y).predict_proba(new)
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_clip_probe_is_the_minimum_of_the_penalised_likelihood_of_raw_features():
    random = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 40)
    x = (random.normal(size=(120, 5)) + random.normal(size=(3, 5))[y]) * np.logspace(0, 1, 5) + 2
    c = 0.03
    regression = linear_probe.probe(c, standardise=False).fit(x, y)[-1]

    def objective(flat):
        """C x summed cross-entropy + half the squared weights, the intercepts not penalised."""
        w, b = flat[:15].reshape(3, 5), flat[15:]
        logits = x @ w.T + b
        loss = (logsumexp(logits, axis=1) - logits[np.arange(120), y]).sum()
        residual = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        residual[np.arange(120), y] -= 1
        gradient = np.concatenate([(c * residual.T @ x + w).ravel(), c * residual.sum(axis=0)])
        return c * loss + 0.5 * (w**2).sum(), gradient

    ours = np.concatenate([regression.coef_.ravel(), regression.intercept_])
    start = np.zeros(18)
    best = optimize.minimize(objective, start, jac=True, method="trust-constr", tol=1e-9)
    value, gradient = objective(ours)
    assert value == pytest.approx(best.fun, rel=1e-5)
    assert np.abs(gradient).max() < 1e-3 * np.abs(objective(start)[1]).max()
    # And it is another optimum than that of standardised features.
    scaled = linear_probe.probe(c).fit(x, y).predict_proba(x)
    assert np.abs(scaled - regression.predict_proba(x)).max() > 0.01


def command(world, output, registry, *more):
    """Run `python -m eval.linear_probe` on the toy set and return the rows of all its files."""
    arguments = ["--checkpoint", str(world / "runs/tiny"), "--datasets", "toy_classes"]
    arguments += ["--output", str(output), "--batch-size", "16", "--workers", "0", *more]
    command_line.main(arguments, registry)
    files = sorted(output.glob("*.jsonl"))
    return {
        (row["task"], row["metric"]): row
        for path in files
        for row in map(json.loads, path.read_text().splitlines())
    }


def test_protocols_are_rows_of_their_own(world, tmp_path):
    registry = world / "registry.yaml"
    command(world, tmp_path, registry)
    command(world, tmp_path, registry, "--protocol", "clip")
    rows = command(world, tmp_path, registry, "--protocol", "clip", "--shots", "5", "10")
    clip = rows["linear_probe_clip", "top1"]
    assert "not standardised" in clip["protocol"]
    assert "standardised by the training part" in rows["linear_probe", "top1"]["protocol"]
    for shots in (5, 10):
        task = f"linear_probe_clip_{shots}shot"
        each = [rows[task, f"top1_seed{seed}"]["value"] for seed in (0, 1, 2)]
        assert rows[task, "top1"]["value"] == pytest.approx(np.mean(each))
        assert f"{3 * shots} train, 19 test" in rows[task, "top1"]["protocol"]


def test_clip_protocol_takes_the_validation_split_where_there_is_one(world, tmp_path):
    content = yaml.safe_load((world / "registry.yaml").read_text())
    splits = content["datasets"]["toy_classes"]["splits"]
    splits["val"] = {**splits["test"], "samples": None}
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump(content))
    rows = command(world, tmp_path / "results", registry, "--protocol", "clip")
    protocol = rows["linear_probe_clip", "top1"]["protocol"]
    assert "from the validation split" in protocol
    train = sum(1 for i in range(45) if i % 7)
    assert f"{train + 19} train, 19 test" in protocol
    # C is chosen on the validation part alone: the held-out part of the search is exactly it.
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 4)), np.arange(30) % 3
    held_out = np.arange(30) >= 20
    chosen = linear_probe.search_c(x, y, False, held_out)
    fitted = linear_probe.probe(chosen, False).fit(x[:20], y[:20]).score(x[20:], y[20:])
    for c in linear_probe.C_GRID[::16]:
        other = linear_probe.probe(c, False).fit(x[:20], y[:20]).score(x[20:], y[20:])
        assert fitted >= other


def test_options_that_do_nothing_are_refused(world, tmp_path):
    for flag, value in (("--seeds", "1"), ("--head-init", "text")):
        with pytest.raises(ConfigError, match=flag):
            command(world, tmp_path, world / "registry.yaml", flag, value)
