"""95% intervals by bootstrap over clusters (all questions about one picture stay together)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 1000


def interval(
    values: np.ndarray, clusters: Sequence[int], statistic: Callable[[np.ndarray], float] | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of a statistic over resampled clusters.

    Args:
      values: float [n] or [n, k], one row an item.
      clusters: [n], which picture each item is about.
      statistic: of the column sums [k + 1] (the last one is the number of items); default: the mean of one column.
    """
    values = np.asarray(values, float).reshape(len(values), -1)
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((index.max() + 1, values.shape[1] + 1))
    np.add.at(sums, index, np.column_stack([values, np.ones(len(values))]))
    statistic = statistic or (lambda total: total[0] / total[-1])
    rng = np.random.default_rng(seed)
    draws = [statistic(sums[rng.integers(len(sums), size=len(sums))].sum(0)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
