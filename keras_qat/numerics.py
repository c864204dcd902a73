"""The one home of the arithmetic: ranges → scale and zero point, real values → the integer grid.

Everything here is a pure function. The functions on tensors work in float32 exactly as the ones on numpy arrays do, so
that the integers `freeze` writes are those that training saw.
"""

import numpy as np
import tensorflow as tf

from keras_qat.arrays import ops
from keras_qat.spec import Spec
from keras_qat.traced_once import traced_once

# Ranges narrower than this (a dead layer, a constant zero) are widened to it. It keeps scales positive, and above the
# 2^-26 below which the SOFTMAX of TFLM and of LiteRT's reference kernels aborts the process.
SMALLEST_SPAN = 4e-6
# The scale of a channel without any weight. Small against every real one: XNNPACK refuses s_in·s_w/s_out ≥ 256.
_SCALE_OF_NOTHING = 1e-10
# Biases are kept below 2^30 steps of their accumulator: the rest of int32 is for the sums.
_LARGEST_BIAS = 2.0**30
# XNNPACK refuses accumulators whose step is 256 of the output's. With 255 any but 0 is outside of the output's range too.
LARGEST_MULTIPLIER = 255.0


def widen(low, high):
    """Makes a range hold zero and have a width: `min(low, 0)`, `max(high, 0)`, at least `SMALLEST_SPAN` apart."""
    low, high = ops.minimum(low, 0.0), ops.maximum(high, 0.0)
    return low, ops.maximum(high, low + SMALLEST_SPAN)


@traced_once
def scale_and_zero_point(low, high, spec: Spec):
    """The grid on which TensorFlow's fake quantization kernel puts values of the range `low..high`.

    `scale = (high - low) / (2^bits - 1)`, `zero_point = qmin + clip(round(-low / scale), 0, 2^bits - 1)`: float32
    divisions, rounded half away from zero, as that kernel does it. `low <= 0 <= high` is required (see `widen`).
    A symmetric grid has `scale = max(-low, high) / qmax` and zero point 0.

    Args:
        low, high: Scalars: numpy floats, or tensors.
        spec: The bits.

    Returns:
        `(scale, zero_point)`, numpy float32 and int for numpy input, else float32 tensors.
    """
    is_numpy = isinstance(low, (float, np.floating))
    if spec.symmetric and is_numpy:
        return np.float32(max(-np.float64(low), np.float64(high)) / spec.qmax), 0
    if spec.symmetric:
        return ops.cast(ops.cast(ops.maximum(-low, high), "float64") / float(spec.qmax), "float32"), ops.zeros(())
    steps = np.float32(2**spec.bits - 1)
    if is_numpy:
        scale = (np.float32(high) - np.float32(low)) / steps
        zero = np.floor(-np.float32(low) / scale + np.float32(0.5))
        return scale, int(np.clip(zero, 0, steps)) + spec.qmin
    # In float64, because graphs turn a float32 division by a constant into a multiplication, whose last bit differs.
    scale = ops.cast(ops.cast(high - low, "float64") / float(steps), "float32")
    return scale, ops.clip(ops.floor(-low / scale + 0.5), 0, steps) + spec.qmin


@traced_once
def grid(low, high, spec: Spec):
    """Returns a range, widened, and the scale of its grid: `(low, high, scale)`."""
    low, high = widen(low, high)
    return low, high, scale_and_zero_point(low, high, spec)[0]


def fake_quant(x, low, high, spec: Spec, nonnegative: bool = False, precise: bool = False):
    """Rounds `x` to the grid of the range `low..high`; the result stays float.

    Formula: `(clip(floor(x / scale + 0.5) + zero_point, qmin, qmax) - zero_point) · scale`.
    Gradient: 1 where `low <= x <= high`, else 0 (straight through, clipped).

    Args:
        x: Float tensor.
        low, high: Scalar tensors with `low <= 0 <= high`, which get no gradient.
        spec: The bits.
        nonnegative: `x >= 0` is known (behind a relu), which saves a pass over the gradient.
        precise: In float64, as `tflite_export.Tensor.quantize` does it, instead of by TensorFlow's kernel. The two part
            at about one in a million of arbitrary real numbers, those next to a tie.
    """
    low, high = tf.stop_gradient(low), tf.stop_gradient(high)
    if spec.symmetric:
        high = tf.maximum(-low, high)
        low = -high

    @tf.custom_gradient
    def straight_through(values):
        if spec.symmetric:
            scale, _ = scale_and_zero_point(low, high, spec)
            rounded = ops.clip(ops.floor(values / scale + 0.5), spec.qmin, spec.qmax) * scale
        elif precise:
            rounded = _fake_quant_in_float64(values, low, high, spec)
        else:
            rounded = tf.quantization.fake_quant_with_min_max_vars(values, low, high, num_bits=spec.bits)

        def gradient(upstream):
            inside = values <= high
            if not nonnegative:
                inside = tf.logical_and(inside, values >= low)
            return upstream * tf.cast(inside, upstream.dtype)

        return rounded, gradient

    return straight_through(tf.convert_to_tensor(x))


def _fake_quant_in_float64(x, low, high, spec: Spec):
    scale, zero_point = (ops.cast(value, "float64") for value in scale_and_zero_point(low, high, spec))
    lowest, highest = ((bound - zero_point) * scale for bound in (spec.qmin, spec.qmax))
    steps = ops.floor((ops.clip(ops.cast(x, "float64"), lowest, highest) - lowest) / scale + 0.5)
    return ops.cast(steps + spec.qmin - zero_point, "float32") * ops.cast(scale, "float32")


def with_ties_broken(x, low, high, spec: Spec, ties: str):
    """Moves `x` by a hair so that `fake_quant` rounds ties as a kernel does: always up, or away from the integer zero.

    AVERAGE_POOL_2D divides the sum of int8 values and rounds half away from the *integer* zero. In float a tie is never
    hit exactly; a shift of 1/5000 step decides it, and moves nothing else for windows of up to 2,500 values.
    """
    scale, zero_point = scale_and_zero_point(low, high, spec)
    hair = scale * 2e-4
    if ties == "up":
        return x + ops.stop_gradient(hair)
    return x + ops.stop_gradient(ops.where(x >= -zero_point * scale, hair, -hair))


def levels_of(spec: Spec) -> np.ndarray:
    """`[qmax, 1 / qmax]`: what the arithmetic of weights wants to know of the number of bits."""
    return np.array([spec.qmax, 1.0 / spec.qmax], np.float32)


@traced_once
def weight_scale(weights, spec: Spec, channel_axes: tuple[int, ...], levels=None):
    """`max|w| / qmax` per output channel (or per tensor), with a floor for channels without any weight.

    An empty channel takes the scale of the largest one, which costs nothing and keeps its bias precise.

    Args:
        weights: Float tensor.
        spec: The bits, and whether channels have scales of their own.
        channel_axes: The axes that together number them.
        levels: A tensor like `levels_of(spec)` where the number of bits changes.

    Returns:
        A float32 tensor with as many axes as `weights`, of size 1 where it is shared.
    """
    channels = {axis % len(weights.shape) for axis in channel_axes} if spec.per_channel else set()
    shared = [axis for axis in range(len(weights.shape)) if axis not in channels]
    largest = ops.max(ops.abs(weights), axis=shared, keepdims=True)
    qmax, one_part = ops.unstack(levels_of(spec) if levels is None else levels)
    substitute = ops.maximum(ops.max(largest), _SCALE_OF_NOTHING * qmax)
    # Multiplied, not divided: XLA turns a division by a constant into this, and both must agree to the bit.
    return ops.where(largest > substitute * 1e-6, largest, substitute) * one_part


def weight_integers(weights, scale, spec: Spec, levels=None):
    """`clip(round_half_even(w / scale), -qmax, qmax)`: the integers of the file, as floats."""
    qmax = spec.qmax if levels is None else levels[0]
    return ops.clip(ops.round(weights / scale), -qmax, qmax)


def fake_quant_weights(weights, scale, spec: Spec, levels=None):
    """`weight_integers · scale`. Gradient: 1, since no weight lies outside of its own range."""
    weights, levels = tf.convert_to_tensor(weights), None if levels is None else tf.convert_to_tensor(levels)

    @tf.custom_gradient
    def straight_through(values):
        return weight_integers(values, scale, spec, levels) * scale, lambda upstream: upstream

    return straight_through(weights)


@traced_once
def accumulator_step(input_scale, scale, multiplier, bias):
    """The real value of one step of a kernel's int32 accumulator, per channel: `|s_in · s_w · multiplier|`.

    `multiplier` is what a folded batch norm (or input scaling) multiplies a channel with. Where it is almost nothing, no
    int32 can hold the bias in such steps. They are made larger, and the integers of the weights as much smaller.

    Returns:
        The steps, and for each channel the factor of its weights' integers: 1.0, or less where steps were made larger.
    """
    step = ops.abs(input_scale * scale * multiplier)
    smallest = ops.abs(bias) * (1.0 / _LARGEST_BIAS) + _SCALE_OF_NOTHING * _SCALE_OF_NOTHING
    return ops.maximum(step, smallest), ops.minimum(step / smallest, 1.0)
