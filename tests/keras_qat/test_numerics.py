"""The arithmetic against other implementations of it: TensorFlow's kernel, and the integer kernels in plain numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_qat import numerics
from keras_qat.spec import Spec
from tflite_export import Tensor

ACTIVATIONS, WEIGHTS = Spec(), Spec(symmetric=True, per_channel=True)
BITS = (2, 4, 8)


def random_ranges(count=300, seed=0):
    """Ranges of all magnitudes that hold zero: on both sides of it, or ending there."""
    generator = np.random.default_rng(seed)
    size = 10 ** generator.uniform(-4, 4, (count, 2))
    ends = size * generator.choice([0.0, 1.0, 1.0], (count, 2)) + [1e-3, 0] * size
    return [(np.float32(-low), np.float32(high)) for low, high in ends]


RANGES = [
    *random_ranges(),
    *[(np.float32(low), np.float32(high)) for low, high in ((-1, 1), (-1, 0), (0, 1), (0, 255), (0, 255 / 256))],
]


def on_tensors(low, high, spec):
    scale, zero_point = numerics.scale_and_zero_point(tf.constant(low), tf.constant(high), spec)
    return np.float32(scale), int(zero_point)


# --- scale and zero point --------------------------------------------------------------------------------------------


MODES = {
    "eager": lambda function: function,
    "graph": tf.function,
    "xla": lambda function: tf.function(function, jit_compile=True),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bits", BITS)
def test_scale_and_zero_point_are_the_same_in_numpy_and_on_tensors(bits, mode):
    spec = Spec(bits)
    on_tensor = mode(lambda low, high: numerics.scale_and_zero_point(low, high, spec))
    different = []
    for low, high in RANGES:
        scale, zero_point = numerics.scale_and_zero_point(low, high, spec)
        assert isinstance(zero_point, int) and scale.dtype == np.float32
        other_scale, other_zero_point = on_tensor(tf.constant(low), tf.constant(high))
        assert zero_point == int(other_zero_point)
        if scale != other_scale.numpy():
            different.append((low, high, scale, other_scale.numpy()))
    assert not different, f"{len(different)} of {len(RANGES)}: {different[:3]}"


@pytest.mark.parametrize("bits", BITS)
def test_grid_is_that_of_tensorflows_kernel(bits):
    """Bit for bit: each of the kernel's values is `(q - zero_point) · scale`, from qmin to qmax."""
    spec = Spec(bits)
    for low, high in RANGES:
        scale, zero_point = numerics.scale_and_zero_point(low, high, spec)
        integers = np.arange(spec.qmin, spec.qmax + 1)
        grid = (integers - zero_point).astype(np.float32) * scale
        span = high - low
        outside = [low - span, high + span]
        ends = tf.quantization.fake_quant_with_min_max_vars(outside, low, high, num_bits=bits)
        np.testing.assert_array_equal(ends, grid[[0, -1]], f"ends of {low}..{high}")
        values = tf.quantization.fake_quant_with_min_max_vars(grid, low, high, num_bits=bits).numpy()
        assert np.array_equal(np.round((values / scale).astype(np.float64)) + zero_point, integers), (low, high)
        # The kernel adds the lowest value to a multiple of the scale: a float32 rounding more than `(q - z) · scale`.
        np.testing.assert_allclose(values, grid, rtol=0, atol=float(span) * 1.2e-7)


@pytest.mark.parametrize("bits", BITS)
def test_grid_of_a_wrong_zero_point_would_be_noticed(bits):
    """The test above can fail: shifted by one step the ends of the grid are not the kernel's."""
    spec = Spec(bits)
    low, high = np.float32(-1), np.float32(2)
    scale, zero_point = numerics.scale_and_zero_point(low, high, spec)
    ends = tf.quantization.fake_quant_with_min_max_vars([-9.0, 9.0], low, high, num_bits=bits).numpy()
    assert ends[0] == np.float32(spec.qmin - zero_point) * scale
    assert ends[0] != np.float32(spec.qmin - zero_point - 1) * scale


@pytest.mark.parametrize(
    "low, high, scale, zero_point",
    [
        (0, 255, 1, -128),
        (0, 255 / 256, 1 / 256, -128),
        (-1, 127 / 128, 1 / 128, 0),
        (-128, 127, 1, 0),
        (-255, 0, 1, 127),
    ],
)
def test_known_grids(low, high, scale, zero_point):
    assert numerics.scale_and_zero_point(np.float32(low), np.float32(high), ACTIVATIONS) == (scale, zero_point)
    assert on_tensors(np.float32(low), np.float32(high), ACTIVATIONS) == (scale, zero_point)


@pytest.mark.parametrize(
    "low, high", [(0, 0), (1, 2), (-2, -1), (1e-9, 2e-9), (-1e-9, 1e-9), (3, 3), (-0.0, 0.0), (-5, 7)]
)
def test_widened_ranges_hold_zero_and_have_a_width(low, high):
    wide = [float(end) for end in numerics.widen(tf.constant(low, tf.float32), tf.constant(high, tf.float32))]
    low, high = float(np.float32(low)), float(np.float32(high))
    assert wide[0] <= min(low, 0) and wide[1] >= max(high, 0)
    assert wide[1] - wide[0] >= 0.99 * numerics.SMALLEST_SPAN
    scale, zero_point = numerics.scale_and_zero_point(*map(np.float32, wide), ACTIVATIONS)
    assert scale >= 2**-26 and -128 <= zero_point <= 127
    if high - low > 1 and low <= 0 <= high:
        assert wide == [low, high]


# --- fake quantization -----------------------------------------------------------------------------------------------


def by_formula(x, low, high, spec):
    scale, zero_point = numerics.scale_and_zero_point(low, high, spec)
    exact = np.asarray(x, np.float64) / scale
    return np.clip(np.floor(exact + 0.5) + zero_point, spec.qmin, spec.qmax), exact, scale, zero_point


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_fake_quant_value_and_gradient_follow_the_formula(bits, nonnegative):
    generator, spec = np.random.default_rng(3), Spec(bits)
    for low, high in RANGES[:60]:
        low = np.float32(0) if nonnegative else low
        if low == high:
            continue
        x = generator.uniform(0 if nonnegative else 1.5 * low - high, 1.5 * high - low, 500).astype("float32")
        upstream = generator.normal(size=500).astype("float32")
        variable = tf.Variable(x)
        with tf.GradientTape() as tape:
            y = numerics.fake_quant(variable, tf.constant(low), tf.constant(high), spec, nonnegative)
        integers, exact, scale, zero_point = by_formula(x, low, high, spec)
        is_clear = np.abs(exact % 1 - 0.5) > 1e-3  # float32 decides ties its own way
        np.testing.assert_array_equal((np.round(y / scale) + zero_point)[is_clear], integers[is_clear])
        gradient = tape.gradient(y, variable, upstream)
        np.testing.assert_array_equal(gradient, upstream * ((low <= x) & (x <= high)))


@pytest.mark.parametrize("precise", [True, False])
def test_precise_fake_quant_puts_values_next_to_ties_where_the_file_puts_them(precise):
    different = 0
    for low, high in RANGES[:60]:
        scale, zero_point = numerics.scale_and_zero_point(low, high, ACTIVATIONS)
        ties = (np.arange(-127.5, 127.5) - zero_point) * np.float64(scale)
        x = np.concatenate([np.nextafter(np.float32(ties), np.float32(side)) for side in (-np.inf, 0, np.inf)])
        y = numerics.fake_quant(x, tf.constant(low), tf.constant(high), ACTIVATIONS, precise=precise)
        file = Tensor("x", (1,), "int8", (float(scale),), zero_point).quantize(x)
        different += np.sum(np.round(y / scale) + zero_point != file)
    assert (different == 0) == precise


def test_fake_quant_gives_no_gradient_to_its_range():
    low, high = tf.Variable(-1.0), tf.Variable(1.0)
    with tf.GradientTape() as tape:
        y = numerics.fake_quant(tf.constant([0.3, 5.0]), low, high, ACTIVATIONS)
    assert tape.gradient(y, [low, high]) == [None, None]


def test_fake_quant_is_idempotent():
    x = np.random.default_rng(0).normal(size=1000).astype("float32")
    for low, high in RANGES[:40]:
        once = numerics.fake_quant(x, tf.constant(low), tf.constant(high), ACTIVATIONS)
        np.testing.assert_array_equal(once, numerics.fake_quant(once, tf.constant(low), tf.constant(high), ACTIVATIONS))


@pytest.mark.parametrize("ties", ["away", "up"])
@pytest.mark.parametrize("count", [2, 4, 9, 16, 48, 2500])
def test_ties_of_averages_are_broken_as_the_kernels_do(count, ties):
    """AVERAGE_POOL_2D divides the sum of int8 values by their number, and rounds half away from the integer 0."""
    low, high = np.float32(-0.7), np.float32(1.9)
    scale, zero_point = numerics.scale_and_zero_point(low, high, ACTIVATIONS)
    generator = np.random.default_rng(count)
    on_ties = count * np.arange(-128, 127) + count // 2
    sums = np.concatenate([on_ties, generator.integers(-128 * count, 127 * count, 4000)])
    up = (sums + count // 2) // count
    expected = up if ties == "up" else np.where(sums >= 0, up, -((-sums + count // 2) // count))
    averages = ((sums / count - zero_point) * scale).astype("float32")
    bounds = tf.constant(low), tf.constant(high)

    def integers(x):
        return np.round(numerics.fake_quant(x, *bounds, ACTIVATIONS) / scale) + zero_point

    np.testing.assert_array_equal(integers(numerics.with_ties_broken(averages, *bounds, ACTIVATIONS, ties)), expected)
    if count % 2 == 0:
        assert not np.array_equal(integers(averages), expected)  # without it they differ


# --- weights ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "dense": ((24, 10), (-1,), (0,)),
    "conv1d": ((3, 6, 10), (-1,), (0, 1)),
    "conv2d": ((3, 3, 6, 10), (-1,), (0, 1, 2)),
    "depthwise": ((3, 3, 6, 2), (2, 3), (0, 1)),
    "transposed": ((3, 3, 10, 6), (2,), (0, 1, 3)),
    "scale": ((12,), (0,), ()),
}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape, channel_axes, shared", SHAPES.values(), ids=SHAPES)
def test_weights_are_rounded_per_output_channel(shape, channel_axes, shared, bits, per_channel):
    generator = np.random.default_rng(1)
    weights = generator.normal(size=shape) * 10 ** generator.uniform(-3, 3, [shape[axis] for axis in range(len(shape))])
    weights = weights.astype("float32")
    spec = Spec(bits, symmetric=True, per_channel=per_channel)
    scale = np.asarray(numerics.weight_scale(weights, spec, channel_axes))
    largest = np.abs(weights).max(axis=shared if per_channel else None, keepdims=True)
    assert scale.shape == largest.shape and scale.dtype == np.float32
    in_range = largest > 1e-6 * largest.max()
    np.testing.assert_allclose(scale[in_range], (largest / spec.qmax)[in_range], rtol=2e-7)
    integers = np.asarray(numerics.weight_integers(weights, scale, spec))
    np.testing.assert_array_equal(integers, np.round(weights / scale))
    assert np.all(np.abs(integers) <= spec.qmax)  # never qmin - 1, which kernels do not take
    peaks = np.abs(integers).max(axis=shared if per_channel else None, keepdims=True)
    np.testing.assert_array_equal(peaks[in_range], spec.qmax)
    np.testing.assert_array_equal(numerics.fake_quant_weights(weights, scale, spec), integers * scale)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_as_a_tensor_give_the_same_to_the_bit(bits):
    """Training in XLA with bits that a schedule moves, and the integers that are written."""
    weights = np.random.default_rng(bits).normal(size=(64, 64)).astype("float32")
    spec = Spec(bits, symmetric=True, per_channel=True)
    scale = numerics.weight_scale(weights, spec, (-1,))
    expected = [scale, numerics.weight_integers(weights, scale, spec)]

    def on_tensors(weights, levels):
        scale = numerics.weight_scale(weights, spec, (-1,), levels)
        return scale, numerics.weight_integers(weights, scale, spec, levels)

    for jit_compile in (False, True):
        found = tf.function(on_tensors, jit_compile=jit_compile)(weights, tf.constant(numerics.levels_of(spec)))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_gradient_of_weights_is_straight_through():
    weights, upstream = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    variable = tf.Variable(weights)
    with tf.GradientTape() as tape:
        y = numerics.fake_quant_weights(variable, numerics.weight_scale(weights, WEIGHTS, (-1,)), WEIGHTS)
    np.testing.assert_array_equal(tape.gradient(y, variable, upstream), upstream)


@pytest.mark.parametrize("dead", [0.0, 1e-30, -1e-12])
def test_dead_channels_get_a_finite_scale_and_no_weight(dead):
    weights = np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype("float32")
    weights[..., 2] = dead
    scale = np.asarray(numerics.weight_scale(weights, WEIGHTS, (-1,)))
    assert np.all(scale > 0) and scale.max() / scale.min() < 1e6
    assert not np.any(numerics.weight_integers(weights, scale, WEIGHTS)[..., 2])
    alone = np.asarray(numerics.weight_scale(weights[..., [0, 1, 3, 4]], WEIGHTS, (-1,)))
    np.testing.assert_array_equal(scale[..., [0, 1, 3, 4]], alone)  # the living are left alone


def test_tensor_of_zeros():
    scale = np.asarray(numerics.weight_scale(np.zeros((3, 4), "float32"), WEIGHTS, (-1,)))
    assert np.all(scale > 0) and np.all(np.isfinite(1 / scale))
    assert not np.any(numerics.fake_quant_weights(np.zeros((3, 4), "float32"), scale, WEIGHTS))


# --- kernels ---------------------------------------------------------------------------------------------------------


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
    snapped, moved = map(np.asarray, numerics.snap_to_kernels(steps, output_scale, fewest, move))
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
    ratio = np.asarray(numerics.snap_to_kernels(steps, output_scale, fewest, move)[0]) / steps
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
    snapped, moved = numerics.snap_to_kernels(step, output_scale, 6.0, move)
    if move == "down" and wanted < 6:
        np.testing.assert_allclose(output_scale / snapped, 6, rtol=1e-4)
        assert np.asarray(moved) == 1
    else:
        assert np.asarray(snapped) == step and np.asarray(moved) == 0


def test_integers_in_proportion_move_a_gain_by_a_percent_at_most():
    steps = np.exp(np.random.default_rng(0).uniform(-11, 0.5, 4000)).astype("float32")
    moved, integers, is_moved = numerics.snap_by_integers(steps, np.full_like(steps, 127), np.float32(1))
    assert np.array_equal(is_moved == 1, (steps <= 1) & (steps * 8192 >= 1))
    inside = is_moved == 1
    np.testing.assert_allclose((integers * moved / (127 * steps))[inside], 1, atol=0.0125)
    assert np.all(integers <= 127) and np.all(integers[inside] >= 42) and np.all(integers[~inside] == 127)
    divisors = np.unique(np.round(1 / moved[inside]))
    assert divisors[:4].tolist() == [1, 2, 6, 10] and np.all(divisors[1:] % 2 == 0)
    in_tensors = numerics.snap_by_integers(tf.constant(steps), tf.fill(steps.shape, 127.0), tf.constant(1.0))
    for ours, theirs in zip(in_tensors, (moved, integers, is_moved), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("move", ["up", "down", "nearest"])
def test_snapping_is_the_same_in_xla(move):
    steps = np.exp(np.random.default_rng(0).uniform(-10, 0, 2000)).astype("float32")
    snap = lambda x: numerics.snap_to_kernels(x, tf.constant(0.7), 6.0, move)[0]
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
    assert numerics.has_divisors(count) == has


@pytest.mark.parametrize("count", [16, 49, 64, 100, 1024])
def test_divisors_of_means_make_steps_smaller_and_stand_far_from_powers_of_two(count):
    """They are even, and in each octave above the share of the count: a range that is moved must hold what it held."""
    wanted = np.exp(np.random.default_rng(1).uniform(np.log(2), np.log(8000), 2000)).astype("float32")
    divisor = np.asarray(numerics.kernel_divisor(wanted, numerics.FEWEST_STEPS, "down", count))
    assert np.all(divisor % 2 == 0) and np.all(divisor >= wanted)
    octave = 2 ** np.ceil(np.log2(divisor))
    assert np.all(divisor <= 0.95 * octave) and np.all(divisor > 0.5 * octave)
    assert np.all(divisor >= count / 2 ** count.bit_length() * octave)


# --- accumulators and batch norms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "multiplier, bias", [(1.0, 0.0), (-0.3, 2.0), (0.0, 5.0), (1e-12, 5.0), (0.0, 0.0), (1e-30, 1e-30)]
)
def test_bias_fits_into_int32_whatever_the_multiplier(multiplier, bias):
    arguments = [tf.constant([value], tf.float32) for value in (0.02, 0.003, multiplier, bias)]
    step, kept = (value.numpy() for value in numerics.accumulator_step(*arguments))
    assert step > 0 and abs(bias / step) <= 2**30
    if abs(multiplier) > 0.1:
        np.testing.assert_allclose(step, 0.02 * 0.003 * abs(multiplier), rtol=1e-6)
        assert kept == 1


@pytest.mark.parametrize("scale, center", [(True, True), (True, False), (False, True), (False, False)])
def test_batch_norm_as_multiplier_and_offset(scale, center):
    layer = keras.layers.BatchNormalization(scale=scale, center=center, epsilon=1e-2)
    layer.build((None, 6))
    generator = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(generator.uniform(0.2, 2, 6) * (1 if "variance" in weight.path else generator.choice([-1, 1], 6)))
    x = generator.normal(size=(9, 6)).astype("float32")
    multiplier, offset = numerics.batch_norm_multiplier_and_offset(layer)
    np.testing.assert_allclose(x * multiplier + offset, layer(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale, center", [(True, True), (False, True), (True, False)])
def test_fused_batch_norm_does_what_keras_does(scale, center, frozen):
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(9, 5, 5, 6)) * 3 + 1, tf.float32)
    upstream = tf.constant(generator.normal(size=x.shape), tf.float32)
    found = []
    for fused in (False, True):
        layer = keras.layers.BatchNormalization(scale=scale, center=center, momentum=0.7)
        layer.build(x.shape)
        for weight, values in zip(layer.weights, np.random.default_rng(1).uniform(0.2, 2, (4, 6)), strict=False):
            weight.assign(values)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = numerics.fused_batch_norm(layer, x, frozen) if fused else layer(x, training=not frozen)
        gradients = tape.gradient(y, [x, *(weight.value for weight in layer.trainable_weights)], upstream)
        found.append([y, *gradients, *layer.weights])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
