"""Validation split and search of the regularisation."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eval import linear_probe
from loaders.errors import DataError


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
