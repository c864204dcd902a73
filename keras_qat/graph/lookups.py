"""Functions of single numbers: which there are, and how chains of them become one look-up.

A look-up (256 results, one for each integer) makes any such function exact on every runtime. It takes three ops: CAST, ADD,
GATHER. TFLite has single ops that look up too, for a few functions.
"""

import keras
import numpy as np

from keras_qat.graph.walk import (
    MOVES,
    Graph,
    Reused,
    clone,
    connect,
    fresh_inputs,
    is_index,
    key_of,
    nodes_of,
    readers_of,
    rebuild,
)
from keras_qat.primitives import Pointwise

# Functions that LiteRT looks up in one op. TensorFlow Lite Micro has ABS and RSQRT only.
SINGLE_OPS = {
    "ops.Absolute": "ABS",
    "ops.Exp": "EXP",
    "ops.Gelu": "GELU",
    "ops.Log": "LOG",
    "ops.Rsqrt": "RSQRT",
}
# The same functions for layers that stay in float.
FLOAT_OPS = {
    **SINGLE_OPS,
    "ops.Ceil": "CEIL",
    "ops.Cos": "COS",
    "ops.Floor": "FLOOR",
    "ops.Round": "ROUND",
    "ops.Sin": "SIN",
    "ops.Sqrt": "SQRT",
}
LOOKUPS = {
    f"ops.{name}"
    for name in (
        "Absolute", "Angle", "Arccos", "Arccosh", "Arcsin", "Arcsinh", "Arctan", "Arctanh", "Cbrt", "Ceil", "Celu", "Clip", "Cos", "Cosh",
        "Deg2rad", "Elu", "Equal", "Erf", "Erfc", "Erfinv", "Exp", "Exp2", "Expm1", "Fabs", "Floor", "FloorDivide", "Gelu", "Greater",
        "GreaterEqual", "HardShrink", "HardTanh", "I0", "Isfinite", "Isinf", "Isnan", "Less", "LessEqual", "Log", "Log10", "Log1p", "Log2",
        "LogSigmoid", "LogicalAnd", "LogicalNot", "LogicalOr", "Mod", "NanToNum", "NotEqual", "Power", "Rad2deg", "Reciprocal", "Round",
        "Rsqrt", "Selu", "Sign", "Sin", "Sinc", "Sinh", "SoftShrink", "Softplus", "Softsign", "SparsePlus",
        "SparseSigmoid", "Sqrt", "Squareplus", "Tan", "TanhShrink", "Threshold", "Trunc",
    )
}  # fmt: skip
# Functions with an op of their own, which a look-up may take in.
_NATIVE = {
    "HardSwish", "Rescale", "ops.Add", "ops.Cast", "ops.Maximum", "ops.Minimum", "ops.Multiply", "ops.Relu", "ops.Relu6",
    "ops.Sigmoid", "ops.Subtract", "ops.Tanh", "ops.Where",
}  # fmt: skip
_OPS_OF_A_LOOKUP = 3
_LONGEST_CHAIN = 64


def needs_lookup(operation) -> bool:
    return key_of(operation) in LOOKUPS


def merge_lookups(model: Graph) -> Graph:
    """Chains of pointwise operations that TFLite lacks become `Pointwise` layers; what it has stays where it is shorter."""
    chains, dtypes = _chains(model), _dtypes(model)
    if not (chains or dtypes or any(key_of(node.operation) == "Constant" for node in nodes_of(model))):
        return model
    reused, inputs, new = Reused(), fresh_inputs(model, dtypes), {}
    new.update(zip(map(id, model.inputs), keras.tree.flatten(inputs), strict=True))

    def visit(node, args, kwargs):
        result_id = id(node.outputs[0])
        if result_id in chains:
            root, nodes = chains[result_id]
            result = Pointwise(_function(root, nodes), name=node.operation.name)(new[id(root)])
        elif key_of(node.operation) == "Constant":
            result = node.operation(
                keras.tree.flatten(inputs)[0]
            )  # its argument means nothing and shall hinder nothing
        elif key_of(node.operation) in MOVES and is_index(args[0]):
            like = [keras.KerasTensor(x.shape, args[0].dtype) for x in node.outputs]
            result = connect(reused[node.operation], args, kwargs, like)
        else:
            result = reused.call(node, args, kwargs)
        new.update(zip(map(id, node.outputs), keras.tree.flatten(result), strict=True))
        return result

    return Graph(inputs, rebuild(model, visit, keras.tree.flatten(inputs)), model.name)


def _dtypes(model) -> dict[str, str]:
    """The types of the inputs: one that is only ever cast to whole numbers (the words of an Embedding) has that type."""
    readers, found = readers_of(model), {}
    for tensor in model.inputs:
        types = _read_as(tensor, readers)
        if types == {"int32"} or types == {"int64"}:
            found[tensor._keras_history.operation.name] = "int32"
    return found


def _read_as(tensor, readers) -> set:
    """The types of what is made of a tensor, also after it was moved. None stands for an output of the model."""
    types = set()
    for reader in readers.get(id(tensor), []):
        key = reader and key_of(reader.operation)
        if key in MOVES:
            types |= _read_as(reader.outputs[0], readers)
        elif key != "Constant":
            types.add(reader.outputs[0].dtype if key == "ops.Cast" else None)
    return types


def _chains(model) -> dict[int, tuple]:
    """Id of a tensor → the tensor it is a function of, number by number, and the nodes of that function."""
    if not any(needs_lookup(node.operation) for node in nodes_of(model)):
        return {}
    derived = _derived(model)
    readers, found = readers_of(model), {}
    for key, (root, nodes) in derived.items():
        if not any(needs_lookup(node.operation) for node in nodes):
            continue
        ends_here = any(
            reader is None or derived.get(id(reader.outputs[0]), (None,))[0] is not root
            for reader in readers.get(key, [])
        )
        if ends_here and (len(nodes) == 1 or sum(map(_cost, nodes)) >= _OPS_OF_A_LOOKUP):
            found[key] = (root, nodes)
        elif ends_here:
            for node in nodes:
                if needs_lookup(node.operation):
                    found[id(node.outputs[0])] = (node.input_tensors[0], (node,))
    return found


def _derived(model) -> dict[int, tuple]:
    derived: dict[int, tuple] = {}
    for node in nodes_of(model):
        sources = [derived.get(id(tensor), (tensor, ())) for tensor in node.input_tensors]
        roots = {id(root): root for root, _ in sources}
        if len(roots) != 1 or not _is_pointwise(node, sources):
            continue
        (root,) = roots.values()
        earlier = {id(one): one for _, nodes in sources for one in nodes}
        if node.outputs[0].shape == root.shape and len(earlier) < _LONGEST_CHAIN:
            derived[id(node.outputs[0])] = (root, (*earlier.values(), node))
    return derived


def constants_of(node) -> list:
    """The arrays of several numbers that a node computes with."""
    arguments = (node.arguments.args, node.arguments.kwargs)
    return [x for x in keras.tree.flatten(arguments) if not isinstance(x, keras.KerasTensor) and np.size(x) > 1]


def _is_pointwise(node, sources) -> bool:
    key = key_of(node.operation)
    if constants_of(node):
        return False
    if key == "ChannelScale":
        return node.operation.scalars is not None
    if key in ("ops.Relu", "ops.Relu6") and not sources[0][1]:
        return False  # it fuses into the op in front of it, and the look-up behind it has the finer grid
    return key in LOOKUPS or key in _NATIVE


def _cost(node) -> int:
    """How many ops the operation takes on its own."""
    if key_of(node.operation) in SINGLE_OPS or not needs_lookup(node.operation):
        return 1
    return _OPS_OF_A_LOOKUP


def _on_numbers(operation):
    if key_of(operation) != "ChannelScale":
        return clone(operation)
    multiplier, offset = operation.scalars
    return lambda x: x * multiplier + offset


def _function(root, nodes) -> keras.Model:
    number = keras.Input((), dtype=root.dtype)
    values = {id(root): number}
    for node in nodes:
        args, kwargs = node.arguments.fill_in(values)
        values[id(node.outputs[0])] = _on_numbers(node.operation)(*args, **kwargs)
    return keras.Model(number, values[id(nodes[-1].outputs[0])])
