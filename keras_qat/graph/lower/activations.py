"""Activation functions."""

import keras
from keras import ops

from keras_qat.graph.walk import clone
from keras_qat.layers import HardSwish
from keras_qat.primitives import Slope


def _split_activation(layer, args, kwargs):
    """`activation=` becomes an operation of its own; freeze fuses it again where TFLite can."""
    if layer.activation is keras.activations.linear:
        return None
    activation = symbolic(layer.activation)
    linear = _linear_copy(layer)
    return lambda x: activation(linear(x))


def _activation(layer, args, kwargs):
    return symbolic(layer.activation)


def symbolic(activation):
    """An activation function as operations of keras.ops.

    A few of Keras's own only take numbers, not symbolic tensors, and so do those of TensorFlow.
    """
    name, module = getattr(activation, "__name__", ""), getattr(activation, "__module__", "") or ""
    if getattr(keras.activations, name, None) is activation and name in _NOT_SYMBOLIC:
        return _NOT_SYMBOLIC[name]
    if name == "gelu" and module.startswith("tensorflow."):
        return lambda x: ops.gelu(x, approximate=False)
    return getattr(ops, name, activation) if module.startswith("tensorflow.") else activation


def _linear_copy(layer):
    activation, layer.activation = layer.activation, keras.activations.linear
    try:
        copy = clone(layer)
        copy.activity_regularizer = None  # it is for what comes out of the activation
        return copy
    finally:
        layer.activation = activation


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
    """LEAKY_RELU itself rounds differently on every runtime."""
    return Slope(slope, name="leaky_relu")


def _prelu(layer, args, kwargs):
    return Slope(layer.alpha, trainable=layer.trainable, name=layer.name)


def _hard_swish(operation, args, kwargs):
    return HardSwish(name=operation.name)


def _silu(operation, args, kwargs):
    return lambda x: ops.multiply(x, ops.sigmoid(x))


def _hard_sigmoid(operation, args, kwargs):
    return lambda x: ops.multiply(ops.relu6(ops.add(x, 3.0)), 1.0 / 6.0)


_WITH_ACTIVATION = ("Dense", "Conv1D", "Conv2D", "DepthwiseConv1D", "DepthwiseConv2D", "Conv2DTranspose")
_NOT_SYMBOLIC = {
    "hard_silu": ops.hard_silu,
    "mish": lambda x: x * ops.tanh(ops.softplus(x)),
}


def _glu(operation, args, kwargs):
    axis = operation.axis

    def glu(x):
        first, second = ops.split(x, 2, axis=axis)
        return first * ops.sigmoid(second)

    return glu


RULES = {
    **dict.fromkeys(_WITH_ACTIVATION, _split_activation),
    "Activation": _activation,
    "PReLU": _prelu,
    "ReLU": _relu,
    "ops.ReLU": _relu,
    "ops.LeakyRelu": _leaky_relu,
    "ops.HardSilu": _hard_swish,
    "ops.Glu": _glu,
    "ops.HardTanh": lambda operation, args, kwargs: lambda x: ops.clip(x, -1.0, 1.0),
    "ops.Silu": _silu,
    "ops.HardSigmoid": _hard_sigmoid,
}
