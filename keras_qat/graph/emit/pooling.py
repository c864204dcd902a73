"""Pooling and reductions."""

import math

import keras
from ai_edge_litert import schema_py_generated as schema

from keras_qat.graph.emit.call import PADDINGS, Call, output_size, pair


def _pool(call: Call, kind: str, window, strides, padding: str) -> None:
    image = call.as_image(call.inputs[0])
    sizes = [
        output_size(size, wide, stride, 1, padding)
        for size, wide, stride in zip(call.shape(image)[1:3], window, strides, strict=True)
    ]
    result = call.image_output((call.shape(image)[0], *sizes, call.shape(image)[-1]))
    call.op(
        kind,
        [image],
        result,
        padding=PADDINGS[padding],
        strideH=strides[0],
        strideW=strides[1],
        filterHeight=window[0],
        filterWidth=window[1],
    )
    call.from_image(result)


def _keras_pool(kind: str):
    def emit(call: Call) -> None:
        layer = call.operation
        _pool(call, kind, pair(layer.pool_size), pair(layer.strides), layer.padding)

    return emit


max_pool, average_pool = _keras_pool("MAX_POOL_2D"), _keras_pool("AVERAGE_POOL_2D")


def reduced_axes(node) -> list[int]:
    """The axes that a reduction is over: those named, or of a global pooling all between batch and channels."""
    rank = len(node.input_tensors[0].shape)
    if isinstance(node.operation, keras.Layer):
        return list(range(1, rank - 1))
    axis = node.operation.axis
    axes = range(rank) if axis is None else [axis] if isinstance(axis, int) else axis
    return sorted(one % rank for one in axes)


def values_per_mean(node) -> int:
    """How many values an average is over."""
    return math.prod(node.input_tensors[0].shape[axis] for axis in reduced_axes(node))


def _reduction(kind: str):
    def emit(call: Call) -> None:
        keep = len(call.shape(call.output)) == len(call.shape(call.inputs[0]))
        axes = call.constant("axes", reduced_axes(call.node), "int32")
        call.op(kind, [call.inputs[0], axes], call.output, keepDims=keep)

    return emit


mean = _reduction("MEAN")

largest, smallest = _reduction("REDUCE_MAX"), _reduction("REDUCE_MIN")


def _index(kind: str):
    def emit(call: Call) -> None:
        axis = call.constant("axis", call.operation.axis % len(call.shape(call.inputs[0])), "int32")
        call.op(kind, [call.inputs[0], axis], call.output, outputType=schema.TensorType.INT32)

    return emit


index_of_largest, index_of_smallest = _index("ARG_MAX"), _index("ARG_MIN")


def global_average_pool(call: Call) -> None:
    """AVERAGE_POOL_2D over everything: where MEAN rounds differently on the runtimes."""
    shape = call.shape(call.inputs[0])
    window = (1, shape[1]) if len(shape) == 3 else shape[1:3]
    _pool(call, "AVERAGE_POOL_2D", window, window, "valid")
