"""Sparsity schedules: tfmot's golden values, and what tfmot gets wrong."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_qat import schedules
from keras_qat.schedules import Constant, Cyclic, Exponential, OneShot, Polynomial

# schedule → step: (due, sparsity)
GOLDEN = {
    "steep": (
        Polynomial(0.2, 0.8, 100, 110, power=3, frequency=2),
        {
            99: (False, 0.2),
            100: (True, 0.2),
            101: (False, 0.3626),
            102: (True, 0.4928),
            104: (True, 0.6704),
            105: (False, 0.725),
            106: (True, 0.7616),
            108: (True, 0.7952),
            110: (True, 0.8),
            111: (False, 0.8),
        },
    ),
    "to_half": (
        Polynomial(0.0, 0.5, 0, 100, power=3, frequency=10),
        dict(
            zip(
                range(0, 101, 10),
                [(True, s) for s in (0, 0.1355, 0.244, 0.3285, 0.392, 0.4375, 0.468, 0.4865, 0.496, 0.4995, 0.5)],
                strict=True,
            )
        ),
    ),
    "long": (
        Polynomial(0.0, 0.8, 0, 1000),
        dict(
            zip(
                range(100, 1001, 100),
                [(True, s) for s in (0.2168, 0.3904, 0.5256, 0.6272, 0.7, 0.7488, 0.7784, 0.7936, 0.7992, 0.8)],
                strict=True,
            )
        ),
    ),
    "linear": (
        Polynomial(0.1, 0.9, 10, 20, power=1, frequency=5),
        {10: (True, 0.1), 15: (True, 0.5), 20: (True, 0.9)},
    ),
    "constant": (
        Constant(0.5, 100, 200, frequency=10),
        {99: False, 100: True, 109: False, 110: True, 111: False, 200: True, 201: False},
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values_of_tfmot(name):
    schedule, values = GOLDEN[name]
    for step, expected in values.items():
        due, sparsity = expected if isinstance(expected, tuple) else (expected, 0.5)
        assert bool(schedule.due(step)) == due, step
        assert float(schedule(step)) == pytest.approx(sparsity, abs=1e-6), step


@pytest.fixture(scope="module")
def tfmot():
    """tfmot switches the whole process to legacy Keras, unless tf.keras has been touched before."""
    assert tf.keras.__version__ == keras.__version__
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    module = pytest.importorskip("tensorflow_model_optimization")
    if before is None:
        os.environ.pop("TF_USE_LEGACY_KERAS", None)
    return module.sparsity.keras


def pairs(tfmot):
    return [
        (tfmot.PolynomialDecay(0.2, 0.8, 100, 110, frequency=2), Polynomial(0.2, 0.8, 100, 110, frequency=2)),
        (tfmot.PolynomialDecay(0.0, 0.9, 7, 60, 2, 5), Polynomial(0.0, 0.9, 7, 60, 2, 5)),
        (tfmot.ConstantSparsity(0.5, 30, 200, 10), Constant(0.5, 30, 200, 10)),
        (tfmot.ConstantSparsity(0.5, 30), Constant(0.5, 30, None, 100)),
    ]


def test_tfmot_schedules_are_taken_as_they_are(tfmot):
    for theirs, ours in pairs(tfmot):
        assert schedules.adapt(theirs) == ours
        for step in range(250):
            due, sparsity = theirs(tf.constant(step, tf.int64))
            assert float(ours(step)) == pytest.approx(float(sparsity), abs=1e-6)
            assert bool(ours.due(step)) == bool(due) or step == ours.end


def test_a_tfmot_schedule_of_the_users_own(tfmot):
    class Stairs(tfmot.PruningSchedule):
        begin_step, end_step = 2, 8

        def __call__(self, step):
            return self._should_prune_in_step(step, 2, 8, 3), tf.cast(step, tf.float32) / 10

        def get_config(self):
            return {}

    stairs = schedules.adapt(Stairs())
    assert [step for step in range(12) if stairs.due(step)] == [2, 5, 8]
    assert float(stairs(5)) == 0.5 and (stairs.begin, stairs.end) == (2, 8)
    with pytest.raises(ValueError, match="unit='steps'"):
        stairs.in_steps(10)


ALL = {
    "constant": Constant(0.5, 10, 95),
    "one_shot": OneShot(0.5, 10),
    "polynomial": Polynomial(0.1, 0.8, 10, 95),
    "polynomial_rare": Polynomial(0.1, 0.8, 10, 95, frequency=40),
    "exponential": Exponential(0.1, 0.8, 10, 95),
    "cyclic": Cyclic(0.2, 0.8, 10, 95, cycles=3),
    "joined": schedules.join([Polynomial(0.0, 0.4, 10, 30), Polynomial(0.4, 0.8, 0, 45)], [50]),
}


@pytest.mark.parametrize("name", ALL)
def test_the_end_is_always_reached(name):
    schedule = ALL[name]
    assert bool(schedule.due(schedule.end)) and not bool(schedule.due(schedule.end + 1))
    assert float(schedule(schedule.end)) == pytest.approx(schedule.final, abs=1e-6)
    assert not any(bool(schedule.due(step)) for step in range(schedule.begin)) and bool(schedule.due(schedule.begin))


@pytest.mark.parametrize("name", ALL)
def test_arrays_tensors_and_graphs_agree_with_numbers(name):
    schedule, steps = ALL[name], np.arange(0, 120)
    values, due = [float(schedule(int(s))) for s in steps], [bool(schedule.due(int(s))) for s in steps]
    np.testing.assert_allclose(schedule(steps), values, atol=1e-7)
    np.testing.assert_array_equal(schedule.due(steps), due)
    both = tf.function(lambda step: (schedule(step), schedule.due(step)), jit_compile=True)
    for step in (0, 10, 53, 95, 110):
        value, is_due = both(tf.constant(step, tf.int64))
        assert float(value) == pytest.approx(values[step], abs=1e-6) and bool(is_due) == due[step]


@pytest.mark.parametrize(
    "schedule",
    [Polynomial(0.2, 0.8, 50, 50), Exponential(0.2, 0.8, 50, 50), Cyclic(0.2, 0.8, 50, 50), Constant(0.8, 50, 50)],
    ids=lambda s: type(s).__name__,
)
def test_beginning_where_it_ends_is_one_shot(schedule):
    assert [step for step in range(200) if schedule.due(step)] == [50]
    assert float(schedule(50)) == float(schedule(51)) == pytest.approx(0.8)


def test_short_runs_prune():
    """tfmot's frequency of 100 would never prune here."""
    schedule = Polynomial(0.0, 0.8, 0, 30)
    assert [step for step in range(40) if schedule.due(step)] == list(range(0, 31, 3))


def test_exponential_follows_its_formula():
    p = np.linspace(0, 1, 11)
    expected = 0.1 + 0.7 * (1 - np.exp(-3 * p)) / (1 - np.exp(-3))
    np.testing.assert_allclose(Exponential(0.1, 0.8, 0, 10, rate=3)(np.arange(11)), expected, atol=1e-6)


def test_cyclic_prunes_and_lets_regrow():
    schedule = Cyclic(0.2, 0.8, 0, 100, cycles=2, power=1, frequency=5)
    assert [round(float(schedule(step)), 3) for step in (0, 10, 25, 49, 50, 60, 75, 100, 200)] == [
        0.2,
        0.44,
        0.8,
        0.8,
        0.2,
        0.44,
        0.8,
        0.8,
        0.8,
    ]
    uneven = Cyclic(0.2, 0.8, 0, 100, cycles=3, frequency=50)  # the second cycle begins between two turns
    assert [step for step in range(120) if uneven.due(step)] == [0, 34, 50, 67, 100]


def test_joined_schedules_count_from_their_boundaries():
    joined = schedules.join([Polynomial(0.0, 0.5, 10, 20, frequency=5), Constant(0.7, 5, frequency=10)], [40])
    assert [step for step in range(80) if joined.due(step)] == [10, 15, 20, 45, 55, 65, 75]
    assert float(joined(39)) == pytest.approx(0.5) and float(joined(40)) == pytest.approx(0.7)
    assert joined.end is None and joined.final == 0.7
    nested = schedules.join([joined, OneShot(0.9, 3)], [100])
    assert bool(nested.due(103)) and float(nested(103)) == pytest.approx(0.9) and nested.end == 103


def test_epochs_become_steps():
    assert Polynomial(0.0, 0.5, 1, 3).in_steps(25.0) == Polynomial(0.0, 0.5, 25, 75)
    assert Constant(0.5, 0, 2, frequency=1).in_steps(7.5) == Constant(0.5, 0, 15, frequency=8)
    assert OneShot(0.5, 2).in_steps(10) == OneShot(0.5, 20)
    joined = schedules.join([OneShot(0.5), OneShot(0.6, 1)], [2]).in_steps(10)
    assert joined == schedules.join([OneShot(0.5), OneShot(0.6, 10)], [20])


@pytest.mark.parametrize(
    "iterations, expected",
    [
        (50, 50),  # the optimizer's clock agrees with the sparsity
        (57, 57),  # between two turns
        (5050, 50),  # it had trained before
        (100, 100),
        (9999, 50),
    ],
)
def test_a_loaded_model_goes_on_where_it_was(iterations, expected):
    schedule = Polynomial(0.0, 0.5, 0, 100, frequency=10)
    sparsity = 0.5 if iterations == 100 else 0.4375
    assert schedules.resume(schedule, iterations, sparsity) == expected


@pytest.mark.parametrize(
    "origins, expected",
    [
        ([30], 60),  # noted where pruning began: of the steps with that sparsity the right one
        ([80, 30], 10),  # the latest that agrees
        ([85, 30], 60),
        ([], 10),  # nothing known: the first step with it
        ([95], 10),
    ],
)
def test_of_several_steps_with_one_sparsity_the_noted_beginning_decides(origins, expected):
    schedule = Cyclic(0.2, 0.8, 0, 100, cycles=2, frequency=5)
    assert float(schedule(10)) == pytest.approx(0.6704) and float(schedule(60)) == pytest.approx(0.6704)
    assert schedules.resume(schedule, 90, 0.6704, origins=origins) == expected


BAD = {
    "above": lambda: Constant(1.0),
    "below": lambda: Constant(-0.1),
    "nan": lambda: Constant(float("nan")),
    "text": lambda: Constant("0.5"),
    "final": lambda: Polynomial(0.0, 1.2, 0, 10),
    "initial": lambda: Polynomial(-0.1, 0.5, 0, 10),
    "backwards": lambda: Polynomial(0.0, 0.5, 10, 9),
    "negative_begin": lambda: Polynomial(0.0, 0.5, -5, 9),
    "frequency": lambda: Constant(0.5, 0, 10, frequency=0),
    "rate": lambda: Exponential(0.0, 0.5, 0, 10, rate=0),
    "high_below_low": lambda: Cyclic(0.5, 0.2, 0, 10),
    "no_cycles": lambda: Cyclic(0.2, 0.5, 0, 10, cycles=0),
    "boundaries": lambda: schedules.join([OneShot(0.5), OneShot(0.6)], []),
    "boundary_order": lambda: schedules.join([OneShot(0.5)] * 3, [20, 10]),
    "no_schedule": lambda: schedules.adapt("soon"),
    "no_end": lambda: Polynomial(0.0, 0.5, 0, None),
    "neither_share_nor_bits": lambda: Constant(1.5),
    "too_many_bits": lambda: Polynomial(16, 8, 0, 10),
    "bits_as_a_sparsity": lambda: schedules.of_sparsity(schedules.join([Constant(0.5), OneShot(4)], [9])),
    "sparsity_as_bits": lambda: schedules.of_bits(Polynomial(8, 0.5, 0, 10)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_schedules_are_refused(name):
    with pytest.raises(ValueError, match="Received: "):
        BAD[name]()


def test_bits_fall_along_a_schedule():
    schedule = schedules.of_bits(Polynomial(8, 4, 10, 50, power=1))
    np.testing.assert_allclose(schedule(np.array([0, 10, 20, 30, 40, 50, 60])), [8, 8, 7, 6, 5, 4, 4])
    assert schedules.of_bits(3) == Constant(3)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.99])
def test_sparsities_from_none_to_nearly_all(sparsity):
    assert schedules.adapt(sparsity) == Constant(sparsity)
