"""Kernels that approximate, step by step as TFLite computes them, for the QAT model's inference.

Integers come and go as float32 tensors. In between everything is float64, which holds every int32 exactly.
"""

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


def _fixed_point_16(real):
    """A positive number as `multiplier / 2^15 · 2^exponent`, the multiplier from 2^14 to 2^15 - 1."""
    real = ops.cast(real, "float64")
    exponent = ops.floor(ops.log2(real)) + 1.0
    exponent = exponent + ops.cast(real >= _power(exponent), "float64")
    exponent = exponent - ops.cast(real < _power(exponent - 1.0), "float64")
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


def _divide_by_power(x, exponent):
    """`x / 2^exponent`, halves away from zero."""
    return ops.sign(x) * ops.floor(ops.abs(x) / _power(exponent) + 0.5)
