"""Convolutions made of several."""

import keras


def _separable_conv(layer, args, kwargs):
    """Depthwise, then pointwise."""
    rank = layer.rank
    if rank == 1:
        depthwise = keras.layers.DepthwiseConv1D
        pointwise = keras.layers.Conv1D
    else:
        depthwise, pointwise = keras.layers.DepthwiseConv2D, keras.layers.Conv2D
    first = depthwise(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        name="depthwise",
    )
    second = pointwise(
        layer.filters,
        1,
        use_bias=layer.use_bias,
        kernel_regularizer=layer.pointwise_regularizer,
        kernel_constraint=layer.pointwise_constraint,
        bias_regularizer=layer.bias_regularizer,
        bias_constraint=layer.bias_constraint,
        trainable=layer.trainable,
        name="pointwise",
    )
    channels = layer.depthwise_kernel.shape[rank]
    first.build((None,) * (rank + 1) + (channels,))
    first.kernel.assign(layer.depthwise_kernel)
    second.build((None,) * (rank + 1) + (channels * layer.depth_multiplier,))
    second.kernel.assign(layer.pointwise_kernel)
    if layer.use_bias:
        second.bias.assign(layer.bias)
    return lambda x: layer.activation(second(first(x)))


RULES = {"SeparableConv1D": _separable_conv, "SeparableConv2D": _separable_conv}
