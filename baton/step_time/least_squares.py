"""Least squares with coefficients that must not be negative.

Lawson and Hanson's active-set method (Solving Least Squares Problems, 1974, chapter 23): coefficients
enter one at a time where that helps most, and leave when the free fit would make them negative.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def non_negative_least_squares(matrix: Array, target: Array) -> Array:
    """The x >= 0 that makes |matrix @ x - target| least. Columns may differ in size by any factor;
    a column of zeros gets 0. Raises ValueError for shapes that do not match or numbers that are none."""
    if matrix.ndim != 2 or target.shape != (matrix.shape[0],):
        raise ValueError(f"a matrix of shape {matrix.shape} does not go with a target of {target.shape}")
    if not (np.isfinite(matrix).all() and np.isfinite(target).all()):
        raise ValueError("a measurement is not a finite number")
    sizes = np.linalg.norm(matrix, axis=0)
    scaled = matrix / np.where(sizes > 0, sizes, 1.0)
    num_columns = matrix.shape[1]
    x = np.zeros(num_columns)
    is_free = np.zeros(num_columns, dtype=bool)
    tolerance = 1e-12 * max(1.0, float(np.linalg.norm(target)))
    for _ in range(10 * num_columns):
        gradient = scaled.T @ (target - scaled @ x)
        gradient[is_free | (sizes == 0)] = -np.inf
        entering = int(np.argmax(gradient))
        if gradient[entering] <= tolerance:
            break
        is_free[entering] = True
        while True:
            free_x = np.zeros(num_columns)
            free_x[is_free] = np.linalg.lstsq(scaled[:, is_free], target, rcond=None)[0]
            is_blocked = is_free & (free_x <= 0)
            if not is_blocked.any():
                x = free_x
                break
            # Go towards the free fit until the first coefficient reaches zero, and hold it there.
            steps = x[is_blocked] / (x[is_blocked] - free_x[is_blocked])
            x = x + float(steps.min()) * (free_x - x)
            is_free &= x > 1e-15
            x[~is_free] = 0.0
            if not is_free.any():
                break
    result: Array = x / np.where(sizes > 0, sizes, 1.0)
    return result
