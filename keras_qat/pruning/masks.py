"""The masks of a model while it is pruned: chosen when the schedule says so, enforced after every step."""

import math
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_qat.pruning import criteria
from keras_qat.pruning.patterns import Channels, NofM, mask_in_weights
from keras_qat.pruning.selection import keep_count, largest, largest_of_all
from keras_qat.pruning.targets import Policy, Target
from keras_qat.schedules import Schedule, last_chosen


class Masks:
    """The masks of all targets with the same policy.

    Args:
        policy: The policy.
        schedule: The policy's schedule, in steps.
        targets: What is masked.
        scope: "layer", or "global" for one ranking over all targets.
        floor: The share of each target that a global ranking leaves.
    """

    def __init__(self, policy: Policy, schedule: Schedule, targets: list[Target], scope: str, floor: float):
        self.pattern, self.criterion = policy.pattern, criteria.resolve(policy.criterion)
        self.schedule, self.targets = schedule, targets
        self.global_scope, self.floor = scope == "global" and not isinstance(self.pattern, NofM), floor
        self._groups = _groups(targets)
        self._masks = [_variable(target.variable.shape, "bool", "ones") for target in targets]
        self._of_companions = [[_variable(v.shape, "bool", "ones") for v in target.companions] for target in targets]
        self._pending = _variable((), "bool", "zeros")
        self._scores = []
        if self.criterion.of_step is not None:
            self._scores = [_variable(target.variable.shape, "float32", "zeros") for target in targets]

    def begin(self, step: int, was_pruned: bool) -> None:
        """Where a fit starts: with the zeros that are there if the weights were pruned before, else with all weights.

        Then with what should be gone at this step and is not: at step 0, or if something else trained them in between.
        """
        if was_pruned and step >= self.schedule.begin:
            self._assign([mask_in_weights(self.pattern, t.variable.value, t.layout) for t in self.targets])
        asked = last_chosen(self.schedule, step)
        by_magnitude = [criteria.magnitude(ops.cast(target.variable, "float32")) for target in self.targets]
        missing = _removed(self._best(by_magnitude, asked)) - _removed(self._masks)
        removed, total = self.counts()
        if missing > (0.01 * total if removed else 0):
            if self._scores:
                self._pending.assign(True)  # there are no gradients yet: right after the first step
            else:
                self.choose(asked)

    def scores(self) -> dict:
        """The sums so far, each by what its variable is called."""
        named = [(target.path, target.variable.name) for target in self.targets]
        return dict(zip(named, self._scores, strict=bool(self._scores)))

    def take_scores(self, sums: dict) -> None:
        """Goes on with the sums of an earlier fit, where they are of the same variables."""
        for name, score in self.scores().items():
            if name in sums and sums[name].shape == score.shape:
                score.assign(sums[name])

    def observe(self, gradients: dict) -> None:
        """Adds up the scores of a step. Gradients are known by the ids of their `tf.Variable`s."""
        for target, score in zip(self.targets, self._scores, strict=bool(self._scores)):
            gradient = gradients.get(id(target.variable.value))
            if gradient is not None:
                gradient, weight = (ops.cast(tf.convert_to_tensor(x), "float32") for x in (gradient, target.variable))
                score.assign_add(self.criterion.of_step(gradient, weight))

    def advance(self, step, moved_on) -> None:
        """Chooses anew if it is time to."""
        due = ops.logical_and(moved_on, ops.logical_or(self.schedule.due(step), self._pending.value))
        ops.cond(due, lambda: self.choose(self.schedule(step)), lambda: None)

    def choose(self, sparsity) -> None:
        """Keeps the best of the weights as the optimizer has left them.

        By magnitude a removed weight comes back where the last update alone makes it larger than one that was kept.
        """
        weights = [ops.cast(target.variable, "float32") for target in self.targets]
        scores = self._summed_scores(weights) if self._scores else list(map(self.criterion.of_weight, weights))
        self._assign(self._best(scores, sparsity))
        for score in self._scores if self.criterion.forgets else ():
            score.assign(ops.zeros_like(score))
        self._pending.assign(False)

    def _summed_scores(self, weights) -> list:
        """The sums of steps; for removed weights, of which they say nothing, less than any other and by the last update."""
        lowest = ops.min(ops.stack([ops.min(score.value) for score in self._scores]))
        return [
            ops.where(mask.value, score.value, lowest - 1.0 - 1.0 / (1.0 + ops.abs(weight)))
            for mask, score, weight in zip(self._masks, self._scores, weights, strict=True)
        ]

    def _best(self, scores, sparsity) -> list:
        """The masks over the largest scores."""
        if isinstance(self.pattern, NofM):
            return [self.pattern.mask(s, sparsity, t.layout) for s, t in zip(scores, self.targets, strict=True)]
        rows, sizes = zip(*[self._units_of(group, scores) for group in self._groups], strict=True)
        if self.global_scope:
            chosen = largest_of_all(rows, sizes, sparsity, self.floor)
        else:
            chosen = [largest(row, keep_count(row.shape[0], sparsity)) for row in rows]
        kept = {place: units for group, units in zip(self._groups, chosen, strict=True) for place in group}
        return [
            self.pattern.spread(kept[place], tuple(target.variable.shape), target.layout)
            for place, target in enumerate(self.targets)
        ]

    def _units_of(self, group: list[int], scores):
        """The scores and sizes of units; of those that go together the mean over all their weights, and the sum."""
        targets = [self.targets[place] for place in group]
        sizes = [self.pattern.unit_sizes(tuple(t.variable.shape), t.layout) for t in targets]
        rows = [self.pattern.unit_scores(scores[place], t.layout) for place, t in zip(group, targets, strict=True)]
        if len(group) == 1:
            return rows[0], sizes[0]
        total = np.sum(sizes, axis=0)
        return sum(row * (size / total).astype("float32") for row, size in zip(rows, sizes, strict=True)), total

    def _assign(self, masks) -> None:
        for target, own, of_companions, mask in zip(self.targets, self._masks, self._of_companions, masks, strict=True):
            own.assign(mask)
            if of_companions:
                kept = Channels().unit_scores(ops.cast(mask, "float32"), target.layout) > 0
                for companion in of_companions:
                    companion.assign(ops.reshape(kept, companion.shape))

    def enforce(self, strategy) -> None:
        """Sets what is masked to zero; outside of the replicas."""
        for target, own, of_companions in zip(self.targets, self._masks, self._of_companions, strict=True):
            for variable, mask in [(target.variable, own), *zip(target.companions, of_companions, strict=True)]:
                strategy.extended.update(variable.value, _zero_where_masked, args=(mask.value,), group=False)

    def counts(self) -> tuple[int, int]:
        """How many weights are removed, of how many."""
        return _removed(self._masks), sum(math.prod(mask.shape) for mask in self._masks)


def _groups(targets: list[Target]) -> list[list[int]]:
    """The places of targets, those together whose channels are coupled."""
    groups: dict[object, list[int]] = {}
    for place, target in enumerate(targets):
        groups.setdefault(target.coupled or (place, "alone"), []).append(place)
    return list(groups.values())


def _removed(masks) -> int:
    return sum(int(np.sum(~ops.convert_to_numpy(mask))) for mask in masks)


def _zero_where_masked(variable, mask) -> None:
    # Not a product: that would leave zeros of both signs behind, which compress badly.
    variable.assign(tf.where(mask, variable, tf.zeros((), variable.dtype)))


def _variable(shape, dtype, initializer) -> keras.Variable:
    return keras.Variable(
        initializer, shape=tuple(shape), dtype=dtype, trainable=False, aggregation="only_first_replica"
    )


def zeros_of(model: keras.Model) -> dict[int, tuple[int, int]]:
    """How many exact zeros the kernels hold that have some but are not all zero: the variable's id → zeros, and its size."""
    counts = {}
    for variable in model.trainable_variables:
        values = ops.convert_to_numpy(variable) if len(variable.shape) >= 2 else np.ones(1)
        zeros = int(np.count_nonzero(values == 0))
        if 0 < zeros < values.size:
            counts[id(variable)] = zeros, values.size
    return counts


def share_of(counts: Iterable[tuple[int, int]]) -> float:
    """The zeros of all in their sizes together; 0 if there is nothing."""
    zeros, total = np.sum([(0, 0), *counts], axis=0)
    return float(zeros / max(total, 1))
