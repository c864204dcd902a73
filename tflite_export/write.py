"""Program → bytes of a `.tflite` file."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from tflite_export.garbage import garbage_left
from tflite_export.ops import BUILTINS
from tflite_export.program import Program, Tensor
from tflite_export.rim import with_io_types

_ALIGNMENT = 16  # what microcontrollers and SIMD kernels expect of weights in flash
_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "int32": schema.TensorType.INT32,
    "uint8": schema.TensorType.UINT8,
    "int64": schema.TensorType.INT64,
    "int16": schema.TensorType.INT16,
    "int8": schema.TensorType.INT8,
    "int4": schema.TensorType.INT4,
    "bool": schema.TensorType.BOOL,
}


class _AlignedBuffer(schema.BufferT):
    """A buffer whose bytes begin at a multiple of 16, as the schema asks (the generated code does not do it)."""

    def Pack(self, builder):
        if self.data is None:
            schema.BufferStart(builder)
            return schema.BufferEnd(builder)
        size = len(self.data)
        builder.StartVector(1, size, _ALIGNMENT)
        builder.head = builder.head - size
        builder.Bytes[builder.head : builder.head + size] = self.data
        data = builder.EndVector()
        schema.BufferStart(builder)
        schema.BufferAddData(builder, data)
        return schema.BufferEnd(builder)


class _Buffers:
    """The file's buffers; equal bytes are stored once, so weights shared between layers cost nothing twice."""

    def __init__(self):
        self.list = [_AlignedBuffer()]  # buffer 0 is by convention the empty one
        self._known = {}

    def index_of(self, tensor: Tensor) -> int:
        if not tensor.is_constant:
            return 0
        content = _pack_int4(tensor.data) if tensor.dtype == "int4" else tensor.data.tobytes()
        if content not in self._known:
            self._known[content] = len(self.list)
            self.list.append(_AlignedBuffer(data=content))
        return self._known[content]

    @property
    def size(self) -> int:
        return sum(len(buffer.data) + 4 * _ALIGNMENT for buffer in self.list if buffer.data is not None)


def _pack_int4(values: np.ndarray) -> bytes:
    """Two 4-bit integers a byte, the first one in the low half."""
    nibbles = np.append(values.ravel(), np.zeros(values.size % 2, values.dtype)).astype(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).tobytes()


def _quantization(tensor: Tensor):
    if not tensor.scale:
        return None
    return schema.QuantizationParametersT(
        scale=np.asarray(tensor.scale, np.float32),
        zeroPoint=np.full(len(tensor.scale), tensor.zero_point, np.int64),
        quantizedDimension=tensor.axis or 0,
    )


def _tensor(tensor: Tensor, buffers: _Buffers, dynamic_batch: bool):
    signature = None
    if dynamic_batch and tensor.batched and not tensor.is_constant:
        signature = np.array((-1, *tensor.shape[1:]), np.int32)
    return schema.TensorT(
        shape=np.array(tensor.shape, np.int32),
        type=_TYPES[tensor.dtype],
        buffer=buffers.index_of(tensor),
        name=tensor.name,
        quantization=_quantization(tensor),
        shapeSignature=signature,
        hasRank=True,
    )


def _options(kind: str, values: dict):
    name = BUILTINS[kind].options
    if name is None:
        return schema.BuiltinOptions.NONE, None
    options = getattr(schema, f"{name}T")()
    for field, value in values.items():
        if not hasattr(options, field):
            raise ValueError(f"{kind} has no option {field!r} in the TFLite schema ({name}). Received: {values}")
        setattr(options, field, value)
    return getattr(schema.BuiltinOptions, name), options


def _operators(program: Program, indices: dict[str, int]):
    """The ops and the table of (builtin, version) pairs that they point into."""
    codes, operators = {}, []
    for op in program.ops:
        if op.kind not in BUILTINS:
            raise ValueError(f"Unknown TFLite op {op.kind!r}. Add a row to BUILTINS in tflite_export/ops.py.")
        code = (op.kind, BUILTINS[op.kind].version_of(op, program))
        options_type, options = _options(op.kind, op.options)
        operators.append(
            schema.OperatorT(
                opcodeIndex=codes.setdefault(code, len(codes)),
                inputs=np.array([-1 if name is None else indices[name] for name in op.inputs], np.int32),
                outputs=np.array([indices[name] for name in op.outputs], np.int32),
                builtinOptionsType=options_type,
                builtinOptions=options,
            )
        )
    operator_codes = [
        schema.OperatorCodeT(
            # Old readers know just the one-byte field, which ends at PLACEHOLDER_FOR_GREATER_OP_CODES.
            deprecatedBuiltinCode=min(getattr(schema.BuiltinOperator, kind), 127),
            builtinCode=getattr(schema.BuiltinOperator, kind),
            version=version,
        )
        for kind, version in codes
    ]
    return operators, operator_codes


def _signature(program: Program, indices: dict[str, int]):
    def side(names):
        return [schema.TensorMapT(name=name, tensorIndex=indices[tensor]) for name, tensor in names.items()]

    return schema.SignatureDefT(
        signatureKey="serving_default", inputs=side(program.inputs), outputs=side(program.outputs), subgraphIndex=0
    )


@garbage_left()
def write(program: Program, input_type: str = "int8", output_type: str = "int8") -> bytes:
    """Writes a program as a TFLite flatbuffer.

    Args:
        program: what `keras_qat.freeze` returned, or one made by hand.
        input_type: "int8", or "uint8" or "float32" to put a QUANTIZE behind every integer input.
        output_type: the same for the outputs (QUANTIZE to uint8, DEQUANTIZE to float32).

    Returns:
        The file's bytes. They hold one subgraph, one signature `serving_default`, and buffers aligned to 16 bytes.
    """
    program = with_io_types(program, input_type, output_type)
    program.check()
    indices = {name: index for index, name in enumerate(program.tensors)}
    buffers = _Buffers()
    tensors = [_tensor(tensor, buffers, program.dynamic_batch) for tensor in program.tensors.values()]
    operators, operator_codes = _operators(program, indices)
    model = schema.ModelT(
        version=3,
        operatorCodes=operator_codes,
        subgraphs=[
            schema.SubGraphT(
                tensors=tensors,
                inputs=np.array([indices[name] for name in program.inputs.values()], np.int32),
                outputs=np.array([indices[name] for name in program.outputs.values()], np.int32),
                operators=operators,
                name="main",
            )
        ],
        description=program.description,
        buffers=buffers.list,
        signatureDefs=[_signature(program, indices)],
    )
    builder = flatbuffers.Builder(buffers.size + 256 * (len(tensors) + len(operators)) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
