"""How sparse a model is to be at a step, or how many bits its weights have: schedules are functions of the step, for
numbers, arrays and tensors alike.

`schedule(step)` is the sparsity, `schedule.due(step)` tells whether the masks are chosen anew at that step. Steps count
what the optimizer has done: step 0 is before the first one.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from keras import ops


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all schedules share: masks are chosen at `begin`, then every `frequency` steps, and always at `end`.

    `end=None` (or -1) goes on for ever, where a schedule can. `frequency=None` is a tenth of the way from `begin` to
    `end`, at most 100 steps, so that a short run prunes, too.
    """

    _can_be_endless: ClassVar[bool] = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _VALUES:
                _check_value(f"{type(self).__name__}.{field.name}", value)
        if self.end == -1:
            object.__setattr__(self, "end", None)
        if self.begin < 0 or not (self._can_be_endless if self.end is None else self.begin <= self.end):
            raise ValueError(
                f"{type(self).__name__} begins at step 0 or later and ends where it begins or later. Received: "
                f"begin={self.begin}, end={self.end}"
            )
        if self.frequency is not None and self.frequency <= 0:
            raise ValueError(f"{type(self).__name__}.frequency is above 0. Received: frequency={self.frequency}")

    @property
    def every(self) -> int:
        """The frequency, decided."""
        if self.frequency is not None:
            return self.frequency
        return 100 if self.end is None else min(max((self.end - self.begin) // 10, 1), 100)

    def due(self, step):
        step = ops.cast(step, "int64")
        turn = (step - self.begin) % self.every == 0
        if self.end is None:
            return ops.logical_and(step >= self.begin, turn)
        inside = ops.logical_and(step >= self.begin, step <= self.end)
        return ops.logical_and(inside, ops.logical_or(turn, step == self.end))

    def in_steps(self, steps_per_epoch: float) -> "Schedule":
        """The same with `begin`, `end` and `frequency`, so far in epochs, in steps."""
        given = {name: getattr(self, name) for name in ("begin", "end", "frequency")}
        return dataclasses.replace(
            self, **{name: value and max(round(value * steps_per_epoch), 1) for name, value in given.items()}
        )


_VALUES = ("sparsity", "initial", "final", "low", "high")


def _check_value(name, value) -> None:
    if not isinstance(value, (int, float, np.number)) or not (_is_sparsity(value) or _is_bits(value)):
        raise ValueError(
            f"{name} is a share of the weights, at least 0 and below 1, or a number of bits, 2 to 8. Received: {value!r}"
        )


def _is_sparsity(value) -> bool:
    return 0.0 <= value < 1.0


def _is_bits(value) -> bool:
    return 2.0 <= value <= 8.0


def _progress(step, begin, end):
    """0 up to `begin`, 1 from `end` on; also where both are the same step."""
    step = ops.cast(step, "float32")
    way = ops.clip((step - begin) / max(end - begin, 1), 0.0, 1.0)
    return ops.where(step >= end, ops.ones_like(way), way)


def _everywhere(step, value):
    return ops.zeros_like(ops.cast(step, "float32")) + value


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
    """One sparsity from `begin` on, the masks chosen anew every `frequency` steps."""

    _can_be_endless: ClassVar[bool] = True

    sparsity: float  # or the number of bits
    begin: int = 0
    end: int | None = None
    frequency: int | None = None

    @property
    def final(self) -> float:
        return self.sparsity

    def __call__(self, step):
        return _everywhere(step, self.sparsity)


@dataclasses.dataclass(frozen=True)
class OneShot(Schedule):
    """All at once: at step `begin`, and never again."""

    sparsity: float
    begin: int = 0
    frequency: None = dataclasses.field(default=None, init=False)

    @property
    def end(self) -> int:
        return self.begin

    @property
    def final(self) -> float:
        return self.sparsity

    def __call__(self, step):
        return _everywhere(step, self.sparsity)

    def in_steps(self, steps_per_epoch):
        return dataclasses.replace(self, begin=round(self.begin * steps_per_epoch))


@dataclasses.dataclass(frozen=True)
class Polynomial(Schedule):
    """Fast at first, slow towards the end.

    Formula: `s = final + (initial - final) · (1 - p)^power` with `p` the share of the way from `begin` to `end`.

    Paper: Zhu and Gupta, "To prune, or not to prune" (2017).
    """

    initial: float
    final: float
    begin: int
    end: int
    power: float = 3.0
    frequency: int | None = None

    def __call__(self, step):
        left = 1.0 - _progress(step, self.begin, self.end)
        return self.final + (self.initial - self.final) * left**self.power


@dataclasses.dataclass(frozen=True)
class Exponential(Schedule):
    """Every step closes the same share of the gap that is left, and the end is reached exactly.

    Formula: `s = initial + (final - initial) · (1 - e^(-rate · p)) / (1 - e^(-rate))` with `p` as in `Polynomial`.
    """

    initial: float
    final: float
    begin: int
    end: int
    rate: float = 5.0
    frequency: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rate < math.inf:
            raise ValueError(f"Exponential.rate is a number above 0. Received: rate={self.rate}")

    def __call__(self, step):
        way = _progress(step, self.begin, self.end)
        closed = (1.0 - ops.exp(-self.rate * way)) / (1.0 - math.exp(-self.rate))
        return self.initial + (self.final - self.initial) * closed


@dataclasses.dataclass(frozen=True)
class Cyclic(Schedule):
    """Prunes and lets regrow: climbs from `low` to `high` in the first half of a cycle, rests in the second.

    At the start of the next cycle it falls back to `low`; behind the last one it stays at `high`. The climb is that of
    `Polynomial`. What is no longer pruned starts again from zero.
    """

    low: float
    high: float
    begin: int
    end: int
    cycles: int = 2
    power: float = 3.0
    frequency: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.cycles < 1 or self.low > self.high:
            raise ValueError(
                f"Cyclic has cycles >= 1 and low <= high. Received: cycles={self.cycles}, low={self.low}, "
                f"high={self.high}"
            )

    @property
    def final(self) -> float:
        return self.high

    @property
    def every(self) -> int:
        return super().every if self.frequency else min(max((self.end - self.begin) // (20 * self.cycles), 1), 100)

    def __call__(self, step):
        turns = self._turns(step)
        within = ops.where(turns >= self.cycles, ops.ones_like(turns), turns - ops.floor(turns))
        return self.high + (self.low - self.high) * (1.0 - ops.minimum(2.0 * within, 1.0)) ** self.power

    def due(self, step):
        step = ops.cast(step, "int64")
        begins_a_turn = ops.floor(self._turns(step)) > ops.floor(self._turns(step - 1))
        return ops.logical_or(super().due(step), begins_a_turn)

    def _turns(self, step):
        return _progress(step, self.begin, self.end) * self.cycles


@dataclasses.dataclass(frozen=True)
class Joined(Schedule):
    """One schedule after the other; each counts steps from its own boundary. See `join`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]
    frequency: None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        if len(self.boundaries) != len(self.schedules) - 1 or list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(
                "join takes one boundary less than schedules, in rising order. Received: "
                f"{len(self.schedules)} schedules, boundaries={list(self.boundaries)}"
            )

    @property
    def begin(self) -> int:
        return self.schedules[0].begin

    @property
    def end(self) -> int | None:
        last = self.schedules[-1].end
        return None if last is None else last + self._starts[-1]

    @property
    def final(self) -> float:
        return self.schedules[-1].final

    def __call__(self, step):
        return self._pick(step, lambda schedule, since: schedule(since))

    def due(self, step):
        return self._pick(step, lambda schedule, since: schedule.due(since))

    def in_steps(self, steps_per_epoch):
        boundaries = tuple(round(boundary * steps_per_epoch) for boundary in self.boundaries)
        return Joined(tuple(schedule.in_steps(steps_per_epoch) for schedule in self.schedules), boundaries)

    @property
    def _starts(self) -> tuple[int, ...]:
        return (0, *self.boundaries)

    def _pick(self, step, value_of):
        step = ops.cast(step, "int64")
        value = value_of(self.schedules[0], step)
        for schedule, start in zip(self.schedules[1:], self.boundaries, strict=True):
            value = ops.where(step >= start, value_of(schedule, step - start), value)
        return value


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Joined:
    """One schedule after the other, the next one from its boundary on, where it starts at its own step 0.

    Example:
        `join([Polynomial(0.0, 0.5, 0, 100), Polynomial(0.5, 0.9, 0, 300)], boundaries=[200])`
    """
    return Joined(tuple(adapt(schedule) for schedule in schedules), tuple(boundaries))


class Foreign(Schedule):
    """A tfmot `PruningSchedule` of the user's own making, asked as tfmot asks it."""

    final = frequency = None

    def __init__(self, schedule):
        end = getattr(schedule, "end_step", -1)
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "begin", getattr(schedule, "begin_step", 0))
        object.__setattr__(self, "end", None if end == -1 else end)

    def __call__(self, step):
        return ops.cast(self.schedule(ops.convert_to_tensor(step, "int64"))[1], "float32")

    def due(self, step):
        return ops.cast(self.schedule(ops.convert_to_tensor(step, "int64"))[0], "bool")

    def in_steps(self, steps_per_epoch):
        raise ValueError(f"A tfmot schedule counts steps. Take unit='steps' with it. Received: {self.schedule!r}")


def adapt(schedule) -> Schedule:
    """A schedule, a tfmot `PruningSchedule`, or a number (that sparsity from the first step on) → a schedule.

    The two schedules that tfmot comes with become ours, which reach their end whatever the frequency.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, (int, float)):
        return Constant(schedule)
    if not callable(schedule) or not hasattr(schedule, "_should_prune_in_step"):
        raise ValueError(
            f"Expected a schedule of kq.schedules, a tfmot PruningSchedule or a number. Received: {schedule!r}"
        )
    name = type(schedule).__name__ if type(schedule).__module__.startswith("tensorflow_model_optimization") else ""
    span = name and {"begin": schedule.begin_step, "end": schedule.end_step, "frequency": schedule.frequency}
    if name == "ConstantSparsity":
        return Constant(schedule.target_sparsity, **span)
    if name == "PolynomialDecay":
        return Polynomial(schedule.initial_sparsity, schedule.final_sparsity, power=schedule.power, **span)
    return Foreign(schedule)


def of_sparsity(schedule) -> Schedule:
    """`adapt`, and nothing but shares of the weights in it."""
    adapted = adapt(schedule)
    if not all(map(_is_sparsity, _values_of(adapted))):
        raise ValueError(f"A sparsity is a share of the weights: at least 0, below 1. Received: {schedule!r}")
    return adapted


def of_bits(schedule) -> Schedule:
    """`adapt`, and nothing but numbers of bits in it."""
    is_number = isinstance(schedule, (int, float))
    adapted = adapt(schedule) if not is_number or _is_bits(schedule) else None
    if adapted is None or isinstance(adapted, Foreign) or not all(map(_is_bits, _values_of(adapted))):
        raise ValueError(
            f"Weights have 2 to 8 bits. Expected a schedule between them, or a number. Received: {schedule!r}"
        )
    return adapted


def _values_of(schedule: Schedule) -> list[float]:
    """The ends of what a schedule can give."""
    if isinstance(schedule, Joined):
        return [value for each in schedule.schedules for value in _values_of(each)]
    return [getattr(schedule, field.name) for field in dataclasses.fields(schedule) if field.name in _VALUES]


def last_chosen(schedule: Schedule, step: int):
    """The sparsity of the masks at a step: that of the last step at which they were chosen, 0 before the first."""
    steps = np.arange((step if schedule.end is None else min(step, schedule.end)) + 1)
    turns = steps[np.asarray(schedule.due(steps))]
    return schedule(turns[-1]) if len(turns) else ops.zeros(())


def resume(
    schedule: Schedule,
    iterations: int,
    sparsity: float,
    reached: Callable = lambda value: value,
    origins: Sequence[int] = (),
) -> int:
    """The step of a model that was saved while it was pruned and loaded again, told from what it was saved with.

    Args:
        schedule: It was pruned by this one.
        iterations: Steps that its optimizer has done.
        sparsity: Of its pruned weights.
        reached: The sparsity that the pattern makes of that of the schedule.
        origins: After how many of those steps pruning may have begun, if that is known.

    Returns:
        The steps since the first origin that agrees with the sparsity. If there is none, 0 for weights that are not pruned
        at all; `iterations`, if that agrees; else (the optimizer had trained before the pruning began) the step at which
        the schedule chose masks of nearly that sparsity.
    """
    agreeing = (iterations - origin for origin in origins if _agrees(schedule, iterations - origin, sparsity, reached))
    if (step := next(agreeing, None)) is not None:
        return step
    if sparsity < 0.005:
        return 0
    if _agrees(schedule, iterations, sparsity, reached):
        return iterations
    steps = np.arange((schedule.begin if schedule.end is None else schedule.end) + 1)
    turns = steps[np.asarray(schedule.due(steps))]
    return int(turns[np.argmin(np.abs(np.asarray(reached(schedule(turns))) - sparsity))])


def _agrees(schedule: Schedule, step: int, sparsity: float, reached: Callable) -> bool:
    return step >= 0 and abs(float(reached(last_chosen(schedule, step))) - sparsity) < 0.02
