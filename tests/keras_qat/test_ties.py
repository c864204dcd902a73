"""Steps and ranges on which all kernels round alike, against models of the kernels in integers."""

import numpy as np
import pytest
import tensorflow as tf

from keras_qat import ties


def quantized_multiplier(real: float) -> tuple[int, int]:
    """`QuantizeMultiplier` of TFLite: a Q31 integer and an exponent."""
    fraction, exponent = np.frexp(real)
    fixed = int(np.floor(fraction * 2**31 + 0.5))
    return (fixed // 2, int(exponent) + 1) if fixed == 2**31 else (fixed, int(exponent))


def double_rounding(accumulators, real: float):
    """`MultiplyByQuantizedMultiplier`, in integers."""
    fixed, exponent = quantized_multiplier(real)
    product = (accumulators << max(exponent, 0)) * fixed
    nudged = product + np.where(product >= 0, 1 << 30, 1 - (1 << 30))
    high = np.where(nudged >= 0, nudged >> 31, -(-nudged >> 31))  # SaturatingRoundingDoublingHighMul: C++ truncates
    right = max(-exponent, 0)
    mask = (1 << right) - 1
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0))  # RoundingDivideByPOT


def single_rounding(accumulators, real: float):
    return np.floor(accumulators * real + 0.5).astype(np.int64)


def in_float32(accumulators, input_scale, weight_scale, output_scale):
    """XNNPACK: a float32 multiplier, rounded half to even."""
    multiplier = np.float32(input_scale * weight_scale) / output_scale
    return np.round(accumulators.astype(np.float32) * multiplier).astype(np.int64)


def test_models_of_the_kernels_do_what_the_kernels_do():
    assert quantized_multiplier(0.5) == (2**30, 0) and quantized_multiplier(1 - 1e-12) == (2**30, 1)
    numbers = np.array([-6, -3, -2, -1, 0, 1, 2, 3, 6])
    np.testing.assert_array_equal(double_rounding(numbers, 0.25), [-2, -1, -1, 0, 0, 1, 1, 1, 2])
    np.testing.assert_array_equal(single_rounding(numbers, 0.25), [-1, -1, 0, 0, 0, 0, 1, 1, 2])


def disagreements(steps, input_scale, output_scale) -> list[int]:
    """For each channel how many accumulators of the int8 output range the kernels round differently."""
    found = []
    for weight_scale in np.float32(steps / input_scale):
        real = np.float64(input_scale) * np.float64(weight_scale) / np.float64(output_scale)
        limit = int(255.5 / real)
        accumulators = np.arange(-limit, limit + 1, dtype=np.int64)
        twice = double_rounding(accumulators, real)
        wrong = twice != single_rounding(accumulators, real)
        wrong |= twice != in_float32(accumulators, input_scale, weight_scale, output_scale)
        found.append(int(wrong.sum()))
    return found


WANTED = np.concatenate(
    [
        np.random.default_rng(2).uniform(32, 1024, 60),
        2 ** np.random.default_rng(3).uniform(5, 10, 60),
        [32, 33, 61, 61.5, 63, 63.9, 64, 64.1, 65, 66, 127, 128, 129, 255.9, 256, 491, 492, 493, 511.99, 512, 1024],
    ]
)


FEW = np.concatenate([np.arange(6, 33), np.random.default_rng(4).uniform(6, 32, 60)])


@pytest.mark.parametrize("wanted", [WANTED, FEW], ids=["many", "few"])
@pytest.mark.parametrize(
    "move, fewest",
    [("nearest", 32.0), ("nearest", 6.0), ("up", 6.0), ("down", 6.0)],
    ids=["nearest", "nearest_from_6", "up", "down"],
)
@pytest.mark.parametrize("output_scale", [0.02, 1 / 3, 17.3])
def test_kernels_round_snapped_steps_alike(output_scale, move, fewest, wanted):
    output_scale, input_scale = np.float32(output_scale), np.float32(0.0123)
    steps = (output_scale / wanted).astype("float32")
    steps = steps[steps * np.float32(fewest) <= output_scale]
    snapped, moved = map(np.asarray, ties.snap_to_kernels(steps, output_scale, fewest, move))
    assert np.all(moved == 1)
    found = disagreements(snapped, input_scale, output_scale)
    # Next to a power of two float32 leaves the largest of values too little room: less than one in ten thousand.
    assert sum(found) <= 1e-4 * np.sum(511 * output_scale / snapped), dict(
        zip(output_scale / steps, found, strict=True)
    )
    # The steps as they were: most of them are rounded differently somewhere.
    assert np.mean(np.array(disagreements(steps, input_scale, output_scale)) > 0) > 0.5


@pytest.mark.parametrize("move, fewest", [("up", 6.0), ("down", 6.0), ("nearest", 32.0)])
def test_steps_are_moved_only_a_little(move, fewest):
    output_scale = np.float32(0.05)
    wanted = np.exp(np.random.default_rng(0).uniform(np.log(fewest), np.log(8192), 3000))
    steps = (output_scale / wanted).astype("float32")
    ratio = np.asarray(ties.snap_to_kernels(steps, output_scale, fewest, move)[0]) / steps
    # 5 % for the power of two, 2 for evenness; a hair of at most 1e-4 goes the other way.
    if move == "up":
        assert ratio.min() >= 1  # weights must not leave -127..127
        assert np.all(ratio < 1.002 * wanted / (0.95 * wanted - 3.95))
    elif move == "down":
        assert ratio.max() <= 1 + 1e-4  # ranges must not shrink
        assert np.all(ratio > 0.998 * wanted / (wanted / 0.95 + 4.11))
    else:
        assert np.all(np.abs(np.log(ratio)) < 0.027 + 3 / wanted)
    assert np.median(np.abs(np.log(ratio))) < 0.02


@pytest.mark.parametrize("wanted", [0.5, 1, 3, 5.9, 8300, 1e6])
@pytest.mark.parametrize("move", ["up", "down", "nearest"])
def test_steps_out_of_reach_stay(wanted, move):
    """But a step that is too large can always be made smaller."""
    output_scale = np.float32(0.05)
    step = np.array([output_scale / wanted], "float32")
    snapped, moved = ties.snap_to_kernels(step, output_scale, 6.0, move)
    if move == "down" and wanted < 6:
        np.testing.assert_allclose(output_scale / snapped, 6, rtol=1e-4)
        assert np.asarray(moved) == 1
    else:
        assert np.asarray(snapped) == step and np.asarray(moved) == 0


def test_integers_in_proportion_move_a_gain_by_a_percent_at_most():
    steps = np.exp(np.random.default_rng(0).uniform(-11, 0.5, 4000)).astype("float32")
    moved, integers, is_moved = ties.snap_by_integers(steps, np.full_like(steps, 127), np.float32(1))
    assert np.array_equal(is_moved == 1, (steps <= 1) & (steps * 8192 >= 1))
    inside = is_moved == 1
    np.testing.assert_allclose((integers * moved / (127 * steps))[inside], 1, atol=0.0125)
    assert np.all(integers <= 127) and np.all(integers[inside] >= 42) and np.all(integers[~inside] == 127)
    divisors = np.unique(np.round(1 / moved[inside]))
    assert divisors[:4].tolist() == [1, 2, 6, 10] and np.all(divisors[1:] % 2 == 0)
    in_tensors = ties.snap_by_integers(tf.constant(steps), tf.fill(steps.shape, 127.0), tf.constant(1.0))
    for ours, theirs in zip(in_tensors, (moved, integers, is_moved), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("move", ["up", "down", "nearest"])
def test_snapping_is_the_same_in_xla(move):
    steps = np.exp(np.random.default_rng(0).uniform(-10, 0, 2000)).astype("float32")
    snap = lambda x: ties.snap_to_kernels(x, tf.constant(0.7), 6.0, move)[0]
    np.testing.assert_allclose(snap(steps), tf.function(snap, jit_compile=True)(steps), rtol=3e-7)


@pytest.mark.parametrize(
    "count, has",
    [
        (4, False),
        (5, True),
        (8, False),
        (9, True),
        (14, False),
        (15, False),
        (16, True),
        (49, True),
        (64, True),
        (100, True),
        (127, False),
        (1024, True),
    ],
)
def test_means_have_divisors_where_their_count_is_not_just_below_a_power_of_two(count, has):
    assert ties.has_divisors(count) == has


@pytest.mark.parametrize("count", [16, 49, 64, 100, 1024])
def test_divisors_of_means_make_steps_smaller_and_stand_far_from_powers_of_two(count):
    """They are even, and in each octave above the share of the count: a range that is moved must hold what it held."""
    wanted = np.exp(np.random.default_rng(1).uniform(np.log(2), np.log(8000), 2000)).astype("float32")
    divisor = np.asarray(ties.kernel_divisor(wanted, ties.FEWEST_STEPS, "down", count))
    assert np.all(divisor % 2 == 0) and np.all(divisor >= wanted)
    octave = 2 ** np.ceil(np.log2(divisor))
    assert np.all(divisor <= 0.95 * octave) and np.all(divisor > 0.5 * octave)
    assert np.all(divisor >= count / 2 ** count.bit_length() * octave)
