"""Pooling by keras.ops, and pooling whose windows follow from the size of its result."""

import keras


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
    """Where the size is a multiple of the result's, all windows are alike."""

    def rule(layer, args, kwargs):
        sizes = args[0].shape[1:-1]
        results = layer.output_size if hasattr(layer.output_size, "__len__") else (layer.output_size,) * len(sizes)
        if layer.data_format != "channels_last" or any(size % result for size, result in zip(sizes, results)):
            return None
        window = tuple(size // result for size, result in zip(sizes, results))
        return layers[len(sizes)](window, name=layer.name)

    return rule


_AVERAGE = {
    1: keras.layers.AveragePooling1D,
    2: keras.layers.AveragePooling2D,
    3: keras.layers.AveragePooling3D,
}
_MAX = {1: keras.layers.MaxPooling1D, 2: keras.layers.MaxPooling2D, 3: keras.layers.MaxPooling3D}
RULES = {
    "ops.AveragePool": _pool(_AVERAGE),
    "ops.MaxPool": _pool(_MAX),
    **{f"AdaptiveAveragePooling{rank}D": _adaptive(_AVERAGE) for rank in _AVERAGE},
    **{f"AdaptiveMaxPooling{rank}D": _adaptive(_MAX) for rank in _MAX},
}
