"""What each TFLite builtin needs in a file: its options table and its version.

To add an op, add one row. `options` names the schema table whose fields `Op.options` fills; `int8` and `int16` are the
versions a runtime must know for these element types; `version` is for the few ops whose version hangs on more than that.
"""

import dataclasses
from collections.abc import Callable

from tflite_export.program import Op, Program


@dataclasses.dataclass(frozen=True)
class Builtin:
    """One row of the table. `typed_by` is the input whose element type chooses the version.

    `micro` says whether TensorFlow Lite Micro has a kernel for the op too: for int8, or for float32 where LiteRT has no
    other.
    """

    options: str | None = None
    int8: int = 1
    int16: int = 1
    typed_by: int = 0
    version: Callable[[Op, Program], int] | None = None
    micro: bool = True

    def version_of(self, op: Op, program: Program) -> int:
        if self.version is not None:
            return self.version(op, program)
        dtype = program.tensors[op.inputs[self.typed_by]].dtype
        return {"int8": self.int8, "uint8": self.int8, "int16": self.int16}.get(dtype, 1)


def _dtype(program, op, index):
    return program.tensors[op.inputs[index]].dtype


def _conv_2d(op, program):
    data, weights = (program.tensors[name] for name in op.inputs[:2])
    if data.dtype == "int16":
        return 8 if op.options.get("quantizedBiasType") else 4
    if data.shape[-1] != weights.shape[-1]:
        return 6  # grouped
    return {"int4": 7, "float32": 1}.get(weights.dtype, 3)


def _depthwise_conv_2d(op, program):
    if _dtype(program, op, 0) == "int16":
        return 5
    if _dtype(program, op, 0) == "float32":
        return 2 if max(op.options["dilationWFactor"], op.options["dilationHFactor"]) > 1 else 1
    return 7 if _dtype(program, op, 1) == "int4" else 3


def _fully_connected(op, program):
    if _dtype(program, op, 0) == "int16":
        return 11 if op.options.get("quantizedBiasType") else 7
    if _dtype(program, op, 1) == "int4":
        return 10
    return 5 if op.options.get("keepNumDims") else 1 if _dtype(program, op, 0) == "float32" else 4


def _transpose_conv(op, program):
    if op.options.get("fusedActivationFunction"):
        return 4
    return 3 if len(op.inputs) == 4 else 2


def _mul(op, program):
    first, second, output = (program.tensors[name] for name in (*op.inputs, *op.outputs))
    if first.dtype == "int16":
        return 4
    if not output.scale:
        return 1
    return 3 if first.scale[0] * second.scale[0] / output.scale[0] >= 1 else 2


def _resize(op, program):
    if _dtype(program, op, 0) == "int16":
        return 4
    if op.options.get("halfPixelCenters") or op.options.get("alignCorners"):
        return 3
    return 2 if _dtype(program, op, 0) == "int8" else 1


def _strided_slice(op, program):
    if len(program.tensors[op.inputs[0]].shape) > 4:
        return 4
    return 2 if _dtype(program, op, 0) == "int8" else 1


def _by_rank(first_version_above_4):
    def version(op, program):
        tensor = program.tensors[op.inputs[0]]
        if len(tensor.shape) > 4:
            return first_version_above_4
        return {"int8": 2, "int16": first_version_above_4 - 1}.get(tensor.dtype, 1)

    return version


def _binary(above_4):
    def version(op, program):
        shapes = [program.tensors[name].shape for name in op.inputs]
        if _dtype(program, op, 0) == "int16":
            return above_4 + (1 if above_4 == 3 else 0)
        if shapes[0] != shapes[1] and max(map(len, shapes)) > 4:
            return above_4
        return 2 if _dtype(program, op, 0) == "int8" else 1

    return version


def _sub(op, program):
    return 5 if _dtype(program, op, 0) == "int16" else _binary(3)(op, program)


def _quantize(op, program):
    return 2 if program.tensors[op.outputs[0]].dtype == "int16" else 1


BUILTINS: dict[str, Builtin] = {
    "ABS": Builtin("AbsOptions", int8=2),
    "ADD": Builtin("AddOptions", int8=2, int16=3),
    "ARG_MAX": Builtin("ArgMaxOptions", int8=2),
    "ARG_MIN": Builtin("ArgMinOptions", int8=2),
    "AVERAGE_POOL_2D": Builtin("Pool2DOptions", int8=2, int16=3),
    "BATCH_MATMUL": Builtin("BatchMatMulOptions", int8=2, int16=3),
    "BROADCAST_TO": Builtin("BroadcastToOptions", int8=3, int16=3),
    "CAST": Builtin("CastOptions", int8=3),
    "CEIL": Builtin(),
    "CONCATENATION": Builtin("ConcatenationOptions", int8=2, int16=3),
    "CONV_2D": Builtin("Conv2DOptions", version=_conv_2d),
    "COS": Builtin(),
    "DEPTHWISE_CONV_2D": Builtin("DepthwiseConv2DOptions", version=_depthwise_conv_2d),
    "DEPTH_TO_SPACE": Builtin("DepthToSpaceOptions"),
    "DEQUANTIZE": Builtin("DequantizeOptions", int8=2, int16=3),
    "ELU": Builtin(),
    "EQUAL": Builtin("EqualOptions"),
    "EXP": Builtin("ExpOptions", int8=2, micro=False),
    "FLOOR": Builtin(),
    "FULLY_CONNECTED": Builtin("FullyConnectedOptions", version=_fully_connected),
    "GATHER": Builtin("GatherOptions", int8=2, int16=4),
    "GELU": Builtin("GeluOptions", int8=2, micro=False),
    "GREATER": Builtin("GreaterOptions"),
    "GREATER_EQUAL": Builtin("GreaterEqualOptions"),
    "HARD_SWISH": Builtin("HardSwishOptions"),
    "LEAKY_RELU": Builtin("LeakyReluOptions", int16=2),
    "LESS": Builtin("LessOptions"),
    "LESS_EQUAL": Builtin("LessEqualOptions"),
    "LOG": Builtin(int8=2, micro=False),
    "LOGICAL_AND": Builtin("LogicalAndOptions"),
    "LOGICAL_NOT": Builtin("LogicalNotOptions"),
    "LOGICAL_OR": Builtin("LogicalOrOptions"),
    "LOGISTIC": Builtin(int8=2, int16=3),
    "MAXIMUM": Builtin("MaximumMinimumOptions", version=_binary(3)),
    "MAX_POOL_2D": Builtin("Pool2DOptions", int8=2, int16=3),
    "MEAN": Builtin("ReducerOptions", int8=2, int16=3),
    "MINIMUM": Builtin("MaximumMinimumOptions", version=_binary(3)),
    "MIRROR_PAD": Builtin("MirrorPadOptions", int8=2, int16=3),
    "MUL": Builtin("MulOptions", version=_mul),
    "NOT_EQUAL": Builtin("NotEqualOptions"),
    "PACK": Builtin("PackOptions", int8=2, int16=3),
    "PAD": Builtin("PadOptions", version=_by_rank(4)),
    "PADV2": Builtin("PadV2Options", version=_by_rank(4)),
    "PRELU": Builtin(),
    "QUANTIZE": Builtin("QuantizeOptions", version=_quantize),
    "REDUCE_MAX": Builtin("ReducerOptions", int8=2, int16=3),
    "REDUCE_MIN": Builtin("ReducerOptions", int8=2, int16=3),
    "RELU": Builtin(int8=2, int16=3),
    "RELU6": Builtin(int8=2, int16=3),
    "RESHAPE": Builtin("ReshapeOptions"),
    "RESIZE_BILINEAR": Builtin("ResizeBilinearOptions", version=_resize),
    "RESIZE_NEAREST_NEIGHBOR": Builtin("ResizeNearestNeighborOptions", version=_resize),
    "ROUND": Builtin(),
    "RSQRT": Builtin(int8=2, int16=3),
    "SELECT_V2": Builtin("SelectV2Options"),
    "SHAPE": Builtin("ShapeOptions"),
    "SIN": Builtin(),
    "SOFTMAX": Builtin("SoftmaxOptions", int8=2, int16=3),
    "SPACE_TO_DEPTH": Builtin("SpaceToDepthOptions", int8=2),
    "SPLIT": Builtin("SplitOptions", int8=2, int16=4, typed_by=1),
    "SQRT": Builtin(micro=False),
    "STRIDED_SLICE": Builtin("StridedSliceOptions", version=_strided_slice),
    "SUB": Builtin("SubOptions", version=_sub),
    "TANH": Builtin(int8=2, int16=3),
    "TRANSPOSE": Builtin("TransposeOptions", int8=2, int16=5),
    "TRANSPOSE_CONV": Builtin("TransposeConvOptions", version=_transpose_conv),
    "UNPACK": Builtin("UnpackOptions", int8=2, int16=4),
}
