"""Layers for what is inside of normalizations and attention, where a plain operation would lose the precision."""

import keras
import numpy as np
from keras import ops

from keras_qat import kernels
from keras_qat.layers import GridLayer, _calibrating
from keras_qat.truths import packed, unpacked

# What the weights of masked places may add up to, next to the largest one of their row.
_LEAK = 2.0**-8
_FAR_BELOW = -1e9


@keras.saving.register_keras_serializable("keras_qat")
class InverseRoot(GridLayer):
    """`1 / sqrt(max(x / count, floor) + epsilon)` of a sum of squares: what normalizations multiply with.

    A grid cannot tell values below its step from zero. They count as one step, because the true result for a row of
    zeros, `1 / sqrt(epsilon)`, would stretch the range of all results until the others vanish in it.
    """

    def __init__(self, epsilon: float = 0.0, floor: float = 0.0, count: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.epsilon, self.floor, self.count = float(epsilon), float(floor), count

    def call(self, x, input_scale=None, output_scale=None):
        smallest = 0.0 if input_scale is None else input_scale
        mean = ops.maximum(x, smallest) / self.count
        return ops.rsqrt(ops.maximum(mean, self.floor) + self.epsilon)

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon, "floor": self.floor, "count": self.count}


@keras.saving.register_keras_serializable("keras_qat")
class Mask(keras.layers.Layer):
    """Moves the scores that attention must not see to the lowest integer of their grid; `Scores` in front sees to it
    that a softmax gives them nothing there.

    Args:
        keep: Where scores stay, as an array of truth values that broadcasts to them, or what `get_config` has for it; None
            where a tensor tells.
    """

    def __init__(self, keep=None, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.keep = unpacked(keep)

    def call(self, x, keep=None):
        return ops.where(self.keep if keep is None else keep, x, _FAR_BELOW)

    def compute_output_spec(self, x, keep=None):
        return keras.KerasTensor(x.shape, "float32")

    def get_config(self):
        return {**super().get_config(), "keep": packed(self.keep)}


@keras.saving.register_keras_serializable("keras_qat")
class Scores(keras.layers.Layer):
    """What a softmax reads, on a grid that leaves out what is too low to count: it does nothing but tell the range.

    The lowest integer is as far below the best score of every row as makes all places that have it count for 1/256 of
    that one. Whatever is lower ends up there, for nothing. The others get finer steps for it.

    Args:
        factor: What the softmax multiplies the scores with.
        keep: Of the `Mask` behind, if there is one. Rows of which nothing is kept have no say.
    """

    def __init__(self, factor: float = 1.0, keep=None, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.factor, self.keep = float(factor), unpacked(keep)

    def call(self, x, keep=None, training=None):
        if not (training or _calibrating.get()):
            return x
        keep = self.keep if keep is None else keep
        seen = x if keep is None else ops.where(keep, x, _FAR_BELOW)
        best = ops.max(seen, axis=-1)
        in_sight = best > _FAR_BELOW
        instead = ops.max(ops.where(in_sight, best, 0.0))  # of rows that see nothing
        lowest_best = ops.stop_gradient(ops.min(ops.where(in_sight, best, instead)))
        return ops.maximum(seen, lowest_best - np.log(x.shape[-1] / _LEAK) / self.factor)

    def compute_output_spec(self, x, *args, **kwargs):
        return keras.KerasTensor(x.shape, "float32")

    def get_config(self):
        return {**super().get_config(), "factor": self.factor, "keep": packed(self.keep)}


class _Wide(keras.layers.Layer):
    """The base of what computes in 16 bits."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})


@keras.saving.register_keras_serializable("keras_qat")
class WideMatmul(GridLayer):
    """A matmul of 16-bit integers: what it reads in 8 bits is brought to 16 on the same scale, which is exact."""

    operands = 2

    def call(self, x, y, x_scale=None, y_scale=None, output_scale=None, training=None):
        if training or x_scale is None or _calibrating.get() or not self.rounds:
            return ops.matmul(x, y)
        integers = [ops.cast(ops.round(value / scale), "float64") for value, scale in ((x, x_scale), (y, y_scale))]
        ratio = ops.cast(x_scale * y_scale, "float64") / ops.cast(output_scale, "float64")
        return kernels.requantized_16(ops.matmul(*integers), ratio) * output_scale

    def compute_output_spec(self, x, y, *args, **kwargs):
        return keras.KerasTensor(ops.matmul(x, y).shape, "float32")


@keras.saving.register_keras_serializable("keras_qat")
class WideAdd(_Wide):
    """A sum of 16-bit integers; reads 8 bits as `WideMatmul` does."""

    def call(self, x, y):
        return ops.add(x, y)


@keras.saving.register_keras_serializable("keras_qat")
class Widen(_Wide):
    """From 8 bits to 16 on the same scale, which is exact. A layer with weights that reads it writes 16 bits too."""

    def call(self, x):
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_qat")
class TransposedMatmul(keras.layers.Layer):
    """`x @ transpose(table)`, the table as it is: scores of each of its rows."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, x, table):
        return ops.matmul(x, ops.transpose(table))

    def compute_output_spec(self, x, table):
        return keras.KerasTensor((*x.shape[:-1], table.shape[0]), "float32")


@keras.saving.register_keras_serializable("keras_qat")
class Narrow(_Wide):
    """Back from 16 bits to 8, on a range of its own."""

    def call(self, x):
        return x

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_qat")
class Probabilities(GridLayer):
    """`softmax(factor · x)` along the last axis, in 16 bits; at inference by the kernel's own arithmetic.

    An int8 SOFTMAX writes steps of 1/256. Of 64 places that count alike each would get 4 of them: 22 dB. The 16-bit one
    reads 16 bits too and writes steps of 1/32768. Its look-ups come to within 2 of them, which the layers behind add up.
    """

    STEP = 1.0 / 32768.0
    LIMITS = (0.0, 32767.0 * STEP)

    def __init__(self, factor: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = float(factor)

    def call(self, x, input_scale=None, output_scale=None, training=None):
        if training or input_scale is None or _calibrating.get() or not self.rounds:
            return ops.softmax(x * self.factor, axis=-1)
        scale = ops.cast(input_scale, "float64") * float(np.float32(self.factor))
        return kernels.softmax_16(ops.round(x / input_scale), scale) * self.STEP

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}
