"""Quantizes a QAT model step by step: ranges first, then rounding, then everything else comes to rest."""

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from keras_qat.batch_norms import OfStatistics
from keras_qat.callbacks.train_function import StepCallback, TrainFunction, replaced
from keras_qat.layers import FakeQuant, GridLayer, Quantized, require_qat
from keras_qat.primitives import InFloat
from keras_qat.schedules import Schedule, of_bits
from keras_qat.spec import Rule
from keras_qat.weighted import checked_rules, first_matches, weighted_layers


class QuantizationSchedule(StepCallback):
    """Says from which step on a QAT model quantizes, keeps its ranges and batch norm statistics, and with how many bits.

    Before `start` it trains in float, while ranges are observed. From `freeze_ranges` on they stay as they are, which
    saves the search for every tensor's ends. From `freeze_batch_norm` on batch norms normalize with their moving averages
    and leave them alone; gamma and beta go on learning. With both, training sees what inference sees. What validation and
    `kq.export` see are the integers at any time.

    Each of these changes takes one new trace of the training step, at the first run of the train function that begins at
    that step or later (with `steps_per_execution=N` up to N - 1 steps late). Bits are a variable that the graph reads: they
    change at their step exactly, without any trace.

    Frozen ranges and statistics are saved with the model and stay frozen in further training, until a schedule says
    otherwise. Bits are saved with the weights.

    Steps are those of the optimizer's clock, which `BackupAndRestore`, a saved model and a second `fit` carry on. On a model
    that was compiled anew this callback goes on where it was; a new one starts over.

    Every epoch's logs get `weight_bits`, the mean over the layers that are subject to `bits`.

    Args:
        start: The first step that quantizes.
        freeze_ranges: The first step that observes no ranges any more; None: all do. 0 keeps what `kq.calibrate` found.
        freeze_batch_norm: The first step that leaves the statistics alone; None: none does.
        bits: How many bits weights have, 2 to 8: a schedule of `kq.schedules`, rounded, or a number. Before the schedule
            begins, and with None, layers have the bits of their scheme. (How often masks are chosen matters to pruning
            alone.)
        rules: `kq.Rule(pattern, ...)`, the pattern shell-style on the layer's path, or a class of layers; with a schedule
            of bits, a number, or None to leave the layers at the bits of their scheme. The first match wins.
        unit: "steps" (of the optimizer) or "epochs" are what all of these count.

    Example:
        ```python
        schedule = kq.callbacks.QuantizationSchedule(
            start=200,
            freeze_ranges=2000,
            freeze_batch_norm=2000,
            bits=kq.schedules.Polynomial(8, 4, begin=200, end=1500, power=1),
            rules=[kq.Rule("stem/*", None), kq.Rule("head", None)],
        )
        qat.fit(x, y, epochs=10, callbacks=[schedule])
        ```
    """

    def __init__(
        self,
        start: float = 0,
        freeze_ranges: float | None = None,
        freeze_batch_norm: float | None = None,
        bits: Schedule | int | None = None,
        rules: Sequence[Rule] = (),
        *,
        unit: str = "steps",
    ):
        super().__init__()
        if unit not in ("steps", "epochs"):
            raise ValueError(f"unit is 'steps' or 'epochs'. Received: {unit!r}")
        self.times = {"start": start, "freeze_ranges": freeze_ranges, "freeze_batch_norm": freeze_batch_norm}
        for name, time in self.times.items():
            _check_time(name, time, unit, optional=name != "start")
        if freeze_ranges is not None and freeze_ranges < start:
            raise ValueError(
                "Ranges are frozen at the start of quantization or later, freeze_ranges >= start: before it they are only "
                f"observed. Received: {start=}, {freeze_ranges=}"
            )
        self.bits, self.unit = None if bits is None else of_bits(bits), unit
        self.rules = [(rule, None if rule.scheme is None else of_bits(rule.scheme)) for rule in checked_rules(rules)]
        self.step = 0
        self._origin, self._model_before = 0, None
        self._scheduled: dict[str, int | None] = {}
        self._stage: _Stage | None = None
        self._in_float: list[keras.Layer] = []
        self._runs_until_check = 0
        self._annealed: list[_Annealed] = []

    def prepare(self):
        require_qat(self.model)
        self._refuse_a_second_one()
        self._scheduled = self._in_steps()
        self._annealed = self._groups_of_bits()
        self._find_origin()
        if self._stage_at(self.step).frozen_ranges:
            self._require_ranges()
        self._warn_if_too_short()
        self._stage, self._runs_until_check = None, 0

    def begin(self):
        for annealed in self._annealed:
            annealed.advance(self.step)

    def next_stage(self):
        if self._runs_until_check > 0:  # to look at the optimizer's clock would mean to wait for the step
            self._runs_until_check -= 1
            return False
        step = self.clock() - self._origin
        times = [time for time in self._scheduled.values() if time is not None and time > step]
        runs = (min(times) - step) // self.model.steps_per_execution if times else np.inf
        self._runs_until_check = max(runs, 1) - 1
        stage = self._stage_at(step)
        if stage == self._stage:
            return False
        self._enter(stage)
        return True

    @contextlib.contextmanager
    def around_step(self):
        with contextlib.ExitStack() as stack:
            for layer in self._in_float:
                stack.enter_context(replaced(layer, "rounds", False))
            yield

    def after_step(self):
        if not self._annealed:
            return
        if tf.distribute.has_strategy():
            tf.distribute.get_replica_context().merge_call(self._advance)
        else:
            self._advance(tf.distribute.get_strategy())

    def _advance(self, strategy) -> None:
        del strategy
        step = ops.cast(self.model.optimizer.iterations, "int64") - self._origin
        for annealed in self._annealed:
            annealed.advance(step)

    def epoch_logs(self):
        bits = [quantizer.spec.bits for annealed in self._annealed for quantizer in annealed.quantizers]
        return {"weight_bits": float(np.mean(bits))} if bits else {}

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        self.step = self.clock() - self._origin

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self.step = self.clock() - self._origin

    def _stage_at(self, step: int) -> "_Stage":
        reached = {name: time is not None and step >= time for name, time in self._scheduled.items()}
        return _Stage(reached["start"], reached["freeze_ranges"], reached["freeze_batch_norm"])

    def _enter(self, stage: "_Stage") -> None:
        if stage.frozen_ranges:
            self._require_ranges()
        for layer in self._layers(FakeQuant):
            layer.frozen = stage.frozen_ranges
        for layer in self._layers(Quantized, InFloat, OfStatistics):
            has_statistics = getattr(layer, "batch_norm", layer) is not None
            layer.frozen_statistics = stage.frozen_statistics and has_statistics
        self._in_float = [] if stage.rounds else self._layers(FakeQuant, GridLayer)
        self._stage = stage

    def _layers(self, *classes: type) -> list[keras.Layer]:
        return [layer for layer in self.model._flatten_layers() if isinstance(layer, classes)]

    def _in_steps(self) -> dict[str, int | None]:
        length = self.steps_per_epoch() if self.unit == "epochs" else 1
        return {name: time if time is None else round(time * length) for name, time in self.times.items()}

    def _groups_of_bits(self) -> list["_Annealed"]:
        if self.bits is None and not self.rules:
            return []
        items = [item for item in weighted_layers(self.model) if _is_in_quantized(item)]
        chosen = first_matches([rule for rule, _ in self.rules], items)
        schedules = {id(rule): schedule for rule, schedule in self.rules}
        groups: dict[tuple, _Annealed] = {}
        for item, rule in zip(items, chosen, strict=True):
            schedule = self.bits if rule is None else schedules[id(rule)]
            if schedule is None:
                continue
            quantizer = item.around[-1].weight_quantizer
            in_steps = schedule if self.unit == "steps" else schedule.in_steps(self.steps_per_epoch())
            group = groups.setdefault((id(schedule), quantizer.spec.bits), _Annealed(in_steps, quantizer.spec.bits, []))
            group.quantizers.append(quantizer)
        return list(groups.values())

    def _find_origin(self) -> None:
        """At which count of the optimizer's clock step 0 was."""
        clock = self.clock()
        if clock == 0 and self._model_before is not None and self._model_before() is self.model:
            self._origin = -self.step  # compiled anew
        elif self._model_before is None or self._model_before() is not self.model:
            self._origin = 0
        self._model_before = weakref.ref(self.model)
        self.step = clock - self._origin

    def _require_ranges(self) -> None:
        unseen = [layer for layer in self._layers(FakeQuant) if not layer.quantizer.was_observed()]
        if unseen:
            names = [site for layer in unseen for site in layer.sites]
            raise ValueError(
                f"Ranges are to be frozen from step {self._scheduled['freeze_ranges']} on, and {len(names)} were never "
                f"observed: {names[:8]}. Freeze them later, or run kq.calibrate(qat, data) first."
            )

    def _warn_if_too_short(self) -> None:
        last = self.last_step(self.step)
        ends = [time for time in self._scheduled.values() if time is not None]
        ends += [annealed.schedule.end for annealed in self._annealed if annealed.schedule.end is not None]
        if last is not None and max(ends) > last:
            warnings.warn(
                f"This fit ends at step {last}, the quantization schedule at step {max(ends)}: the rest takes another fit "
                "with this callback, or a shorter schedule.",
                stacklevel=2,
            )

    def _refuse_a_second_one(self) -> None:
        callbacks = TrainFunction.of(self.model).callbacks
        if any(isinstance(other, QuantizationSchedule) for other in callbacks if other is not self):
            raise ValueError(
                "Two QuantizationSchedule callbacks cannot both say how a model is quantized. Use one; for bits that differ "
                "between layers give it rules."
            )


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What the graph of a training step is like: each of these is decided when it is traced."""

    rounds: bool
    frozen_ranges: bool
    frozen_statistics: bool


@dataclasses.dataclass
class _Annealed:
    """The weights that have the same bits at every step; `own` are those of their scheme."""

    schedule: Schedule
    own: int
    quantizers: list

    def advance(self, step) -> None:
        step = ops.convert_to_tensor(step, "int64")
        scheduled = ops.cast(ops.round(self.schedule(step)), "int32")
        bits = ops.where(step >= self.schedule.begin, scheduled, self.own)
        for quantizer in self.quantizers:
            quantizer.take_bits(bits)


def _is_in_quantized(item) -> bool:
    around = item.around[-1] if item.around else None
    return isinstance(around, Quantized) and around.layer is item.layer


def _check_time(name: str, time, unit: str, optional: bool) -> None:
    if time is None and optional:
        return
    is_number = isinstance(time, (int, float, np.number)) and not isinstance(time, bool)
    if not is_number or not 0 <= time < np.inf or (unit == "steps" and time != int(time)):
        kind = "a whole number of steps" if unit == "steps" else "a number of epochs"
        raise ValueError(f"{name} is {kind}, 0 or more{', or None' if optional else ''}. Received: {time!r}")
