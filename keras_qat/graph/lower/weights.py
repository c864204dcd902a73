"""Layers with weights, made from the weights of others."""

import keras
import numpy as np


def dense_of(kernel, bias=None, trainable=False, name="dense", **options) -> keras.layers.Dense:
    """A Dense with these weights.

    Args:
        kernel: (inputs, outputs), an array or a variable.
        bias: One number per output, or None.
        trainable: Whether they are learned.
        name: What a person knows them by.
        options: Of `keras.layers.Dense`: regularizers, constraints.
    """
    kernel = np.asarray(kernel, "float32")
    layer = keras.layers.Dense(
        kernel.shape[-1], use_bias=bias is not None, trainable=trainable, name=name, dtype="float32", **options
    )
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    if bias is not None:
        layer.bias.assign(np.asarray(bias, "float32"))
    return layer


def options_of(layer) -> dict:
    """What a convolution takes over from one whose kernel has the same numbers in other axes."""
    return {
        "padding": layer.padding,
        "use_bias": layer.use_bias,
        "kernel_regularizer": layer.kernel_regularizer,
        "bias_regularizer": layer.bias_regularizer,
        "kernel_constraint": _of_numbers(layer.kernel_constraint),
        "bias_constraint": layer.bias_constraint,
        "trainable": layer.trainable,
    }


def _of_numbers(constraint):
    """A constraint of numbers alone; refused where it matters which axes they are in."""
    if constraint is None or isinstance(constraint, keras.constraints.NonNeg):
        return constraint
    raise ValueError(
        f"Its constraint {type(constraint).__name__} works on axes of the kernel, which has others among integers. Use NonNeg, "
        "or none."
    )


def penalties(weight, prefix: str = "") -> dict:
    """A weight's regularizer and constraint, as arguments of the layer that takes it over. Of a plain array: none."""
    return {f"{prefix}{what}": getattr(weight, what, None) for what in ("regularizer", "constraint")}


def is_learned(operand) -> bool:
    return isinstance(operand, keras.Variable) and operand.trainable
