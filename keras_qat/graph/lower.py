"""What TFLite has no single integer op for, written as what it has.

One rule per operation: it looks at the operation (and its arguments) and returns a callable on symbolic tensors that
does the same with primitive layers and keras.ops, or None to leave it alone. Trace opens the result like any layer.
"""

import keras
import numpy as np
from keras import ops

from keras_qat.graph.walk import clone, key_of
from keras_qat.layers import ChannelScale, HardSwish, Rescale


def lowering_of(operation, args, kwargs):
    """The rule's answer for this operation, or None."""
    key = key_of(operation)
    if key in _RULES:
        return _RULES[key](operation, args, kwargs)
    if key in _WITH_ACTIVATION and operation.activation is not keras.activations.linear:
        return _split_activation(operation)
    return None


def _split_activation(layer):
    """`activation=` becomes an operation of its own; freeze fuses it again where TFLite can."""
    activation = _symbolic(layer.activation)
    linear = _linear_copy(layer)
    return lambda x: activation(linear(x))


def _activation(layer, args, kwargs):
    return _symbolic(layer.activation)


def _symbolic(activation):
    """Keras's activation functions as operations of keras.ops: a few of them only take numbers, not symbolic tensors."""
    name = getattr(activation, "__name__", "")
    is_keras = getattr(keras.activations, name, None) is activation
    return getattr(ops, name) if is_keras and name in ("hard_silu",) else activation


def _linear_copy(layer):
    activation, layer.activation = layer.activation, keras.activations.linear
    try:
        return clone(layer)
    finally:
        layer.activation = activation


def _separable_conv(layer, args, kwargs):
    """Depthwise, then pointwise."""
    rank = layer.rank
    if rank == 1:
        depthwise = keras.layers.DepthwiseConv1D
        pointwise = keras.layers.Conv1D
    else:
        depthwise, pointwise = keras.layers.DepthwiseConv2D, keras.layers.Conv2D
    first = depthwise(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        name="depthwise",
    )
    second = pointwise(
        layer.filters,
        1,
        use_bias=layer.use_bias,
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        trainable=layer.trainable,
        name="pointwise",
    )
    channels = layer.depthwise_kernel.shape[rank]
    first.build((None,) * (rank + 1) + (channels,))
    first.kernel.assign(layer.depthwise_kernel)
    second.build((None,) * (rank + 1) + (channels * layer.depth_multiplier,))
    second.kernel.assign(layer.pointwise_kernel)
    if layer.use_bias:
        second.bias.assign(layer.bias)
    return lambda x: layer.activation(second(first(x)))


def _rescaling(layer, args, kwargs):
    return ChannelScale(np.ravel(layer.scale), np.ravel(layer.offset), name=layer.name)


def _normalization(layer, args, kwargs):
    """`(x - mean) / max(sqrt(variance), epsilon)`, or its inverse."""
    mean, deviation = np.ravel(layer.mean), np.maximum(np.sqrt(np.ravel(layer.variance)), keras.config.epsilon())
    if layer.invert:
        return ChannelScale(deviation, mean, name=layer.name)
    return ChannelScale(1.0 / deviation, -mean / deviation, name=layer.name)


def _relu(operation, args, kwargs):
    """relu with a slope, without a maximum, or with a maximum of 6 as the plain operation of that name."""
    slope, highest, threshold = operation.negative_slope, operation.max_value, operation.threshold
    if threshold != 0 or (slope != 0 and highest is not None):
        return None
    if slope != 0:
        return _sloped(float(slope))
    return {None: ops.relu, 6: ops.relu6}.get(highest)


def _leaky_relu(operation, args, kwargs):
    return _sloped(float(operation.negative_slope))


def _sloped(slope: float):
    """The larger of x and slope · x. LEAKY_RELU itself rounds differently on every runtime."""
    choose = ops.maximum if slope <= 1 else ops.minimum
    scaled = Rescale(slope, same_grid=True, name="slope")
    return lambda x: choose(x, scaled(x))


def _hard_swish(operation, args, kwargs):
    return HardSwish(name=operation.name)


def _silu(operation, args, kwargs):
    return lambda x: ops.multiply(x, ops.sigmoid(x))


def _hard_sigmoid(operation, args, kwargs):
    return lambda x: ops.multiply(ops.relu6(ops.add(x, 3.0)), 1.0 / 6.0)


def _arithmetic_with_constant(operation, args, kwargs):
    """`x + c`, `c - x`, `x * c`, `x / c` with a number or one number per channel."""
    if len(args) != 2 or all(isinstance(x, keras.KerasTensor) for x in args):
        return None
    constant_first = isinstance(args[1], keras.KerasTensor)
    tensor, constant = (args[1], args[0]) if constant_first else args
    constant = np.asarray(constant, np.float32)
    per_channel = constant.size == 1 or (constant.shape[-1] == constant.size == tensor.shape[-1])
    key = key_of(operation).replace("TrueDivide", "Divide")
    if not per_channel or (key == "ops.Divide" and constant_first):
        return None
    scaling = {
        "ops.Add": lambda c: ChannelScale(1.0, np.ravel(c)),
        "ops.Subtract": lambda c: (
            ChannelScale(-1.0, np.ravel(c)) if constant_first else ChannelScale(1.0, -np.ravel(c))
        ),
        "ops.Multiply": lambda c: ChannelScale(np.ravel(c)),
        "ops.Divide": lambda c: ChannelScale(1.0 / np.ravel(c)),
    }[key](constant)
    return lambda *arguments: scaling(arguments[1 if constant_first else 0])


_WITH_ACTIVATION = {"Dense", "Conv1D", "Conv2D", "DepthwiseConv1D", "DepthwiseConv2D", "Conv2DTranspose"}
_RULES = {
    "Activation": _activation,
    "SeparableConv1D": _separable_conv,
    "SeparableConv2D": _separable_conv,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "ReLU": _relu,
    "ops.ReLU": _relu,
    "ops.LeakyRelu": _leaky_relu,
    "ops.HardSilu": _hard_swish,
    "ops.Silu": _silu,
    "ops.HardSigmoid": _hard_sigmoid,
    "ops.Add": _arithmetic_with_constant,
    "ops.Subtract": _arithmetic_with_constant,
    "ops.Multiply": _arithmetic_with_constant,
    "ops.TrueDivide": _arithmetic_with_constant,
    "ops.Divide": _arithmetic_with_constant,
}
