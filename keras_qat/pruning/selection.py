"""Which units stay: exact counts, whatever ties there are, within one kernel or over many."""

import math

import numpy as np
from keras import ops


def keep_count(units: int, sparsity):
    """`max(round(units · (1 - sparsity)), 1)`, halves to even, as tfmot counts."""
    kept = ops.round(units * (1.0 - ops.cast(sparsity, "float32")))
    return ops.maximum(ops.cast(kept, "int64"), 1)


def largest(scores, count):
    """A mask over the `count` largest of a row of scores; of equal ones the first."""
    order = ops.argsort(-scores)
    return _unsorted(ops.arange(scores.shape[0]) < ops.cast(count, "int32"), order)


def largest_of_all(unit_scores: list, unit_sizes: list[np.ndarray], sparsity, floor: float) -> list:
    """One ranking over the units of many kernels: the lowest scores go until the share `sparsity` of all weights is gone.

    Args:
        unit_scores: A row of scores for each kernel.
        unit_sizes: How many weights each unit has.
        sparsity: Of all kernels together.
        floor: The share of each kernel's units that stays in any case, at least one unit.

    Returns:
        A mask over the units for each kernel.
    """
    floors = [max(math.ceil(floor * len(sizes)), 1) for sizes in unit_sizes]
    safe = [ops.where(largest(row, count), np.inf, row) for row, count in zip(unit_scores, floors, strict=True)]
    scores, sizes = ops.concatenate(safe), np.concatenate(unit_sizes)
    order = ops.argsort(scores)
    total = int(sizes.sum())
    budget = total - keep_count(total, sparsity)
    gone = ops.logical_and(
        ops.cumsum(ops.take(ops.convert_to_tensor(sizes), order)) <= budget, ops.take(scores, order) < np.inf
    )
    kept = ops.logical_not(_unsorted(gone, order))
    return ops.split(kept, np.cumsum([len(sizes) for sizes in unit_sizes])[:-1].tolist())


def _unsorted(values, order):
    """`values`, which belong to the places that `order` names, in their places."""
    return ops.scatter(order[:, None], values, values.shape)
