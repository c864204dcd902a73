"""What is removed at a time: single weights, blocks, N of M, output channels.

A pattern gathers the scores of a kernel's weights into the scores of its units, which stay or go as a whole, and spreads
the choice of units out over the kernel again.
"""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_qat.weighted import Layout


class _Units:
    """What the patterns of units share: they reach the sparsity that the schedule asks for."""

    def sparsity_at(self, asked):
        return asked


@dataclasses.dataclass(frozen=True)
class Weights(_Units):
    """Every single weight by itself."""

    def unit_scores(self, scores, layout: Layout):
        """The mean score of each unit, in a row."""
        return ops.reshape(scores, (-1,))

    def spread(self, kept, shape, layout: Layout):
        """A mask over the kernel from one over the units."""
        return ops.reshape(kept, shape)

    def unit_sizes(self, shape, layout: Layout) -> np.ndarray:
        """How many weights each unit has."""
        return np.ones(math.prod(shape), "int64")


@dataclasses.dataclass(frozen=True)
class Blocks(_Units):
    """Blocks of `rows` × `columns` in the kernel's last two axes (inputs and outputs), at the rims what is left of one."""

    rows: int
    columns: int

    def __post_init__(self):
        if not all(isinstance(size, int) and size >= 1 for size in (self.rows, self.columns)):
            raise ValueError(f"A block has at least one row and column. Received: {self.rows!r} x {self.columns!r}")

    def unit_scores(self, scores, layout):
        sums = ops.sum(self._blocked(scores), (2, 4))
        return ops.reshape(sums, (-1,)) / ops.cast(self.unit_sizes(scores.shape, layout), scores.dtype)

    def spread(self, kept, shape, layout):
        *_, height, width = shape
        blocks = ops.reshape(kept, (-1, -(-height // self.rows), 1, -(-width // self.columns), 1))
        full = ops.repeat(ops.repeat(blocks, self.rows, axis=2), self.columns, axis=4)
        full = ops.reshape(full, (-1, full.shape[1] * self.rows, full.shape[3] * self.columns))
        return ops.reshape(full[:, :height, :width], shape)

    def unit_sizes(self, shape, layout):
        *matrices, height, width = shape
        one = np.outer(_cut(height, self.rows), _cut(width, self.columns))
        return np.tile(np.ravel(one), math.prod(matrices))

    def _blocked(self, values):
        """As (matrices, blocks down, rows, blocks across, columns), filled up with zeros."""
        *_, height, width = values.shape
        down, across = -(-height // self.rows), -(-width // self.columns)
        values = ops.reshape(values, (-1, height, width))
        values = ops.pad(values, [[0, 0], [0, down * self.rows - height], [0, across * self.columns - width]])
        return ops.reshape(values, (-1, down, self.rows, across, self.columns))


def _cut(length, size) -> np.ndarray:
    """The lengths of the pieces, the last one perhaps shorter."""
    return np.minimum(size, length - np.arange(0, length, size))


@dataclasses.dataclass(frozen=True)
class Channels(_Units):
    """Whole output channels, with their biases and the batch norm behind them: nothing is left of such a channel.

    Channels that an addition ties together (those of all layers that end in one residual stream) go together, by the mean
    score of all of their weights: alone none of them could be taken out of the model. (In a float model; a QAT model is not
    made smaller, and layers with different rules choose for themselves.)
    """

    def unit_scores(self, scores, layout):
        return ops.reshape(ops.mean(scores, _shared_axes(scores.shape, layout)), (-1,))

    def spread(self, kept, shape, layout):
        shared = _shared_axes(shape, layout)
        return ops.broadcast_to(ops.reshape(kept, [1 if axis in shared else n for axis, n in enumerate(shape)]), shape)

    def unit_sizes(self, shape, layout):
        shared = _shared_axes(shape, layout)
        size = math.prod(shape[axis] for axis in shared)
        return np.full(math.prod(shape) // size, size, "int64")


def _shared_axes(shape, layout) -> list[int]:
    channels = {axis % len(shape) for axis in layout.channels}
    return [axis for axis in range(len(shape)) if axis not in channels]


@dataclasses.dataclass(frozen=True)
class NofM:
    """`n` of every `m` weights in a row survive, along the axis that TFLite's kernels read (the inputs of a channel).

    `NofM(2, 4)` is what is known as 2:4. On the way to its sparsity `1 - n/m` more of the m survive; a row whose length m
    does not divide ends in a shorter group, of which n survive, too.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self):
        if not (isinstance(self.n, int) and isinstance(self.m, int) and 1 <= self.n < self.m):
            raise ValueError(f"NofM keeps n of m, 1 <= n < m. Received: n={self.n!r}, m={self.m!r}")

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def sparsity_at(self, asked):
        """Whole weights of m: what becomes of a sparsity of the schedule."""
        return ops.cast(self._removed(asked), "float32") / self.m

    def _removed(self, sparsity):
        return ops.minimum(ops.cast(ops.round(sparsity * self.m), "int32"), self.m - self.n)

    def mask(self, scores, sparsity, layout: Layout):
        """The mask at a sparsity of the schedule."""
        rows = ops.moveaxis(scores, layout.inner, -1)
        *around, length = rows.shape
        groups = -(-length // self.m)
        rows = ops.reshape(rows, (-1, length))
        rows = ops.pad(rows, [[0, 0], [0, groups * self.m - length]], constant_values=-np.inf)
        rows = ops.reshape(rows, (-1, self.m))
        kept = ops.argsort(ops.argsort(-rows)) < self.m - self._removed(sparsity)
        kept = ops.reshape(ops.reshape(kept, (-1, groups * self.m))[:, :length], (*around, length))
        return ops.moveaxis(kept, -1, layout.inner)


Pattern = Weights | Blocks | Channels | NofM


def mask_in_weights(pattern: Pattern, weights, layout: Layout):
    """The mask that a pruned kernel itself shows: a unit is gone if all of it is zero."""
    alive = ops.not_equal(weights, 0)
    if isinstance(pattern, NofM):
        return alive
    units = pattern.unit_scores(ops.cast(alive, "float32"), layout)
    return pattern.spread(units > 0, weights.shape, layout)
