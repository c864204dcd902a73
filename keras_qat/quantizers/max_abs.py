"""Weights: symmetric, the largest magnitude of each output channel is the end of its range."""

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

    def scale(self, weights):
        return ops.stop_gradient(numerics.weight_scale(weights, self.spec, self.channel_axes))

    def quantize_weights(self, weights):
        """Returns the weights on their grid, and the scale with one entry per output channel."""
        scale = self.scale(weights)
        return numerics.fake_quant_weights(weights, scale, self.spec), self.per_output_channel(scale, weights)

    def integers(self, weights):
        return numerics.weight_integers(weights, self.scale(weights), self.spec)

    def per_output_channel(self, scale, weights):
        """Flattens a scale with kept axes to one entry per output channel, repeated if all share one."""
        channels = 1
        for axis in self.channel_axes:
            channels *= weights.shape[axis]
        return ops.broadcast_to(ops.reshape(scale, (-1,)), (channels,))

    def get_config(self):
        config = {"bits": self.spec.bits, "per_channel": self.spec.per_channel, "channel_axes": self.channel_axes}
        return {**super().get_config(), **config}
