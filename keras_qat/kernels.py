"""Kernels that approximate, step by step as TFLite computes them, for the QAT model's inference.

Integers come and go as float32 tensors. In between everything is float64, which holds every int32 exactly.
"""

import numpy as np
from keras import ops


def hard_swish(integers, input_scale, output_scale):
    """HARD_SWISH: `x · relu6(x + 3) / 6` in 16-bit fixed point, the same on all runtimes.

    Args:
        integers: Of the input, its zero point taken off.
        input_scale, output_scale: Of the grids.

    Returns:
        Integers of the output, before its zero point is added.
    """
    fine = ops.cast(integers, "float64") * 128.0
    fine_scale = input_scale * (1.0 / 128.0)
    output_multiplier, output_exponent = _fixed_point_16(fine_scale / output_scale)
    gate_multiplier, gate_exponent = _fixed_point_16(fine_scale / (3.0 / 32768.0))
    value = _rounding_high_product(fine, output_multiplier)

    left = ops.maximum(gate_exponent, 0.0)
    gate = _saturate(fine * _power(ops.maximum(left - 1.0, 0.0)))
    gate = _rounding_high_product(gate, gate_multiplier)
    gate = ops.where(left > 0, _saturate(gate * 2.0), _divide_by_power(gate, ops.maximum(-gate_exponent, 0.0)))
    gate = ops.floor((gate + 32768.0) * 0.5)

    product = _truncate(gate * value / 32768.0)
    return ops.cast(_divide_by_power(product, -output_exponent), "float32")


def rsqrt(source, grid, hair: float = 0.0) -> np.ndarray:
    """RSQRT of all 256 integers: a root in 20 bits, times a multiplier, rounded twice.

    Args:
        source, grid: The tensors it reads and writes (`tflite_export.Tensor`).
        hair: Added to the roots: the kernel's own are off by a few hundredths.
    """
    integers = np.maximum(np.arange(-128.0, 128.0) - source.zero_point, 0.0)
    with np.errstate(divide="ignore"):
        roots = np.minimum(np.floor(2.0**20 / np.sqrt(integers) + 0.5 + hair), 2.0**31)
    multiplier, exponent = np.frexp(1.0 / (np.sqrt(np.float64(source.scale[0])) * grid.scale[0] * 2.0**20))
    steps = np.floor(np.floor(roots * multiplier + 0.5) * 2.0**exponent + 0.5)
    return np.clip(steps + grid.zero_point, -128, 127).astype(int)


def softmax_16(integers, scale):
    """SOFTMAX of 16-bit integers along the last axis: two look-ups with 512 linear pieces each.

    As LiteRT computes it. TensorFlow Lite Micro makes its tables in float32 and is off by 1 in 0.2 % of the results.

    Args:
        integers: Of the input, whose zero point is 0.
        scale: Of its grid, times beta.

    Returns:
        Integers of the output, whose scale is 1/32768.
    """
    integers = ops.cast(integers, "float64")
    below_best = integers - ops.max(integers, axis=-1, keepdims=True)
    multiplier, exponent = _fixed_point_32(ops.cast(scale, "float64") * (65535.0 / 10.0))
    steps = _rounding_high_product_32(below_best * _power(ops.maximum(exponent, 0.0)), multiplier)
    exponentials = _interpolate(_divide_by_power(steps, ops.maximum(-exponent, 0.0)) + 32767.0, _EXPONENTIALS)
    total = ops.sum(exponentials, axis=-1, keepdims=True)
    digits = _exponent_of(total)
    mantissa = ops.floor((total * _power(31.0 - digits) + 8192.0) / 16384.0) - 98304.0
    product = exponentials * _interpolate(mantissa, _RECIPROCALS)
    shift = digits - 1.0
    return ops.cast(ops.clip(ops.floor(product / _power(shift) + 0.5), 0.0, 32767.0), "float32")


def requantized_16(sums, ratio):
    """What 16-bit matmuls and dense layers make of their accumulators, by a multiplier of 15 bits.

    Args:
        sums: The accumulators.
        ratio: The real value of one step of them / the scale of the output.

    Returns:
        Integers of the output, whose zero point is 0.
    """
    multiplier, shift = _of_15_bits(ratio)
    return ops.cast(ops.floor(ops.cast(sums, "float64") * multiplier / _power(shift) + 0.5), "float32")


def snap_to_15_bits(ratio):
    """The ratio moved by at most 1/16384 of it, to where 16-bit dense layers round alike everywhere.

    LiteRT has multipliers of 31 bits and TensorFlow Lite Micro of 15: it has to be one of these. An odd one, because they
    round ties of negative numbers apart, and with an even one there are more of those.
    """
    multiplier, shift = _of_15_bits(ratio)
    return (2.0 * ops.floor(0.5 * multiplier) + 1.0) / _power(shift)


def _of_15_bits(ratio):
    """A positive number as `multiplier / 2^shift`, the multiplier from 2^14 to 2^15 - 1."""
    multiplier, exponent = _fixed_point_32(ratio)
    return ops.minimum(ops.floor((multiplier + 32768.0) / 65536.0), 32767.0), 15.0 - exponent


def _table(function, low: float, high: float) -> np.ndarray:
    """A function at 513 points, each moved so that the straight lines between them are closest to it."""
    points = np.linspace(low, high, 513)
    middles = points[:-1] + 0.5 * (high - low) / 512
    wanted, values = _rounded(function(middles) * 32768.0), _rounded(function(points) * 32768.0)
    between = _rounded((function(points[1:]) * 32768.0 + values[:-1]) / 2.0)
    values[:-1] -= _rounded((between - wanted) / 2.0)
    return np.clip(values, -32768.0, 32767.0)


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


_EXPONENTIALS = _table(np.exp, -10.0, 0.0)
_RECIPROCALS = _table(lambda x: 1.0 / (1.0 + x), 0.0, 1.0)


def _interpolate(x, table: np.ndarray):
    """The table's value between two points, for 16-bit numbers from the lowest to the highest."""
    x = _saturate(x)
    place = ops.floor(x / 128.0)
    index = ops.cast(place + 256.0, "int32")
    values = ops.convert_to_tensor(table, "float64")
    base = ops.take(values, index)
    slope = ops.take(values, index + 1) - base
    return base + ops.floor((slope * (x - 128.0 * place) + 64.0) / 128.0)


def _exponent_of(real):
    """How many binary digits are in front of the point: from 2^(n-1) up to below 2^n it is n."""
    exponent = ops.floor(ops.log2(real)) + 1.0
    exponent = exponent + ops.cast(real >= _power(exponent), "float64")
    return exponent - ops.cast(real < _power(exponent - 1.0), "float64")


def _fixed_point_32(real):
    """A positive number as `multiplier / 2^31 · 2^exponent`, the multiplier from 2^30 to 2^31 - 1."""
    real = ops.cast(real, "float64")
    exponent = _exponent_of(real)
    multiplier = ops.floor(real / _power(exponent) * 2.0**31 + 0.5)
    is_over = ops.cast(multiplier >= 2.0**31, "float64")
    return multiplier / (1.0 + is_over), exponent + is_over


def _fixed_point_16(real):
    """A positive number as `multiplier / 2^15 · 2^exponent`, the multiplier from 2^14 to 2^15 - 1."""
    real = ops.cast(real, "float64")
    exponent = _exponent_of(real)
    wide = ops.round(real / _power(exponent) * 2.0**31)
    return ops.minimum(ops.floor((wide + 32768.0) / 65536.0), 32767.0), exponent


def _power(exponent):
    return ops.power(ops.cast(2.0, "float64"), exponent)


def _saturate(x):
    return ops.clip(x, -32768.0, 32767.0)


def _truncate(x):
    return ops.sign(x) * ops.floor(ops.abs(x))


def _rounding_high_product(x, y):
    """`x · y / 2^15`, halves away from zero but for negative ones."""
    product = x * y  # where it is 0, the half that is added changes nothing
    return _truncate((product + 0.5 + 16383.5 * ops.sign(product)) / 32768.0)


def _rounding_high_product_32(x, y):
    """`x · y / 2^31`, halves away from zero but for negative ones."""
    product = x * y
    return _truncate((product + 0.5 + (2.0**30 - 0.5) * ops.sign(product)) / 2.0**31)


def _divide_by_power(x, exponent):
    """`x / 2^exponent`, halves away from zero."""
    return ops.sign(x) * ops.floor(ops.abs(x) / _power(exponent) + 0.5)
