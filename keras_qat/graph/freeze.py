"""QAT model → Program: the integers of training, and nothing else."""

import dataclasses
from fractions import Fraction

import keras
import numpy as np
from keras import tree

from keras_qat.graph.emit.call import Call
from keras_qat.graph.plan import row_of_node
from keras_qat.graph.rows import batch_axis, rows_per_sample
from keras_qat.graph.walk import input_names, is_index, nodes_of, output_names, path_of
from keras_qat.layers import FakeQuant, Quantized, Rescale, require_qat
from keras_qat.operations import GONE
from keras_qat.primitives import Slope
from tflite_export import Op, Program, Tensor, with_io_types
from tflite_export.garbage import garbage_left
from tflite_export.optimize import optimize
from tflite_export.program import unique_name


@garbage_left()
def freeze(
    qat: keras.Model,
    input_type="int8",
    output_type="int8",
    dynamic_batch: bool = False,
    portable: bool = False,
) -> Program:
    """Turns a QAT model into integers: batch norms folded, weights rounded, training-only layers dropped.

    Args:
        qat: What `kq.quantize` returned, its ranges observed by training or `kq.calibrate`.
        input_type, output_type: "int8", "uint8" or "float32" at the rim of the file; or such a type of NumPy or
            TensorFlow.
        dynamic_batch: The file takes any batch size instead of 1.
        portable: Only ops that TensorFlow Lite Micro has too: GELU, EXP and LOG become look-ups of three ops. The integers
            are the same.

    Returns:
        A `tflite_export.Program`.

    Raises:
        ValueError: if a range was never observed; the message names the layers.
    """
    _require_ranges(qat)
    program = Program(dynamic_batch=dynamic_batch, description=f"{qat.name}, quantized by keras_qat")
    freezer = _Freezer(program, portable, rows_per_sample(qat))
    if dynamic_batch:
        freezer.require_one_row(qat)
    for tensor in qat.inputs:
        freezer.begin(tensor)
    for node in nodes_of(qat):
        freezer.take(node)
    program.inputs = {name: freezer.input_of(name, x) for name, x in zip(input_names(qat), qat.inputs, strict=True)}
    for name, tensor in zip(output_names(qat), qat.outputs, strict=True):
        program.outputs[name] = freezer.tensor_of(tensor)
    return with_io_types(optimize(program), input_type, output_type)


def _require_ranges(qat) -> None:
    require_qat(qat)
    layers = [layer for layer in qat.layers if isinstance(layer, FakeQuant)]
    unseen = [site for layer in layers if not layer.quantizer.was_observed() for site in layer.sites]
    if unseen:
        shown = ", ".join(repr(name) for name in unseen[:8]) + (" ..." if len(unseen) > 8 else "")
        raise ValueError(
            f"The ranges of {len(unseen)} tensors were never observed: {shown}. Train the model with fit, or run "
            "kq.calibrate(qat, data) first."
        )


@dataclasses.dataclass
class _Pending:
    """An operation whose result has no grid yet: the FakeQuant behind it will give it one."""

    node: object
    inputs: list[str]
    name: str
    activation: str | None = None
    shape: tuple = ()


_OF_A_GRID = (
    "factors",
    "constant",
    "count",
    "square",
    "terms",
    "signs",
)  # arguments of a FakeQuant's call that move its range


class _Freezer:
    """Walks through a QAT model. `values` maps tensor ids to names of integer tensors, or to what is still pending."""

    def __init__(self, program: Program, portable: bool, rows: dict[int, Fraction]):
        self.program, self.portable, self.rows = program, portable, rows
        self.values: dict[int, object] = {}
        self.grids: dict[FakeQuant, tuple[float, int]] = {}
        self.floats: dict[str, str] = {}  # integer tensor → its DEQUANTIZE

    def shape(self, tensor) -> tuple[int, ...]:
        """Of a batch of one sample."""
        return tuple(int(self.rows[id(tensor)]) if size is None else size for size in tensor.shape)

    def require_one_row(self, qat) -> None:
        for node in nodes_of(qat):
            result = node.outputs[0]
            if self.rows[id(result)] > 1 or batch_axis(result) not in (0, None):
                raise ValueError(
                    f"Layer {path_of(node.operation)!r}: the batch is not its first axis, or has several rows for each "
                    "sample. Expected: dynamic_batch=False."
                )

    def begin(self, tensor) -> None:
        if is_index(tensor):
            name = tensor._keras_history.operation.name
            self.values[id(tensor)] = self.program.add(Tensor(name, self.shape(tensor), _type_of_index(tensor)))
            self.program.inputs[name] = self.values[id(tensor)]
            return
        self.values[id(tensor)] = _Pending(None, [], tensor._keras_history.operation.name, shape=tensor.shape)

    def input_of(self, name: str, tensor) -> str:
        """One that nothing reads is there all the same: somebody will set it."""
        if name not in self.program.inputs:
            self.program.inputs[name] = self.program.add(Tensor(name, self.shape(tensor), "int8", scale=(1.0,)))
        return self.program.inputs[name]

    def tensor_of(self, tensor) -> str:
        value = self.values[id(tensor)]
        if isinstance(value, _Pending):
            raise ValueError(f"The output of {value.name!r} has no range. Was the QAT model edited after kq.quantize?")
        return value

    def take(self, node) -> None:
        if isinstance(node.operation, FakeQuant):
            if not node.arguments.kwargs.get("peek"):
                self._on_grid(node)
            return
        kind = row_of_node(node).range_kind(node)
        sources = [self.values[id(x)] for x in _data_inputs(node, kind)]
        if kind in GONE:
            result = sources[0]
        elif kind == "clamp" and isinstance(sources[0], _Pending):
            result = dataclasses.replace(sources[0], activation=row_of_node(node).activation, name=node.operation.name)
        elif kind == "same":
            result = self._like_input(node, sources)
        elif kind == "float":
            result = self._in_float(node, sources)
        elif kind == "index":
            output = node.outputs[0]
            result = self.program.add(Tensor(node.operation.name, self.shape(output), _type_of_index(output)))
            self._emit(node, sources, result, None)
        else:
            result = _Pending(node, sources, node.operation.name)
        self.values[id(node.outputs[0])] = result

    def _in_float(self, node, sources) -> str:
        """An operation that stays in float, a DEQUANTIZE in front of it where it reads integers."""
        sources = [self._as_float(source) for source in sources]
        tensor = self.program.add(Tensor(node.operation.name, self.shape(node.outputs[0]), "float32"))
        self._emit(node, sources, tensor, None)
        return tensor

    def _as_float(self, source) -> str:
        if isinstance(source, _Pending):  # an input that nothing reads in integers
            if source.name not in self.program.inputs:
                shape = (1, *source.shape[1:])
                self.program.inputs[source.name] = self.program.add(Tensor(source.name, shape, "float32"))
            return self.program.inputs[source.name]
        if self.program.tensors[source].dtype not in ("int8", "int16"):
            return source
        if source not in self.floats:
            shape = self.program.tensors[source].shape
            self.floats[source] = self.program.add(Tensor(f"{source}/float", shape, "float32"))
            self.program.ops.append(Op("DEQUANTIZE", [source], [self.floats[source]]))
        return self.floats[source]

    def _on_grid(self, node) -> None:
        """A FakeQuant: whatever is pending in front of it is written to a tensor of its grid."""
        scale, zero_point = self._grid_of(node)
        value, like = self.values[id(node.input_tensors[0])], node.input_tensors[0]
        shape = self.shape(like)
        name = value.name if isinstance(value, _Pending) else f"{value}/integers"
        dtype = "int16" if node.operation.spec.bits == 16 else "int8"
        tensor = self.program.add(Tensor(name, shape, dtype, scale=(float(scale),), zero_point=zero_point))
        if not isinstance(value, _Pending):
            self.program.ops.append(Op("QUANTIZE", [value], [tensor]))
        elif value.node is None:
            self.program.inputs[value.name] = tensor
        else:
            self._emit(value.node, value.inputs, tensor, value.activation)
        self.values[id(node.outputs[0])] = tensor

    def _grid_of(self, node) -> tuple[float, int]:
        """The scale and the zero point of a FakeQuant's grid, which may depend on those of others."""
        if node.operation not in self.grids:
            options = dict(node.arguments.kwargs)
            if options.get("stretch") is not None:
                options = _node_of(options["stretch"]).arguments.kwargs
            options = {key: value for key, value in options.items() if key in _OF_A_GRID}
            if options.get("factors") is not None:
                options["factors"] = [self._grid_of(_node_of(scale))[0] for scale in options["factors"]]
            if options.get("terms") is not None:
                options["terms"] = [term and self._grid_of(_node_of(term[1])) for term in options["terms"]]
            self.grids[node.operation] = node.operation.parameters(**options)
        return self.grids[node.operation]

    def _like_input(self, node, sources: list[str]) -> str:
        """An operation that only moves values: its result is on the grid of its input."""
        shape = self.shape(node.outputs[0])
        read = zip(sources, _data_inputs(node, "same"), strict=True)
        like = next((source for source, x in read if not is_index(x)), sources[0])
        tensor = self.program.add(
            dataclasses.replace(
                self.program.tensors[like], name=node.operation.name, shape=shape, data=None, batched=True
            )
        )
        self._emit(node, sources, tensor, None)
        return tensor

    def _emit(self, node, inputs, output, activation) -> None:
        operation, weights = node.operation, None
        if isinstance(operation, (Quantized, Rescale, Slope)):
            scales = [self.program.tensors[name].scale[0] for name in (inputs[0], output)]
            weights = operation.integers(*[np.float32(scale) for scale in scales])
            _require_finite(operation, weights)
            operation = getattr(operation, "layer", operation)
        row_of_node(node).emit(Call(self.program, operation, node, inputs, output, activation, weights, self.portable))


def _node_of(tensor):
    """The call that made it."""
    operation, index, _ = tensor._keras_history
    return operation._inbound_nodes[index]


def _require_finite(layer, weights) -> None:
    if isinstance(layer, Quantized) and not all(np.all(np.isfinite(one)) for one in (weights.kernel, weights.bias)):
        raise ValueError(
            f"Layer {path_of(layer)!r}: its weights hold NaN or infinite values, which no integer stands for. Training has "
            "diverged: go back to a checkpoint, and lower the learning rate or clip gradients (kq.callbacks.GradientClipping)."
        )


def _type_of_index(tensor) -> str:
    return "bool" if tensor.dtype == "bool" else "int32"


def _data_inputs(node, kind: str):
    """The further inputs of a grid layer are the scales; a constant does not look at its first input (see `Constant`)."""
    if kind == "constant":
        return node.input_tensors[1:]
    return node.input_tensors[: getattr(node.operation, "operands", None)]


def taps(qat: keras.Model) -> tuple[list[str], keras.Model]:
    """The tensor names of the file, and a model that computes their values: what a per-layer comparison needs."""
    found: dict[str, object] = {}
    for node in nodes_of(qat):
        if isinstance(node.operation, FakeQuant) and not node.arguments.kwargs.get("peek"):
            value = node.outputs[0]
            value = keras.ops.moveaxis(value, batch_axis(value), 0) if batch_axis(value) else value
            found[unique_name(node.input_tensors[0]._keras_history.operation.name, found)] = value
    inputs = tree.map_structure(lambda x: x, qat._inputs_struct)
    return list(found), keras.Model(inputs, list(found.values()))
