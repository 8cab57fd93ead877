"""Least squares with non-negative coefficients over a stream of measurements, in constant memory.

What is kept are the normal equations' sums, so adding a measurement costs a few multiplications and
no history. Older measurements fade: whenever the sums have grown to twice the window they are
halved. A step cannot get faster by more work, so a coefficient below zero is never the answer: all
subsets of terms are solved (there are at most seven) and the best one without a negative
coefficient wins. Terms are scaled before solving: pairs go into the millions where a base is 1.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt


class RunningFit:
    def __init__(self, num_terms: int, *, window: int = 1024) -> None:
        """`window`: measurements after which an old one counts about half."""
        self._window = window
        self._weight = 0.0
        self._pairs = [(i, j) for i in range(num_terms) for j in range(i, num_terms)]
        self._products = [0.0] * len(self._pairs)
        self._targets = [0.0] * num_terms
        self.num_added = 0

    def add(self, terms: tuple[float, ...], seconds: float) -> None:
        pairs = self._pairs
        self._products = [s + terms[i] * terms[j] for s, (i, j) in zip(self._products, pairs, strict=True)]
        self._targets = [s + term * seconds for s, term in zip(self._targets, terms, strict=True)]
        self._weight += 1.0
        self.num_added += 1
        if self._weight >= 2 * self._window:
            self._weight /= 2
            self._targets = [value / 2 for value in self._targets]
            self._products = [value / 2 for value in self._products]

    def spread(self, term: int) -> float:
        """Standard deviation over mean of a term whose first one is 1. A slope needs some."""
        products = self._matrix()
        total, squares = products[0, term], products[term, term]
        if total <= 0.0:
            return 0.0
        return float(max(0.0, self._weight * squares / total**2 - 1.0) ** 0.5)

    def _matrix(self) -> npt.NDArray[np.float64]:
        matrix = np.zeros((len(self._targets), len(self._targets)))
        for (i, j), value in zip(self._pairs, self._products, strict=True):
            matrix[i, j] = matrix[j, i] = value
        return matrix

    def coefficients(self) -> tuple[float, ...]:
        """One per term, none negative; zeros before the first measurement."""
        products, targets = self._matrix(), np.array(self._targets)
        scale = np.sqrt(np.diag(products))
        used = [i for i in range(len(targets)) if scale[i] > 0.0]
        best, best_gain = np.zeros(len(targets)), 0.0
        for size in range(1, len(used) + 1):
            for subset in map(list, combinations(used, size)):
                scaled = products[np.ix_(subset, subset)] / np.outer(scale[subset], scale[subset])
                right = targets[subset] / scale[subset]
                solution = np.linalg.lstsq(scaled, right, rcond=1e-9)[0]
                if (solution < 0.0).any():
                    continue
                # By how much the squared error falls against "always 0".
                gain = float(2 * solution @ right - solution @ scaled @ solution)
                if gain > best_gain * (1.0 + 1e-12):
                    best_gain = gain
                    best = np.zeros(len(targets))
                    best[subset] = solution / scale[subset]
        return tuple(float(value) for value in best)
