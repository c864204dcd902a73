"""Layers on volumes, (batch, depth, height, width, channels): TFLite works on images, so depth is taken slice by slice."""

import math

import keras
import numpy as np
from keras import ops

from keras_qat.graph.lower.activations import symbolic
from keras_qat.graph.lower.weights import options_of


def _slices(x) -> list:
    return [x[:, depth] for depth in range(x.shape[1])]


def _windows(size: int, window: int, stride: int, padding: str) -> list[range]:
    """Which slices each result is made of; "same" leaves out what lies outside."""
    if padding == "valid":
        return [range(first, first + window) for first in range(0, size - window + 1, stride)]
    count = math.ceil(size / stride)
    before = max((count - 1) * stride + window - size, 0) // 2
    starts = [n * stride - before for n in range(count)]
    return [range(max(first, 0), min(first + window, size)) for first in starts]


def _conv_3d(layer, args, kwargs):
    """For each slice of the result a Conv2D over the channels of all slices it reads; one layer, called for each."""
    depth, height, width, channels, filters = layer.kernel.shape
    if layer.data_format != "channels_last":
        return None
    if layer.groups > 1:
        return _conv_3d_of_groups(layer)
    conv = keras.layers.Conv2D(
        filters,
        (height, width),
        strides=layer.strides[1:],
        dilation_rate=layer.dilation_rate[1:],
        activation=layer.activation,
        **options_of(layer),
        name=layer.name,
    )
    conv.build((None, None, None, depth * channels))
    kernel = ops.transpose(layer.kernel, (1, 2, 0, 3, 4))
    conv.kernel.assign(ops.reshape(kernel, (height, width, depth * channels, filters)))
    if layer.use_bias:
        conv.bias.assign(layer.bias)
    size, stride, rate = args[0].shape[1], layer.strides[0], layer.dilation_rate[0]
    reach, pad = (depth - 1) * rate + 1, [[0, 0]] * 5
    if layer.padding == "same":
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        pad = [[0, 0], [total // 2, total - total // 2], [0, 0], [0, 0], [0, 0]]

    def convolve(x):
        slices = _slices(ops.pad(x, pad) if any(map(any, pad)) else x)
        windows = [window[::rate] for window in _windows(len(slices), reach, stride, "valid")]
        return ops.stack([conv(ops.concatenate([slices[n] for n in window], -1)) for window in windows], axis=1)

    return convolve


def _conv_3d_of_groups(layer):
    """A Conv3D for each group of channels."""
    convs, groups, per_group = [], layer.groups, layer.filters // layer.groups
    for group in range(groups):
        of_result = slice(group * per_group, (group + 1) * per_group)
        conv = keras.layers.Conv3D.from_config(
            {**layer.get_config(), "groups": 1, "filters": per_group, "name": f"group_{group}", "activation": None}
        )
        conv.build((None, None, None, None, layer.kernel.shape[-2]))
        conv.kernel.assign(layer.kernel[..., of_result])
        if layer.use_bias:
            conv.bias.assign(layer.bias[of_result])
        convs.append(conv)
    activation = symbolic(layer.activation)
    return lambda x: activation(
        ops.concatenate([conv(part) for conv, part in zip(convs, ops.split(x, groups, axis=-1), strict=True)], axis=-1)
    )


def _conv_3d_transpose(layer, args, kwargs):
    """For each slice of the result a Conv2DTranspose over the channels of all slices that reach it.

    Slice `k` of the kernel writes the slices `n · stride + k` of the result. The slices of the kernel with the same remainder
    by the stride are one layer, which is called for each of theirs.
    """
    depth, height, width, filters, channels = layer.kernel.shape
    size, stride = args[0].shape[1], layer.strides[0]
    if layer.data_format != "channels_last" or any(rate != 1 for rate in layer.dilation_rate) or depth < stride:
        return None
    result = layer.compute_output_shape(args[0].shape)[1]
    # The same as the convolution whose gradient it is would leave out in front.
    cut = max((size - 1) * stride + depth - result, 0) // 2 if layer.padding == "same" else 0
    kernel, convs = np.asarray(layer.kernel), []
    for first in range(stride):
        read = kernel[first::stride][::-1]  # the last one comes from the slice furthest in front
        conv = keras.layers.Conv2DTranspose(
            filters,
            (height, width),
            strides=layer.strides[1:],
            output_padding=None if layer.output_padding is None else layer.output_padding[1:],
            **options_of(layer),
            name=f"{layer.name}_{first}",
        )
        conv.build((None, None, None, len(read) * channels))
        conv.kernel.assign(np.transpose(read, (1, 2, 3, 0, 4)).reshape(height, width, filters, len(read) * channels))
        if layer.use_bias:
            conv.bias.assign(layer.bias)
        convs.append((conv, len(read)))
    most, activation = -(-depth // stride), symbolic(layer.activation)

    def convolve(x):
        behind = max((result - 1 + cut) // stride - size + 1, 0)
        slices = _slices(ops.pad(x, [[0, 0], [most - 1, behind], [0, 0], [0, 0], [0, 0]]))
        results = []
        for place in range(cut, cut + result):
            conv, count = convs[place % stride]
            last = place // stride + most - 1
            results.append(conv(ops.concatenate(slices[last - count + 1 : last + 1], axis=-1)))
        return activation(ops.stack(results, axis=1))

    return convolve


def _max_pool_3d(layer, args, kwargs):
    def join(slices):
        result = slices[0]
        for one in slices[1:]:
            result = ops.maximum(result, one)
        return result

    return _pool_3d(layer, args[0], keras.layers.MaxPooling2D, join)


def _average_pool_3d(layer, args, kwargs):
    return _pool_3d(
        layer, args[0], keras.layers.AveragePooling2D, lambda slices: sum(slices[1:], slices[0]) * (1.0 / len(slices))
    )


def _pool_3d(layer, x, pool_2d, join):
    if layer.data_format != "channels_last":
        return None
    window, stride = layer.pool_size[0], layer.strides[0]
    windows = _windows(x.shape[1], window, stride, layer.padding)

    def pool(x):
        pooled = [
            pool_2d(layer.pool_size[1:], layer.strides[1:], layer.padding, name=f"{layer.name}_{n}")(one)
            for n, one in enumerate(_slices(x))
        ]
        return ops.stack([join([pooled[n] for n in window]) for window in windows], axis=1)

    return pool


def _global_average_3d(layer, args, kwargs):
    return lambda x: ops.mean(x, axis=(1, 2, 3), keepdims=layer.keepdims)


def _global_max_3d(layer, args, kwargs):
    return lambda x: ops.max(x, axis=(1, 2, 3), keepdims=layer.keepdims)


def _zero_padding_3d(layer, args, kwargs):
    return lambda x: ops.pad(x, [[0, 0], *[list(pair) for pair in layer.padding], [0, 0]])


def _up_sampling_3d(layer, args, kwargs):
    def up_sample(x):
        for axis, size in enumerate(layer.size, start=1):
            x = ops.repeat(x, size, axis=axis) if size > 1 else x
        return x

    return up_sample


RULES = {
    "AveragePooling3D": _average_pool_3d,
    "Conv3D": _conv_3d,
    "Conv3DTranspose": _conv_3d_transpose,
    "GlobalAveragePooling3D": _global_average_3d,
    "GlobalMaxPooling3D": _global_max_3d,
    "MaxPooling3D": _max_pool_3d,
    "UpSampling3D": _up_sampling_3d,
    "ZeroPadding3D": _zero_padding_3d,
}
