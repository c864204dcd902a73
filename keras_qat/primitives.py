"""Layers that stand for integer ops which Keras itself has no layer for; lowerings are made of them."""

import keras
import numpy as np
from keras import ops

from keras_qat import ties
from keras_qat.graph.walk import key_of, nodes_of
from keras_qat.layers import GridLayer, _calibrating
from keras_qat.replicas import agree_on_statistics

# Functions with an infinite value or an infinite slope somewhere.
_SINGULAR = {
    f"ops.{name}"
    for name in (
        "Arccos", "Arccosh", "Arcsin", "Arctanh", "Cbrt", "Divide", "Erfinv", "Log", "Log10", "Log1p", "Log2", "Power",
        "Reciprocal", "Rsqrt", "Sqrt", "Tan", "TrueDivide",
    )
}  # fmt: skip


@keras.saving.register_keras_serializable("keras_qat")
class Pointwise(GridLayer):
    """A function of single numbers. In the file it is a look-up among 256 results, so any function is exact.

    Args:
        function: A functional model from one number per sample to one, made of keras.ops.
    """

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = keras.saving.deserialize_keras_object(function) if isinstance(function, dict) else function
        self.is_singular = any(key_of(node.operation) in _SINGULAR for node in nodes_of(self.function))

    def call(self, x, input_scale=None, output_scale=None):
        flat = ops.reshape(x, (-1,))
        result = self._function(flat) if not self.is_singular else self._finite(flat, input_scale)
        return ops.reshape(result, ops.shape(x))

    def _function(self, flat):
        return ops.cast(self.function(flat), "float32")

    def _finite(self, flat, step):
        """Where the function is infinite, its value half a step of the grid further on; and at 0 its slope there."""
        raw = ops.stop_gradient(self._function(flat))
        is_finite = ops.isfinite(raw)
        half = 1e-6 if step is None else 0.5 * step
        near = self._function(ops.where(ops.logical_and(is_finite, flat != 0), flat, half))
        return ops.where(is_finite, near + ops.stop_gradient(raw - near), near)

    def get_config(self):
        return {**super().get_config(), "function": keras.saving.serialize_keras_object(self.function)}


@keras.saving.register_keras_serializable("keras_qat")
class Constant(keras.layers.Layer):
    """A tensor that comes from no input: a position embedding, the table of an Embedding.

    It is called on any tensor, which it does not look at: a functional model has to reach it from its inputs.

    Args:
        values: Its numbers, or None for a layer whose weight is loaded.
        shape: Of the weight, if there are no values.
        trainable: Whether it is learned.
        regularizer, constraint: Of the weight.
        per_sample: Each sample gets a copy, for what does not broadcast. The first axis of the values has size 1 then.
    """

    def __init__(
        self,
        values=None,
        shape=None,
        trainable=False,
        regularizer=None,
        constraint=None,
        per_sample: bool = False,
        **kwargs,
    ):
        super().__init__(**{**kwargs, "trainable": trainable, "dtype": "float32"})
        self.per_sample = per_sample
        self.regularizer, self.constraint = keras.regularizers.get(regularizer), keras.constraints.get(constraint)
        self.values = None if values is None else np.asarray(values, "float32")
        self.shape = tuple(shape) if values is None else self.values.shape

    def build(self, input_shape=None):
        initializer = "zeros" if self.values is None else lambda shape, dtype=None: ops.convert_to_tensor(self.values)
        self.value = self.add_weight(
            name="value",
            shape=self.shape,
            initializer=initializer,
            trainable=self.trainable,
            regularizer=self.regularizer,
            constraint=self.constraint,
        )

    def call(self, x):
        value = ops.convert_to_tensor(self.value)
        return ops.broadcast_to(value, (ops.shape(x)[0], *self.shape[1:])) if self.per_sample else value

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], *self.shape[1:]) if self.per_sample else self.shape, "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "shape": self.shape,
            "trainable": self.trainable,
            "regularizer": keras.regularizers.serialize(self.regularizer),
            "constraint": keras.constraints.serialize(self.constraint),
            "per_sample": self.per_sample,
        }


@keras.saving.register_keras_serializable("keras_qat")
class Clamp(keras.layers.Layer):
    """`min(max(x, low), high)` with `low <= 0 <= high`: the result's grid ends there, so it needs no op of its own."""

    def __init__(self, low: float, high: float, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.low, self.high = low, high

    def call(self, x):
        return ops.clip(x, self.low, self.high)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "low": self.low, "high": self.high}


@keras.saving.register_keras_serializable("keras_qat")
class ExactUpsampling(keras.layers.Layer):
    """Bilinear upsampling by whole numbers, in three ops that round alike everywhere.

    Args:
        factors: How many times as high and as wide.
    """

    def __init__(self, factors, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.factors = tuple(factors)

    def call(self, x):
        size = [before * times for before, times in zip(x.shape[1:-1], self.factors, strict=True)]
        return ops.image.resize(x, size, interpolation="bilinear")

    def get_config(self):
        return {**super().get_config(), "factors": self.factors}


@keras.saving.register_keras_serializable("keras_qat")
class InFloat(keras.layers.Layer):
    """An operation that stays in float, because a `kq.Rule` says so.

    Args:
        operation: A layer, or an operation of keras.ops.
        frozen_statistics: A batch norm keeps its moving averages in training too (see `Quantized`).
    """

    def __init__(self, operation, frozen_statistics=False, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.operation = keras.saving.deserialize_keras_object(operation) if isinstance(operation, dict) else operation
        self.frozen_statistics = frozen_statistics

    @property
    def batch_norm(self) -> keras.layers.BatchNormalization | None:
        return self.operation if isinstance(self.operation, keras.layers.BatchNormalization) else None

    def build(self, *args, **kwargs):
        """The operation was built before it came in here."""

    def call(self, *args, training=None, **kwargs):
        if getattr(self.operation, "_call_has_training_arg", False):
            kwargs["training"] = training and not self.frozen_statistics
        result = self.operation(*args, **kwargs)
        if kwargs.get("training") and self.batch_norm is not None:
            agree_on_statistics(self.batch_norm)
        return result

    def compute_output_spec(self, *args, **kwargs):
        return self.operation.compute_output_spec(*args, **kwargs)

    def get_config(self):
        operation = keras.saving.serialize_keras_object(self.operation)
        return {**super().get_config(), "operation": operation, "frozen_statistics": self.frozen_statistics}


@keras.saving.register_keras_serializable("keras_qat")
class Slope(GridLayer):
    """`x` where it is positive, else `x · slopes`: leaky relu and PReLU, in one PRELU that all kernels round alike.

    Args:
        slopes: A number, or an array that broadcasts to one sample; or None for a layer whose weight is loaded.
        shape: Of the weight, if there are no slopes.
        trainable: Whether they are learned.
    """

    def __init__(self, slopes=None, shape=None, trainable=False, **kwargs):
        super().__init__(**{**kwargs, "trainable": trainable})
        self.values = None if slopes is None else np.atleast_1d(np.asarray(slopes, "float32"))
        self.shape = tuple(shape) if slopes is None else self.values.shape

    def build(self, *_):
        initializer = "zeros" if self.values is None else lambda shape, dtype=None: ops.convert_to_tensor(self.values)
        self.slopes = self.add_weight(
            name="slopes", shape=self.shape, initializer=initializer, trainable=self.trainable
        )

    def call(self, x, input_scale=None, output_scale=None):
        if input_scale is None or not self.rounds:
            return ops.where(x >= 0, x, x * self.slopes)
        integers, scale = self.integers(input_scale, output_scale)
        product = x * (self.slopes + ops.stop_gradient(integers * scale - self.slopes))
        # A quarter of a step decides ties, see Quantized.
        product = product + ops.stop_gradient(0.25 * scale * input_scale * ops.sign(product))
        return ops.where(x >= 0, x, product)

    def integers(self, input_scale=None, output_scale=None):
        """The slopes' integers and the scale of one step."""
        largest = ops.maximum(ops.max(ops.abs(self.slopes)), 1e-4)
        scale, _ = ties.snap_to_kernels(largest / 127.0, 1.0, ties.FEWEST_STEPS, "up")
        return ops.clip(ops.round(self.slopes / scale), -127.0, 127.0), scale

    def get_config(self):
        return {**super().get_config(), "shape": self.shape, "trainable": self.trainable}


@keras.saving.register_keras_serializable("keras_qat")
class Sum(GridLayer):
    """`x + y`, or `x - y`; at inference in float64, which the 20 extra bits of the kernels come closest to.

    In float32 a sum is off by 1e-5 of a step. Where both are on one grid all elements with the same sum stand at the same
    place between two steps, so that one tie can be a percent of them. (`ties.stretch_of_sums` keeps away from ties.)

    Args:
        sign: Of `y`, 1 or -1.
    """

    operands = 2

    def __init__(self, sign: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.sign = sign

    @property
    def stands_for(self) -> str:
        return "Add" if self.sign > 0 else "Subtract"

    def call(self, x, y, x_scale=None, y_scale=None, output_scale=None, training=None):
        if training or x_scale is None or _calibrating.get() or not self.rounds:
            return x + y if self.sign > 0 else x - y
        x_scale, y_scale, step = (ops.cast(scale, "float64") for scale in (x_scale, y_scale, output_scale))
        x, y = ops.round(ops.cast(x, "float64") / x_scale), ops.round(ops.cast(y, "float64") / y_scale)
        steps = ops.floor((x * x_scale + self.sign * y * y_scale) / step + 0.5)
        return ops.cast(steps, "float32") * ops.cast(step, "float32")

    def compute_output_spec(self, x, y, *args, **kwargs):
        return keras.KerasTensor(ops.add(x, y).shape, "float32")

    def get_config(self):
        return {**super().get_config(), "sign": self.sign}
