"""The same computed twice: once is enough."""

import keras
import numpy as np
from keras import tree

from keras_qat.graph.walk import Graph, Reused, nodes_of, path_of, rewrite
from keras_qat.operations import row_of
from keras_qat.spec import Rules

_KINDS_THAT_DIFFER = ("train", "tied", "constant")  # a Dropout draws anew, a constant is a weight of its own


def merge_twins(model: Graph, rules: Rules) -> tuple[Graph, dict[str, str]]:
    """Operations without weights that do the same to the same tensors → one; then those that read their results, in turn.

    People write a relu in front of every branch; each would be an op and have a range of its own. What rules treat
    differently stays apart.

    Returns:
        The graph, and the paths of the operations that are gone → the path of the one that is left.
    """
    schemes = {id(node): rules.scheme_of(path_of(node.operation)) for node in nodes_of(model) if _is_pure(node)}

    def place(node, args, kwargs) -> tuple:
        """What twins have in common that is quickly found."""
        tensors = [id(x) for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        return type(node.operation), tuple(tensors), id(schemes[id(node)])

    pure = [node for node in nodes_of(model) if id(node) in schemes]
    if len({place(node, node.arguments.args, node.arguments.kwargs) for node in pure}) == len(pure):
        return model, {}
    reused, known, merged = Reused(), {}, {}

    def visit(node, args, kwargs):
        if id(node) not in schemes:
            return reused.call(node, args, kwargs)
        twins = known.setdefault(place(node, args, kwargs), [])
        for twin, result in twins:
            if _alike(twin, node):
                merged[path_of(node.operation)] = path_of(twin.operation)
                return result
        twins.append((node, reused.call(node, args, kwargs)))
        return twins[-1][1]

    return rewrite(model, visit), merged


def _is_pure(node) -> bool:
    """Whether what it does depends on its arguments and its configuration alone."""
    operation, row = node.operation, row_of(node.operation)
    if row is None or row.range in _KINDS_THAT_DIFFER:
        return False
    is_fixed = getattr(operation, "scalars", None) is not None  # a `ChannelScale`, its numbers are its configuration
    return is_fixed or not (isinstance(operation, keras.Layer) and operation.variables)


def _alike(one, other) -> bool:
    return _same(_settings(one), _settings(other))


def _settings(node):
    """The configuration of a node's operation, and its arguments that are no tensors."""
    operation = node.operation
    config = operation.get_config() if isinstance(operation, keras.Layer) else vars(operation)
    options = {key: value for key, value in config.items() if key != "name" and not key.startswith("_")}
    constants = tree.map_structure(
        lambda x: None if isinstance(x, keras.KerasTensor) else x, (node.arguments.args, node.arguments.kwargs)
    )
    return options, constants


def _same(one, other) -> bool:
    """Equal; arrays number by number, of weights and of what knows no equality only the same ones."""
    if isinstance(one, keras.Variable) or isinstance(other, keras.Variable):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if hasattr(one, "shape") and hasattr(other, "shape"):
        return np.array_equal(np.asarray(one), np.asarray(other))
    return one is other or (type(one) is type(other) and bool(one == other))
