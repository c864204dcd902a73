"""OPERATIONS.md says what the code does, and the column "runs on" what TensorFlow Lite Micro has."""

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from keras_qat import document
from keras_qat.graph.lower import RULES
from keras_qat.operations import OPERATIONS
from tflite_export import Op, Program, Tensor, write
from tflite_export.ops import BUILTINS
from tflite_export.runtimes import RefusedModelError, available, run

SECTIONS = {
    "layers": (document.layer_entries, document.layers_section),
    "functions": (document.function_entries, document.functions_section),
}
_INNER = {"ops.Identity"}  # Keras has no public function for it


@pytest.mark.parametrize("section", SECTIONS)
def test_document_is_up_to_date(section):
    make, render = SECTIONS[section]
    entries = make()
    assert [f"{entry.name}: {entry.failure}" for entry in entries if entry.failure] == []
    assert {entry.range for entry in entries if entry.ops} <= document.RANGES.keys()
    is_shown = (lambda key: hasattr(keras.layers, key)) if section == "layers" else (lambda key: "." in key)
    keys = {key for key in {**OPERATIONS, **RULES} if is_shown(key)} - _INNER
    missing = keys - {entry.key for entry in entries if entry.ops or entry.range}
    assert not missing, f"No call of these was found: {missing}. Give them one in _CALLS of keras_qat/document.py."
    is_current = render(entries) in document.PATH.read_text()
    assert is_current, f"{document.PATH.name} is not what the code says. Renew it: {document.COMMAND}"


def test_document_has_nothing_else():
    text = document.PATH.read_text()
    assert text.startswith(document.introduction())
    assert text.count("\n## ") == len(SECTIONS)


# --- what TensorFlow Lite Micro has ----------------------------------------------------------------------------------

IMAGE, SCALE = (1, 4, 4, 4), 0.0625


def x(*shape, dtype="int8"):
    """A tensor that the op reads."""
    return Tensor("x", shape or IMAGE, dtype, (SCALE,) if dtype == "int8" else ())


def y(*shape, dtype="int8", scale=SCALE, zero_point=0):
    """A tensor that it writes."""
    return Tensor("y", shape or IMAGE, dtype, (scale,) if dtype == "int8" else (), zero_point)


def numbers(values, dtype="int32", scale=()):
    data = np.array(values, dtype)
    return Tensor("numbers", data.shape, dtype, scale, data=data)


def weights(*shape, axis=0):
    channels = shape[axis]
    kernel = Tensor("weights", shape, "int8", (0.5,) * channels, axis=axis, data=np.ones(shape, np.int8))
    bias = Tensor("bias", (channels,), "int32", (0.5 * SCALE,) * channels, axis=0, data=np.zeros(channels, np.int32))
    return kernel, bias


_VALID = {"padding": schema.Padding.VALID, "strideH": 1, "strideW": 1}
_CONV = _VALID | {"dilationHFactor": 1, "dilationWFactor": 1}
_POOL = _VALID | {"filterHeight": 2, "filterWidth": 2}
_PADDINGS = numbers([[0, 0], [1, 1], [1, 1], [0, 0]])
_KERNEL, _BIAS = weights(4, 2, 2, 4)
_TYPES = {"inDataType": schema.TensorType.INT8, "outDataType": schema.TensorType.INT32}
_INT32 = schema.TensorType.INT32

_FLOAT = ([x(dtype="float32")], [y(dtype="float32")])

# The smallest use of every op: what it reads, what it writes, options. The default is one int8 image in, one out.
USES = {
    **dict.fromkeys(("CEIL", "COS", "FLOOR", "ROUND", "SIN"), _FLOAT),  # LiteRT has no others either
    "ADD": ([x(), x()], [y()]),
    "ARG_MAX": ([x(), numbers(3)], [y(1, 4, 4, dtype="int32")], {"outputType": _INT32}),
    "ARG_MIN": ([x(), numbers(3)], [y(1, 4, 4, dtype="int32")], {"outputType": _INT32}),
    "AVERAGE_POOL_2D": ([x()], [y(1, 3, 3, 4)], _POOL),
    "BATCH_MATMUL": ([x(), x()], [y()]),
    "BROADCAST_TO": ([x(1, 1, 4), numbers([1, 4, 4])], [y(1, 4, 4)]),
    "CAST": ([x()], [y(dtype="int32")], _TYPES),
    "CONCATENATION": ([x(), x()], [y(1, 4, 4, 8)], {"axis": 3}),
    "CONV_2D": ([x(), _KERNEL, _BIAS], [y(1, 3, 3, 4)], _CONV),
    "DEPTHWISE_CONV_2D": ([x(), *weights(1, 2, 2, 4, axis=3)], [y(1, 3, 3, 4)], _CONV | {"depthMultiplier": 1}),
    "DEPTH_TO_SPACE": ([x()], [y(1, 8, 8, 1)], {"blockSize": 2}),
    "DEQUANTIZE": ([x()], [y(dtype="float32")]),
    **dict.fromkeys(
        ("EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL", "NOT_EQUAL"),
        ([x(dtype="int32"), numbers([3])], [y(dtype="bool")]),
    ),
    **dict.fromkeys(("LOGICAL_AND", "LOGICAL_OR"), ([x(dtype="bool"), x(dtype="bool")], [y(dtype="bool")])),
    "LOGICAL_NOT": ([x(dtype="bool")], [y(dtype="bool")]),
    "FULLY_CONNECTED": ([x(1, 4), *weights(3, 4)], [y(1, 3)]),
    "GATHER": ([numbers([[1], [2]], "int8", (SCALE,)), x(1, 4, dtype="int32")], [y(1, 4, 1)], {"axis": 0}),
    "LOGISTIC": ([x()], [y(scale=1 / 256, zero_point=-128)]),
    "MAXIMUM": ([x(), x()], [y()]),
    "MAX_POOL_2D": ([x()], [y(1, 3, 3, 4)], _POOL),
    "MEAN": ([x(), numbers([1, 2])], [y(1, 4)]),
    "MINIMUM": ([x(), x()], [y()]),
    "MIRROR_PAD": ([x(), _PADDINGS], [y(1, 6, 6, 4)]),
    "MUL": ([x(), x()], [y()]),
    "PACK": ([x(1, 4), x(1, 4)], [y(1, 2, 4)], {"axis": 1, "valuesCount": 2}),
    "PAD": ([x(), _PADDINGS], [y(1, 6, 6, 4)]),
    "PADV2": ([x(), _PADDINGS, numbers(3, "int8", (SCALE,))], [y(1, 6, 6, 4)]),
    "PRELU": ([x(), numbers([[[16] * 4]], "int8", (SCALE,))], [y()]),
    "REDUCE_MAX": ([x(), numbers([1, 2])], [y(1, 4)]),
    "REDUCE_MIN": ([x(), numbers([1, 2])], [y(1, 4)]),
    "RESHAPE": ([x(), numbers([1, 64])], [y(1, 64)], {"newShape": np.int32([1, 64])}),
    "RESIZE_BILINEAR": ([x(), numbers([8, 8])], [y(1, 8, 8, 4)], {"halfPixelCenters": True}),
    "RESIZE_NEAREST_NEIGHBOR": ([x(), numbers([8, 8])], [y(1, 8, 8, 4)], {"halfPixelCenters": True}),
    "SELECT_V2": ([numbers(np.eye(4) > 0, "bool"), x(), x()], [y()]),
    "SHAPE": ([x()], [y(4, dtype="int32")], {"outType": _INT32}),
    "SOFTMAX": ([x()], [y(scale=1 / 256, zero_point=-128)], {"beta": 1.0}),
    "SPACE_TO_DEPTH": ([x()], [y(1, 2, 2, 16)], {"blockSize": 2}),
    "SPLIT": ([numbers(3), x()], [y(1, 4, 4, 2), y(1, 4, 4, 2)], {"numSplits": 2}),
    "STRIDED_SLICE": ([x(), numbers([0, 1, 0, 0]), numbers(IMAGE), numbers([1, 1, 1, 1])], [y(1, 3, 4, 4)]),
    "SUB": ([x(), x()], [y()]),
    "SUM": ([x(), numbers([1, 2])], [y(1, 4, scale=1.0)]),
    "TANH": ([x()], [y(scale=1 / 128)]),
    "TRANSPOSE": ([x(), numbers([0, 2, 1, 3])], [y()]),
    "TRANSPOSE_CONV": ([numbers([1, 5, 5, 4]), _KERNEL, x(), _BIAS], [y(1, 5, 5, 4)], _VALID),
    "UNPACK": ([x(1, 2, 4)], [y(1, 4), y(1, 4)], {"axis": 1, "num": 2}),
}


def _file(kind, inputs, outputs, options=()) -> tuple[bytes, list[np.ndarray]]:
    """The file of one op, and ones to feed it with."""
    program = Program()
    names = [[program.add(Tensor(**vars(tensor))) for tensor in side] for side in (inputs, outputs)]
    program.inputs = {name: name for name in names[0] if not program.tensors[name].is_constant}
    program.outputs = {name: name for name in names[1]}
    program.ops.append(Op(kind, *names, dict(options)))
    tensors = [program.tensors[name] for name in program.inputs]
    return write(program), [np.ones(tensor.shape, tensor.dtype) for tensor in tensors]


def _runs(runtime, content, feed) -> bool:
    try:
        run(runtime, content, feed)
    except RefusedModelError:
        return False
    return True


@pytest.mark.skipif(not available("tflm"), reason="tflite-micro is not installed")
@pytest.mark.parametrize("kind", BUILTINS)
def test_micro_is_what_tflm_has(kind):
    content, feed = _file(kind, *USES.get(kind, ([x()], [y()])))
    assert _runs("xnnpack", content, feed), f"Give USES a use of {kind} that LiteRT takes."
    assert _runs("tflm", content, feed) == BUILTINS[kind].micro
