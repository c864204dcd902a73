"""How each operation is written: one small function per op, integers only.

Every function gets a `Call`: the Keras node, the names of its integer inputs, the tensor to write, the activation fused
behind it. What an op has to move around itself (a 1D convolution is a 2D one between two reshapes) it does here.
"""

import dataclasses
import math

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_qat import numerics
from keras_qat.graph.lookups import FLOAT_OPS, SINGLE_OPS
from keras_qat.graph.walk import key_of, nodes_of
from tflite_export import Op, Program, Tensor
from tflite_export.ops import BUILTINS

_ACTIVATIONS = {
    None: schema.ActivationFunctionType.NONE,
    "RELU": schema.ActivationFunctionType.RELU,
    "RELU6": schema.ActivationFunctionType.RELU6,
}
_PADDINGS = {"same": schema.Padding.SAME, "valid": schema.Padding.VALID}
_PIXEL_BY_PIXEL = {
    "padding": schema.Padding.VALID,
    "strideH": 1,
    "strideW": 1,
    "dilationHFactor": 1,
    "dilationWFactor": 1,
    "depthMultiplier": 1,
}


@dataclasses.dataclass
class Call:
    """One operation on its way into a program.

    Args:
        program: Where it goes.
        operation: The Keras layer or operation; of a `Quantized` the layer inside.
        node: Its node in the QAT model.
        inputs: Names of the integer tensors it reads.
        output: Name of the tensor it writes.
        activation: None, "RELU" or "RELU6", fused.
        portable: Only ops that TensorFlow Lite Micro has too.
        weights: The `IntegerWeights` of a `Quantized`, or what the `integers` of another layer returned.
    """

    program: Program
    operation: object
    node: object
    inputs: list[str]
    output: str
    activation: str | None = None
    weights: object = None
    portable: bool = False

    def shape(self, name: str) -> tuple[int, ...]:
        return self.program.tensors[name].shape

    @property
    def is_float(self) -> bool:
        """A rule leaves the operation in float."""
        return self.program.tensors[self.output].dtype == "float32"

    def op(self, kind: str, inputs: list, output: str, **options) -> None:
        self.program.ops.append(Op(kind, inputs, [output], options))

    def fused(self) -> dict:
        return {"fusedActivationFunction": _ACTIVATIONS[self.activation]}

    def constant(self, what: str, values, dtype: str, **quantization) -> str:
        data = np.ascontiguousarray(values).astype(dtype)
        return self.program.add(Tensor(f"{self.output}/{what}", data.shape, dtype, data=data, **quantization))

    def twin(self, name: str, shape, what: str) -> str:
        """A new tensor on the grid of `name`, with another shape."""
        return self.program.add(
            dataclasses.replace(self.program.tensors[name], name=f"{self.output}/{what}", shape=tuple(shape))
        )

    def reshape(self, name: str, output: str) -> None:
        shape = list(self.shape(output))
        if self.program.dynamic_batch:
            shape[0] = -1
        target = self.constant("shape", shape, "int32")
        self.op("RESHAPE", [name, target], output, newShape=np.array(shape, np.int32))

    def reshaped(self, name: str, shape, what: str) -> str:
        twin = self.twin(name, shape, what)
        self.reshape(name, twin)
        return twin

    def as_image(self, name: str) -> str:
        """(batch, steps, channels) → (batch, 1, steps, channels); (batch, channels) → (batch, 1, 1, channels)."""
        shape = self.shape(name)
        if len(shape) == 4:
            return name
        middle = (1,) * (4 - len(shape)) + shape[1:-1]
        if len(shape) > 4:
            middle = (int(np.prod(shape[1:-2])), shape[-2])
        return self.reshaped(name, (shape[0], *middle, shape[-1]), "image")

    def image_output(self, shape) -> str:
        """The tensor an op on images writes: the output itself, or a twin that `from_image` reshapes to it."""
        return self.output if tuple(shape) == self.shape(self.output) else self.twin(self.output, shape, "result")

    def from_image(self, name: str) -> None:
        if name != self.output:
            self.reshape(name, self.output)


# --- layers with weights ---------------------------------------------------------------------------------------------


def _weights_and_bias(call: Call, kernel: np.ndarray, axis: int, input_name: str) -> list[str]:
    """Adds the two constants of a layer; `kernel` in TFLite's layout, its output channels along `axis`."""
    if call.is_float:
        bias = call.operation.bias if call.operation.use_bias else np.zeros(kernel.shape[axis])
        return [call.constant("weights", kernel, "float32"), call.constant("bias", bias, "float32")]
    steps, read = np.asarray(call.weights.step, np.float64), call.program.tensors[input_name]
    scale = tuple((steps / np.float32(read.scale[0])).tolist())
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
        _output_size(*sizes, padding)
        for sizes in zip(call.shape(image)[1:3], kernel.shape[1:3], strides, dilation, strict=True)
    )
    result = call.image_output((1, height, width, kernel.shape[axis]))
    call.op(
        kind,
        [image, *constants],
        result,
        padding=_PADDINGS[padding],
        strideH=strides[0],
        strideW=strides[1],
        dilationHFactor=dilation[0],
        dilationWFactor=dilation[1],
        **options,
        **call.fused(),
    )
    call.from_image(result)


def _output_size(size, window, stride, dilation, padding) -> int:
    if padding == "same":
        return -(-size // stride)
    return -(-(size - (window - 1) * dilation) // stride)


def _padded_in_front(call: Call, image: str, steps: int) -> str:
    """Zeros in front of the time axis, for causal convolutions."""
    if steps == 0:
        return image
    batch, height, width, channels = call.shape(image)
    padded = call.twin(image, (batch, height, width + steps, channels), "padded")
    call.op("PAD", [image, call.constant("paddings", [[0, 0], [0, 0], [steps, 0], [0, 0]], "int32")], padded)
    return padded


def _pair(values) -> tuple[int, int]:
    return (1, values[0]) if len(values) == 1 else tuple(values)


def conv_2d(call: Call) -> None:
    layer = call.operation
    kernel = np.moveaxis(_kernel(call), -1, 0)
    kernel = kernel[:, None] if kernel.ndim == 3 else kernel
    strides, dilation = _pair(layer.strides), _pair(layer.dilation_rate)
    _convolution(call, "CONV_2D", kernel, 0, strides, dilation, layer.padding)


def depthwise_conv_2d(call: Call) -> None:
    layer = call.operation
    kernel = _kernel(call)
    kernel = kernel[None] if kernel.ndim == 3 else kernel
    height, width, channels, multiplier = kernel.shape
    kernel = kernel.reshape(1, height, width, channels * multiplier)
    strides, dilation = _pair(layer.strides), _pair(layer.dilation_rate)
    _convolution(call, "DEPTHWISE_CONV_2D", kernel, 3, strides, dilation, layer.padding, depthMultiplier=multiplier)


conv_1d, depthwise_conv_1d = conv_2d, depthwise_conv_2d


def conv_2d_transpose(call: Call) -> None:
    layer = call.operation
    constants = _weights_and_bias(call, np.moveaxis(_kernel(call), 2, 0), 0, call.inputs[0])
    call.op(
        "TRANSPOSE_CONV",
        [_output_shape(call), constants[0], call.inputs[0], constants[1]],
        call.output,
        padding=_PADDINGS[layer.padding],
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
    """One number added to all channels is an ADD; anything else a depthwise convolution over single pixels."""
    if call.is_float:
        bias = call.operation.bias if call.operation.use_bias else np.zeros(1)
        return _multiply_and_add(call, call.operation.kernel, bias)
    if call.weights is None:
        offset = call.operation.scalars[1]
        return _with_scalar(call, "ADD", np.sign(offset) * 127, max(abs(offset), 1e-30) / 127)
    image = call.as_image(call.inputs[0])
    constants = _weights_and_bias(call, _kernel(call).reshape(1, 1, 1, -1), 3, image)
    result = call.image_output(call.shape(image))
    call.op("DEPTHWISE_CONV_2D", [image, *constants], result, **_PIXEL_BY_PIXEL, **call.fused())
    call.from_image(result)


def _multiply_and_add(call: Call, multiplier, offset) -> None:
    product = call.twin(call.output, call.shape(call.output), "product")
    call.op("MUL", [call.inputs[0], call.constant("multiplier", multiplier, "float32")], product)
    call.op("ADD", [product, call.constant("addend", offset, "float32")], call.output)


def batch_norm(call: Call) -> None:
    """In float only: among integers it is folded, or a `ChannelScale`."""
    _multiply_and_add(call, *numerics.batch_norm_multiplier_and_offset(call.operation))


def clamp(call: Call) -> None:
    """In float only: among integers it is the end of a grid."""
    low, high = (call.constant(what, getattr(call.operation, what), "float32") for what in ("low", "high"))
    above = call.twin(call.output, call.shape(call.output), "above")
    call.op("MAXIMUM", [call.inputs[0], low], above)
    call.op("MINIMUM", [above, high], call.output)


def rescale(call: Call) -> None:
    if call.is_float:
        return call.op("MUL", [call.inputs[0], call.constant("factor", call.operation.factor, "float32")], call.output)
    integer, scale, _ = call.weights
    _with_scalar(call, "MUL", integer, scale)


def slope(call: Call) -> None:
    """PRELU, its input and output on one grid: a positive number stays exactly what it is."""
    if call.is_float:
        return call.op(
            "PRELU", [call.inputs[0], call.constant("slopes", call.operation.slopes, "float32")], call.output
        )
    integers, scale = call.weights
    call.op("PRELU", [call.inputs[0], call.constant("slopes", integers, "int8", scale=(float(scale),))], call.output)


def _with_scalar(call: Call, kind: str, integer, scale) -> None:
    scalar = call.constant("constant", integer, "int8", scale=(float(scale),))
    call.op(kind, [call.inputs[0], scalar], call.output, **call.fused())


# --- arithmetic and activations --------------------------------------------------------------------------------------


def _binary(kind: str, fuses: bool = True):
    def emit(call: Call) -> None:
        call.op(kind, call.inputs, call.output, **(call.fused() if fuses else {}))

    return emit


add, subtract, multiply = _binary("ADD"), _binary("SUB"), _binary("MUL")
batch_matmul = _binary("BATCH_MATMUL", fuses=False)
maximum, minimum = _binary("MAXIMUM", fuses=False), _binary("MINIMUM", fuses=False)
relu = _binary("RELU", fuses=False)
logistic, tanh = _binary("LOGISTIC", fuses=False), _binary("TANH", fuses=False)
hard_swish = _binary("HARD_SWISH", fuses=False)


def pointwise(call: Call) -> None:
    """A look-up: in one op where LiteRT has one with the same 256 results, else CAST, ADD, GATHER."""
    operations = [node.operation for node in nodes_of(call.operation.function)]
    if call.is_float:
        return call.op(FLOAT_OPS[key_of(operations[0])], call.inputs, call.output)
    results = _results(call)
    kind = SINGLE_OPS.get(key_of(operations[0])) if len(operations) == 1 else None
    if kind is not None and (BUILTINS[kind].micro or not call.portable) and _looks_up(call, results):
        options = {"approximate": bool(operations[0].approximate)} if kind == "GELU" else {}
        return call.op(kind, call.inputs, call.output, **options)
    _look_up(call, results)


def _look_up(call: Call, results) -> None:
    """CAST, ADD, GATHER: the 256 results as a table."""
    shape = call.shape(call.output)
    integers = call.program.add(Tensor(f"{call.output}/integers", shape, "int32"))
    indices = call.program.add(Tensor(f"{call.output}/indices", shape, "int32"))
    grid = call.program.tensors[call.output]
    table = call.constant("results", results, "int8", scale=grid.scale, zero_point=grid.zero_point)
    call.op("CAST", call.inputs, integers, inDataType=schema.TensorType.INT8, outDataType=schema.TensorType.INT32)
    call.op("ADD", [integers, call.constant("offset", 128, "int32")], indices)
    call.op("GATHER", [table, indices], call.output, axis=0)


def _numbers(call: Call) -> np.ndarray:
    """What the 256 integers of the input stand for."""
    grid = call.program.tensors[call.inputs[0]]
    return grid.dequantize(np.arange(-128, 128))


def _results(call: Call) -> np.ndarray:
    step = np.float32(call.program.tensors[call.inputs[0]].scale[0])
    return call.program.tensors[call.output].quantize(np.asarray(call.operation(_numbers(call), step)))


def _looks_up(call: Call, results) -> bool:
    """Whether the kernel, which knows nothing of what we do where the function is infinite, has the same results."""
    with np.errstate(all="ignore"):
        plain = np.asarray(call.operation.function(_numbers(call)))
    integers = call.program.tensors[call.output].quantize(np.nan_to_num(plain, nan=0.0))
    return not np.any(np.isnan(plain)) and np.array_equal(integers, results)


def inverse_root(call: Call) -> None:
    """RSQRT where it has the same results: where epsilon is too small to matter."""
    if call.is_float:
        return _inverse_root_in_float(call)
    results = _results(call)
    if call.operation.count == 1 and _rsqrt_has(results, call):
        return call.op("RSQRT", call.inputs, call.output)
    _look_up(call, results)


def _rsqrt_has(results, call: Call) -> bool:
    """Whether RSQRT computes them. Its fixed-point numbers decide otherwise within a thousandth of a tie."""
    grid = call.program.tensors[call.output]
    with np.errstate(divide="ignore"):
        steps = np.minimum(1.0 / np.sqrt(_numbers(call).astype(np.float64)) / grid.scale[0], 255.25)
    is_clear = np.abs(steps - np.floor(steps) - 0.5) > 1e-3
    return bool(np.all(is_clear)) and np.array_equal(np.floor(steps + 0.5) + grid.zero_point, results)


def _inverse_root_in_float(call: Call) -> None:
    """`√n / √(max(x, n·floor) + n·epsilon)`."""
    layer, shape = call.operation, call.shape(call.output)
    steps = [("MAXIMUM", layer.count * layer.floor), ("ADD", layer.count * layer.epsilon), ("MUL", layer.count**0.5)]
    value = call.inputs[0]
    for kind, number in steps:
        if kind == "MUL":
            root = call.twin(call.output, shape, "root")
            call.op("RSQRT", [value], root)
            value = root
        result = call.output if kind == "MUL" else call.twin(call.output, shape, kind.lower())
        call.op(kind, [value, call.constant(f"{kind.lower()}/number", number, "float32")], result)
        value = result


def mask(call: Call) -> None:
    """MINIMUM with the lowest number where the mask hides."""
    keep = call.operation.keep
    if call.is_float:
        limits = call.constant("mask", np.where(keep, np.finfo("float32").max, -1e9), "float32")
    else:
        grid = call.program.tensors[call.output]
        low, high = grid.integer_range
        integers = np.where(keep, high, low)
        limits = call.constant("mask", integers, grid.dtype, scale=grid.scale, zero_point=grid.zero_point)
    call.op("MINIMUM", [call.inputs[0], limits], call.output)


def _widened(call: Call, name: str) -> str:
    """A tensor in 16 bits, on the same scale."""
    narrow = call.program.tensors[name]
    if narrow.dtype != "int8":
        return name
    wide = dataclasses.replace(narrow, name=f"{name}/wide", dtype="int16", zero_point=0)
    if wide.name not in call.program.tensors:
        call.op("QUANTIZE", [name], call.program.add(wide))
    return wide.name


def probabilities(call: Call) -> None:
    call.op("SOFTMAX", [_widened(call, call.inputs[0])], call.output, beta=call.operation.factor)


def wide_matmul(call: Call) -> None:
    call.op("BATCH_MATMUL", [_widened(call, name) for name in call.inputs], call.output)


def wide_add(call: Call) -> None:
    call.op("ADD", [_widened(call, name) for name in call.inputs], call.output)


def widen(call: Call) -> None:
    grid = call.program.tensors[call.output]
    grid.dtype, grid.zero_point = "int16", 0
    call.op("QUANTIZE", call.inputs, call.output)


def transposed_matmul(call: Call) -> None:
    call.op("BATCH_MATMUL", call.inputs, call.output, adjY=True)


def narrow(call: Call) -> None:
    call.op("QUANTIZE", call.inputs, call.output)


def scores(call: Call) -> None:
    """In float only, and nothing there: among integers it is the end of a grid."""
    call.reshape(call.inputs[0], call.output)


def softmax(call: Call) -> None:
    call.op("SOFTMAX", call.inputs, call.output, beta=1.0)


def relu6(call: Call) -> None:
    """A RELU, where the grid of the result ends at 6 anyway. TFLM's RELU6 cannot change the scale."""
    result = call.program.tensors[call.output]
    if call.is_float:
        return call.op("RELU6", call.inputs, call.output)
    if (127 - result.zero_point) * result.scale[0] <= 6.0 + 0.5 * result.scale[0]:
        return relu(call)
    unclipped = call.twin(call.output, result.shape, "unclipped")
    grid = {"scale": result.scale, "zero_point": result.zero_point}
    call.op("RELU", call.inputs, unclipped)
    call.op("MINIMUM", [unclipped, call.constant("six", result.quantize(6.0), "int8", **grid)], call.output)


# --- pooling ---------------------------------------------------------------------------------------------------------


def _pool(call: Call, kind: str, window, strides, padding: str) -> None:
    image = call.as_image(call.inputs[0])
    sizes = [
        _output_size(size, wide, stride, 1, padding)
        for size, wide, stride in zip(call.shape(image)[1:3], window, strides, strict=True)
    ]
    result = call.image_output((1, *sizes, call.shape(image)[-1]))
    call.op(
        kind,
        [image],
        result,
        padding=_PADDINGS[padding],
        strideH=strides[0],
        strideW=strides[1],
        filterHeight=window[0],
        filterWidth=window[1],
    )
    call.from_image(result)


def _keras_pool(kind: str):
    def emit(call: Call) -> None:
        layer = call.operation
        _pool(call, kind, _pair(layer.pool_size), _pair(layer.strides), layer.padding)

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


def index_of_largest(call: Call) -> None:
    axis = call.operation.axis % len(call.shape(call.inputs[0]))
    call.op(
        "ARG_MAX",
        [call.inputs[0], call.constant("axis", axis, "int32")],
        call.output,
        outputType=schema.TensorType.INT32,
    )


def global_average_pool(call: Call) -> None:
    """AVERAGE_POOL_2D over everything: where MEAN rounds differently on the runtimes."""
    shape = call.shape(call.inputs[0])
    window = (1, shape[1]) if len(shape) == 3 else shape[1:3]
    _pool(call, "AVERAGE_POOL_2D", window, window, "valid")


# --- shape -----------------------------------------------------------------------------------------------------------


def reshape(call: Call) -> None:
    call.reshape(call.inputs[0], call.output)


def transpose_order(node) -> list[int]:
    axes = node.operation.axes
    rank = len(node.input_tensors[0].shape)
    return [axis % rank for axis in axes] if axes is not None else list(reversed(range(rank)))


def transpose(call: Call) -> None:
    order = call.constant("order", transpose_order(call.node), "int32")
    call.op("TRANSPOSE", [call.inputs[0], order], call.output)


def pad_value(node) -> float:
    """What a Pad or ZeroPadding fills in."""
    values = [*node.arguments.args[1:], node.arguments.kwargs.get("constant_values")]
    return next((float(value) for value in values if value is not None), 0.0)


def _paddings(node) -> list[list[int]]:
    operation, rank = node.operation, len(node.input_tensors[0].shape)
    if hasattr(operation, "pad_width"):
        return np.broadcast_to(np.array(operation.pad_width), (rank, 2)).tolist()
    middle = operation.padding if rank == 4 else [operation.padding]
    return [[0, 0], *[list(pair) for pair in middle], [0, 0]]


def pad(call: Call) -> None:
    paddings = call.constant("paddings", _paddings(call.node), "int32")
    value = pad_value(call.node)
    if value == 0:
        return call.op("PAD", [call.inputs[0], paddings], call.output)
    tensor = call.program.tensors[call.inputs[0]]
    grid = {"scale": tensor.scale, "zero_point": tensor.zero_point}
    call.op(
        "PADV2", [call.inputs[0], paddings, call.constant("value", tensor.quantize(value), "int8", **grid)], call.output
    )


def resize(call: Call) -> None:
    image = call.as_image(call.inputs[0])
    batch, *size, channels = call.shape(call.output)
    size = [1] * (2 - len(size)) + size  # of a series
    result = call.image_output((batch, *size, channels))
    factors = smooth_factors(call.node)
    if factors is None or call.is_float:
        _one_resize(call, "BILINEAR" if interpolates(call.node) else "NEAREST_NEIGHBOR", image, size, result)
    else:
        _smooth_resize(call, image, factors, result)
    call.from_image(result)


def _one_resize(call: Call, kind: str, image: str, size, result: str) -> None:
    call.op(f"RESIZE_{kind}", [image, call.constant("size", size, "int32")], result, halfPixelCenters=True)


_LARGEST_SMOOTH_FACTOR = 4


def _sizes(node) -> list[tuple[int, int]]:
    """Height and width before and after."""
    return list(zip(node.input_tensors[0].shape[1:-1], node.outputs[0].shape[1:-1], strict=True))


def interpolates(node) -> bool:
    """Whether a resize has pixels to mix: a single one is only repeated."""
    is_bilinear = getattr(node.operation, "interpolation", "nearest") == "bilinear"
    return is_bilinear and any(before not in (1, after) for before, after in _sizes(node))


def smooth_factors(node) -> tuple[int, ...] | None:
    """How many times as large a bilinear image gets, where `_smooth_resize` is worth its multiplications."""
    if not interpolates(node):
        return None
    pairs = _sizes(node)
    factors = tuple(after // before for before, after in pairs)
    is_whole = all(after == before * times for (before, after), times in zip(pairs, factors, strict=True))
    return factors if is_whole and max(factors) <= _LARGEST_SMOOTH_FACTOR else None


def _smooth_resize(call: Call, image: str, factors, result: str) -> None:
    """Bilinear interpolation that rounds alike everywhere: every pixel repeated, then a weighted mean of neighbours.

    RESIZE_BILINEAR does it in one op, but its kernels round ties apart (in 6 % of the results), which layers behind it
    add up. Here all is on one scale, the accumulator counts `finest` steps of it, and a bias of 1 lifts the ties.
    """
    batch, *size, channels = call.shape(result)
    taps = np.outer(*[_taps(times) for times in factors])
    margins = [times // 2 for times in factors]
    repeated = call.twin(result, call.shape(result), "repeated")
    _one_resize(call, "NEAREST_NEIGHBOR", image, size, repeated)
    padded = call.twin(result, (batch, *[n + 2 * m for n, m in zip(size, margins, strict=True)], channels), "padded")
    paddings = call.constant("paddings", [[0, 0], *[[m, m] for m in margins], [0, 0]], "int32")
    call.op("MIRROR_PAD", [repeated, paddings], padded, mode=schema.MirrorPadMode.SYMMETRIC)

    finest = 127 // taps.max()
    scale, step = 1.0 / (finest * taps.sum()), call.program.tensors[image].scale[0] / (finest * taps.sum())
    integers = np.repeat(finest * taps[None, :, :, None], channels, axis=-1)
    weights = call.constant("weights", integers, "int8", scale=(float(scale),) * channels, axis=3)
    bias = call.constant("bias", np.ones(channels), "int32", scale=(float(step),) * channels, axis=0)
    call.op("DEPTHWISE_CONV_2D", [padded, weights, bias], result, **_PIXEL_BY_PIXEL)


def _taps(times: int) -> np.ndarray:
    """Weights with which repeated pixels become interpolated ones: a window as wide as a pixel was."""
    return np.ones(times, int) if times % 2 else np.array([1, *[2] * (times - 1), 1])


def slice_keys(node) -> tuple:
    """What stands in the brackets of `x[...]`."""
    key = node.arguments.args[1] if len(node.arguments.args) > 1 else node.arguments.kwargs["key"]
    return tuple(key) if isinstance(key, (tuple, list)) else (key,)  # a model loaded from a file has lists


def strided_slice(call: Call) -> None:
    keys, rank = slice_keys(call.node), len(call.shape(call.inputs[0]))
    begin, end, step, shrink = [], [], [], 0
    for axis, key in enumerate(_expanded(keys, rank)):
        size = call.shape(call.inputs[0])[axis]
        if isinstance(key, int):
            first, last, stride = key % size, key % size + 1, 1
            shrink |= 1 << axis
        else:
            first, last, stride = key.indices(size)
        begin.append(first), end.append(last), step.append(stride)
    # The whole batch, however large: its begin and end are masked out.
    masks = {"beginMask": 1, "endMask": 1, "shrinkAxisMask": shrink}
    new_axes = [key for key in keys if key is None]
    bounds = [call.constant(*pair, "int32") for pair in (("begin", begin), ("end", end), ("step", step))]
    if not new_axes:
        return call.op("STRIDED_SLICE", [call.inputs[0], *bounds], call.output, **masks)
    sizes = [n for n, axis in zip(call.node.outputs[0].shape, _kept(keys, rank), strict=True) if axis]
    sliced = call.twin(call.output, (1, *sizes[1:]), "slice")
    call.op("STRIDED_SLICE", [call.inputs[0], *bounds], sliced, **masks)
    call.reshape(sliced, call.output)


def _expanded(keys, rank) -> list:
    """The keys with the ellipsis and the missing ones written out, without new axes."""
    keys = [key for key in keys if key is not None]
    missing = [slice(None)] * (rank - sum(key is not Ellipsis for key in keys))
    if Ellipsis not in keys:
        return keys + missing
    at = keys.index(Ellipsis)
    return keys[:at] + missing + keys[at + 1 :]


def _kept(keys, rank) -> list[bool]:
    """For each axis of the result whether it is one of the input's (True) or a new one (False)."""
    keys = list(keys)
    given = sum(key is not None and key is not Ellipsis for key in keys)
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[at : at + 1] = [slice(None)] * (rank - given)
    return [key is not None for key in keys if not isinstance(key, int)]


def take(call: Call) -> None:
    """GATHER by constant indices, or by indices that the model computes."""
    indices = take_indices(call.node)
    if indices is None:
        values, indices = call.inputs
    else:
        values, indices = call.inputs[0], call.constant("indices", indices, "int32")
    call.op("GATHER", [values, indices], call.output, axis=call.operation.axis % len(call.shape(values)))


def take_indices(node) -> np.ndarray | None:
    """The constant indices of a Take, or None where they are a tensor."""
    if len(node.input_tensors) > 1:
        return None
    given = [*node.arguments.args[1:], *node.arguments.kwargs.values()][0]
    size = node.input_tensors[0].shape[node.operation.axis]
    return np.asarray(given) % size


def stack(call: Call) -> None:
    axis = call.operation.axis % len(call.shape(call.output))
    call.op("PACK", call.inputs, call.output, axis=axis, valuesCount=len(call.inputs))


def select(call: Call) -> None:
    """Where a constant mask is true the first tensor, else the second."""
    condition = np.asarray(call.node.arguments.args[0], bool)
    call.op("SELECT_V2", [call.constant("condition", condition, "bool"), *call.inputs], call.output)


def broadcast(call: Call) -> None:
    shape = call.constant("shape", call.shape(call.output), "int32")
    call.op("BROADCAST_TO", [call.inputs[0], shape], call.output)


def constant_tensor(call: Call) -> None:
    """No op: the tensor itself is a constant."""
    tensor = call.program.tensors[call.output]
    tensor.data, tensor.batched = tensor.quantize(np.asarray(call.operation.value)), False


def concatenation(call: Call) -> None:
    rank = len(call.shape(call.output))
    call.op("CONCATENATION", call.inputs, call.output, axis=call.operation.axis % rank)
