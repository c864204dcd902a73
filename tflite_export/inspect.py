"""What is in a `.tflite` file: its ops, tensors, sizes, multiply-accumulates, and whether it is integers throughout."""

import collections
import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ai_edge_litert import schema_py_generated as schema

from tflite_export.table import table

_IDENTIFIER = b"TFL3"
_MAX_OBJECTS = 500_000
_FLOATS = ("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
# What reading past the end, or numbers that make no sense, turn into inside the flatbuffers library.
_UNREADABLE = (struct.error, ValueError, TypeError, IndexError, OverflowError)


def _names_of(enum: type) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


_KINDS = _names_of(schema.BuiltinOperator)
_DTYPES = {number: name.lower() for number, name in _names_of(schema.TensorType).items()}


@dataclasses.dataclass
class TensorSummary:
    """One tensor. `bytes` is the size of a constant, 0 for what is computed; -1 in `signature` stands for any size."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()
    axis: int | None = None
    bytes: int = 0
    signature: tuple[int, ...] = ()
    subgraph: int = 0

    @property
    def is_constant(self) -> bool:
        return self.bytes > 0

    @property
    def is_float(self) -> bool:
        return self.dtype in _FLOATS

    @property
    def has_dynamic_batch(self) -> bool:
        return bool(self.signature) and self.signature[0] == -1


@dataclasses.dataclass
class OpSummary:
    """One op: what it reads and writes, by tensor name (None: an optional input left out), and what it costs."""

    kind: str
    version: int
    inputs: list[str | None]
    outputs: list[str]
    macs: int = 0
    weight_bytes: int = 0
    subgraph: int = 0


@dataclasses.dataclass
class Port:
    """An input or output of the model: the name a caller knows it by, and its tensor."""

    name: str
    tensor: TensorSummary


@dataclasses.dataclass
class Signature:
    """A way into the file. A file without signatures has one, with an empty key, named after its tensors."""

    key: str
    subgraph: int
    inputs: list[Port]
    outputs: list[Port]


@dataclasses.dataclass
class Summary:
    """What `inspect` found. `inputs` and `outputs` are those of the first subgraph, in the file's own order."""

    ops: list[OpSummary]
    tensors: list[TensorSummary]
    signatures: list[Signature]
    reasons: list[str]
    rim: list[str]
    weight_bytes: int
    file_bytes: int
    subgraphs: int = 1

    @property
    def inputs(self) -> list[Port]:
        return self.signatures[0].inputs

    @property
    def outputs(self) -> list[Port]:
        return self.signatures[0].outputs

    @property
    def op_counts(self) -> dict[str, int]:
        """How often each op kind occurs, the most frequent one first."""
        return dict(collections.Counter(op.kind for op in self.ops).most_common())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one pass at the shapes in the file; bodies of loops count once."""
        return sum(op.macs for op in self.ops)

    @property
    def is_full_int8(self) -> bool:
        """Whether no op computes on floats; see `reasons` when not, and `rim` for what was let pass."""
        return not self.reasons

    def __str__(self) -> str:
        return "\n\n".join(section for section in (self._headline(), *self._tables()) if section)

    def _headline(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.op_counts.items())
        lines = [
            f"{self.file_bytes:,} bytes, {self.weight_bytes:,} of them constants; {self.macs:,} MACs",
            f"{len(self.ops)} ops in {self.subgraphs} subgraph(s): {counts or 'none'}",
            f"full int8: {'yes' if self.is_full_int8 else 'no'}",
        ]
        lines += [f"  because {reason}" for reason in self.reasons]
        return "\n".join(lines + [f"  rim: {note}" for note in self.rim])

    def _tables(self) -> Iterable[str]:
        yield table(
            ("signature", "", "name", "tensor", "shape", "dtype", "scale", "zero point"),
            [
                (signature.key, side, port.name, port.tensor.name, *_tensor_cells(port.tensor))
                for signature in self.signatures
                for side, ports in (("input", signature.inputs), ("output", signature.outputs))
                for port in ports
            ],
        )
        yield table(
            ("#", "op", "version", "MACs", "constant bytes", "inputs", "outputs"),
            [(i, op.kind, op.version, op.macs, op.weight_bytes, *_op_cells(op)) for i, op in enumerate(self.ops)],
        )
        yield table(
            ("tensor", "shape", "dtype", "scale", "zero point", "axis", "bytes"),
            [(t.name, *_tensor_cells(t), "" if t.axis is None else t.axis, t.bytes or "") for t in self.tensors],
        )

    def to_dict(self) -> dict:
        return {
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "macs": self.macs,
            "subgraphs": self.subgraphs,
            "is_full_int8": self.is_full_int8,
            "reasons": list(self.reasons),
            "rim": list(self.rim),
            "op_counts": self.op_counts,
            "inputs": _tensor_names(self.inputs),
            "outputs": _tensor_names(self.outputs),
            "signatures": {
                signature.key: {
                    "subgraph": signature.subgraph,
                    "inputs": _tensor_names(signature.inputs),
                    "outputs": _tensor_names(signature.outputs),
                }
                for signature in self.signatures
            },
            "ops": [dataclasses.asdict(op) for op in self.ops],
            "tensors": [dataclasses.asdict(tensor) for tensor in self.tensors],
        }


def _tensor_names(ports: list[Port]) -> dict[str, str]:
    return {port.name: port.tensor.name for port in ports}


def _tensor_cells(tensor: TensorSummary) -> tuple[str, ...]:
    shape = "x".join("?" if size == -1 else str(size) for size in tensor.signature or tensor.shape) or "scalar"
    return shape, tensor.dtype, _range_cell([f"{scale:.6g}" for scale in tensor.scale]), _range_cell(tensor.zero_point)


def _range_cell(values: Sequence) -> str:
    if len(set(values)) < 2:
        return str(values[0]) if values else ""
    return f"{values[0]} .. ({len(values)})"


def _op_cells(op: OpSummary) -> tuple[str, str]:
    return ", ".join(name or "-" for name in op.inputs), ", ".join(op.outputs)


def inspect(tflite: bytes | str | os.PathLike) -> Summary:
    """Reads a `.tflite` file, made by whatever tool, without running it.

    Args:
        tflite: the file's bytes, or its path.

    Returns:
        A `Summary`; print it, or take `to_dict()`.

    Raises:
        ValueError: the file is empty, cut off, damaged or something else than a `.tflite`.
        FileNotFoundError: there is no such file.

    Example:
        >>> summary = tflite_export.inspect("model.tflite")
        >>> summary.is_full_int8, summary.macs
    """
    content, where = _content_of(tflite)
    try:
        return _summarize(_Reader(content))
    except _UNREADABLE as error:
        raise ValueError(
            f"{where} is not a readable .tflite file: it is cut off or damaged ({error}). Expected a complete TFLite "
            f"flatbuffer. Received: {len(content)} bytes. Export or download the file again."
        ) from error


def load(tflite: bytes | str | os.PathLike) -> bytes:
    """The bytes of a `.tflite` given as bytes or as a path, once its first bytes look right."""
    return _content_of(tflite)[0]


def _content_of(tflite) -> tuple[bytes, str]:
    if isinstance(tflite, (bytes, bytearray, memoryview)):
        content = bytes(tflite)
        _check_identifier(content[:8], len(content), "The given data")
        return content, "The given data"
    if not isinstance(tflite, (str, os.PathLike)):
        raise TypeError(f"Expected the bytes or the path of a .tflite file. Received: {type(tflite).__name__}")
    path = Path(tflite)
    with path.open("rb") as file:  # the head first: nobody wants to load a disk image to learn that it is one
        _check_identifier(file.read(8), path.stat().st_size, f"File {str(path)!r}")
        file.seek(0)
        return file.read(), f"File {str(path)!r}"


def _check_identifier(head: bytes, size: int, where: str) -> None:
    if head[4:8] != _IDENTIFIER:
        received = f"{size} bytes that begin with {head!r}" if size else "no bytes at all"
        raise ValueError(
            f"{where} is not a readable .tflite file. Expected a TFLite flatbuffer, with 'TFL3' as bytes 4 to 8. "
            f"Received: {received}. Give a file that a TFLite exporter wrote."
        )


class _Reader:
    """Reads flatbuffer vectors with limits, so that damaged lengths can cost neither much time nor memory.

    In an intact file every object takes at least 8 bytes and nothing is stored twice.
    """

    def __init__(self, content: bytes):
        self.content = content
        self._objects = min(_MAX_OBJECTS, len(content) // 8)
        self._bytes = 4 * len(content)

    def objects(self, table, field: str) -> list:
        length = getattr(table, f"{field}Length")()
        self._objects -= length
        if self._objects < 0:
            raise ValueError(f"{field.lower()} has {length} entries, more than the file can hold")
        return [getattr(table, field)(index) for index in range(length)]

    def numbers(self, table, field: str) -> list:
        if table is None or getattr(table, f"{field}IsNone")():
            return []
        values = getattr(table, f"{field}AsNumpy")()
        self._spend(values.nbytes)
        return values.tolist()

    def text(self, value: bytes | None) -> str:
        self._spend(len(value or b""))
        return (value or b"").decode("utf-8", "replace")

    def _spend(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise ValueError("its vectors are larger than the file")


def _summarize(reader: _Reader) -> Summary:
    model = schema.Model.GetRootAs(reader.content)
    buffer_sizes = [_buffer_size(buffer, reader) for buffer in reader.objects(model, "Buffers")]
    codes = [_operator_code(code, reader) for code in reader.objects(model, "OperatorCodes")]
    parts = [
        _Subgraph(index, subgraph, reader, codes, buffer_sizes)
        for index, subgraph in enumerate(reader.objects(model, "Subgraphs"))
    ]
    if not parts:
        raise ValueError("it holds no subgraph")
    signatures = _signatures(reader.objects(model, "SignatureDefs"), parts, reader)
    reasons, rim = _float_ops(parts, {signature.subgraph for signature in signatures})
    return Summary(
        ops=[op for part in parts for op in part.op_summaries()],
        tensors=[tensor for part in parts for tensor in part.tensors],
        signatures=signatures,
        reasons=reasons,
        rim=rim,
        weight_bytes=sum(buffer_sizes[index] for index in {index for part in parts for index in part.buffers}),
        file_bytes=len(reader.content),
        subgraphs=len(parts),
    )


def _buffer_size(buffer, reader: _Reader) -> int:
    if buffer.Offset() > 1:  # files of 2 GB and more keep their weights behind the flatbuffer
        if buffer.Offset() + buffer.Size() > len(reader.content):
            raise ValueError(f"a buffer at {buffer.Offset()} of {buffer.Size()} bytes lies outside of the file")
        return buffer.Size()
    return 0 if buffer.DataIsNone() else len(buffer.DataAsNumpy())


def _operator_code(code, reader: _Reader) -> tuple[str, int]:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    kind = _KINDS.get(number, f"BUILTIN_{number}")
    return f"CUSTOM {reader.text(code.CustomCode())}" if kind == "CUSTOM" else kind, code.Version()


def _at(items: Sequence, index: int, what: str):
    if not 0 <= index < len(items):
        raise ValueError(f"{what} {index} does not exist, there are {len(items)}")
    return items[index]


class _Subgraph:
    """A subgraph with its ops' tensors looked up; op inputs that are left out are None."""

    def __init__(self, index: int, table, reader: _Reader, codes: list, buffer_sizes: list[int]):
        self.index = index
        self.buffers: list[int] = []
        self.tensors = [self._tensor(tensor, reader, buffer_sizes) for tensor in reader.objects(table, "Tensors")]
        self.inputs = reader.numbers(table, "Inputs")
        self.outputs = reader.numbers(table, "Outputs")
        for position in (*self.inputs, *self.outputs):
            _at(self.tensors, position, "tensor")
        self.ops = [self._op(op, reader, codes) for op in reader.objects(table, "Operators")]

    def _tensor(self, table, reader: _Reader, buffer_sizes: list[int]) -> TensorSummary:
        shape = tuple(reader.numbers(table, "Shape"))
        name = reader.text(table.Name())
        if min(shape, default=0) < 0:
            raise ValueError(f"tensor {name!r} has shape {shape}")
        self.buffers.append(table.Buffer())
        scale = tuple(reader.numbers(table.Quantization(), "Scale"))
        return TensorSummary(
            name=name,
            shape=shape,
            dtype=_DTYPES.get(table.Type(), f"type_{table.Type()}"),
            scale=scale,
            zero_point=tuple(reader.numbers(table.Quantization(), "ZeroPoint")),
            axis=table.Quantization().QuantizedDimension() if len(scale) > 1 else None,
            bytes=_at(buffer_sizes, table.Buffer(), "buffer"),
            signature=tuple(reader.numbers(table, "ShapeSignature")),
            subgraph=self.index,
        )

    def _op(self, table, reader: _Reader, codes: list):
        kind, version = _at(codes, table.OpcodeIndex(), "operator code")
        inputs = [
            None if index == -1 else _at(self.tensors, index, "tensor") for index in reader.numbers(table, "Inputs")
        ]
        outputs = [_at(self.tensors, index, "tensor") for index in reader.numbers(table, "Outputs")]
        return kind, version, inputs, outputs

    def op_summaries(self) -> list[OpSummary]:
        return [
            OpSummary(
                kind=kind,
                version=version,
                inputs=[tensor and tensor.name for tensor in inputs],
                outputs=[tensor.name for tensor in outputs],
                macs=_macs(kind, inputs, outputs),
                weight_bytes=sum(tensor.bytes for tensor in inputs if tensor),
                subgraph=self.index,
            )
            for kind, version, inputs, outputs in self.ops
        ]


def _signatures(tables: list, parts: list[_Subgraph], reader: _Reader) -> list[Signature]:
    """All signatures, the one of the first subgraph at the front."""
    found = []
    for entry in tables:
        part = _at(parts, entry.SubgraphIndex(), "subgraph")
        sides = {
            side: _ports(getattr(part, side.lower()), reader.objects(entry, side), part, reader)
            for side in ("Inputs", "Outputs")
        }
        found.append(Signature(reader.text(entry.SignatureKey()), part.index, sides["Inputs"], sides["Outputs"]))
    if not any(signature.subgraph == 0 for signature in found):
        first = parts[0]
        found.append(
            Signature("", 0, _ports(first.inputs, [], first, reader), _ports(first.outputs, [], first, reader))
        )
    return sorted(found, key=lambda signature: signature.subgraph)


def _ports(indices: list[int], maps: list, part: _Subgraph, reader: _Reader) -> list[Port]:
    """The subgraph's own order with the signature's names; one tensor may go by several names."""
    names = collections.defaultdict(collections.deque)
    for entry in maps:
        names[entry.TensorIndex()].append(reader.text(entry.Name()))
    tensors = [(index, part.tensors[index]) for index in indices]
    return [Port(names[index].popleft() if names[index] else tensor.name, tensor) for index, tensor in tensors]


def _float_ops(parts: list[_Subgraph], entries: set[int]) -> tuple[list[str], list[str]]:
    """What computes on floats, and what merely converts them at the rim of the model."""
    reasons, rim = [], []
    for part in parts:
        for kind, _, inputs, outputs in part.ops:
            floats = [tensor for tensor in (*inputs, *outputs) if tensor and tensor.is_float]
            if floats:
                at_rim = part.index in entries and _is_at_rim(kind, inputs, outputs, part)
                (rim if at_rim else reasons).append(_float_note(kind, floats))
    return reasons, rim


def _is_at_rim(kind: str, inputs: list, outputs: list, part: _Subgraph) -> bool:
    ends = {"QUANTIZE": (inputs, part.inputs), "DEQUANTIZE": (outputs, part.outputs)}
    tensors, indices = ends.get(kind, ((), ()))
    return any(tensor is part.tensors[index] for tensor in tensors for index in indices)


def _float_note(kind: str, floats: list[TensorSummary]) -> str:
    return f"{kind} on " + ", ".join(dict.fromkeys(f"{tensor.dtype} {tensor.name!r}" for tensor in floats))


def _macs(kind: str, inputs: list, outputs: list) -> int:
    """Multiply-accumulates of one op, from shapes alone; 0 for kinds that do not multiply and add."""
    if kind not in _MACS:
        return 0
    try:
        return _MACS[kind]([tensor and tensor.shape for tensor in inputs], outputs[0].shape)
    except (IndexError, TypeError, ZeroDivisionError):
        return 0  # shapes that are known only when the model runs


# Each gets the shapes of the inputs and of the output. TFLite's kernels lie as [out, height, width, in / groups], and
# as [1, height, width, channels] for depthwise ones. A batched product is [.., m, k] x [.., k, n], either transposed.
_MACS: dict[str, Callable[[list, tuple], int]] = {
    "CONV_2D": lambda inputs, output: math.prod(output) * math.prod(inputs[1][1:]),
    "CONV_3D": lambda inputs, output: math.prod(output) * math.prod(inputs[1][:-1]),
    "DEPTHWISE_CONV_2D": lambda inputs, output: math.prod(output) * math.prod(inputs[1][1:3]),
    "TRANSPOSE_CONV": lambda inputs, output: math.prod(inputs[2]) * math.prod(inputs[1][:3]),
    "FULLY_CONNECTED": lambda inputs, output: math.prod(output) * inputs[1][-1],
    "BATCH_MATMUL": lambda inputs, output: math.prod(output) * (inputs[0][-2] * inputs[0][-1] // output[-2]),
}
