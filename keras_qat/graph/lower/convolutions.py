"""Convolutions made of several."""

import keras
from keras import ops

from keras_qat.graph.lower.weights import is_learned, options_of


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
        depthwise_initializer="zeros",
        depthwise_regularizer=layer.depthwise_regularizer,
        depthwise_constraint=layer.depthwise_constraint,
        trainable=layer.trainable,
        name="depthwise",
    )
    second = pointwise(
        layer.filters,
        1,
        use_bias=layer.use_bias,
        kernel_initializer="zeros",
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


def _conv_1d_transpose(layer, args, kwargs):
    """On an image of one row."""
    if layer.data_format != "channels_last" or layer.dilation_rate[0] != 1:
        return None
    conv = keras.layers.Conv2DTranspose(
        layer.filters,
        (1, layer.kernel_size[0]),
        strides=(1, layer.strides[0]),
        output_padding=None if layer.output_padding is None else (0, *layer.output_padding),
        **options_of(layer),
        name=layer.name,
    )
    conv.build((None, 1, None, layer.kernel.shape[-1]))
    conv.kernel.assign(layer.kernel[None])
    if layer.use_bias:
        conv.bias.assign(layer.bias)
    return lambda x: ops.squeeze(layer.activation(conv(ops.expand_dims(x, 1))), 1)


def _with_kernel(make):
    """`ops.conv(x, kernel)` of a custom layer: the Keras layer with that kernel."""

    def rule(operation, args, kwargs):
        x, kernel = args[0], args[1] if len(args) > 1 else kwargs.get("kernel")
        if isinstance(kernel, keras.KerasTensor) or len(x.shape) not in (3, 4):
            return None
        layer = make(operation, kernel.shape, len(x.shape) - 2)
        layer.trainable = is_learned(kernel)
        layer.build(x.shape)
        layer.kernel.assign(kernel)
        return lambda x, *_, **__: layer(x)

    return rule


def _options(operation) -> dict:
    return {
        "strides": operation.strides,
        "padding": operation.padding,
        "dilation_rate": operation.dilation_rate,
        "data_format": operation.data_format,
        "use_bias": False,
        "name": operation.name,
    }


def _conv(operation, shape, rank):
    layer = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D}[rank]
    return layer(shape[-1], shape[:rank], **_options(operation))


def _depthwise_conv(operation, shape, rank):
    layer = {1: keras.layers.DepthwiseConv1D, 2: keras.layers.DepthwiseConv2D}[rank]
    return layer(shape[:rank], depth_multiplier=shape[-1], **_options(operation))


def _conv_transpose(operation, shape, rank):
    layer = {1: keras.layers.Conv1DTranspose, 2: keras.layers.Conv2DTranspose}[rank]
    return layer(shape[-2], shape[:rank], output_padding=operation.output_padding, **_options(operation))


def _separable_by_ops(operation, args, kwargs):
    """`ops.separable_conv`: depthwise, then pointwise."""
    kernels = [*args[1:], *kwargs.values()]
    if len(kernels) != 2 or any(isinstance(kernel, keras.KerasTensor) for kernel in kernels):
        return None
    options = {name: getattr(operation, name) for name in ("strides", "padding", "data_format", "dilation_rate")}
    return lambda x, *_, **__: ops.conv(ops.depthwise_conv(x, kernels[0], **options), kernels[1])


RULES = {
    "Conv1DTranspose": _conv_1d_transpose,
    "SeparableConv1D": _separable_conv,
    "SeparableConv2D": _separable_conv,
    "ops.Conv": _with_kernel(_conv),
    "ops.ConvTranspose": _with_kernel(_conv_transpose),
    "ops.DepthwiseConv": _with_kernel(_depthwise_conv),
    "ops.SeparableConv": _separable_by_ops,
}
