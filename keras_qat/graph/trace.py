"""Any Keras model → one flat graph of operations that the table knows."""

import contextlib
import inspect
import os
import re
import traceback

import keras
import tensorflow as tf
from keras import ops, tree

from keras_qat.errors import Problem, UnsupportedModelError
from keras_qat.graph.added_losses import collected, with_losses
from keras_qat.graph.moved_weights import MovedWeights, watched
from keras_qat.graph.open_batch import DependsOnBatch, run_on_two_batches
from keras_qat.graph.passed_masks import PassedMasks, problem_with
from keras_qat.graph.symbolic import lenient
from keras_qat.graph.walk import Graph, clone, connect, forget_calls, key_of, nodes_of, rebuild
from keras_qat.primitives import Constant
from tflite_export.program import unique_name

_HOW_TO_BUILD = "Give it an Input, or call it once on a batch, or pass quantize(..., inputs=keras.Input(shape))."

_NO_FORM = "keras_qat has no integer form for this operation."


def trace(model: keras.Model, is_primitive, lowering_of, inputs=None) -> tuple[Graph, list[Problem]]:
    """Flattens a model into primitive operations, each a copy with weights of its own.

    Composite layers (nested and subclassed models, custom layers) are opened by running their `call` on symbolic
    tensors, and what TFLite has no integer op for by running its lowering, again and again until only primitives
    remain. The model itself is left as it was.

    Args:
        model: Any built Keras 3 model.
        is_primitive: `operation -> bool`.
        lowering_of: `(operation, args, kwargs) -> callable or None`, see lower/.
        inputs: A `keras.Input` (or a structure of them) for a model that does not know the shape of its own.

    Returns:
        The flat graph, and what could not be opened. An operation with a problem stands in the graph as it is.
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"keras_qat quantizes keras.Model objects of Keras 3. Received: {type(model)}. A tf_keras model (legacy "
            "Keras 2) has to be rebuilt with keras."
        )
    inputs = _inputs_of(model) if inputs is None else inputs
    tracer = _Tracer(is_primitive, lowering_of)
    open_axes = _dynamic_axes(inputs)
    with _left_untouched(model), lenient(), _rules_noted(tracer):
        outputs = tracer.open_model(model, inputs)
    tracer.warn_of_doubles()
    for output in tree.flatten(outputs):
        if not isinstance(output, keras.KerasTensor):
            raise ValueError(
                f"Model {model.name!r} returns something that does not depend on its inputs: {output!r}. Expected tensors made "
                "of its inputs alone. Leave it out of what `call` returns."
            )
    problems = tracer.problems_of_the_user()
    if open_axes:  # what has no form for lack of a size has one otherwise
        problems = open_axes + [problem for problem in problems if problem.reason != _NO_FORM]
    return Graph(inputs, outputs, model.name), problems


def _inputs_of(model):
    """Fresh inputs with the names, shapes and types that the model was built with."""
    structure = getattr(model, "_inputs_struct", None)
    if isinstance(model, keras.Sequential) and model.built and model._functional is not None:
        structure = model._functional._inputs_struct
    if structure is not None:
        return tree.map_structure(
            lambda x: keras.Input(
                batch_shape=(None, *x.shape[1:]), dtype=x.dtype, name=x._keras_history.operation.name
            ),
            structure,
        )
    shapes = model._build_shapes_dict
    if model.built and not shapes:
        raise ValueError(
            f"Model {model.name!r} was called, but Keras does not know the shape of its input, because its call does not run "
            "on symbolic tensors: it decides by the data, or uses functions of numpy or TensorFlow. Pass kq.quantize(..., "
            "inputs=keras.Input(shape)): what stands in the way is then named."
        )
    if not shapes:
        raise ValueError(f"Model {model.name!r} is not built, so the shape of its input is unknown. {_HOW_TO_BUILD}")
    shape = next(iter(shapes.values()))
    if isinstance(shape, dict):
        return {key: keras.Input(batch_shape=(None, *each[1:]), name=key) for key, each in shape.items()}
    return tree.map_shape_structure(lambda x: keras.Input(batch_shape=(None, *x[1:])), shape)


def _dynamic_axes(inputs) -> list[Problem]:
    problems = []
    for tensor in tree.flatten(inputs):
        unknown = [axis for axis, size in enumerate(tensor.shape) if axis > 0 and size is None]
        if unknown:
            problems.append(
                Problem(
                    tensor._keras_history.operation.name,
                    "InputLayer",
                    f"Axis {unknown[0]} of the input has no fixed size (shape {tensor.shape}).",
                    "Give keras.Input a fixed length there, e.g. keras.Input((28, 28, 1)); only the batch may be open.",
                )
            )
    return problems


class _Tracer:
    def __init__(self, is_primitive, lowering_of):
        self.is_primitive, self.lowering_of = is_primitive, lowering_of
        self.problems: list[Problem] = []
        self._masks: list = []  # the tensors that layers get as mask=
        self._truths: list[tuple] = []  # problems of operations that make truth values, with what they read and write
        self._lowerings: dict[object, tuple] = {}
        self._clones: dict[int, object] = {}
        self.made: dict[int, object] = {}  # what rules made need not be copied
        self.in_rule = False
        self._identities: dict[int, object] = {}
        self._moved = MovedWeights()
        self._passed = PassedMasks(self._computed_mask)
        self._names: set[str] = set()

    def visit(self, node, args, kwargs, path):
        """Calls a primitive's copy, or opens a composite."""
        operation = node.operation
        self._masks += _symbolic(kwargs.get("mask"))
        if problem := problem_with(operation, kwargs) or _quantized_before(operation):
            return self._leave_closed(operation, args, kwargs, path, "\n".join(problem))
        try:
            lowering = self._lowering_of(operation, args, kwargs)
            if lowering is not None:
                outputs = self._open_call(lowering, operation, args, kwargs, path, is_rule=True)
                return self._regularized(operation, outputs, path)
        except Exception as error:  # an `activation=` that only takes numbers, arguments that no rule expects
            return self._leave_closed(operation, args, kwargs, path, _why_closed(operation, error))
        if self.is_primitive(operation):
            return self._call_copy(node, args, kwargs, path)
        if isinstance(operation, (keras.Layer, keras.Function)):
            try:
                return self._regularized(operation, self.open(operation, args, kwargs, path), path)
            except Exception as error:  # whatever a user's `call` raises on symbolic tensors
                return self._leave_closed(operation, args, kwargs, path, _why_closed(operation, error))
        return self._leave_closed(operation, args, kwargs, path, _NO_FORM)

    def open_model(self, model, inputs):
        try:
            return self.open(model, (inputs,), {}, path="")
        except UnsupportedModelError:
            raise
        except Exception as error:  # whatever a user's `call` raises on symbolic tensors
            raise UnsupportedModelError([_problem(model.name, model, _why_closed(model, error))]) from error

    def open(self, composite, args, kwargs, path):
        """Replaces a composite by what it is made of."""
        graph = _functional_graph(composite)
        if graph is None:
            return self._open_call(composite.call, composite, args, kwargs, path)
        return self._visit_graph(graph, tree.flatten(args), composite, kwargs, path)

    def _computed_mask(self, compute, layer, tensors, mask):
        return self._open_call(compute, layer, (tensors, mask), {}, layer.name)

    def _open_call(self, call, composite, args, kwargs, path, is_rule=False):
        tape = None
        if is_rule:
            graph, tensors, outputs = self._run_rule(run_call, call, composite, args, kwargs)
        else:
            with watched(composite) as tape:
                graph, tensors, outputs = _run_users_call(call, composite, args, kwargs)
        if graph is None:
            return outputs
        return self._visit_graph(graph, tensors, composite, kwargs, path, tape)

    def _visit_graph(self, graph, tensors, composite, kwargs, path, tape=None):
        training = kwargs.get("training")
        is_one_operation = len(nodes_of(graph)) == 1 and not _is_model(composite)

        def visit(node, inner_args, inner_kwargs):
            inner = node.operation
            inner_args, inner_kwargs = self._moved.restored(composite, tape, (inner_args, inner_kwargs))
            if training is not None and getattr(inner, "_call_has_training_arg", False):
                inner_kwargs = {"training": training, **inner_kwargs}
            # A layer that is just one operation (Add, ReLU) lends it its name, as does a Dense to what is left of it
            # without its activation: that is the name a person knows.
            is_core = is_one_operation or (inner.name == composite.name and not _is_model(composite))
            inner_path = path if is_core else _join(path, _plain_name(inner))
            inner_kwargs = self._passed.given_to(inner, inner_args, inner_kwargs)
            outputs = self.visit(node, inner_args, inner_kwargs, inner_path)
            self._passed.note(inner, inner_args, outputs)
            return outputs

        outputs = rebuild(graph, visit, tensors)
        return outputs if tape is None else self._moved.restored(composite, tape, outputs)

    def _regularized(self, operation, outputs, path):
        """What was opened no longer is the layer that has an `activity_regularizer`; an Identity behind it has it."""
        regularizer = getattr(operation, "activity_regularizer", None)
        if regularizer is None:
            return outputs
        if id(operation) not in self._identities:
            options = {"activity_regularizer": keras.regularizers.serialize(regularizer), "dtype": "float32"}
            identity = keras.layers.Identity(**options, name=self._unique(_join(path, "activity")))
            self._identities[id(operation)] = (operation, identity)
        return tree.map_structure(self._identities[id(operation)][1], outputs)

    def _lowering_of(self, operation, args, kwargs):
        """The operation's lowering; one with weights is made once, so that what is called twice keeps sharing them."""
        key = _identity(operation, args)
        if key not in self._lowerings or key is None:
            self._lowerings[key] = (operation, self._run_rule(self.lowering_of, operation, args, kwargs))
        return self._lowerings[key][1]

    def warn_of_doubles(self):
        opened = [operation for operation, _ in self._lowerings.values() if isinstance(operation, keras.Layer)]
        self._moved.warn_of_doubles({id(weight) for layer in opened for weight in layer._trainable_variables})

    def _run_rule(self, function, *arguments):
        self.in_rule = True
        try:
            return function(*arguments)
        finally:
            self.in_rule = False

    def _call_copy(self, node, args, kwargs, path):
        operation = node.operation
        if isinstance(operation, keras.Layer):
            if id(operation) not in self._clones:
                self._clones[id(operation)] = (operation, self._copy_of(operation, self._unique(path)))
            copy = self._clones[id(operation)][1]
            if isinstance(copy, Constant) and copy._inbound_nodes:
                return copy.output  # it is the same tensor wherever it is read
        else:
            copy = clone(operation, self._unique(path))
        if _is_known(node, args, kwargs) and getattr(copy, "built", True):
            return connect(copy, args, kwargs, node.outputs)
        return copy(*args, **kwargs)

    def _copy_of(self, layer, name):
        if id(layer) not in self.made or layer.dtype_policy.name != "float32":
            return clone(layer, name)
        forget_calls(layer)
        layer.name = name
        return layer

    def _leave_closed(self, operation, args, kwargs, path, reason):
        outputs = _Closed(operation, name=self._unique(path))(*args, **kwargs)
        self.problems.append(_problem(path, operation, reason))
        if reason == _NO_FORM and all(tensor.dtype == "bool" for tensor in tree.flatten(outputs)):
            self._truths.append((self.problems[-1], _symbolic((args, kwargs)), tree.flatten(outputs)))
        return outputs

    def problems_of_the_user(self) -> list[Problem]:
        """Without what Keras compares to make a mask, where whoever meets the mask has a problem of its own."""
        behind, dropped = {id(tensor) for tensor in self._masks}, []
        for problem, read, written in reversed(self._truths):
            if any(id(tensor) in behind for tensor in written):
                behind.update(map(id, read))
                dropped.append(problem)
        return [problem for problem in self.problems if problem not in dropped] or self.problems

    def _unique(self, path: str) -> str:
        """A Keras name for a path ("backbone/conv" → "backbone.conv"), numbered where it is taken."""
        name = unique_name(path.replace("/", "."), self._names)
        self._names.add(name)
        return name


def _symbolic(arguments) -> list:
    return [x for x in tree.flatten(arguments) if isinstance(x, keras.KerasTensor)]


def _identity(operation, args):
    """What makes two calls the same as far as weights go: the layer, or the function and its variables; else None."""
    if isinstance(operation, keras.Layer):
        return id(operation)
    variables = tuple(id(x) if isinstance(x, keras.Variable) else None for x in tree.flatten(args))
    if not any(variables):
        return None
    options = {key: value for key, value in vars(operation).items() if not key.startswith("_") and key != "name"}
    return type(operation), variables, repr(sorted(options.items()))


@contextlib.contextmanager
def _rules_noted(tracer: _Tracer):
    """Notes the operations that rules make. Others that a rule calls are the user's: an `activation=` can be anything."""
    plain = keras.Operation.__init__

    def init(self, *args, **kwargs):
        if tracer.in_rule:
            tracer.made[id(self)] = self
        plain(self, *args, **kwargs)

    keras.Operation.__init__ = init
    try:
        yield
    finally:
        keras.Operation.__init__ = plain


def _quantized_before(operation) -> tuple[str, str] | None:
    mode = getattr(operation, "quantization_mode", None)
    if mode is None:
        return None
    return (
        f"Keras has quantized its weights already (model.quantize({mode!r})).",
        "Give kq.quantize the float model, from before model.quantize was called.",
    )


def _is_known(node, args, kwargs) -> bool:
    """Whether a copy called on these arguments returns what the node did: it need not run then."""
    now, then = _symbolic((args, kwargs)), node.input_tensors
    is_same = len(now) == len(then) and all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(now, then))
    return is_same and not any(x.dtype in ("float16", "bfloat16", "float64") for x in node.outputs)


class _Closed(keras.Operation):
    """Stands in for an operation that could not be opened, so that all problems are found in one go."""

    def __init__(self, operation, name):
        super().__init__(name=name)
        self.operation = operation

    def call(self, *args, **kwargs):
        raise UnsupportedModelError([])

    def compute_output_spec(self, *args, **kwargs):
        return self.operation.compute_output_spec(*args, **kwargs)


def _functional_graph(composite):
    if isinstance(composite, keras.Sequential):
        return composite._functional
    return composite if isinstance(composite, keras.Function) and key_of(composite) is not None else None


def _run_users_call(call, composite, args, kwargs):
    """`run_call`; where that fails because the batch is open, with batches of given sizes."""
    try:
        return run_call(call, composite, args, kwargs)
    except Exception as error:
        try:
            return run_on_two_batches(lambda size: run_call(call, composite, args, kwargs, size))
        except DependsOnBatch:
            raise
        except Exception as later:  # an error about None tells less than what comes behind it
            raise (later if "None" in str(error) else error) from None


def run_call(call, composite, args, kwargs, batch=None):
    """Runs `call` on fresh symbolic tensors. Returns its graph, or (None, ..) if `call` just passes inputs through."""
    originals = [x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
    shape_of = lambda x: (batch, *x.shape[1:]) if x.shape and x.shape[0] is None else x.shape  # noqa: E731
    stand_ins = {id(x): keras.KerasTensor(shape_of(x), x.dtype) for x in originals}
    swap = lambda x: stand_ins.get(id(x), x)  # noqa: E731
    inner_args, inner_kwargs = tree.map_structure(swap, args), tree.map_structure(swap, kwargs)
    parameters = inspect.signature(call).parameters
    accepts_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if not accepts_any:
        inner_kwargs = {key: value for key, value in inner_kwargs.items() if key in parameters}
    if "training" in parameters and parameters["training"].default is inspect.Parameter.empty:
        inner_kwargs.setdefault("training", None)
    with collected(composite) as losses:
        outputs = call(*inner_args, **inner_kwargs)
    outputs = with_losses(outputs, losses, composite.name)
    back = {id(stand_ins[id(x)]): x for x in originals}
    if all(id(x) in back for x in tree.flatten(outputs)):
        return None, None, tree.map_structure(lambda x: back[id(x)], outputs)
    used = list({id(x): x for x in originals}.values())
    begin = [stand_ins[id(x)] for x in used]
    return Graph(begin, outputs), used, None


@contextlib.contextmanager
def _left_untouched(model):
    """Takes the nodes that symbolic calls leave on a model's layers off again."""
    layers = list({id(layer): layer for layer in model._flatten_layers()}.values())
    before = [(layer, len(layer._inbound_nodes), len(layer._outbound_nodes), list(layer._losses)) for layer in layers]
    try:
        yield
    finally:
        for layer, inbound, outbound, losses in before:
            del layer._inbound_nodes[inbound:]
            del layer._outbound_nodes[outbound:]
            layer._losses[:] = losses


def original(operation):
    """What a stand-in for something that could not be opened stands for; anything else itself."""
    return operation.operation if isinstance(operation, _Closed) else operation


def _is_model(operation) -> bool:
    return isinstance(operation, (keras.Model, keras.Function))


def _plain_name(operation) -> str:
    """A layer's name; for keras.ops, whose names are numbered over the whole process, the name without its number."""
    return operation.name if isinstance(operation, keras.Layer) else re.sub(r"_\d+$", "", operation.name)


def _join(path, name):
    return f"{path}/{name}" if path else name


def _why_closed(operation, error) -> str:
    if _is_refusal(error):
        return str(error).replace(". ", ".\n", 1)  # what it is, and the way out
    if type(operation).__module__.startswith("keras.") and not isinstance(operation, keras.layers.Lambda):
        return _NO_FORM
    if isinstance(error, DependsOnBatch):
        return f"Its call computes with the size of the batch. {error}"
    line = _line_of(error)
    if "TensorFlow function" in str(error):
        return f"Its call uses TensorFlow's functions, which cannot be traced: {line}."
    if "as a Python `bool`" in str(error) or "as a boolean" in str(error):
        return f"Its call decides by the data which way to go: {line}."
    return f"Its call cannot run on symbolic tensors: {type(error).__name__}: {_first_line(error)} In: {line}."


def _problem(path, operation, reason) -> Problem:
    """With the way out that stands behind the reason, on a line of its own, or that follows from it."""
    reason, _, way_out = reason.partition("\n")
    if type(operation).__name__ in _PREPROCESSING:
        way_out = way_out or "Run it in front of the model (with tf.data, say), and give the model what comes of it."
    way_out = way_out or _instead_of(reason) or "Rebuild it from what keras_qat/OPERATIONS.md lists."
    return Problem(path, type(operation).__name__, reason, way_out)


_PREPROCESSING = (
    *("CategoryEncoding", "Discretization", "HashedCrossing", "Hashing", "IntegerLookup", "MelSpectrogram"),
    *("STFTSpectrogram", "StringLookup", "TextVectorization"),
)


def _is_refusal(error) -> bool:
    """Whether a rule has said itself why not."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        type(error) is ValueError and re.search(r"[/\\]graph[/\\]lower[/\\]\w+\.py$", frames[-1].filename) is not None
    )


_HERE = os.path.dirname(os.path.dirname(__file__))
_PACKAGES = tuple(folder + os.sep for folder in (_HERE, os.path.dirname(keras.__file__), os.path.dirname(tf.__file__)))


def _line_of(error) -> str:
    """The user's own line that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_PACKAGES) and "optree" not in frame.filename]
    return f"{own[-1].line!r} (line {own[-1].lineno} of {own[-1].filename})" if own else "unknown"


_OTHER_NAMES = {
    "concat": "concatenate",
    "gather": "take",
    "image.resize": "image.resize",
    "nn.space_to_depth": "reshape and keras.ops.transpose",
    **{f"reduce_{name}": name for name in ("all", "any", "max", "mean", "min", "prod", "sum")},
    **{f"math.reduce_{name}": name for name in ("all", "any", "max", "mean", "min", "prod", "std", "sum", "variance")},
    "math.reduce_variance": "var",
}


def _instead_of(reason: str) -> str | None:
    """The way out for a call that keras.ops has a twin of."""
    if "which way to go" in reason:
        return "Use keras.ops.where on values of one tensor, or decide outside of the model."
    names = re.findall(r"\b(?:tf|tensorflow)\.([\w.]+)", reason)
    if not names:
        return None
    last = {name: name.split(".")[-1] for name in names}
    twins = {name: _OTHER_NAMES.get(name, one if hasattr(ops, one) else None) for name, one in last.items()}
    twins = [f"keras.ops.{twin} for tf.{name}" for name, twin in twins.items() if twin]
    return f"Use {', '.join(twins)}." if twins else "Use functions of keras.ops in place of tf's."


def _first_line(error) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
