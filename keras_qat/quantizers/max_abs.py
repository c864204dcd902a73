"""Weights: symmetric, the largest magnitude of each output channel is the end of its range."""

import math

import keras
from keras import ops

from keras_qat import numerics
from keras_qat.spec import Spec


@keras.saving.register_keras_serializable("keras_qat")
class MaxAbs(keras.layers.Layer):
    """Fake-quantizes weights with `scale = max|w| / qmax` per output channel. It has no state.

    Args:
        bits: Of the integers.
        per_channel: One scale per output channel, or one for all.
        channel_axes: The axes of the kernel that together number the output channels.
    """

    def __init__(self, bits: int = 8, per_channel: bool = True, channel_axes: tuple[int, ...] = (-1,), **kwargs):
        super().__init__(**kwargs)
        self.spec = Spec(bits, symmetric=True, per_channel=per_channel)
        self.channel_axes = tuple(channel_axes)

    def channel_scale(self, weights):
        """The scale with one entry per output channel, repeated if all share one."""
        scale = ops.stop_gradient(numerics.weight_scale(weights, self.spec, self.channel_axes))
        channels = math.prod(weights.shape[axis] for axis in self.channel_axes)
        return ops.broadcast_to(ops.reshape(scale, (-1,)), (channels,))

    def fake_quant(self, weights, scale):
        """The weights on the grid of `scale`, as floats."""
        return numerics.fake_quant_weights(weights, scale, self.spec)

    def integers(self, weights, scale):
        """The numbers of their steps, as floats."""
        return numerics.weight_integers(weights, scale, self.spec)

    def get_config(self):
        config = {"bits": self.spec.bits, "per_channel": self.spec.per_channel, "channel_axes": self.channel_axes}
        return {**super().get_config(), **config}
