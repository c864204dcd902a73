"""Masks that are computed from whole numbers (which ids are padding, which places come later), and what they choose."""

import keras
import numpy as np
from keras import ops

from keras_qat.graph.lower.weights import is_learned, penalties
from keras_qat.graph.walk import MOVES, is_index, key_of
from keras_qat.primitives import Constant
from keras_qat.truths import COMPARISONS, CONNECTIVES, Comparison, Logic, Not, Number

_TRUTHS = ("Comparison", "InputLayer", "Logic", "Not")
_MIRRORED = {"less": "greater", "less_equal": "greater_equal", "greater": "less", "greater_equal": "less_equal"}
# Of numbers that are 0 or not, these are logic.
_LOGIC_OF_NUMBERS = {"minimum": "logical_and", "multiply": "logical_and", "maximum": "logical_or"}


def truth_of(x):
    """Where a symbolic tensor of whole numbers is not 0."""
    return x if x.dtype == "bool" else Comparison("not_equal", name="truth")(x)


def on_numbers(function, args):
    """A function whose arguments become 1 where they are true and 0 elsewhere, if they are of the kind of these ones: truth
    values. What comes of values on a grid is looked up."""
    flags = [isinstance(x, keras.KerasTensor) and x.dtype == "bool" for x in args]
    to_number = [
        (Number(name="number") if counts(x) else lambda x: ops.cast(x, "float32")) if is_flag else lambda x: x
        for x, is_flag in zip(args, flags, strict=True)
    ]
    return (lambda *args: function(*[f(x) for f, x in zip(to_number, args, strict=True)])) if any(flags) else None


def chosen(keep, one, other=0.0):
    """`one` where `keep` is true, elsewhere `other`. Each is a tensor, an array or a number, one of them a tensor."""
    anchor = next(x for x in (one, other, keep) if isinstance(x, keras.KerasTensor))
    return ops.where(keep, *[x if isinstance(x, keras.KerasTensor) else _constant(x)(anchor) for x in (one, other)])


def _constant(values) -> Constant:
    """A number, an array or a weight: a token in place of what is hidden is learned."""
    array = np.asarray(values, "float32")
    shape = (1,) * max(1 - array.ndim, 0) + array.shape
    return Constant(array.reshape(shape), trainable=is_learned(values), name="constant", **penalties(values))


def counts(tensor) -> bool:
    """Whether a tensor holds whole numbers, or truth values that come of such alone and not of values on a grid."""
    operation, index, _ = tensor._keras_history
    key = key_of(operation)
    if not is_index(tensor) or (tensor.dtype == "bool" and key not in (*_TRUTHS, *MOVES)):
        return False
    return key not in MOVES or all(map(counts, operation._inbound_nodes[index].input_tensors))


def _name_of(operation) -> str:
    """The name of the function in keras.ops."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(operation).__name__)[1:]


def _comparison(operation, args, kwargs):
    """Of whole numbers with one of them: what masks are made of."""
    function = _name_of(operation)
    tensors = [x for x in args if isinstance(x, keras.KerasTensor)]
    constants = [x for x in args if not isinstance(x, keras.KerasTensor)]
    if len(tensors) != 1 or not is_index(tensors[0]) or tensors[0].dtype == "bool" or np.size(constants[0]) != 1:
        return None
    if isinstance(args[1], keras.KerasTensor):
        function = _MIRRORED.get(function, function)
    comparison = Comparison(function, np.ravel(constants[0])[0], name=operation.name)
    return lambda *operands: comparison(next(x for x in operands if isinstance(x, keras.KerasTensor)))


def logic(operation, args, kwargs):
    """Of truth values, and of whole numbers that stand for them: those next to 0 and 1."""
    function = _name_of(operation)
    function = _LOGIC_OF_NUMBERS.get(function, function)
    tensors = [x for x in args if isinstance(x, keras.KerasTensor)]
    others = [np.asarray(x) for x in args if not isinstance(x, keras.KerasTensor)]
    if not tensors or not all(map(counts, tensors)) or not all(np.all((x == 0) | (x == 1)) for x in others):
        return None

    def combined(*args):
        symbolic = [truth_of(x) for x in args if isinstance(x, keras.KerasTensor)]
        constants = [np.atleast_1d(x) != 0 for x in args if not isinstance(x, keras.KerasTensor)]
        return Logic(function, *constants, name=operation.name)(*symbolic)

    return combined


def _not(operation, args, kwargs):
    """Of truth values that come from whole numbers."""
    return (lambda x: Not(name=operation.name)(truth_of(x))) if counts(args[0]) else None


def _select(operation, args, kwargs):
    """The first choice whose condition holds: one where within the other."""

    def select(conditions, choices, default=0):
        result = default
        for condition, choice in reversed(list(zip(conditions, choices, strict=True))):
            result = ops.where(condition, choice, result)
        return result

    return select


def _cast(operation, args, kwargs):
    """Between whole numbers and truth values. Truth values that become whole numbers stay what they are."""
    x, wanted = args[0], operation.dtype
    if x.dtype == "bool" and wanted.startswith(("float", "bfloat")):
        return Number(name=operation.name) if counts(x) else None  # of values on a grid it is looked up
    if not is_index(x) or wanted not in ("bool", "int8", "uint8", "int32", "int64"):
        return None
    return truth_of if wanted == "bool" else lambda x: x


def _class_name(function: str) -> str:
    return "ops." + "".join(part.capitalize() for part in function.split("_"))


RULES = {
    **{_class_name(function): _comparison for function in COMPARISONS},
    **{_class_name(function): logic for function in CONNECTIVES},
    "ops.Cast": _cast,
    "ops.LogicalNot": _not,
    "ops.Select": _select,
}
