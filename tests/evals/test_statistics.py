"""Intervals: they cover the truth as often as they say, they are repeatable, and clusters widen them."""

import numpy as np
import pytest

from vlkd_jax.evals import statistics
from vlkd_jax.evals.statistics import interval


def simulate(rng, pictures=80):
    """Right and wrong answers about pictures that are easy or hard: (values, clusters); the true mean is 0.5."""
    sizes = rng.integers(1, 6, pictures)
    clusters = np.repeat(np.arange(pictures), sizes)
    chance = rng.choice([0.1, 0.9], pictures)
    return (rng.random(len(clusters)) < chance[clusters]).astype(float), clusters


def test_coverage_on_clustered_data(rng, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    clustered, alone = [], []
    for _ in range(150):
        values, clusters = simulate(rng)
        for bounds, groups in ((clustered, clusters), (alone, np.arange(len(values)))):
            low, high = interval(values, groups)
            bounds.append(low <= 0.5 <= high)
    assert 0.89 <= np.mean(clustered) <= 0.99
    assert np.mean(alone) < np.mean(clustered) - 0.08  # what comes of taking the questions for independent


def test_the_mean_lies_inside_and_the_result_is_repeatable(rng):
    values, clusters = simulate(rng)
    low, high = interval(values, clusters)
    assert low < values.mean() < high
    assert interval(values, clusters) == (low, high)
    assert interval(values, clusters, seed=1) != (low, high)
    assert all(type(bound) is float for bound in (low, high))


def test_names_of_clusters_and_order_of_items_do_not_matter(rng):
    values, clusters = simulate(rng)
    order = np.argsort(clusters, kind="stable")
    shuffled = rng.permutation(len(values))
    expected = interval(values[order], clusters[order])
    assert interval(values[shuffled], clusters[shuffled]) == pytest.approx(expected)
    assert interval(values, 1000 + 7 * clusters) == pytest.approx(expected)


def test_clusters_of_one_agree_with_the_normal_interval(rng):
    values = rng.random(500)
    low, high = interval(values, range(500))
    half = 1.96 * values.std() / np.sqrt(500)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_a_statistic_of_several_columns(rng):
    columns = rng.integers(1, 5, (60, 2)).astype(float)
    low, high = interval(columns, range(60), lambda total: total[0] / total[1])
    assert low < columns[:, 0].sum() / columns[:, 1].sum() < high
    counted = interval(columns, range(60), lambda total: total[-1])
    assert counted == (60, 60)


def test_no_variation_gives_a_point():
    assert interval(np.ones(10), range(10)) == (1, 1)
    assert interval(np.array([0.0, 1.0]), [4, 4]) == (0.5, 0.5)
