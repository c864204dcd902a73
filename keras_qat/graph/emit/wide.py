"""What is in 16 bits, and masks: the inside of attention and of recurrent cells."""

import dataclasses

import numpy as np

from keras_qat.graph.emit.call import Call


def mask(call: Call) -> None:
    """MINIMUM with the lowest number where the mask hides."""
    keep = call.operation.keep
    if call.is_float:
        limits = call.constant("mask", np.where(keep, np.finfo("float32").max, -1e9), "float32")
    else:
        grid = call.program.tensors[call.output]
        low, high = grid.integer_range
        low = max(low, -high) if grid.dtype == "int16" else low  # 16-bit grids are symmetric
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


def narrow(call: Call) -> None:
    call.op("QUANTIZE", call.inputs, call.output)


def scores(call: Call) -> None:
    """In float only, and nothing there: among integers it is the end of a grid."""
    call.reshape(call.inputs[0], call.output)
