"""Pooling by keras.ops, and pooling whose windows follow from the size of its result."""

import keras
import numpy as np
from keras import ops

from keras_qat.graph.lower.attention import masked
from keras_qat.graph.lower.linear_maps import adaptive_average
from keras_qat.graph.lower.truths import truth_of
from keras_qat.primitives import Constant


def _pool(layers):
    def rule(operation, args, kwargs):
        rank = len(args[0].shape) - 2
        if rank not in layers:
            return None
        return layers[rank](
            operation.pool_size,
            strides=operation.strides,
            padding=operation.padding,
            data_format=operation.data_format,
            name=operation.name,
        )

    return rule


def _adaptive(layers):
    """Where the size is a multiple of the result's, all windows are alike; else averages are two products with matrices."""

    def rule(layer, args, kwargs):
        sizes = args[0].shape[1:-1]
        results = layer.output_size if hasattr(layer.output_size, "__len__") else (layer.output_size,) * len(sizes)
        if any(size % result for size, result in zip(sizes, results)):
            return adaptive_average(layer, args[0]) if layers is _AVERAGE else None
        if layer.data_format != "channels_last":
            return None
        window = tuple(size // result for size, result in zip(sizes, results))
        return layers[len(sizes)](window, name=layer.name)

    return rule


def _of_channels_first(reduce):
    def rule(layer, args, kwargs):
        axes = tuple(range(2, len(args[0].shape)))
        return (
            (lambda x: reduce(x, axis=axes, keepdims=layer.keepdims)) if layer.data_format == "channels_first" else None
        )

    return rule


def _average_of_steps(layer, args, kwargs):
    """With a mask it is attention that likes all places alike."""
    if kwargs.get("mask") is None:
        return _of_channels_first(ops.mean)(layer, args, kwargs)
    if layer.data_format == "channels_first":
        return None
    no_scores = Constant(np.zeros((1, 1, args[0].shape[1])), per_sample=True, name="scores")

    def average(x, mask):
        weights = ops.softmax(masked(no_scores(x), ops.expand_dims(truth_of(mask), 1)), axis=-1)
        result = ops.matmul(weights, x)
        return result if layer.keepdims else ops.squeeze(result, axis=1)

    return average


_AVERAGE = {
    1: keras.layers.AveragePooling1D,
    2: keras.layers.AveragePooling2D,
    3: keras.layers.AveragePooling3D,
}
_MAX = {1: keras.layers.MaxPooling1D, 2: keras.layers.MaxPooling2D, 3: keras.layers.MaxPooling3D}
RULES = {
    "GlobalAveragePooling1D": _average_of_steps,
    "GlobalAveragePooling2D": _of_channels_first(ops.mean),
    "GlobalMaxPooling1D": _of_channels_first(ops.max),
    "GlobalMaxPooling2D": _of_channels_first(ops.max),
    "ops.AveragePool": _pool(_AVERAGE),
    "ops.MaxPool": _pool(_MAX),
    **{f"AdaptiveAveragePooling{rank}D": _adaptive(_AVERAGE) for rank in _AVERAGE},
    **{f"AdaptiveMaxPooling{rank}D": _adaptive(_MAX) for rank in _MAX},
}
