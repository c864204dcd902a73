"""The arithmetic against other implementations of it: TensorFlow's kernel, and the integer kernels in plain numpy."""

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


# --- accumulators -----------------------------------------------------------------------------------------------------


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
