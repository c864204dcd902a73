"""Ops on truth values, and what they choose."""

import numpy as np

from keras_qat.graph.emit.call import Call


def comparison(call: Call) -> None:
    operation = call.operation
    number = call.constant("number", [operation.number], "int32")
    call.op(operation.function.upper(), [call.inputs[0], number], call.output)


def logic(call: Call) -> None:
    inputs = list(call.inputs)
    if call.operation.constant is not None:
        inputs.append(call.constant("constant", call.operation.constant, "bool"))
    call.op(call.operation.function.upper(), inputs, call.output)


def negation(call: Call) -> None:
    call.op("LOGICAL_NOT", call.inputs, call.output)


def number(call: Call) -> None:
    tensor = call.program.tensors[call.output]
    grid = {} if call.is_float else {"scale": tensor.scale, "zero_point": tensor.zero_point}
    step, zero = (1.0, 0) if call.is_float else (tensor.scale[0], tensor.zero_point)
    values = [
        call.constant(name, [round(value / step) + zero], tensor.dtype, **grid)
        for name, value in (("one", 1), ("zero", 0))
    ]
    call.op("SELECT_V2", [call.inputs[0], *values], call.output)


def mask(call: Call) -> None:
    """The lowest number where the mask hides: SELECT_V2, or MINIMUM where it is a constant."""
    keep = call.operation.keep
    tensor = call.program.tensors[call.output]
    grid = {} if call.is_float else {"scale": tensor.scale, "zero_point": tensor.zero_point}
    low, high = _limits(tensor)
    if keep is None:
        scores, flags = call.inputs
        call.op("SELECT_V2", [flags, scores, call.constant("hidden", [low], tensor.dtype, **grid)], call.output)
    else:
        limits = call.constant("mask", np.where(keep, high, low), tensor.dtype, **grid)
        call.op("MINIMUM", [call.inputs[0], limits], call.output)


def _limits(tensor):
    if tensor.dtype == "float32":
        return -1e9, np.finfo("float32").max
    low, high = tensor.integer_range
    return (max(low, -high) if tensor.dtype == "int16" else low), high  # 16-bit grids are symmetric
