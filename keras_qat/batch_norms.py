"""A batch norm that stands alone, with one scale for all of its channels: MUL by one constant and ADD of another.

`x · m + (beta - mean(x) · m)` with `m = gamma / sqrt(variance(x) + epsilon)`. With `Scheme(per_channel_norms=True)` it is a
depthwise convolution with a scale for each channel, and one op less; but TensorFlow Lite Micro keeps 8 bytes of arena for each.
"""

import keras
from keras import ops

from keras_qat.primitives import Sum
from keras_qat.replicas import agreed
from tflite_export.program import unique_name

_GAMMA, _BETA = "gamma", "beta"


class OfStatistics(keras.layers.Layer):
    """A number for each channel that depends on a statistic: in training that of the batch, else its moving average.

    Args:
        learned: Whether gamma (or beta) is learned too.
        momentum: Of the moving average.
        regularizer, constraint: Of what is learned.
        frozen_statistics: The moving average counts in training too, and stays as it is (see `Quantized`).
    """

    weight_name = statistic_name = None

    def __init__(
        self, learned=True, momentum=0.99, regularizer=None, constraint=None, frozen_statistics=False, **kwargs
    ):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.learned, self.momentum, self.frozen_statistics = learned, momentum, frozen_statistics
        self.regularizer, self.constraint = keras.regularizers.get(regularizer), keras.constraints.get(constraint)

    def build(self, input_shape, *_):
        shape, first = (input_shape[-1],), "ones" if self.weight_name == _GAMMA else "zeros"
        if self.learned:
            options = {"regularizer": self.regularizer, "constraint": self.constraint}
            self.weight = self.add_weight(name=self.weight_name, shape=shape, initializer=first, **options)
        self.moving = self.add_weight(name=self.statistic_name, shape=shape, initializer=first, trainable=False)

    def _statistic(self, x, training):
        if not (training and self.trainable) or self.frozen_statistics:
            return ops.convert_to_tensor(self.moving)
        statistic = self._of_batch(x)
        self.moving.assign(agreed(self.moving * self.momentum + statistic * (1.0 - self.momentum)))
        return statistic

    def compute_output_spec(self, x, *_, **__):
        return keras.KerasTensor((x.shape[-1],), "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "learned": self.learned,
            "momentum": self.momentum,
            "frozen_statistics": self.frozen_statistics,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
        }


@keras.saving.register_keras_serializable("keras_qat")
class NormMultiplier(OfStatistics):
    """`gamma / sqrt(variance + epsilon)`."""

    weight_name, statistic_name = _GAMMA, "moving_variance"

    def __init__(self, epsilon=1e-3, **kwargs):
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def call(self, x, training=None):
        return self.multiplier(self._statistic(x, training))

    def multiplier(self, variance):
        inverse = ops.rsqrt(variance + self.epsilon)
        return inverse * self.weight if self.learned else inverse

    def _of_batch(self, x):
        return ops.var(x, axis=tuple(range(len(x.shape) - 1)))

    def get_config(self):
        return {**super().get_config(), "epsilon": self.epsilon}


@keras.saving.register_keras_serializable("keras_qat")
class NormOffset(OfStatistics):
    """`beta - mean · multiplier`, of the multiplier as the file has it."""

    weight_name, statistic_name = _BETA, "moving_mean"

    def call(self, x, multiplier, training=None):
        return self.offset(self._statistic(x, training), multiplier)

    def offset(self, mean, multiplier):
        offset = -mean * multiplier
        return offset + self.weight if self.learned else offset

    def _of_batch(self, x):
        return ops.mean(x, axis=tuple(range(len(x.shape) - 1)))


def multiplied_and_added(norm: keras.layers.BatchNormalization):
    """`(x, training) -> y`: what a batch norm makes of symbolic tensors, in the layers above. All calls share them."""
    factor = _part(NormMultiplier, norm, "multiplier", norm.scale, norm.moving_variance, epsilon=norm.epsilon)
    addend = _part(NormOffset, norm, "offset", norm.center, norm.moving_mean)
    names = []

    def call(x, training=None):
        names.append(unique_name(norm.name, names))
        options = {} if training is None else {"training": training}
        multiplier = factor(x, **options)
        product = ops.multiply(x, multiplier)
        product._keras_history.operation.name = f"{names[-1]}.product"
        return Sum(name=names[-1])(product, addend(x, multiplier, **options))

    return call


def _part(kind, norm, name, learned, statistic, **options):
    """One of the layers above, with what a batch norm has of it."""
    layer = kind(
        learned=learned,
        momentum=norm.momentum,
        regularizer=getattr(norm, f"{kind.weight_name}_regularizer"),
        constraint=getattr(norm, f"{kind.weight_name}_constraint"),
        trainable=norm.trainable,
        name=f"{norm.name}.{name}",
        **options,
    )
    layer.build(statistic.shape)
    layer.moving.assign(statistic)
    if learned:
        layer.weight.assign(getattr(norm, kind.weight_name))
    return layer
