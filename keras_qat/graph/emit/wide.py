"""What is in 16 bits, and masks: the inside of attention and of recurrent cells."""

import dataclasses

from keras_qat.graph.emit.call import Call


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
