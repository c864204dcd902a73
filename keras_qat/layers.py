"""The layers of a QAT model: everything else in it is plain Keras."""

import contextlib
import contextvars
import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from keras_qat import fused_batch_norm, kernels, numerics, ties
from keras_qat.arrays import ops, read_as
from keras_qat.quantizers import MaxAbs
from keras_qat.replicas import agree_on_statistics
from keras_qat.spec import Spec

_stretch_of_sums = tf.function(ties.stretch_of_sums, autograph=False)  # one operation, where `freeze` asks for it
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
        in_training: False leaves the values alone while training. Used for probabilities at the model's output, whose
            loss needs their logarithm.
        frozen: The range stays as it is in training too, where nothing is searched for it any more.
    """

    rounds = True  # False lets values through while a training step runs; ranges are observed all the same

    def __init__(self, quantizer, sites=("tensor",), bits=8, in_training=True, frozen=False, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        if isinstance(quantizer, dict):
            quantizer = keras.saving.deserialize_keras_object(quantizer)
        self.quantizer, self.sites = quantizer, tuple(sites)
        self.spec, self.in_training, self.frozen = Spec(bits, symmetric=bits > 8), in_training, frozen
        self.supports_masking = True

    def build(self, input_shape):
        self.quantizer.build(self)

    def call(
        self,
        x,
        site=0,
        observe=True,
        rounding="half_up",
        peek=False,
        factors=None,
        constant=1.0,
        count=1,
        square=False,
        terms=None,
        signs=(),
        stretch=None,
        training=None,
    ):
        """Rounds `x` to the grid.

        Args:
            x: The tensor.
            site: Its number among those that share the range.
            observe: Whether it has a say in the range, while training.
            rounding: "half_up", or with ties "away" or "up" (see `numerics.with_ties_broken`), or "precise" for values of the
                outside world (see `numerics.fake_quant`), or "product" for what `factors` are of.
            peek: Just tell the grid, before the tensor itself is there.
            factors: The scales of the tensors that the group's tensor is a product of; its range is then moved to where
                all kernels round products alike.
            constant: The scale of a constant factor.
            count: How many values a mean is over (see `ties.snap_to_kernels`).
            square: It is the product of a tensor and itself (see `ties.snap_to_kernels`).
            terms: For both terms of each sum that is written to this grid what a peek at its own grid returned, or None
                where that is this grid; at inference its range is moved to where all kernels add alike. (Peeks alone
                take them, because that takes time.)
            signs: For each sum 1, or -1 for a difference.
            stretch: What such a peek returned.

        Returns:
            The rounded tensor and the scale; of a peek how much wider the range was made and the zero point, as one tensor,
            and the scale.
        """
        if peek:
            return self._peek(factors, (constant, count, square), None if training else terms, signs)
        x = ops.cast(x, "float32")
        if _calibrating.get():
            if observe and self.quantizer.observes:
                self.quantizer.include(x, site)
            return x, numerics.grid(*self.quantizer.limits(x, site), self.spec)[2]
        if training and self.frozen:
            limits = self.quantizer.known_limits()
        else:
            limits = self.quantizer.limits(x, site, observe=bool(training) and observe)
        low, high, scale = numerics.grid(*limits, self.spec)
        if not self.rounds:
            return x, scale
        if factors is not None:
            low, high, scale, quarter_step = self._snapped(low, high, factors, constant, count, square)
            if rounding == "product":  # not what only shares the grid of products
                x = x + quarter_step * ops.stop_gradient(ops.sign(x))
        if stretch is not None and not training:
            low, high = ties.stretched(low, high, stretch[0])
            scale, _ = numerics.scale_and_zero_point(low, high, self.spec)
        if training and not self.in_training:
            return x, scale
        if rounding in ("away", "up"):
            x = numerics.with_ties_broken(x, low, high, self.spec, rounding)
        nonnegative = self.quantizer.observes and self.quantizer.nonnegative[site]
        precise = rounding == "precise" and not training
        return numerics.fake_quant(x, low, high, self.spec, nonnegative, precise), scale

    def _peek(self, factors, of, terms, signs):
        low, high, scale = numerics.grid(*self.quantizer.known_limits(), self.spec)
        stretch = ops.ones(())
        if factors is not None:
            low, high, *_ = self._snapped(low, high, factors, *of)
        if terms is not None:
            grids = [ops.zeros((2,)) if term is None else ops.stack([term[1], term[0][1]]) for term in terms]
            stretch = ties.stretch_of_sums(
                low, high, self.spec, tuple(signs), ops.reshape(ops.stack(grids), (-1, 2, 2))
            )
            low, high = ties.stretched(low, high, stretch)
        scale, zero_point = numerics.scale_and_zero_point(low, high, self.spec)
        return ops.stack([stretch, ops.cast(zero_point, "float32")]), scale

    def _snapped(self, low, high, factors, constant, count, square):
        """See `ties.snapped_grid`."""
        step = constant * math.prod(factors[1:], start=factors[0])
        return ties.snapped_grid(low, high, self.spec, step, count, square)

    def parameters(self, factors=None, constant=1.0, count=1, square=False, terms=None, signs=()) -> tuple[float, int]:
        """The scale and the zero point as the file gets them. `terms` are scales and zero points, see `call`."""
        low, high = numerics.widen(*[np.float32(limit) for limit in self.quantizer.known_limits(np.float32(0))])
        if factors is not None:
            factors = [np.float32(factor) for factor in factors]
            low, high, *_ = self._snapped(low, high, factors, constant, count, square)
        if terms is not None:  # the search that inference makes, by the same operations
            grids = np.reshape([(0.0, 0.0) if term is None else term for term in terms], (-1, 2, 2)).astype("float32")
            searched = _stretch_of_sums(
                *map(ops.convert_to_tensor, (low, high)), self.spec, tuple(signs), tf.constant(grids)
            )
            low, high = ties.stretched(low, high, np.float32(searched))
        return numerics.scale_and_zero_point(low, high, self.spec)

    def compute_output_spec(self, x, peek=False, **kwargs):
        return keras.KerasTensor((2,) if peek else x.shape, "float32"), keras.KerasTensor((), "float32")

    def get_config(self):
        return {
            **super().get_config(),
            "quantizer": keras.saving.serialize_keras_object(self.quantizer),
            "sites": self.sites,
            "bits": self.spec.bits,
            "in_training": self.in_training,
            "frozen": self.frozen,
        }


@keras.saving.register_keras_serializable("keras_qat")
class ChannelScale(keras.layers.Layer):
    """`x · kernel + bias` with one number per channel (or one for all): what scaling layers become.

    Args:
        kernel: The multipliers, a number or a list with one per channel. `None`: ones.
        bias: The same for the offsets. `None`: zeros.
        trainable: Whether these numbers are learned, as those of a layer normalization are.
        kernel_regularizer, kernel_constraint, bias_regularizer, bias_constraint: Of the learned numbers.
    """

    def __init__(
        self,
        kernel=None,
        bias=None,
        trainable=False,
        kernel_regularizer=None,
        kernel_constraint=None,
        bias_regularizer=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(**{**kwargs, "trainable": trainable, "dtype": "float32"})
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.learns = trainable
        self.factors, self.offsets = _compact(kernel, 1.0), _compact(bias, 0.0)
        self.use_bias = bool(np.any(self.offsets != 0)) or (trainable and bias is not None)

    @property
    def scalars(self) -> tuple[float, float] | None:
        """The multiplier and the offset where each is fixed and the same for all channels, else None."""
        both_scalar = self.factors.size == self.offsets.size == 1 and not self.learns
        return (float(self.factors[0]), float(self.offsets[0])) if both_scalar else None

    @property
    def is_one_number(self) -> bool:
        """It only multiplies by one number, or only adds one."""
        return self.scalars is not None and (self.scalars[0] == 1 or self.scalars[1] == 0)

    def build(self, input_shape):
        channels = (int(input_shape[-1]),)
        self.kernel = self._numbers("kernel", channels, self.factors)
        if self.use_bias:
            self.bias = self._numbers("bias", channels, self.offsets)

    def _numbers(self, name, shape, values):
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=_constant(values),
            trainable=self.learns,
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
        )

    def call(self, x):
        x = x * self.kernel
        return x + self.bias if self.use_bias else x

    def numbers(self, like=None):
        """The multipliers and offsets as they are now; arrays where `like` is one of numpy's."""
        return read_as(like, self.kernel), read_as(like, self.bias) if self.use_bias else 0.0

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "kernel": self.factors.tolist(),
            "bias": self.offsets.tolist() if self.use_bias else None,
            "trainable": self.learns,
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }


def _compact(values, default) -> np.ndarray:
    """One number per channel, or just one where they are all the same."""
    values = np.ravel(np.asarray(default if values is None else values, np.float32))
    return values[:1] if np.all(values == values[0]) else values


def _constant(values):
    def initializer(shape, dtype=None):
        return ops.broadcast_to(ops.convert_to_tensor(values, dtype), shape)

    return initializer


class GridLayer(keras.layers.Layer):
    """A layer that must know the grids it stands between: `annotate` calls it with the scales of both."""

    operands = 1  # how many tensors it reads; their scales come behind them, then that of what it writes
    rounds = True  # False computes in real values while a training step runs, as if there were no grids

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.supports_masking = True

    def compute_output_shape(self, input_shape, *_):
        return input_shape

    def compute_output_spec(self, x, *args, **kwargs):
        return keras.KerasTensor(self.compute_output_shape(x.shape), "float32")


@keras.saving.register_keras_serializable("keras_qat")
class Rescale(GridLayer):
    """`x · factor`, the factor moved by less than a percent to where all kernels round alike: a MUL by a constant.

    With a factor of 1 it carries a tensor from one grid to another. (QUANTIZE does that in one op too, but rounds
    differently on every runtime.)

    Args:
        factor: Any number.
    """

    def __init__(self, factor: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = float(factor)

    def call(self, x, input_scale=None, output_scale=None):
        if input_scale is None or _calibrating.get() or not self.rounds:
            return x * self.factor
        integer, scale, snapped = self.integers(input_scale, output_scale)
        product = x * ops.stop_gradient(integer * scale)
        return product + ops.stop_gradient(0.25 * snapped * scale * input_scale * ops.sign(product))

    def integers(self, input_scale, output_scale):
        """The constant's integer, its scale, and 1.0 if all kernels round its products alike, else 0.0."""
        integers = np.arange(1.0, 128.0, dtype="float32")
        factor = max(abs(self.factor), 1e-30)
        wanted = integers * (output_scale / (input_scale * factor))  # steps of the product to one of the output
        divisors = ties.kernel_divisor(wanted, ties.FEWEST_STEPS, "nearest")
        best = ops.argmin(ops.abs(ops.log(divisors / wanted)))
        integer, divisor = ops.take(integers, best), ops.take(divisors, best)
        is_close = ops.cast(ops.abs(divisor - ops.take(wanted, best)) < 0.02 * divisor, "float32")
        exact = factor / integer
        scale = ops.where(is_close > 0, ties.one_part_of(divisor) * output_scale / input_scale, exact)
        return integer * math.copysign(1.0, self.factor), scale, is_close

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


@keras.saving.register_keras_serializable("keras_qat")
class HardSwish(GridLayer):
    """`x · relu6(x + 3) / 6`; at inference by the kernel's own 16-bit arithmetic."""

    def call(self, x, input_scale=None, output_scale=None, training=None):
        if training or input_scale is None or _calibrating.get():
            return ops.hard_silu(x)
        return kernels.hard_swish(ops.round(x / input_scale), input_scale, output_scale) * output_scale


@keras.saving.register_keras_serializable("keras_qat")
class Quantized(GridLayer):
    """Runs a layer on quantized weights; with a batch norm or a scaling behind it where `freeze` will fold that in.

    In training it is the layer in float, its kernel fake-quantized, then the batch norm on the batch's statistics. At
    inference it computes what the file will compute: integers times integers, plus one int32 bias that holds the layer's
    own, the batch norm and the input scaling, times the real value of one step of that sum. (All in float32, which is
    exact for integers up to 2^24.)

    Args:
        layer: Any layer with a `kernel` (and a `bias`), its activation taken off.
        channel_axes: The axes of the kernel that together number the output channels.
        batch_norm: The BatchNormalization or `ChannelScale` that directly follows, or None.
        input_scaling: `(multiplier, offset)` that a Rescaling in front of the layer applied to its input, taken over
            here so that the file reads raw values.
        bits, per_channel: How the weights are quantized.
        frozen_statistics: The batch norm keeps its moving averages in training too, and normalizes with them. Its gamma
            and beta go on learning.
        wide: It reads and writes 16 bits.
    """

    def __init__(
        self,
        layer,
        channel_axes=(-1,),
        batch_norm=None,
        input_scaling=(1.0, 0.0),
        bits=8,
        per_channel=True,
        frozen_statistics=False,
        wide=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.layer = _deserialized(layer)
        self.batch_norm = _deserialized(batch_norm)
        self.channel_axes, self.input_scaling = tuple(channel_axes), tuple(input_scaling)
        self.weight_quantizer = MaxAbs(bits, per_channel, self.channel_axes)
        self.frozen_statistics, self.wide = frozen_statistics, wide

    def build(self, input_shape, *_):
        if not self.layer.built:
            self.layer.build(input_shape)
        if self.batch_norm is not None and not self.batch_norm.built:
            self.batch_norm.build(self.layer.compute_output_shape(input_shape))
        self.weight_quantizer.build(self)

    def call(self, x, input_scale=None, output_scale=None, training=None):
        if training or input_scale is None or _calibrating.get() or not self.rounds:
            return self._in_training(x, input_scale, output_scale, training)
        if self._has_penalty(self.layer) or self._has_penalty(self.batch_norm):
            self._in_training(x, input_scale, output_scale, training)  # for its losses
        integers = self.integers(input_scale, output_scale)
        sums = self._linear(ops.round(x / input_scale), integers.kernel) + integers.bias
        # Where steps are snapped to what kernels round alike, whole sums never lie closely below a half. A quarter of a
        # step outwards then keeps the noise of float32 from deciding about those that lie a hair above one.
        if self.wide:
            return kernels.requantized_16(sums, integers.step / output_scale) * output_scale
        return (sums + 0.25 * integers.snapped * ops.sign(sums)) * integers.step

    def _in_training(self, x, input_scale, output_scale, training):
        kernel = ops.convert_to_tensor(self.layer.kernel)
        if self.rounds:
            scale, _ = self._weight_scale(input_scale, output_scale)
            kernel = self.weight_quantizer.fake_quant(kernel, self._per_kernel(scale))
        y = self._linear(x, kernel)
        multiplier, offset = self.input_scaling
        if multiplier != 1.0 or offset != 0.0:
            y = y * multiplier + offset * self._kernel_sums(kernel)
        if self.layer.use_bias:
            y = y + self.layer.bias
        self._penalize(self.layer, y)
        if self.batch_norm is None:
            return y
        if isinstance(self.batch_norm, ChannelScale):
            y = self.batch_norm.call(y)
        elif training and self.batch_norm.trainable and fused_batch_norm.can_fuse(self.batch_norm, y):
            y = fused_batch_norm.train_fused(self.batch_norm, y, self.frozen_statistics)
        else:
            y = self.batch_norm.call(y, training=training and not self.frozen_statistics)
        if training and not self.frozen_statistics and isinstance(self.batch_norm, keras.layers.BatchNormalization):
            agree_on_statistics(self.batch_norm)
        self._penalize(self.batch_norm, y)
        return y

    def _has_penalty(self, layer) -> bool:
        return layer is not None and layer.activity_regularizer is not None

    def _penalize(self, layer, y):
        """Adds the loss of a layer's `activity_regularizer`, as Keras does where the layer itself is called."""
        if self._has_penalty(layer):
            loss = layer.activity_regularizer(y)
            self.add_loss(ops.divide_no_nan(loss, ops.cast(ops.shape(y)[0], loss.dtype)))

    def _linear(self, x, kernel):
        """The layer's own computation with `kernel` in place of its variable, and without its bias."""
        replaced = [(self.layer.kernel, kernel)]
        if self.layer.use_bias:
            replaced.append((self.layer.bias, ops.zeros_like(self.layer.bias)))
        with keras.StatelessScope(state_mapping=replaced):
            return self.layer.call(x)

    def integers(self, input_scale, output_scale) -> "IntegerWeights":
        """The integers of the file. Inference runs on them, and `freeze` writes them: arrays for numpy's scales."""
        scale, snapped = self._weight_scale(input_scale, output_scale)
        kernel = self.weight_quantizer.integers(read_as(input_scale, self.layer.kernel), self._per_kernel(scale))
        multiplier, bias = self._multiplier_and_bias(kernel, scale)
        step, kept = numerics.accumulator_step(input_scale, scale, multiplier, bias)
        # A negative factor of a batch norm turns the channel's integers around, so that its scale stays positive.
        kernel = kernel * self._per_kernel(ops.where(multiplier < 0, -kept, kept))
        if self.wide:
            step = ops.cast(kernels.snap_to_15_bits(step / output_scale), "float32") * output_scale
        elif self.batch_norm is not None and output_scale is not None:
            if isinstance(self.layer, ChannelScale):  # a batch norm alone: its integers are free to choose
                step, kernel, snapped = ties.snap_by_integers(step, kernel, output_scale)
            else:
                step, snapped = ties.snap_to_kernels(step, output_scale, 32.0, "nearest")
        kernel, bias = ops.round(kernel), ops.round(bias / step)
        if output_scale is not None and not self.wide:
            step = ops.minimum(step, numerics.LARGEST_MULTIPLIER * output_scale)
        return IntegerWeights(kernel, step, bias, snapped)

    def _weight_scale(self, input_scale, output_scale):
        """The real value of one step of a weight per channel, and where it was made a little larger for the kernels.

        With a batch norm the scale stays: what is moved then is the product with its factor, at inference.
        """
        scale = self.weight_quantizer.channel_scale(read_as(input_scale, self.layer.kernel))
        if self.wide or self.batch_norm is not None or input_scale is None or output_scale is None:
            return scale, 0.0
        factor = input_scale * self.input_scaling[0]
        step, snapped = ties.snap_to_kernels(factor * scale, output_scale, ties.FEWEST_STEPS, "up")
        return ops.stop_gradient(step / factor), snapped

    def _per_kernel(self, channels):
        """One number per output channel, shaped to multiply the kernel."""
        return ops.reshape(channels, self._channel_shape(self.layer.kernel))

    def _multiplier_and_bias(self, kernel, scale):
        """What is multiplied to a channel's sum, and what is added to it: bias, input offset, batch norm."""
        multiplier, offset = self.input_scaling
        multiplier, bias = multiplier * ops.ones_like(scale), ops.zeros_like(scale)
        if self.layer.use_bias:
            bias = bias + read_as(scale, self.layer.bias)
        if offset != 0.0:
            bias = bias + offset * self._kernel_sums(kernel) * scale
        if self.batch_norm is None:
            return multiplier, bias
        if isinstance(self.batch_norm, ChannelScale):
            norm_multiplier, norm_offset = self.batch_norm.numbers(like=scale)
        else:
            norm_multiplier, norm_offset = fused_batch_norm.multiplier_and_offset(self.batch_norm, like=scale)
        return multiplier * norm_multiplier, bias * norm_multiplier + norm_offset

    def _kernel_sums(self, kernel):
        shared = [axis for axis, size in enumerate(self._channel_shape(kernel)) if size == 1]
        return ops.reshape(ops.sum(kernel, shared), (-1,))

    def _channel_shape(self, kernel) -> list[int]:
        """The kernel's shape with 1 for every axis that does not number output channels."""
        shape = [1] * len(kernel.shape)
        for axis in self.channel_axes:
            shape[axis] = kernel.shape[axis]
        return shape

    def compute_output_shape(self, input_shape, *_):
        return self.layer.compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "channel_axes": self.channel_axes,
            "batch_norm": self.batch_norm and keras.saving.serialize_keras_object(self.batch_norm),
            "input_scaling": self.input_scaling,
            "bits": self.weight_quantizer.spec.bits,
            "per_channel": self.weight_quantizer.spec.per_channel,
            "frozen_statistics": self.frozen_statistics,
            "wide": self.wide,
        }


@dataclasses.dataclass(frozen=True)
class IntegerWeights:
    """Integers of a layer, as float tensors.

    Args:
        kernel: In Keras's layout.
        step: The real value of one step of the kernel's sum, per channel.
        bias: In such steps.
        snapped: 1.0 for the channels whose step all runtimes round alike (see `ties.snap_to_kernels`).
    """

    kernel: object
    step: object
    bias: object
    snapped: object


def _deserialized(layer):
    return keras.saving.deserialize_keras_object(layer) if isinstance(layer, dict) else layer


def is_qat(model) -> bool:
    """Whether `kq.quantize` made this model."""
    return any(isinstance(layer, FakeQuant) for layer in getattr(model, "layers", []))


def require_qat(model) -> None:
    if not is_qat(model):
        raise ValueError(
            "This is not a QAT model: it has no FakeQuant layer. Expected what kq.quantize(model) returns. Received: "
            f"{model!r}"
        )
