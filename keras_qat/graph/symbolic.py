"""What layers do when they run on arrays, and Keras does not let them do on symbolic tensors."""

import contextlib
import functools

import keras
from keras import ops, tree

from keras_qat.graph.walk import Node, key_of

_OPERATORS = {
    "add": ops.add,
    "sub": ops.subtract,
    "mul": ops.multiply,
    "truediv": ops.true_divide,
    "pow": ops.power,
    "matmul": ops.matmul,
    "mod": ops.mod,
    "floordiv": ops.floor_divide,
}
_COMPARISONS = {
    "lt": ops.less,
    "le": ops.less_equal,
    "gt": ops.greater,
    "ge": ops.greater_equal,
    "eq": ops.equal,
    "ne": ops.not_equal,
}
_Reshape = type(ops.reshape(keras.KerasTensor((None, 2)), (-1, 2))._keras_history.operation)
_Ndim = type(ops.ndim(keras.KerasTensor((1,)))._keras_history.operation)


_Cond = keras.src.ops.core.Cond


@contextlib.contextmanager
def lenient():
    """Weights may stand on the left of an operator, layers may return None among their tensors, `ops.ndim` gives a number.

    One thing is not let through that Keras does: None for the size of the batch in a reshape, beside a -1.
    """
    operators = {f"__{name}__": function for name, function in (_OPERATORS | _COMPARISONS).items()}
    replaced = [(keras.Variable, name, _either(name, function)) for name, function in operators.items()]
    replaced += [
        (Node, "__init__", _without_nones(Node.__init__)),
        (keras.Layer, "symbolic_call", _by_running(keras.Layer.symbolic_call)),
        (_Cond, "__call__", _without_branches(_Cond.__call__)),
        (_Ndim, "symbolic_call", lambda self, x: len(x.shape)),
        (_Reshape, "compute_output_spec", _with_sizes(_Reshape.compute_output_spec)),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, method in replaced:
            setattr(owner, name, method)
        yield
    finally:
        for owner, name, method in before:
            setattr(owner, name, method)


def _without_branches(call):
    def __call__(self, pred, *args, **kwargs):
        if isinstance(pred, keras.KerasTensor):
            raise TypeError("keras.ops.cond: which way to go depends on the data.")
        return call(self, pred, *args, **kwargs)

    return __call__


def _either(name, function):
    method = getattr(keras.Variable, name)
    return lambda self, other: (function if isinstance(other, keras.KerasTensor) else method)(self, other)


def _by_running(symbolic_call):
    """What a layer returns is found by running it, as Keras does inside of another layer, where what it says of that was
    written for another `call`. So it is where a layer leaves sizes open (`EinsumDense("abc,cd->abd", (None, 8))`).
    """

    def call(self, *args, **kwargs):
        run = functools.partial(keras.Operation.compute_output_spec, self, *args, **kwargs)
        if key_of(self) is None and not _tells_itself(self):
            with contextlib.suppress(Exception):
                return run()
        outputs = symbolic_call(self, *args, **kwargs)
        if _has_open_sizes(outputs) and not _has_open_sizes((args, kwargs)):
            with contextlib.suppress(Exception):
                return run()
        return outputs

    return call


def _tells_itself(layer) -> bool:
    """Whether what it says of its output was written for its `call`."""
    owner = next(c for c in type(layer).__mro__ if "call" in vars(c))
    own = [c for c in type(layer).__mro__ if issubclass(c, owner)]
    return any(name in vars(c) for c in own for name in ("compute_output_spec", "compute_output_shape"))


def _has_open_sizes(structure) -> bool:
    return any(isinstance(x, keras.KerasTensor) and None in x.shape[1:] for x in tree.flatten(structure))


def _without_nones(init):
    def __init__(self, operation, call_args=None, call_kwargs=None, outputs=None):
        init(self, operation, call_args, call_kwargs, [x for x in tree.flatten(outputs) if x is not None])

    return __init__


def _with_sizes(compute_output_spec):
    def compute(self, x):
        if None in tree.flatten(self.newshape):
            raise TypeError(f"Reshape to {self.newshape}: a size is open.")
        return compute_output_spec(self, x)

    return compute
