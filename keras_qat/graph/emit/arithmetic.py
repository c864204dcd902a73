"""Ops that read one or two tensors and keep their shape."""

from keras_qat import fused_batch_norm
from keras_qat.graph.emit.call import Call


def multiply_and_add(call: Call, multiplier, offset) -> None:
    product = call.twin(call.output, call.shape(call.output), "product")
    call.op("MUL", [call.inputs[0], call.constant("multiplier", multiplier, "float32")], product)
    call.op("ADD", [product, call.constant("addend", offset, "float32")], call.output)


def batch_norm(call: Call) -> None:
    """In float only: among integers it is folded, or a `ChannelScale`."""
    multiply_and_add(call, *fused_batch_norm.multiplier_and_offset(call.operation))


def norm_multiplier(call: Call) -> None:
    layer = call.operation
    call.become_constant(layer.multiplier(layer.moving.value))


def norm_offset(call: Call) -> None:
    layer, multiplier = call.operation, call.program.tensors[call.inputs[0]]
    call.become_constant(layer.offset(layer.moving.value, multiplier.dequantize(multiplier.data)))


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
    factor = call.constant("constant", integer, "int8", scale=(float(scale),))
    call.op("MUL", [call.inputs[0], factor], call.output, **call.fused())


def slope(call: Call) -> None:
    """PRELU, its input and output on one grid: a positive number stays exactly what it is."""
    if call.is_float:
        return call.op(
            "PRELU", [call.inputs[0], call.constant("slopes", call.operation.slopes, "float32")], call.output
        )
    integers, scale = call.weights
    call.op("PRELU", [call.inputs[0], call.constant("slopes", integers, "int8", scale=(float(scale),))], call.output)


def _binary(kind: str, fuses: bool = True):
    def emit(call: Call) -> None:
        call.op(kind, call.inputs, call.output, **(call.fused() if fuses else {}))

    return emit


add, subtract, multiply = _binary("ADD"), _binary("SUB"), _binary("MUL")


def sum_of_two(call: Call) -> None:
    add(call) if call.operation.sign > 0 else subtract(call)


batch_matmul = _binary("BATCH_MATMUL", fuses=False)

maximum, minimum = _binary("MAXIMUM", fuses=False), _binary("MINIMUM", fuses=False)

relu = _binary("RELU", fuses=False)

logistic, tanh = _binary("LOGISTIC", fuses=False), _binary("TANH", fuses=False)

hard_swish = _binary("HARD_SWISH", fuses=False)


def transposed_matmul(call: Call) -> None:
    call.op("BATCH_MATMUL", call.inputs, call.output, adjY=True)


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
