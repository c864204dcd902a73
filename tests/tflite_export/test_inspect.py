import json
import random

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tflite_export import Op, Program, Summary, Tensor, inspect, write

MACS = [  # kind, shapes of the inputs, which of them is the data, shape of the output, MACs
    ("CONV_2D", [(1, 8, 8, 4), (16, 3, 3, 4)], 0, (1, 4, 4, 16), 4 * 4 * 16 * 3 * 3 * 4),
    ("CONV_2D", [(1, 8, 8, 4), (16, 3, 3, 2)], 0, (1, 8, 8, 16), 8 * 8 * 16 * 3 * 3 * 2),
    ("DEPTHWISE_CONV_2D", [(1, 8, 8, 4), (1, 5, 3, 8)], 0, (1, 8, 8, 8), 8 * 8 * 8 * 5 * 3),
    ("TRANSPOSE_CONV", [(4,), (6, 3, 3, 4), (1, 8, 8, 4)], 2, (1, 16, 16, 6), 8 * 8 * 4 * 3 * 3 * 6),
    ("FULLY_CONNECTED", [(2, 32), (10, 32)], 0, (2, 10), 2 * 32 * 10),
    ("MAXIMUM", [(1, 8), (1, 8)], 0, (1, 8), 0),
]


def one_op(kind, shapes, data, output) -> Program:
    program = Program(inputs={"in": f"in{data}"}, outputs={"out": "out"})
    for index, shape in enumerate(shapes):
        dtype, scale = ("int32", ()) if len(shape) == 1 else ("int8", (0.5,))
        program.add(Tensor(f"in{index}", shape, dtype, scale, data=None if index == data else np.ones(shape, dtype)))
    program.add(Tensor("out", output, "int8", (0.5,)))
    program.ops.append(Op(kind, [f"in{index}" for index in range(len(shapes))], ["out"]))
    return program


@pytest.mark.parametrize("kind, shapes, data, output, macs", MACS)
def test_macs_and_weight_bytes(kind, shapes, data, output, macs):
    program = one_op(kind, shapes, data, output)
    summary = inspect(write(program))
    assert summary.macs == summary.ops[0].macs == macs
    constants = [tensor.data.nbytes for tensor in program.tensors.values() if tensor.is_constant]
    assert summary.ops[0].weight_bytes == sum(constants)


def test_everything_a_program_says_comes_back(dense):
    summary = inspect(dense.content)
    assert isinstance(summary, Summary)
    assert summary.file_bytes == len(dense.content)
    assert summary.weight_bytes == 10 * 16 + 10 * 4
    ports = [(port.name, port.tensor.name) for port in summary.inputs + summary.outputs]
    assert ports == [("image", "x"), ("logits", "y")]
    for tensor in summary.tensors:
        written = dense.program.tensors[tensor.name]
        assert (tensor.shape, tensor.dtype, tensor.axis) == (written.shape, written.dtype, written.axis)
        assert tensor.scale == pytest.approx(written.scale)
        assert set(tensor.zero_point) == {written.zero_point}
        assert tensor.is_constant == written.is_constant
    assert summary.ops[0].inputs == ["x", "w", "b"] and summary.ops[0].outputs == ["y"]


def test_path_and_bytes_agree(dense, tmp_path):
    path = tmp_path / "dense.tflite"
    path.write_bytes(dense.content)
    assert inspect(path) == inspect(str(path)) == inspect(dense.content) == inspect(bytearray(dense.content))


def test_dynamic_batch_shows(make_dense):
    tensor = inspect(make_dense(dynamic_batch=True).content).inputs[0].tensor
    assert tensor.signature == (-1, 16) and tensor.shape == (1, 16) and tensor.has_dynamic_batch


def test_shared_buffers_count_once():
    program = Program(inputs={"x": "x"}, outputs={"z": "z"})
    weights = np.arange(64, dtype=np.int8).reshape(8, 8)
    for name in ("x", "y", "z"):
        program.add(Tensor(name, (1, 8), "int8", (0.5,)))
    for source, target in (("x", "y"), ("y", "z")):
        name = program.add(Tensor("w", (8, 8), "int8", (0.1,), data=weights))
        program.ops.append(Op("FULLY_CONNECTED", [source, name, None], [target]))
    summary = inspect(write(program))
    assert summary.weight_bytes == 64
    assert [op.weight_bytes for op in summary.ops] == [64, 64]
    assert summary.ops[0].inputs[2] is None


def island() -> bytes:
    """Integer rim, floats in the middle: what must never pass as full int8."""
    program = Program(inputs={"x": "x"}, outputs={"y": "y"})
    for name in "xy":
        program.add(Tensor(name, (1, 8), "int8", (0.1,)))
    for name in "fg":
        program.add(Tensor(name, (1, 8), "float32"))
    program.ops = [Op("DEQUANTIZE", ["x"], ["f"]), Op("TANH", ["f"], ["g"]), Op("QUANTIZE", ["g"], ["y"])]
    return write(program)


def test_full_int8_with_integer_and_float_rim(make_dense):
    assert inspect(make_dense().content).is_full_int8
    for dtype, rim in (("float32", ["QUANTIZE", "DEQUANTIZE"]), ("uint8", [])):
        summary = inspect(make_dense(input_type=dtype, output_type=dtype).content)
        assert summary.is_full_int8 and summary.reasons == []
        assert [note.split()[0] for note in summary.rim] == rim


def test_a_float_island_is_named():
    summary = inspect(island())
    assert not summary.is_full_int8 and summary.rim == []
    assert [reason.split()[0] for reason in summary.reasons] == ["DEQUANTIZE", "TANH", "QUANTIZE"]
    assert "'f'" in summary.reasons[1] and "'g'" in summary.reasons[1]


@pytest.mark.parametrize(
    "name, full, rim", [("float", False, 0), ("hybrid", False, 0), ("float_rim", True, 2), ("int8", True, 0)]
)
def test_foreign_files(foreign_files, name, full, rim):
    summary = inspect(foreign_files[name])
    assert (summary.is_full_int8, len(summary.rim)) == (full, rim), summary.reasons
    conv, depthwise, transpose, grouped, dense = 8 * 8 * 8 * 27, 8 * 8 * 8 * 9, 8 * 8 * 8 * 36, 16 * 16 * 8 * 2, 20480
    assert summary.macs == conv + depthwise + transpose + grouped + dense


def test_hybrid_has_int8_weights_and_is_still_not_int8(foreign_files):
    summary = inspect(foreign_files["hybrid"])
    assert any(tensor.dtype == "int8" and tensor.is_constant for tensor in summary.tensors)
    assert any(reason.startswith("FULLY_CONNECTED") for reason in summary.reasons)


def test_every_subgraph_and_signature_is_covered(two_signatures):
    summary = inspect(two_signatures)
    assert summary.subgraphs == len({tensor.subgraph for tensor in summary.tensors}) == 4
    ports = {s.key: ([p.name for p in s.inputs], [p.name for p in s.outputs]) for s in summary.signatures}
    assert ports["loop"] == (["x"], ["y"])
    assert (sorted(ports["product"][0]), ports["product"][1]) == (["a", "b"], ["p"])
    assert {"WHILE", "BATCH_MATMUL"} <= set(summary.op_counts)
    assert next(op.macs for op in summary.ops if op.kind == "BATCH_MATMUL") == 2 * 3 * 5 * 4


OP_SIDES = ("inputs", "outputs")


def rewritten(content: bytes, change) -> bytes:
    """The file again, after `change` had its way with the flatbuffer's objects."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
    graph = model.subgraphs[0]
    for owner, field in [(graph, "inputs"), (graph.tensors[0], "shape"), *((graph.operators[0], s) for s in OP_SIDES)]:
        setattr(owner, field, np.array(getattr(owner, field)))  # what was read is a read-only view
    change(model)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_without_signature_tensor_names_serve(dense):
    summary = inspect(rewritten(dense.content, lambda model: setattr(model, "signatureDefs", None)))
    assert [port.name for port in summary.inputs + summary.outputs] == ["x", "y"]


DAMAGES = {
    "an op's input": lambda model: model.subgraphs[0].operators[0].inputs.__setitem__(0, 99),
    "an op's output": lambda model: model.subgraphs[0].operators[0].outputs.__setitem__(0, -1),
    "the op's code": lambda model: setattr(model.subgraphs[0].operators[0], "opcodeIndex", 7),
    "a buffer": lambda model: setattr(model.subgraphs[0].tensors[0], "buffer", 99),
    "the model's input": lambda model: model.subgraphs[0].inputs.__setitem__(0, -2),
    "a shape": lambda model: model.subgraphs[0].tensors[0].shape.__setitem__(1, -16),
    "the subgraphs": lambda model: setattr(model, "subgraphs", []),
    "the signature": lambda model: setattr(model.signatureDefs[0], "subgraphIndex", 3),
    "bytes behind the end": lambda model: model.buffers[1].__dict__.update(offset=99, size=9**9),
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
def test_indices_are_checked(dense, change):
    with pytest.raises(ValueError, match="not a readable .tflite file: it is cut off or damaged"):
        inspect(rewritten(dense.content, change))


@pytest.mark.parametrize("content", [b"", b"TFL3", b"PK\x03\x04zip file", b"\x89HDF\r\n\x1a\n" * 9, bytes(1000)])
def test_other_files_are_refused_by_name(content, tmp_path):
    path = tmp_path / "other.tflite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.tflite.*not a readable \.tflite file.*Received: .*bytes"):
        inspect(path)
    with pytest.raises(ValueError, match="given data.*not a readable"):
        inspect(content)


def test_missing_file_and_wrong_type(tmp_path):
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "none.tflite")
    with pytest.raises(TypeError, match="Received: int"):
        inspect(3)


def test_every_truncation_is_refused(dense):
    for size in range(len(dense.content) - 1):
        with pytest.raises(ValueError, match="not a readable .tflite"):
            inspect(dense.content[:size])


@pytest.mark.parametrize("flips", [1, 3, 30])
def test_damaged_files_give_a_summary_or_a_value_error(foreign_files, two_signatures, flips):
    rng = random.Random(flips)
    for content in (foreign_files["int8"], two_signatures):
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(flips):
                damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
            _read_or_refuse(bytes(damaged))


def test_random_bytes_behind_the_identifier():
    rng = random.Random(0)
    for size in range(0, 3000, 30):
        _read_or_refuse(b"\x10\0\0\0TFL3" + rng.randbytes(size))
        _read_or_refuse(b"\x10\0\0\0TFL3" + bytes(rng.choice((0, 4, 8, 255)) for _ in range(size)))


def _read_or_refuse(content: bytes):
    try:
        summary = inspect(content)
    except ValueError as error:
        assert "not a readable .tflite" in str(error)
    else:
        assert str(summary) and summary.to_dict()


def test_prints_as_aligned_tables_and_as_json(dense):
    summary = inspect(dense.content)
    text = str(summary)
    assert "full int8: yes" in text and "160 MACs" in text
    rows = [line for line in text.splitlines() if line.startswith(("tensor ", "x ", "w ", "b ", "y "))]
    assert len({line.index(cell) for line, cell in zip(rows, ("dtype", "int8", "int8", "int32", "int8"))}) == 1
    back = json.loads(json.dumps(summary.to_dict()))
    assert back["is_full_int8"] is True and back["inputs"] == {"image": "x"} and len(back["tensors"]) == 4
