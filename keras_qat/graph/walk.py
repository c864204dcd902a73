"""Graphs of operations, read and rebuilt node by node: what all the rewrites stand on."""

import collections
from collections.abc import Callable

import keras
from keras import tree

from tflite_export.program import unique_name


class Graph:
    """Operations called on symbolic tensors: a functional model without the layer around it, which takes time to make.

    Args:
        inputs: The tensors it begins with, in any structure.
        outputs: What was made of them, in any structure; may hold other things than tensors.
        name: Of the model.
    """

    def __init__(self, inputs, outputs, name: str | None = None):
        self._inputs_struct, self._outputs_struct, self.name = inputs, outputs, name
        self.inputs = tree.flatten(inputs)
        self.outputs = [x for x in tree.flatten(outputs) if isinstance(x, keras.KerasTensor)]
        self.nodes = _nodes_between(self.inputs, self.outputs)

    def model(self) -> keras.Model:
        return keras.Model(self._inputs_struct, self._outputs_struct, name=self.name)


def _nodes_between(inputs, outputs) -> list:
    """The calls that lead from tensors to tensors, each after those it depends on."""
    begun, seen, ordered = {id(tensor) for tensor in inputs}, set(), []
    pending = [(tensor, False) for tensor in reversed(outputs)]
    while pending:
        tensor, inputs_are_known = pending.pop()
        if id(tensor) in begun:
            continue
        operation, index, _ = getattr(tensor, "_keras_history", (None, 0, 0))
        if operation is None or operation._inbound_nodes[index].is_input:
            raise ValueError(f"It reads a symbolic tensor {tensor} that is not among its arguments.")
        node = operation._inbound_nodes[index]
        if inputs_are_known:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            pending.append((tensor, True))
            pending += [(source, False) for source in reversed(node.input_tensors)]
    return ordered


def operations_of(model) -> list:
    """Everything that a model calls, once."""
    return list({id(node.operation): node.operation for node in nodes_of(model)}.values())


def nodes_of(model) -> list:
    """The calls inside a graph or a functional model, each after those it depends on."""
    if isinstance(model, Graph):
        return model.nodes
    depths = sorted(model._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in model._nodes_by_depth[depth] if not node.is_input]


def input_names(model) -> list[str]:
    return [tensor._keras_history.operation.name for tensor in model.inputs]


def output_names(model) -> list[str]:
    """Keras's names of the outputs, made unique."""
    names: list[str] = []
    for tensor in model.outputs:
        names.append(unique_name(tensor._keras_history.operation.name, names))
    return names


def rebuild(model, visit: Callable, inputs: list):
    """Calls `visit(node, args, kwargs)` for every node in order and returns the new outputs in the old structure.

    Args:
        model: A `Graph` or a functional model.
        visit: Gets the node and its arguments with new tensors in place of old ones; returns the new output tensors.
        inputs: New tensors for `model.inputs`.
    """
    values = {id(old): new for old, new in zip(model.inputs, inputs, strict=True)}
    for node in nodes_of(model):
        args, kwargs = node.arguments.fill_in(values)
        outputs = [x for x in tree.flatten(visit(node, args, kwargs)) if x is not None]
        values.update({id(old): new for old, new in zip(node.outputs, outputs, strict=True)})
    new = lambda x: values[id(x)] if isinstance(x, keras.KerasTensor) else x  # noqa: E731
    return tree.map_structure(new, model._outputs_struct)


def rewrite(graph: Graph, visit: Callable) -> Graph:
    """`rebuild` on fresh inputs of the same names, shapes and types."""
    inputs = fresh_inputs(graph)
    return Graph(inputs, rebuild(graph, visit, tree.flatten(inputs)), graph.name)


def fresh_inputs(model, dtypes=()):
    """New `keras.Input`s like those of `model`, in the same structure; `dtypes` names the ones of another type."""
    dtypes = dict(dtypes)

    def fresh(tensor):
        name = tensor._keras_history.operation.name
        return keras.Input(batch_shape=tensor.shape, dtype=dtypes.get(name, tensor.dtype), name=name)

    return tree.map_structure(fresh, model._inputs_struct)


def clone(operation, name: str | None = None):
    """A new operation with the same configuration and the same weights, called nowhere yet."""
    if not isinstance(operation, keras.Layer):
        twin = object.__new__(type(operation))  # copy.copy would go through Keras's serialization
        vars(twin).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
        twin.name = name or operation.name
        return twin
    # float32 whatever the policy: integers are simulated in float32, and half precision would move them.
    config = {**config_of(operation), "name": name or operation.name, "dtype": "float32"}
    adapted = [config.pop(option, None) for option in _ADAPTERS][0]
    twin = type(operation).from_config(config)
    twin.trainable = operation.trainable
    build = operation._build_shapes_dict
    if operation.weights:
        filled = _filled_from(operation, twin)
        twin.build(**build) if build else twin.build_from_config(operation.get_build_config())
        del twin.add_weight
        weights = [weight for weight in operation.weights if not (adapted and weight.name.startswith("lora_"))]
        for new, old in zip(twin.weights, weights, strict=True):
            if id(new) not in filled:
                new.assign(old)
        if adapted:
            name = "embeddings" if hasattr(twin, "embeddings") else "kernel"
            getattr(twin, name).assign(getattr(operation, name))
    elif build:
        twin.build(**build)
    return twin


def config_of(layer) -> dict:
    """A layer's configuration with its regularizers, constraints and initializers themselves, which a user need not register."""
    config = layer.get_config()
    for option in config:
        if option.endswith(("_regularizer", "_constraint", "_initializer")):
            config[option] = getattr(layer, option, config[option])
    return config


_ADAPTERS = ("lora_rank", "lora_alpha")  # of `enable_lora`: a copy has one weight, with what the adapter adds to it


def _filled_from(layer, twin) -> set[int]:
    """Makes a twin's weights begin as those of a layer, which saves drawing random ones first. Gives the ids of those."""
    add_weight, values, filled = (
        twin.add_weight,
        {weight.name: weight for weight in layer._trainable_variables + layer._non_trainable_variables},
        set(),
    )

    def add(*args, name=None, **options):
        if name in values:
            options["initializer"] = lambda shape, dtype=None: keras.ops.cast(values[name].value, dtype)
        variable = add_weight(*args, name=name, **options)
        if name in values:
            filled.add(id(variable))
        return variable

    vars(twin)["add_weight"] = add
    return filled


def is_index(tensor) -> bool:
    """Whether a tensor holds truth values or numbers that count something (ids of words), not values on a grid."""
    return tensor.dtype in ("bool", "int32", "int64", "uint32")


# What only moves numbers, whatever they are.
MOVES = ("Flatten", "Reshape", "ops.ExpandDims", "ops.GetItem", "ops.Reshape", "ops.Squeeze", "ops.Transpose")


def key_of(operation) -> str | None:
    """What the table of operations knows this by: "Conv2D" for a layer, "ops.Add" for a keras.ops operation.

    A user's subclass counts as the Keras class it derives from as long as it leaves `call` alone; with a `call` of its
    own it is nothing the table knows, and None is returned.
    """
    own = next((c for c in type(operation).__mro__ if c.__module__.split(".")[0] in ("keras", "keras_qat")), None)
    if own is None or type(operation).call is not own.call:
        return None
    return own.__name__ if isinstance(operation, keras.Layer) else f"ops.{own.__name__}"


def path_of(operation) -> str:
    """The path a person knows an operation of a flat model by; Keras allows no slashes in names."""
    return operation.name.replace(".", "/")


def producers_of(model) -> dict[int, object]:
    """Tensor id → the node that makes it."""
    return {id(tensor): node for node in nodes_of(model) for tensor in node.outputs}


def readers_of(model) -> dict[int, list]:
    """Tensor id → the nodes that read it. A model output counts as one more reader, None."""
    readers: dict[int, list] = {}
    for node in nodes_of(model):
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node)
    for tensor in model.outputs:
        readers.setdefault(id(tensor), []).append(None)
    return readers


def calls_of(model) -> collections.Counter:
    """Operation id → how often the model calls it."""
    return collections.Counter(id(node.operation) for node in nodes_of(model))


Node = type(keras.Input(())._keras_history.operation._inbound_nodes[0])


def connect(operation, args, kwargs, like):
    """Calls a built operation on symbolic tensors without running it; what comes of it looks like the tensors `like`.

    Running it is what costs most of the time that a rewrite takes. Returns one tensor, or a list of several.
    """
    outputs = [keras.KerasTensor(tensor.shape, tensor.dtype) for tensor in like]
    Node(operation, args, kwargs, outputs)
    return outputs if len(outputs) > 1 else outputs[0]


def forget_calls(operation) -> None:
    """Makes an operation one that was called nowhere yet. (In several graphs `layer.output` would be of the first.)"""
    del operation._inbound_nodes[:]
    del operation._outbound_nodes[:]


class Reused:
    """What a rewrite calls in place of the old operations: the same ones, what they were called on before forgotten.

    The old model can still be read node by node.
    """

    def __init__(self):
        self._known = set()

    def __getitem__(self, operation):
        if id(operation) not in self._known:
            self._known.add(id(operation))
            forget_calls(operation)
        return operation

    def call(self, node, args, kwargs):
        """The node's operation, called on other tensors of the same shapes."""
        return connect(self[node.operation], args, kwargs, node.outputs)
