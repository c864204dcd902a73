"""Arithmetic of keras.ops."""

import keras
import numpy as np

from keras_qat.graph.walk import key_of
from keras_qat.layers import ChannelScale


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


RULES = {
    "ops.Add": _arithmetic_with_constant,
    "ops.Subtract": _arithmetic_with_constant,
    "ops.Multiply": _arithmetic_with_constant,
    "ops.TrueDivide": _arithmetic_with_constant,
    "ops.Divide": _arithmetic_with_constant,
}
