import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.step_time.least_squares import non_negative_least_squares


def brute_force(matrix: np.ndarray, target: np.ndarray) -> float:
    """The least error over every set of columns whose free fit is not negative."""
    best = float(np.linalg.norm(target))
    for size in range(1, matrix.shape[1] + 1):
        for chosen in itertools.combinations(range(matrix.shape[1]), size):
            columns = matrix[:, chosen]
            x = np.linalg.lstsq(columns, target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(columns @ x - target)))
    return best


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_rows=st.integers(1, 12),
    num_columns=st.integers(1, 6),
    exponent=st.integers(-9, 3),
)
def test_no_choice_of_columns_does_better(seed: int, num_rows: int, num_columns: int, exponent: int):
    """Columns of very different size, as tokens beside squared tokens are."""
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(num_rows, num_columns))
    matrix[:, -1] *= 10.0**exponent
    target = random.normal(size=num_rows)
    x = non_negative_least_squares(matrix, target)
    assert (x >= 0).all()
    assert np.linalg.norm(matrix @ x - target) <= brute_force(matrix, target) * (1 + 1e-7) + 1e-9


def test_repeated_and_empty_columns_are_no_trouble():
    column = np.array([1.0, 2.0, 3.0])
    matrix = np.column_stack([column, column, np.zeros(3)])
    x = non_negative_least_squares(matrix, 4 * column)
    assert x[0] + x[1] == pytest.approx(4)
    assert x[2] == 0


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="not a finite number"):
        non_negative_least_squares(np.array([[np.nan]]), np.array([1.0]))
    with pytest.raises(ValueError, match=r"shape \(1, 1\)"):
        non_negative_least_squares(np.array([[1.0]]), np.array([1.0, 2.0]))
