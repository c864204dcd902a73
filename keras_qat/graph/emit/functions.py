"""Functions of single numbers: look-ups."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_qat import kernels
from keras_qat.graph.emit.call import Call
from keras_qat.graph.lookups import FLOAT_OPS, SINGLE_OPS
from keras_qat.graph.walk import key_of, nodes_of
from tflite_export import Tensor
from tflite_export.ops import BUILTINS


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
    """Whether RSQRT computes them. Its roots are a hair off, which must not matter."""
    source, grid = (call.program.tensors[name] for name in (call.inputs[0], call.output))
    return all(np.array_equal(kernels.rsqrt(source, grid, hair), results) for hair in (-0.05, 0.05))


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
