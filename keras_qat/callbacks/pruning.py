"""Removes weights while a model trains; after every single step what is removed is exactly zero."""

import re
import warnings
import weakref
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_qat.callbacks.train_function import StepCallback, TrainFunction
from keras_qat.pruning.masks import Masks, share_of, zeros_of
from keras_qat.pruning.patterns import Pattern, Weights
from keras_qat.pruning.targets import Policy, Target, find_targets, policy_of
from keras_qat.schedules import Schedule, resume
from keras_qat.spec import Rule
from keras_qat.weighted import checked_rules


class Pruning(StepCallback):
    """Prunes a model on a schedule: no wrapper layers, the model stays what it is, with zeros in it.

    Left alone unless a rule names them: norms, biases, depthwise kernels, the last layer.

    Masks and the step live in what Keras saves anyway: a pruned weight is an exact zero, and the step is the number of
    steps that the optimizer has done since pruning began, which its name tells ("adam_pruned_from_3000"). So
    `BackupAndRestore`, a second `fit`, and a model that was saved and loaded go on where they were. (Weights alone, loaded
    into a new model, do not tell where pruning began. There the step is found by the sparsity, see `schedules.resume`, or
    give it as `initial_step`. What the criteria "taylor" and "movement" have summed up lives in the callback, and begins
    anew with another one.)

    Every epoch's logs get `sparsity`, of all weights that are subject to it.

    Args:
        schedule: Of `kq.schedules`, a tfmot `PruningSchedule`, or a number: that sparsity from the first step on.
        rules: `kq.Rule(pattern, ...)`, the pattern shell-style on the layer's path, or a class of layers; with a
            schedule, a `kq.pruning` pattern, a `kq.pruning.Policy`, or None to leave the layers alone. The first match
            wins.
        pattern: What is removed at a time: `kq.pruning.Weights()`, `Blocks(a, b)`, `NofM(n, m)` or `Channels()`.
        criterion: "magnitude", "taylor" or "movement".
        scope: "layer" gives every layer the schedule's sparsity; "global" ranks the weights of all layers together.
        floor: The share of each layer that a global ranking leaves in any case.
        unit: "steps" (of the optimizer) or "epochs" are what the schedule counts.
        initial_step: The step of a model that was pruned before.

    Example:
        ```python
        schedule = kq.schedules.Polynomial(0.0, 0.8, begin=0, end=2000)
        model.fit(x, y, callbacks=[kq.callbacks.Pruning(schedule, rules=[kq.Rule("stem/*", None)])])
        ```
    """

    def __init__(
        self,
        schedule,
        rules: Sequence[Rule] = (),
        *,
        pattern: Pattern | None = None,
        criterion: str = "magnitude",
        scope: str = "layer",
        floor: float = 0.01,
        unit: str = "steps",
        initial_step: int | None = None,
    ):
        super().__init__()
        for name, value, allowed in (("scope", scope, ("layer", "global")), ("unit", unit, ("steps", "epochs"))):
            if value not in allowed:
                raise ValueError(f"{name} is one of {allowed}. Received: {value!r}")
        if not 0 <= floor < 1:
            raise ValueError(f"floor is the share of a layer that stays, at least 0 and below 1. Received: {floor}")
        self.policy = Policy(schedule, pattern or Weights(), criterion).over(Policy())
        self.rules = [(rule, policy_of(rule.scheme, self.policy)) for rule in checked_rules(rules)]
        self.scope, self.floor, self.unit, self.initial_step = scope, floor, unit, initial_step
        if scope == "global":
            self._check_floor()
        self.step = initial_step or 0
        self.targets: list[Target] = []
        self._masks: list[Masks] = []
        self._origin: int | None = None
        self._clock_before: int = 0
        self._zeros_before: dict[int, tuple[int, int]] = {}
        self._latest = self._pruned = None

    def _check_floor(self):
        for policy in [self.policy, *(policy for _, policy in self.rules if policy is not None)]:
            final = policy.schedule.final
            if final is not None and self.floor > 1.0 - final + 1e-9:
                raise ValueError(f"floor={self.floor} of each layer leaves no room for a sparsity of {final}.")

    def set_model(self, model):
        super().set_model(model)
        if getattr(model, "optimizer", None) is not None:
            # Now, because in `on_train_begin` BackupAndRestore may already have put the clock forward.
            self._clock_before, self._zeros_before = self.clock(), zeros_of(model)

    def prepare(self):
        self.targets = find_targets(self.model, self.policy, self.rules)
        self._check_others()
        schedules = {id(target.policy): self._in_steps(target.policy.schedule) for target in self.targets}
        self._find_origin(schedules[id(self.targets[0].policy)])
        self.step = self.clock() - self._origin
        self._warn_if_too_short(schedules.values())
        by_policy: dict[int, list[Target]] = {}
        for target in self.targets:
            by_policy.setdefault(id(target.policy), []).append(target)
        scores = {name: score for masks in self._masks for name, score in masks.scores().items()} if self.step else {}
        self._masks = [
            Masks(targets[0].policy, schedules[key], targets, self.scope, self.floor)
            for key, targets in by_policy.items()
        ]
        for masks in self._masks:
            masks.take_scores(scores)
        self._pruned = weakref.ref(self.model)
        self._latest = keras.Variable(
            np.int64(self.step), dtype="int64", trainable=False, aggregation="only_first_replica"
        )

    def begin(self):
        for masks in self._masks:
            masks.begin(self.step, was_pruned=self.step > 0)
        self._enforce()

    def _in_steps(self, schedule: Schedule) -> Schedule:
        return schedule if self.unit == "steps" else schedule.in_steps(self.steps_per_epoch())

    def _find_origin(self, schedule: Schedule) -> None:
        """At which count of the optimizer's clock pruning began. `schedule` is that of the first target."""
        before = self._clock_before
        if self._origin is None:
            if self.initial_step is None:
                self.step = self._step_found(schedule) if before > 0 else 0
            self._origin = before - self.step if before else -(self.initial_step or 0)
        elif self.clock() == before == 0:
            # A new clock: compiled anew, or what became of the model (quantized, say). Without zeros it is another one.
            was_pruned = share_of(self._zeros_before.values()) > 0.005
            goes_on = was_pruned or (self._pruned is not None and self._pruned() is self.model)
            self._origin = -self.step if goes_on else 0
        note_beginning(self.model.optimizer, self._origin)

    def _step_found(self, schedule: Schedule) -> int:
        """Of a model that has trained, and that another callback may have pruned."""
        policy = self.targets[0].policy
        counts = [self._zeros_before.get(id(target.variable)) for target in self.targets if target.policy is policy]
        sparsity = share_of(count for count in counts if count)
        return resume(
            schedule, self._clock_before, sparsity, policy.pattern.sparsity_at, beginnings(self.model.optimizer)
        )

    def _warn_if_too_short(self, schedules) -> None:
        last = self.last_step(self.step)
        ends = [schedule.end for schedule in schedules if schedule.end is not None]
        if last is not None and ends and max(ends) > last:
            warnings.warn(
                f"This fit ends at step {last}, the pruning schedule at step {max(ends)}: its final sparsity takes "
                "another fit with this callback, or a shorter schedule.",
                stacklevel=2,
            )

    def _check_others(self) -> None:
        mine = {id(target.variable): target.path for target in self.targets}
        callbacks = TrainFunction.of(self.model).callbacks
        for other in callbacks[: callbacks.index(self)]:
            theirs = {id(target.variable) for target in getattr(other, "targets", ())}
            shared = [path for variable, path in mine.items() if variable in theirs]
            if shared:
                raise ValueError(
                    f"Two Pruning callbacks prune the same layers: {shared}. Use one with rules, or leave the layers "
                    "alone in the other: kq.Rule(layer, None)."
                )

    def changed(self, gradients_and_variables):
        gradients = {id(variable): gradient for gradient, variable in gradients_and_variables}
        for masks in self._masks:
            masks.observe(gradients)
        return gradients_and_variables

    def after_step(self):
        if tf.distribute.has_strategy():
            tf.distribute.get_replica_context().merge_call(self._advance)
        else:
            self._advance(tf.distribute.get_strategy())

    def _advance(self, strategy) -> None:
        step = ops.cast(self.model.optimizer.iterations, "int64") - self._origin
        moved_on = step > self._latest.value  # it did not if the optimizer only accumulated, or left the step out
        self._latest.assign(step)
        for masks in self._masks:
            masks.advance(step, moved_on)
            masks.enforce(strategy)

    def _enforce(self) -> None:
        strategy = self.model.distribute_strategy
        with strategy.scope():
            for masks in self._masks:
                masks.enforce(strategy)

    def epoch_logs(self):
        counts = np.sum([masks.counts() for masks in self._masks], axis=0)
        return {"sparsity": float(counts[0] / counts[1])}

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.step = self.clock() - self._origin

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self._masks:
            self._enforce()  # an optimizer with use_ema has just overwritten the weights with averages
            self.step = self.clock() - self._origin


_BEGINNING = "_pruned_from_"


def beginnings(optimizer) -> list[int]:
    """At which steps of an optimizer's clock pruning began, the latest first."""
    return [int(step) for step in re.findall(_BEGINNING + r"(-?\d+)", optimizer.name)][::-1]


def note_beginning(optimizer, step: int) -> None:
    """Writes such a step into the optimizer's name: of all that Keras saves with a model it is what takes a note."""
    if step not in beginnings(optimizer):
        optimizer.name = f"{optimizer.name}{_BEGINNING}{step}"
