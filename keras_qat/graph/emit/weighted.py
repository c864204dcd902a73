"""Layers with weights, and scalings that stand alone."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_qat import ties
from keras_qat.graph.emit.arithmetic import multiply_and_add
from keras_qat.graph.emit.call import PADDINGS, PIXEL_BY_PIXEL, Call, output_size, pair
from tflite_export import Tensor


def _weights_and_bias(call: Call, kernel: np.ndarray, axis: int, input_name: str) -> list[str]:
    """Adds the two constants of a layer; `kernel` in TFLite's layout, its output channels along `axis`."""
    if call.is_float:
        bias = call.operation.bias if call.operation.use_bias else np.zeros(kernel.shape[axis])
        return [call.constant("weights", kernel, "float32"), call.constant("bias", bias, "float32")]
    steps, read = np.asarray(call.weights.step, np.float64), call.program.tensors[input_name]
    scale = steps / np.float32(read.scale[0])
    if read.dtype == "int8":
        narrowed = ties.narrowest_hair(steps, read.scale[0], call.program.tensors[call.output].scale[0])
        scale = np.where(call.weights.snapped, narrowed, scale)
    scale = tuple(scale.tolist())
    bias_type = "int64" if read.dtype == "int16" else "int32"
    return [
        call.constant("weights", kernel, "int8", scale=scale, axis=axis),
        call.constant("bias", call.weights.bias, bias_type, scale=tuple(steps.tolist()), axis=0),
    ]


def _kernel(call: Call) -> np.ndarray:
    return np.asarray(call.operation.kernel if call.is_float else call.weights.kernel)


def fully_connected(call: Call) -> None:
    constants = _weights_and_bias(call, _kernel(call).T, 0, call.inputs[0])
    keep = len(call.shape(call.inputs[0])) > 2 and len(call.shape(call.output)) > 2
    call.op("FULLY_CONNECTED", [call.inputs[0], *constants], call.output, keepNumDims=keep, **call.fused())


def _convolution(call: Call, kind: str, kernel, axis, strides, dilation, padding, **options) -> None:
    image = call.as_image(call.inputs[0])
    if padding == "causal":
        image, padding = _padded_in_front(call, image, (kernel.shape[2] - 1) * dilation[1]), "valid"
    constants = _weights_and_bias(call, kernel, axis, image)
    height, width = (
        output_size(*sizes, padding)
        for sizes in zip(call.shape(image)[1:3], kernel.shape[1:3], strides, dilation, strict=True)
    )
    result = call.image_output((call.shape(image)[0], height, width, kernel.shape[axis]))
    call.op(
        kind,
        [image, *constants],
        result,
        padding=PADDINGS[padding],
        strideH=strides[0],
        strideW=strides[1],
        dilationHFactor=dilation[0],
        dilationWFactor=dilation[1],
        **options,
        **call.fused(),
    )
    call.from_image(result)


def _padded_in_front(call: Call, image: str, steps: int) -> str:
    """Zeros in front of the time axis, for causal convolutions."""
    if steps == 0:
        return image
    batch, height, width, channels = call.shape(image)
    padded = call.twin(image, (batch, height, width + steps, channels), "padded")
    call.op("PAD", [image, call.constant("paddings", [[0, 0], [0, 0], [steps, 0], [0, 0]], "int32")], padded)
    return padded


def conv_2d(call: Call) -> None:
    layer = call.operation
    kernel = np.moveaxis(_kernel(call), -1, 0)
    kernel = kernel[:, None] if kernel.ndim == 3 else kernel
    strides, dilation = pair(layer.strides), pair(layer.dilation_rate)
    _convolution(call, "CONV_2D", kernel, 0, strides, dilation, layer.padding)


def depthwise_conv_2d(call: Call) -> None:
    layer = call.operation
    kernel = _kernel(call)
    kernel = kernel[None] if kernel.ndim == 3 else kernel
    height, width, channels, multiplier = kernel.shape
    kernel = kernel.reshape(1, height, width, channels * multiplier)
    strides, dilation = pair(layer.strides), pair(layer.dilation_rate)
    _convolution(call, "DEPTHWISE_CONV_2D", kernel, 3, strides, dilation, layer.padding, depthMultiplier=multiplier)


conv_1d, depthwise_conv_1d = conv_2d, depthwise_conv_2d


def conv_2d_transpose(call: Call) -> None:
    layer = call.operation
    constants = _weights_and_bias(call, np.moveaxis(_kernel(call), 2, 0), 0, call.inputs[0])
    call.op(
        "TRANSPOSE_CONV",
        [_output_shape(call), constants[0], call.inputs[0], constants[1]],
        call.output,
        padding=PADDINGS[layer.padding],
        strideH=layer.strides[0],
        strideW=layer.strides[1],
        **call.fused(),
    )


def _output_shape(call: Call) -> str:
    """The shape of the output as a tensor: a constant, or put together from the input's batch at run time."""
    shape = call.shape(call.output)
    if not call.program.dynamic_batch:
        return call.constant("output_shape", shape, "int32")
    numbers = [
        call.program.add(Tensor(f"{call.output}/{what}", size, "int32", batched=False))
        for what, size in (("input_shape", (4,)), ("batch", (1,)), ("output_shape", (4,)))
    ]
    first, second, step = (call.constant(what, [v], "int32") for what, v in (("begin", 0), ("end", 1), ("step", 1)))
    call.op("SHAPE", [call.inputs[0]], numbers[0], outType=schema.TensorType.INT32)
    call.op("STRIDED_SLICE", [numbers[0], first, second, step], numbers[1])
    call.op("CONCATENATION", [numbers[1], call.constant("sizes", shape[1:], "int32")], numbers[2], axis=0)
    return numbers[2]


def channel_scale(call: Call) -> None:
    """A depthwise convolution over single pixels; in float MUL and ADD."""
    if call.is_float:
        bias = call.operation.bias if call.operation.use_bias else np.zeros(1)
        return multiply_and_add(call, call.operation.kernel, bias)
    image = call.as_image(call.inputs[0])
    constants = _weights_and_bias(call, _kernel(call).reshape(1, 1, 1, -1), 3, image)
    result = call.image_output(call.shape(image))
    call.op("DEPTHWISE_CONV_2D", [image, *constants], result, **PIXEL_BY_PIXEL, **call.fused())
    call.from_image(result)
