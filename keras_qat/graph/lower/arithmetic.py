"""Arithmetic of keras.ops: with constants, with weights of custom layers, and what TFLite has only in parts."""

import functools
import math

import keras
import numpy as np
from keras import ops

from keras_qat.graph.lower import truths
from keras_qat.graph.lower.attention import added_mask
from keras_qat.graph.lower.weights import dense_of, is_learned, penalties
from keras_qat.graph.walk import key_of
from keras_qat.layers import ChannelScale
from keras_qat.primitives import Clamp, Constant

_BINARY = {
    "ops.Add": ops.add,
    "ops.Subtract": ops.subtract,
    "ops.Multiply": ops.multiply,
    "ops.Maximum": ops.maximum,
    "ops.Minimum": ops.minimum,
}
_MERGING = {name.removeprefix("ops."): function for name, function in _BINARY.items()}


def _binary(operation, args, kwargs):
    """`x + c`, `c - x`, `x * c`, `x / c` with numbers, arrays or weights; `x / y` of two tensors."""
    key = key_of(operation).replace("TrueDivide", "Divide")
    tensors = [isinstance(x, keras.KerasTensor) for x in args]
    if key in ("ops.Minimum", "ops.Maximum", "ops.Multiply") and (of_truths := truths.logic(operation, args, kwargs)):
        return of_truths
    if key in _BINARY and (of_numbers := truths.on_numbers(_BINARY[key], args)):
        return of_numbers
    if len(args) != 2 or all(tensors):
        return (lambda x, y: ops.multiply(x, ops.reciprocal(y))) if key == "ops.Divide" and len(args) == 2 else None
    at = tensors.index(True)
    x, operand = args[at], args[1 - at]
    values = np.asarray(operand, np.float32)
    if key == "ops.Divide":
        if at == 1:
            return lambda _, y: ops.multiply(ops.reciprocal(y), operand)
        key, values = "ops.Multiply", 1.0 / values
    masking = added_mask(values) if key == "ops.Add" and not is_learned(operand) else None
    if masking is not None:
        return lambda *arguments: masking(arguments[at])
    if values.ndim > len(x.shape) or (values.ndim == len(x.shape) and values.shape[0] != 1):
        return None  # its first axis would be the batch
    per_channel = values.size == 1 or values.shape[-1] == values.size == x.shape[-1]
    if key in ("ops.Maximum", "ops.Minimum"):
        with_constant = _limited(key, values) if values.size == 1 else None
    else:
        with_constant = _scaled(key, values, at, operand) if per_channel else None
    with_constant = with_constant or _with_tensor(key, values, at, operand)
    return lambda *arguments: with_constant(arguments[at])


def _merged(layer, args, kwargs):
    """A merging layer with constants among what it merges."""
    function = _MERGING[key_of(layer)]
    if all(isinstance(x, keras.KerasTensor) for x in args[0]):
        return None
    return lambda tensors: functools.reduce(function, tensors)


def _scaled(key, values, at, operand):
    """One number per channel, or one for all."""
    values, learned = np.ravel(values), is_learned(operand)
    if key == "ops.Multiply":
        return ChannelScale(values, trainable=learned, **penalties(operand, "kernel_"))
    if key == "ops.Add":
        return ChannelScale(1.0, values) if not learned else None
    if learned:
        return None
    return ChannelScale(-1.0, values) if at == 1 else ChannelScale(1.0, -values)


def _limited(key, values):
    limit = float(np.ravel(values)[0])
    if key == "ops.Maximum":
        return ops.relu if limit == 0 else lambda x: ops.clip(x, limit, 3e38)
    return lambda x: ops.clip(x, -3e38, limit)


def _with_tensor(key, values, at, operand):
    constant = Constant(values, trainable=is_learned(operand), name="constant", **penalties(operand))
    function = _BINARY[key]
    return lambda x: function(constant(x), x) if at == 1 else function(x, constant(x))


def _clip(operation, args, kwargs):
    """Limits around zero are the ends of the result's grid; others are looked up."""
    low, high = operation.x_min, operation.x_max
    if np.size(low) > 1 or np.size(high) > 1:
        return lambda x, *_: ops.minimum(ops.maximum(x, low), high)
    if low is None or high is None:
        return None
    if low == 0 and high > 1e30:
        return ops.relu
    return Clamp(float(low), float(high)) if low <= 0 <= high and high - low < 1e30 else None


def _square(operation, args, kwargs):
    return lambda x: ops.multiply(x, x)


def _power(operation, args, kwargs):
    exponent = args[1] if len(args) > 1 else kwargs.get("x2")
    if isinstance(exponent, keras.KerasTensor) or not np.all(np.asarray(exponent) == 2):
        return None
    return lambda x, *_: ops.multiply(x, x)


def _negative(operation, args, kwargs):
    return lambda x: ops.multiply(x, -1.0)


def _mean(operation, args, kwargs):
    """Over all axes between batch and channels it is a global average; over others a sum with weights."""
    axes = _reduced_axes(operation, args[0])
    is_global = axes == list(range(1, len(args[0].shape) - 1)) and len(args[0].shape) in (3, 4)
    return None if is_global else _weighed_sum(operation, args[0], axes, is_mean=True)


def _sum(operation, args, kwargs):
    return _weighed_sum(operation, args[0], _reduced_axes(operation, args[0]), is_mean=False)


def _reduced_axes(operation, x) -> list[int]:
    rank, axis = len(x.shape), operation.axis
    return sorted(one % rank for one in (range(rank) if axis is None else np.ravel(axis).tolist()))


def _weighed_sum(operation, x, axes, is_mean):
    """A FULLY_CONNECTED with equal weights over the axes, moved to the end. MEAN and SUM round differently everywhere."""
    if 0 in axes:
        return None
    kept = [axis for axis in range(len(x.shape)) if axis not in axes]
    count = math.prod(x.shape[axis] for axis in axes)
    dense = dense_of(np.full((count, 1), 1.0 / count if is_mean else 1.0), name=operation.name)
    order, flat = [*kept, *axes], (-1, *[x.shape[axis] for axis in kept[1:]], count)
    shape = [-1, *[1 if axis in axes else x.shape[axis] for axis in range(1, len(x.shape))]]
    if not operation.keepdims:
        shape = flat[:-1]

    def weighed_sum(x):
        x = x if order == sorted(order) else ops.transpose(x, order)
        return _reshaped(dense(_reshaped(x, flat)), shape)

    return weighed_sum


def _reshaped(x, shape):
    return x if tuple(x.shape[1:]) == tuple(shape[1:]) else ops.reshape(x, shape)


def _variance(operation, args, kwargs):
    axis, keepdims = operation.axis, operation.keepdims

    def variance(x):
        centred = x - ops.mean(x, axis=axis, keepdims=True)
        return ops.mean(ops.square(centred), axis=axis, keepdims=keepdims)

    return variance


def _deviation(operation, args, kwargs):
    return lambda x: ops.sqrt(ops.var(x, axis=operation.axis, keepdims=operation.keepdims))


def _log_sum_exp(operation, args, kwargs):
    axis, keepdims = operation.axis, operation.keepdims

    def log_sum_exp(x):
        largest = ops.max(x, axis=axis, keepdims=True)
        result = ops.log(ops.sum(ops.exp(x - largest), axis=axis, keepdims=True)) + largest
        return result if keepdims else ops.squeeze(result, axis=axis)

    return log_sum_exp


def _log_softmax(operation, args, kwargs):
    axis = operation.axis
    return lambda x: x - ops.logsumexp(x, axis=axis, keepdims=True)


def _matmul(operation, args, kwargs):
    """`x @ w` with an array or a weight is a Dense, or for each leading index of w a matrix of its own."""
    if len(args) != 2 or isinstance(args[1], keras.KerasTensor):
        return _from_the_left(*args) if len(args) == 2 and not isinstance(args[0], keras.KerasTensor) else None
    if not isinstance(args[0], keras.KerasTensor):
        return None
    values, learned = np.asarray(args[1], np.float32), is_learned(args[1])
    if values.ndim == 2:
        dense = dense_of(values, trainable=learned, name=operation.name, **penalties(args[1], "kernel_"))
        return lambda x, _: dense(x)
    if values.ndim == 1:
        dense = dense_of(values[:, None], trainable=learned, name=operation.name, **penalties(args[1], "kernel_"))
        return lambda x, _: ops.squeeze(dense(x), axis=-1)
    constant = Constant(values, trainable=learned, name="constant", **penalties(args[1]))
    return lambda x, _: ops.matmul(x, constant(x))


def _dot(operation, args, kwargs):
    if isinstance(args[-1], keras.KerasTensor):
        return None
    return lambda x, w: ops.matmul(x, w)


def _from_the_left(matrix, x):
    """`w @ x` is `xᵀ @ wᵀ`, transposed: a Dense along the axis before the last one."""
    values = np.asarray(matrix, np.float32)
    if values.ndim < 2 or values.size != math.prod(values.shape[-2:]) or len(x.shape) < 3:
        return None
    kernel = values.reshape(values.shape[-2:]).T
    dense = dense_of(kernel, trainable=is_learned(matrix), **penalties(matrix, "kernel_"))
    return lambda _, x: ops.swapaxes(dense(ops.swapaxes(x, -1, -2)), -1, -2)


def _cumulative_sum(operation, args, kwargs):
    """A product with a triangle of ones."""
    axis, size = operation.axis, operation.axis is not None and args[0].shape[operation.axis]
    if not size:
        return None
    triangle = np.triu(np.ones((size, size), np.float32))
    return lambda x: ops.moveaxis(ops.matmul(ops.moveaxis(x, axis, -1), triangle), -1, axis)


def _norm(operation, args, kwargs):
    order, options = operation.ord, {"axis": operation.axis, "keepdims": operation.keepdims}
    if isinstance(options["axis"], (list, tuple)) and len(options["axis"]) > 1 and order not in (None, "fro"):
        return None
    norms = {
        1: lambda x: ops.sum(ops.abs(x), **options),
        np.inf: lambda x: ops.max(ops.abs(x), **options),
        **dict.fromkeys([None, 2, "fro", "euclidean"], lambda x: ops.sqrt(ops.sum(ops.square(x), **options))),
    }
    return norms.get(order)


def _moments(operation, args, kwargs):
    options = {"axis": operation.axes, "keepdims": operation.keepdims}
    return lambda x: (ops.mean(x, **options), ops.var(x, **options))


def _average(operation, args, kwargs):
    """With weights it is the sum of what is multiplied by constants."""
    x, weights = args[0], args[1] if len(args) > 1 else kwargs.get("weights")
    axes = _reduced_axes(operation, x)
    if isinstance(weights, keras.KerasTensor) or is_learned(weights):
        return None
    if weights is None:
        return lambda x, *_, **__: ops.mean(x, axis=axes)
    weights = np.asarray(weights, "float32")
    if weights.ndim == 1 and len(axes) == 1:
        weights = weights.reshape([-1 if axis == axes[0] else 1 for axis in range(len(x.shape))])
    total = np.sum(
        weights * np.ones([1 if size is None else size for size in x.shape]), axis=tuple(axes), keepdims=True
    )
    return lambda x, *_, **__: ops.sum(x * (weights / total), axis=axes)


def _product(operation, args, kwargs):
    """All that lies along an axis, multiplied in pairs."""
    axes = _reduced_axes(operation, args[0])
    if 0 in axes:
        return None

    def product(x):
        for axis in axes:
            parts = ops.split(x, x.shape[axis], axis=axis)
            while len(parts) > 1:
                pairs = zip(parts[::2], parts[1::2], strict=False)
                parts = [*[one * other for one, other in pairs], *parts[len(parts) // 2 * 2 :]]
            x = parts[0]
        return x if operation.keepdims else ops.squeeze(x, axis=axes)

    return product


def _count_nonzero(operation, args, kwargs):
    return lambda x: ops.sum(ops.cast(ops.not_equal(x, 0.0), "float32"), axis=operation.axis)


def _log_add_exp(operation, args, kwargs):
    """`max(x, y) + log(1 + exp(-|x - y|))`, without the limits that exp has on a grid."""
    return lambda x, y: ops.maximum(x, y) + ops.softplus(-ops.abs(x - y))


def _hypotenuse(operation, args, kwargs):
    return lambda x, y: ops.sqrt(ops.square(x) + ops.square(y))


def _batch_norm(operation, args, kwargs):
    """By constants, or weights of a custom layer: a multiplier and an offset for each channel."""
    x, mean, variance, *rest = args
    offset, scale = (rest + [None, None])[:2]
    offset, scale = kwargs.get("offset", offset), kwargs.get("scale", scale)
    if any(isinstance(one, keras.KerasTensor) for one in (mean, variance, offset, scale)):
        return None
    if is_learned(mean) or is_learned(variance):
        return None
    shape = [-1 if axis == operation.axis % len(x.shape) else 1 for axis in range(len(x.shape))]
    deviation = np.sqrt(np.asarray(variance, "float32") + operation.epsilon).reshape(shape)
    mean, fixed = np.asarray(mean, "float32").reshape(shape), lambda one: not is_learned(one)

    def normalize(x, *_, **__):
        if fixed(scale) and fixed(offset):
            multiplier = (1.0 if scale is None else np.asarray(scale, "float32").reshape(shape)) / deviation
            shift = 0.0 if offset is None else np.asarray(offset, "float32").reshape(shape)
            return x * multiplier + (shift - mean * multiplier)
        x = x * (1.0 / deviation) + (-mean / deviation)
        x = x if scale is None else x * scale
        return x if offset is None else x + offset

    return normalize if fixed(offset) and fixed(scale) or shape[-1] == -1 else None


def _alias(function):
    """Another name of a function with the same options."""
    return lambda operation, args, kwargs: lambda x: function(x, axis=operation.axis, keepdims=operation.keepdims)


RULES = {
    **dict.fromkeys(_MERGING, _merged),
    **dict.fromkeys([*_BINARY, "ops.TrueDivide", "ops.Divide"], _binary),
    "ops.Amax": _alias(ops.max),
    "ops.Amin": _alias(ops.min),
    "ops.Average": _average,
    "ops.BatchNorm": _batch_norm,
    "ops.Clip": _clip,
    "ops.CountNonzero": _count_nonzero,
    "ops.Cumsum": _cumulative_sum,
    "ops.Hypot": _hypotenuse,
    "ops.Logaddexp": _log_add_exp,
    "ops.Moments": _moments,
    "ops.Norm": _norm,
    "ops.Square": _square,
    "ops.Power": _power,
    "ops.Prod": _product,
    "ops.Negative": _negative,
    "ops.Mean": _mean,
    "ops.Sum": _sum,
    "ops.Var": _variance,
    "ops.Std": _deviation,
    "ops.Logsumexp": _log_sum_exp,
    "ops.LogSoftmax": _log_softmax,
    "ops.Matmul": _matmul,
    "ops.Dot": _dot,
}
