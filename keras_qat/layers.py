"""The layers of a QAT model: everything else in it is plain Keras."""

import contextlib
import contextvars
import dataclasses

import keras
import numpy as np
from keras import ops

from keras_qat import numerics
from keras_qat.quantizers import MaxAbs
from keras_qat.spec import Spec

_calibrating = contextvars.ContextVar("calibrating", default=False)


@contextlib.contextmanager
def calibrating():
    """Inside of this, every `FakeQuant` widens its range by what it sees and lets the values through unrounded."""
    token = _calibrating.set(True)
    try:
        yield
    finally:
        _calibrating.reset(token)


@keras.saving.register_keras_serializable("keras_qat")
class FakeQuant(keras.layers.Layer):
    """Puts a tensor on its integer grid; the place where the integer graph has a tensor.

    Returns the rounded tensor and the grid's scale, which the layers behind need for their biases.

    Args:
        quantizer: Finds the range (see `keras_qat.quantizers`).
        sites: Names of the tensors that share the range. The layer is called once for each, with its number.
        bits: Of the integers.
        rounding: "half_up", or "away" for the tie rule of TFLite's average pooling.
        in_training: False leaves the values alone while training. Used for probabilities at the model's output, whose
            loss needs their logarithm.
    """

    def __init__(self, quantizer, sites=("tensor",), bits=8, in_training=True, **kwargs):
        super().__init__(**kwargs)
        if isinstance(quantizer, dict):
            quantizer = keras.saving.deserialize_keras_object(quantizer)
        self.quantizer, self.sites = quantizer, tuple(sites)
        self.spec, self.in_training = Spec(bits), in_training
        self.supports_masking = True

    def build(self, input_shape):
        self.quantizer.build(input_shape)

    def call(self, x, site=0, observe=True, rounding="half_up", training=None):
        x = ops.cast(x, "float32")
        if _calibrating.get():
            if observe and self.quantizer.observes:
                self.quantizer.include(x, site)
            low, high = numerics.widen(*self.quantizer.limits(x, site))
            return x, numerics.scale_and_zero_point(low, high, self.spec)[0]
        low, high = numerics.widen(*self.quantizer.limits(x, site, observe=bool(training) and observe))
        scale, _ = numerics.scale_and_zero_point(low, high, self.spec)
        if training and not self.in_training:
            return x, scale
        if rounding == "away":
            x = numerics.away_from_zero(x, low, high, self.spec)
        nonnegative = self.quantizer.observes and self.quantizer.nonnegative[site]
        return numerics.fake_quant(x, low, high, self.spec, nonnegative), scale

    def parameters(self) -> tuple[float, int]:
        """The scale and the zero point as the file gets them."""
        low, high = numerics.widen(*self.quantizer.limits(ops.zeros((1,))))
        return numerics.scale_and_zero_point(np.float32(low), np.float32(high), self.spec)

    def compute_output_spec(self, x, **kwargs):
        return keras.KerasTensor(x.shape, "float32"), keras.KerasTensor((), "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "quantizer": keras.saving.serialize_keras_object(self.quantizer),
            "sites": self.sites,
            "bits": self.spec.bits,
            "in_training": self.in_training,
        }


@keras.saving.register_keras_serializable("keras_qat")
class ChannelScale(keras.layers.Layer):
    """`x · kernel + bias` with one number per channel (or one for all): what scaling layers become.

    Args:
        kernel: The multipliers, a number or a list with one per channel. `None`: ones.
        bias: The same for the offsets. `None`: zeros.
    """

    def __init__(self, kernel=None, bias=None, **kwargs):
        super().__init__(trainable=False, **kwargs)
        self.factors, self.offsets = _compact(kernel, 1.0), _compact(bias, 0.0)
        self.use_bias = bool(np.any(self.offsets != 0))

    @property
    def scalars(self) -> tuple[float, float] | None:
        """The multiplier and the offset where each is the same for all channels, else None."""
        both_scalar = self.factors.size == self.offsets.size == 1
        return (float(self.factors[0]), float(self.offsets[0])) if both_scalar else None

    def build(self, input_shape):
        channels = (int(input_shape[-1]),)
        self.kernel = self.add_weight(
            name="kernel", shape=channels, initializer=_constant(self.factors), trainable=False
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=channels, initializer=_constant(self.offsets), trainable=False
            )

    def call(self, x):
        x = x * self.kernel
        return x + self.bias if self.use_bias else x

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        lists = {"kernel": self.factors, "bias": self.offsets}
        return {
            **{key: value for key, value in super().get_config().items() if key != "trainable"},
            **{key: value.tolist() for key, value in lists.items()},
        }


def _compact(values, default) -> np.ndarray:
    """One number per channel, or just one where they are all the same."""
    values = np.ravel(np.asarray(default if values is None else values, np.float32))
    return values[:1] if np.all(values == values[0]) else values


def _constant(values):
    def initializer(shape, dtype=None):
        return ops.broadcast_to(ops.convert_to_tensor(values, dtype), shape)

    return initializer


@keras.saving.register_keras_serializable("keras_qat")
class Quantized(keras.layers.Layer):
    """Runs a layer on quantized weights; with a batch norm behind it where `freeze` will fold that in.

    In training the batch norm uses the batch's statistics, as in float. At inference its offset and the layer's bias
    become one bias, rounded to the int32 grid `s_in · s_w · multiplier` of the file.

    Args:
        layer: Any layer with a `kernel` (and a `bias`), its activation taken off.
        channel_axes: The axes of the kernel that together number the output channels.
        batch_norm: The BatchNormalization that directly follows, or None.
        input_scaling: `(multiplier, offset)` that a Rescaling in front of the layer applied to its input, taken over
            here so that the file reads raw values.
        bits, per_channel: How the weights are quantized.
    """

    def __init__(
        self, layer, channel_axes=(-1,), batch_norm=None, input_scaling=(1.0, 0.0), bits=8, per_channel=True, **kwargs
    ):
        super().__init__(**kwargs)
        self.layer = _deserialized(layer)
        self.batch_norm = _deserialized(batch_norm)
        self.channel_axes, self.input_scaling = tuple(channel_axes), tuple(input_scaling)
        self.weight_quantizer = MaxAbs(bits, per_channel, self.channel_axes, name="weights")
        self.supports_masking = True

    def rewrapped(self) -> "Quantized":
        """The same layers in a new wrapper that no graph has called yet."""
        spec = self.weight_quantizer.spec
        return Quantized(
            self.layer,
            self.channel_axes,
            self.batch_norm,
            self.input_scaling,
            spec.bits,
            spec.per_channel,
            name=self.name,
        )

    def build(self, input_shape, *_):
        if not self.layer.built:
            self.layer.build(input_shape)
        if self.batch_norm is not None and not self.batch_norm.built:
            self.batch_norm.build(self.layer.compute_output_shape(input_shape))

    def call(self, x, input_scale=None, training=None):
        kernel, weight_scale = self.weight_quantizer.quantize_weights(self.layer.kernel)
        multiplier, offset = self.input_scaling
        if self.batch_norm is not None and training and self.batch_norm.trainable:
            y = self._linear(x, kernel, bias=self.layer.bias if self.layer.use_bias else None)
            return self.batch_norm(self._with_input_scaling(y, kernel), training=True)
        bias = self._total_bias(kernel)
        y = self._linear(x, kernel, bias=None)
        if self.batch_norm is not None:
            multiplier = numerics.batch_norm_multiplier_and_offset(self.batch_norm)[0] * multiplier
            y = y * multiplier
        elif multiplier != 1.0:
            y = y * multiplier
        if bias is None:
            return y
        if input_scale is not None:
            bias = numerics.round_bias(
                bias, numerics.accumulator_scale(input_scale, weight_scale, multiplier, ops.stop_gradient(bias))
            )
        return y + bias

    def _linear(self, x, kernel, bias):
        """The layer's own computation with `kernel` and `bias` in place of its variables."""
        replaced = [(self.layer.kernel, kernel)]
        if self.layer.use_bias:
            replaced.append((self.layer.bias, ops.zeros_like(self.layer.bias) if bias is None else bias))
        with keras.StatelessScope(state_mapping=replaced):
            return self.layer.call(x)

    def _with_input_scaling(self, y, kernel):
        multiplier, offset = self.input_scaling
        if multiplier != 1.0:
            y = y * multiplier
        return y if offset == 0.0 else y + offset * self._kernel_sums(kernel)

    def _kernel_sums(self, kernel):
        channels = {axis % len(kernel.shape) for axis in self.channel_axes}
        return ops.reshape(ops.sum(kernel, [axis for axis in range(len(kernel.shape)) if axis not in channels]), (-1,))

    def _total_bias(self, kernel):
        """Everything that is added to a channel at inference, or None: bias, input offset, batch norm."""
        bias = ops.convert_to_tensor(self.layer.bias) if self.layer.use_bias else None
        if self.input_scaling[1] != 0.0:
            offset = self.input_scaling[1] * self._kernel_sums(kernel)
            bias = offset if bias is None else bias + offset
        if self.batch_norm is None:
            return bias
        multiplier, offset = numerics.batch_norm_multiplier_and_offset(self.batch_norm)
        return offset if bias is None else bias * multiplier + offset

    def integers(self, input_scale: float) -> "IntegerWeights":
        """What `freeze` writes: the integers training used, and the scales and biases with everything folded in."""
        kernel, weight_scale = self.weight_quantizer.quantize_weights(self.layer.kernel)
        integers = np.asarray(self.weight_quantizer.integers(self.layer.kernel)).astype(np.int8)
        multiplier = self.input_scaling[0]
        if self.batch_norm is not None:
            multiplier = numerics.batch_norm_multiplier_and_offset(self.batch_norm)[0] * multiplier
        multiplier = np.broadcast_to(np.asarray(multiplier, np.float32), weight_scale.shape)
        bias = self._total_bias(kernel)
        bias = np.zeros(weight_scale.shape, np.float32) if bias is None else np.asarray(bias)
        step = np.asarray(numerics.accumulator_scale(input_scale, weight_scale, multiplier, bias))
        return IntegerWeights(
            kernel=_flip_channels(integers, multiplier < 0, self.channel_axes),
            scale=step / np.float32(input_scale),
            bias=np.rint(bias / step).astype(np.int32),
            folded=self.batch_norm is not None or self.input_scaling != (1.0, 0.0),
        )

    def compute_output_shape(self, input_shape, *_):
        return self.layer.compute_output_shape(input_shape)

    def compute_output_spec(self, x, *args, **kwargs):
        return keras.KerasTensor(self.layer.compute_output_shape(x.shape), "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "channel_axes": self.channel_axes,
            "batch_norm": self.batch_norm and keras.saving.serialize_keras_object(self.batch_norm),
            "input_scaling": self.input_scaling,
            "bits": self.weight_quantizer.spec.bits,
            "per_channel": self.weight_quantizer.spec.per_channel,
        }


@dataclasses.dataclass(frozen=True)
class IntegerWeights:
    """Integers of a layer in its Keras layout, the real value of one weight step per channel, and the int32 bias.

    `folded` says that a batch norm or an input scaling is in them.
    """

    kernel: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    folded: bool = False


def _deserialized(layer):
    return keras.saving.deserialize_keras_object(layer) if isinstance(layer, dict) else layer


def _flip_channels(integers, flip, channel_axes):
    """Negates the channels where a folded batch norm has a negative factor, so that their scale can stay positive."""
    shape = [1] * integers.ndim
    for axis in channel_axes:
        shape[axis] = integers.shape[axis]
    return np.where(flip.reshape(shape), -integers, integers)
