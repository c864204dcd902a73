"""Weights: symmetric, the largest magnitude of each output channel is the end of its range."""

import math

import keras
import numpy as np

from keras_qat import numerics
from keras_qat.arrays import ops, read_as
from keras_qat.quantizers.quantizer import Quantizer
from keras_qat.spec import Spec


@keras.saving.register_keras_serializable("keras_qat")
class MaxAbs(Quantizer):
    """Fake-quantizes weights with `scale = max|w| / qmax` per output channel.

    Its only state is the number of bits: a variable, so that a schedule can change it without a new trace, and that
    whatever brings weights back (a checkpoint, `EarlyStopping`) brings back the bits they were trained with.

    Args:
        bits: Of the integers.
        per_channel: One scale per output channel, or one for all.
        channel_axes: The axes of the kernel that together number the output channels.
    """

    def __init__(self, bits: int = 8, per_channel: bool = True, channel_axes: tuple[int, ...] = (-1,)):
        self._first_spec = Spec(bits, symmetric=True, per_channel=per_channel)
        self.channel_axes, self.levels = tuple(channel_axes), None

    def build(self, layer):
        first = numerics.levels_of(self._first_spec)
        self.levels = layer.add_weight(
            name="levels",
            shape=(2,),
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(first, dtype),
            trainable=False,
            dtype="float32",
            autocast=False,
            aggregation="only_first_replica",
        )

    @property
    def spec(self) -> Spec:
        """As it is now."""
        bits = (
            1 + round(np.log2(ops.convert_to_numpy(self.levels)[0] + 1))
            if self.levels is not None
            else self._first_spec.bits
        )
        return Spec(bits, symmetric=True, per_channel=self._first_spec.per_channel)

    def take_bits(self, bits) -> None:
        """Goes on with 2 to 8 bits; a tensor will do."""
        every = np.stack([numerics.levels_of(Spec(each, symmetric=True)) for each in range(2, 9)])
        self.levels.assign(ops.take(every, ops.cast(bits, "int32") - 2, axis=0))

    def channel_scale(self, weights):
        """The scale with one entry per output channel, repeated if all share one."""
        scale = ops.stop_gradient(self._scale(weights))
        channels = math.prod(weights.shape[axis] for axis in self.channel_axes)
        return ops.broadcast_to(ops.reshape(scale, (-1,)), (channels,))

    def _scale(self, weights):
        return numerics.weight_scale(weights, self._first_spec, self.channel_axes, read_as(weights, self.levels))

    def fake_quant(self, weights, scale):
        """The weights on the grid of `scale`, as floats."""
        return numerics.fake_quant_weights(weights, scale, self._first_spec, self.levels)

    def integers(self, weights, scale):
        """The numbers of their steps, as floats."""
        return numerics.weight_integers(weights, scale, self._first_spec, read_as(weights, self.levels))

    def get_config(self):
        spec = self.spec
        return {"bits": spec.bits, "per_channel": spec.per_channel, "channel_axes": self.channel_axes}
