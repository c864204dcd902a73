"""Truth values, which masks are made of: they and the whole numbers they come from are no values on a grid."""

import keras
import numpy as np
from keras import ops

COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")
CONNECTIVES = ("logical_and", "logical_or")


@keras.saving.register_keras_serializable("keras_qat")
class Comparison(keras.layers.Layer):
    """Compares whole numbers with one of them: `ids != 0`.

    Args:
        function: One of `COMPARISONS`.
        number: What stands on the right.
    """

    def __init__(self, function: str, number: int = 0, **kwargs):
        super().__init__(**kwargs, autocast=False)
        self.function, self.number = function, int(number)

    def call(self, x):
        return getattr(ops, self.function)(x, ops.cast(self.number, x.dtype))

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "bool")

    def get_config(self):
        return {**super().get_config(), "function": self.function, "number": self.number}


@keras.saving.register_keras_serializable("keras_qat")
class Logic(keras.layers.Layer):
    """`x and y`, `x or y`; of one tensor and a constant, or of two tensors.

    Args:
        function: One of `CONNECTIVES`.
        constant: An array of truth values (or what `get_config` has for it), or None.
    """

    def __init__(self, function: str, constant=None, **kwargs):
        super().__init__(**kwargs, autocast=False)
        self.function, self.constant = function, unpacked(constant)

    def call(self, x, y=None):
        return getattr(ops, self.function)(x, self.constant if y is None else y)

    def compute_output_spec(self, x, y=None):
        return keras.KerasTensor(self.call(x, y).shape, "bool")

    def get_config(self):
        return {**super().get_config(), "function": self.function, "constant": packed(self.constant)}


@keras.saving.register_keras_serializable("keras_qat")
class Not(keras.layers.Layer):
    """`not x`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, autocast=False)

    def call(self, x):
        return ops.logical_not(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "bool")


@keras.saving.register_keras_serializable("keras_qat")
class Number(keras.layers.Layer):
    """1 where something is true, 0 elsewhere."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"}, autocast=False)

    def call(self, x):
        return ops.cast(x, "float32")

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, "float32")


def packed(flags: np.ndarray | None):
    """An array of truth values as a config holds it."""
    return None if flags is None else (list(flags.shape), np.packbits(flags).tobytes().hex())


def unpacked(flags) -> np.ndarray | None:
    """The array that `packed` was given; or such an array itself."""
    if flags is None or isinstance(flags, np.ndarray):
        return None if flags is None else flags.astype(bool)
    shape, bits = flags
    size = int(np.prod(shape))
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=size).astype(bool).reshape(shape)
