"""Clips gradients layer by layer, inside of the optimizer's step, and shows what that did."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from keras_qat.callbacks.train_function import StepCallback
from keras_qat.clipping import Policy, Weight, norm, resolve, squared_norm
from keras_qat.spec import Rule
from keras_qat.weighted import RANGES, WeightedLayer, checked_rules, first_matches, layout_of, weighted_layers
from tflite_export.table import table

_SUMS = 4  # of a group: steps, norms before, norms after, clipped steps


class GradientClipping(StepCallback):
    """Applies a clipping policy to the gradients of each group of layers.

    A group is what one rule governs; the layers without a rule are one more, and so are the trained ranges of
    quantizers (their paths begin with "ranges/"). The gradients are those of the whole batch, on all replicas and
    accumulated if the optimizer accumulates, unscaled, and behind Keras's own clipping if that is set, too. A
    `MultiOptimizer` is the exception: there they are clipped before each of its optimizers accumulates.

    Every epoch's logs get, for the layers without a rule, `grad_norm` and `grad_norm_clipped` (means over the steps)
    and `clipped` (the share of steps in which the policy changed something); for other groups the same with the
    group's name behind it, as in `clipped/head/*`; and `skipped_steps`.

    Args:
        clip: A policy of `kq.clipping`, a list of them (applied in this order), or None for the layers that no rule names.
        rules: `kq.Rule(pattern, policy)`, the pattern shell-style on the layer's path, or a class of layers. The first
            match wins; None leaves the layers alone.
        nonfinite: "skip" leaves out steps whose gradients hold NaN or infinity (or are so large that their squares
            do), as loss scaling does: no weight, no momentum and no accumulator changes. "keep" only counts them.
        log_dir: Writes the same figures for TensorBoard, also without its callback.
        table: Prints a table at the end of `fit`. `report()` returns it at any time.

    Example:
        ```python
        clip = kq.callbacks.GradientClipping(
            kq.clipping.ByGlobalNorm(1.0), rules=[kq.Rule("head", None), kq.Rule("conv*", kq.clipping.Adaptive(0.01))]
        )
        model.fit(x, y, callbacks=[clip])
        ```
    """

    def __init__(
        self,
        clip: Policy | Sequence[Policy] | None,
        rules: Sequence[Rule] = (),
        *,
        nonfinite: str = "skip",
        log_dir: str | None = None,
        table: bool = False,
    ):
        super().__init__()
        if nonfinite not in ("skip", "keep"):
            raise ValueError(f"nonfinite is 'skip' or 'keep'. Received: {nonfinite!r}")
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "log_dir is for TensorBoard, which TensorFlow does not bring along: pip install tensorboard"
            )
        self.clip, self.rules = clip, rules
        self.nonfinite, self.log_dir, self.table = nonfinite, log_dir, table
        self._resolved()
        self._groups: list[_Group] = []
        self._sums = self._skipped = self._writer = None
        self._totals: dict[str, np.ndarray] = {}
        self._all_skipped = 0

    def _resolved(self) -> tuple[Policy | None, list[tuple[Rule, Policy | None]]]:
        """The policies as they are now: they may be changed between two fits."""
        return resolve(self.clip), [(rule, resolve(rule.scheme)) for rule in checked_rules(self.rules)]

    def prepare(self):
        clip, rules = self._resolved()
        layers = weighted_layers(self.model)
        chosen = first_matches([rule for rule, _ in rules], layers)
        policies = {"": clip, RANGES: clip, **{_label(rule): policy for rule, policy in reversed(rules)}}
        members: dict[str, list[WeightedLayer]] = {}
        for layer, rule in zip(layers, chosen, strict=True):
            label = _label(rule) if rule is not None else RANGES if layer.is_range else ""
            if layer.trained and policies[label] is not None:
                members.setdefault(label, []).append(layer)
        before, self._groups = self._groups, [_Group(label, policies[label], each) for label, each in members.items()]
        for group in self._groups:
            group.take_state(next((other for other in before if other.identity == group.identity), None))
        self._sums = _variable(np.zeros((len(self._groups), _SUMS), "float32"))
        self._skipped = _variable(np.int32(0))
        self._totals = {group.label: np.zeros(_SUMS) for group in self._groups}
        self._all_skipped = 0

    def admits(self, gradients):
        tensors = [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients]
        bad = ops.cast(ops.logical_not(ops.isfinite(squared_norm([ops.cast(t, "float32") for t in tensors]))), "int32")
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            bad = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, bad)
        finite = ops.equal(bad, 0)
        self._skipped.assign_add(ops.cast(ops.logical_not(finite), "int32"))
        # On several devices a LossScaleOptimizer looks at the first one's gradients only.
        is_scaled = isinstance(self.model.optimizer, keras.mixed_precision.LossScaleOptimizer)
        skips_itself = is_scaled and tf.distribute.get_strategy().num_replicas_in_sync == 1
        return None if skips_itself or self.nonfinite == "keep" else finite

    def changed(self, gradients_and_variables):
        gradients = {id(variable): gradient for gradient, variable in gradients_and_variables if gradient is not None}
        sums = [group.clip(gradients) for group in self._groups]
        if sums:
            self._sums.assign_add(ops.stack(sums))
        return [(gradients.get(id(variable)), variable) for _, variable in gradients_and_variables]

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        if self._sums is not None:
            self._sums.assign(ops.zeros_like(self._sums))
            self._skipped.assign(0)

    def epoch_logs(self):
        sums = ops.convert_to_numpy(self._sums)
        rows = [_row(group.label, values) for group, values in zip(self._groups, sums, strict=True)]
        logs = {f"{name}{row.suffix}": value for row in rows for name, value in row.logs.items()}
        return {**logs, "skipped_steps": float(ops.convert_to_numpy(self._skipped))}

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        for group, values in zip(self._groups, ops.convert_to_numpy(self._sums), strict=True):
            self._totals[group.label] += values
        self._all_skipped += int(ops.convert_to_numpy(self._skipped))
        if self.log_dir is not None:
            self._write(epoch)

    def _write(self, epoch):
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(os.path.join(self.log_dir, "train"))
        with self._writer.as_default(step=epoch):
            for name, value in self.epoch_logs().items():
                tf.summary.scalar(f"epoch_{name}", value)
        self._writer.flush()

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        if self.table:
            print(self.report())

    def report(self) -> "ClippingReport":
        """What was done in the whole epochs of the last fit."""
        return ClippingReport([_row(label, sums) for label, sums in self._totals.items()], self._all_skipped)


class _Group:
    """The layers that one policy governs, and the policy's state."""

    def __init__(self, label: str, policy: Policy, layers: list[WeightedLayer]):
        self.label, self.policy = label, policy
        self.variables = [list(layer.trained) for layer in layers]
        self.channel_axes = [[layout_of(layer.layer, v).channels for v in layer.trained] for layer in layers]
        self.identity = (label, policy, [id(v) for v in tree.flatten(self.variables)])

    def take_state(self, other: "_Group | None") -> None:
        """Goes on where the same group was in the last fit, or starts anew."""
        self.state = other.state if other else tree.map_structure(_variable, self.policy.init(self._weights()))

    def _weights(self):
        return tree.map_structure_up_to(
            self.variables, lambda v, axes: Weight(ops.cast(v, "float32"), axes), self.variables, self.channel_axes
        )

    def clip(self, gradients: dict):
        """Replaces the group's gradients, by the id of their `tf.Variable`, in place; returns what to add to its sums."""
        present = [v for v in tree.flatten(self.variables) if id(v.value) in gradients]
        if not present:
            return ops.zeros(_SUMS)
        # A weight that the loss does not depend on counts as one whose gradient is zero.
        before = tree.map_structure(lambda v: _dense(gradients.get(id(v.value)), v), self.variables)
        state = tree.map_structure(lambda variable: variable.value, self.state)
        after, clipped, state = self.policy.update(before, self._weights(), state)
        tree.map_structure(lambda variable, value: variable.assign(value), self.state, state)
        news = dict(zip((id(v.value) for v in tree.flatten(self.variables)), tree.flatten(after), strict=True))
        for variable in present:
            key = id(variable.value)
            gradients[key] = ops.cast(news[key], gradients[key].dtype)
        return ops.stack([1.0, norm(tree.flatten(before)), norm(tree.flatten(after)), ops.cast(clipped, "float32")])


def _dense(gradient, variable):
    if gradient is None:
        return ops.zeros(variable.shape)
    return ops.cast(tf.convert_to_tensor(gradient), "float32")


def _variable(value) -> keras.Variable:
    value = np.asarray(value)
    return keras.Variable(value, dtype=value.dtype.name, trainable=False, aggregation="only_first_replica")


def _label(rule) -> str:
    return rule.pattern.__name__ if isinstance(rule.pattern, type) else rule.pattern


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """A group's means over some steps; `norm_clipped` is the norm behind the policy, `clipped` a share of the steps."""

    group: str
    steps: int
    norm: float
    norm_clipped: float
    clipped: float

    @property
    def suffix(self) -> str:
        return f"/{self.group}" if self.group else ""

    @property
    def logs(self) -> dict[str, float]:
        return {"grad_norm": self.norm, "grad_norm_clipped": self.norm_clipped, "clipped": self.clipped}


def _row(label, sums) -> GroupRow:
    steps = int(sums[0])
    means = [float(value) / max(steps, 1) for value in sums[1:]]
    return GroupRow(label, steps, *means)


@dataclasses.dataclass(frozen=True)
class ClippingReport:
    """What `GradientClipping` did in a fit; prints as a table."""

    rows: list[GroupRow]
    skipped_steps: int

    def __str__(self) -> str:
        heading = ("group", "steps", "gradient norm", "behind clipping", "clipped steps")
        body = [
            (r.group or "all others", r.steps, f"{r.norm:.4g}", f"{r.norm_clipped:.4g}", f"{r.clipped:.1%}")
            for r in self.rows
        ]
        return f"{table(heading, body)}\nskipped steps (gradients not finite): {self.skipped_steps}"

    def to_dict(self) -> dict:
        return {"rows": [dataclasses.asdict(row) for row in self.rows], "skipped_steps": self.skipped_steps}
