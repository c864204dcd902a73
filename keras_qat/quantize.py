"""`quantize` and `explain`: the way from a float model to a QAT model, and what it would do on the way."""

import dataclasses
import re
import warnings
from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from keras_qat.errors import Problem, UnsupportedModelError
from keras_qat.graph.added_masks import hide_what_is_added
from keras_qat.graph.annotate import annotate
from keras_qat.graph.fuse import fuse
from keras_qat.graph.lookups import FLOAT_OPS, merge_lookups
from keras_qat.graph.lower import lowering_of
from keras_qat.graph.plan import Plan, plan, row_of_node
from keras_qat.graph.rows import batch_axis, rows_per_sample
from keras_qat.graph.signatures import signatures_remembered
from keras_qat.graph.trace import original, trace
from keras_qat.graph.twins import merge_twins
from keras_qat.graph.walk import (
    Graph,
    input_names,
    key_of,
    nodes_of,
    operations_of,
    output_names,
)
from keras_qat.layers import ChannelScale, is_qat
from keras_qat.operations import row_of
from keras_qat.primitives import Pointwise
from keras_qat.spec import Rule, Rules, Scheme, resolve_scheme
from tflite_export.garbage import garbage_left
from tflite_export.program import unique_name
from tflite_export.table import table

_INTEGER_INPUTS = {"uint8": (0.0, 255.0), "int8": (-128.0, 127.0)}


def quantize(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    rules: Sequence[Rule] = (),
    *,
    input_range=None,
    inputs=None,
) -> keras.Model:
    """Makes a quantization-aware copy of a model: train it like any Keras model, then `kq.export` it.

    Args:
        model: Any built Keras 3 model. It is left as it is.
        scheme: "int8", or a `kq.Scheme`.
        rules: `kq.Rule`s that give chosen layers a scheme of their own; the first match wins.
        input_range: `(low, high)` where the range of the input is known (raw pixels: `(0, 255)`), or a dict of such
            pairs by input name. It is then fixed instead of observed.
        inputs: A `keras.Input` (or a structure of them) for a subclassed model that never saw data.

    Returns:
        A functional `keras.Model` with inputs and outputs of the same names, not compiled.

    Raises:
        UnsupportedModelError: names every layer that cannot be put into integers, and the way out.

    Example:
        ```python
        qat = kq.quantize(model, input_range=(0, 255))
        qat.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        qat.fit(x_train, y_train)
        kq.export(qat, "model.tflite", verify_with=x_test)
        ```
    """
    with garbage_left(), signatures_remembered(), tf.variable_creator_scope(_without_scope):
        prepared = _prepare(model, scheme, rules, input_range, inputs)
        if prepared.problems:
            raise UnsupportedModelError(prepared.problems)
        qat = _with_output_names(annotate(prepared.fused, prepared.plan), prepared.output_names)
    if prepared.rules.unused:
        paths = [_path(operation) for operation in operations_of(prepared.flat)]
        shown = ", ".join(paths[:20]) + (" ..." if len(paths) > 20 else "")
        warnings.warn(f"These rules matched no layer: {prepared.rules.unused}. The layers are: {shown}", stacklevel=2)
    return _with_own_steps(model, qat)


def _without_scope(create, **options):
    """Variables whose handles have short names. TensorFlow makes a kernel for each handle of another name, which takes 1 ms.

    (That is TensorFlow's name of a variable, which Keras has no use for; its own path is what it always is.)
    """
    with tf.name_scope(""):
        return create(**options)


@dataclasses.dataclass(frozen=True)
class Row:
    """One node of `Explanation`. `reason` is empty where it can be quantized."""

    layer: str
    operation: str
    integer_op: str
    range: str
    bits: str
    group: str
    reason: str = ""

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `kq.quantize` would do, a row per node; prints as a table."""

    rows: list[Row]
    problems: list[Problem]

    @property
    def supported(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        heading = ("layer", "keras", "integer op", "range", "bits", "group")
        body = [(r.layer, r.operation, r.integer_op, r.range, r.bits, r.group) for r in self.rows]
        text = table(heading, body)
        if self.problems:
            text += "\n\nCannot be quantized:\n" + "\n".join(f"  - {problem}" for problem in self.problems)
        return text

    def to_dict(self) -> dict:
        problems = [dataclasses.asdict(problem) for problem in self.problems]
        return {"rows": [row.to_dict() for row in self.rows], "problems": problems}


def explain(
    model: keras.Model,
    scheme: str | Scheme = "int8",
    rules: Sequence[Rule] = (),
    *,
    input_range=None,
    inputs=None,
) -> Explanation:
    """Tells, before any training, what each layer becomes, or why it cannot be quantized and what to do.

    Args: as of `kq.quantize`.
    """
    prepared = _prepare(model, scheme, rules, input_range, inputs)
    if prepared.problems:
        reasons = {problem.layer: problem.reason for problem in prepared.problems}
        rows = [_row_before_planning(node, reasons) for node in nodes_of(prepared.flat)]
    else:
        rows = _with_gone([_row(node, prepared) for node in nodes_of(prepared.fused)], prepared, model)
    return Explanation(rows, prepared.problems)


@dataclasses.dataclass
class _Prepared:
    traced: Graph
    twins: dict[str, str]
    flat: Graph
    problems: list[Problem]
    output_names: list[str]
    rules: Rules
    fused: Graph | None = None
    plan: Plan | None = None


def _prepare(model, scheme, rules, input_range, inputs) -> _Prepared:
    """Everything up to the plan; stops at the flat graph if there are problems."""
    if is_qat(model):
        raise ValueError(f"Model {model.name!r} is quantized already: kq.quantize takes the float model.")
    known = Rules(rules, resolve_scheme(scheme))
    traced, problems = trace(model, lambda operation: row_of(operation) is not None, lowering_of, inputs)
    merged, twins = merge_twins(hide_what_is_added(traced), known)
    flat = merge_lookups(merged)
    names = _output_names_of(model, flat)
    problems = list(dict.fromkeys(problems + _refusals(flat) + _not_in_float(flat, known) + _bad_weights(flat)))
    prepared = _Prepared(traced, twins, flat, problems, names, known)
    if not problems:
        _free_names(flat, names)
        prepared.fused = fuse(flat, known)
        prepared.plan = plan(prepared.fused, _input_ranges(flat, input_range))
    return prepared


def _output_names_of(model, flat) -> list[str]:
    """The float model's output names: the keys of a dict of outputs, else the names of the layers that make them."""
    if isinstance(flat._outputs_struct, dict):
        return tree.flatten({key: key for key in flat._outputs_struct})
    functional = getattr(model, "_functional", None) or model
    names = getattr(functional, "output_names", None)
    return list(names) if names else _unique([name.split(".")[0] for name in output_names(flat)])


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]


def _free_names(flat, names) -> None:
    """Lets go of the names that the outputs are to have: "predictions" is what the outside world sees of a Dense."""
    for operation in operations_of(flat):
        if operation.name in names:
            operation.name = f"{operation.name}.{type(operation).__name__.lower()}"


def _with_output_names(qat, names):
    """The QAT model of a graph, with outputs named as in float: losses and metrics by name go on working."""
    _number_doubles(qat)
    taken, flat = input_names(qat), []
    for name, tensor in zip(names, qat.outputs, strict=True):
        taken.append(unique_name(name, taken))
        has_name = tensor._keras_history.operation.name == taken[-1]
        flat.append(tensor if has_name else keras.layers.Identity(name=taken[-1], dtype="float32")(tensor))
    outputs = tree.pack_sequence_as(qat._outputs_struct, flat)
    return keras.Model(qat._inputs_struct, outputs, name=qat.name)


def _number_doubles(graph) -> None:
    """What rewrites name after two calls of a layer can have the name of what they name after another layer."""
    taken = set()
    for operation in operations_of(graph):
        if operation.name in taken:
            operation.name = unique_name(operation.name, taken)
        taken.add(operation.name)


# What a model can have of its own that `fit`, `evaluate` and `predict` call.
_STEPS = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics")


def _with_own_steps(model, qat):
    """The QAT model, of the user's class where that trains its own way and is a functional model but for that."""
    kind, functional = type(model), type(qat)
    base = next(cls for cls in kind.__mro__ if cls.__module__.split(".")[0] == "keras")
    own = [name for name in _STEPS if getattr(kind, name) is not getattr(base, name)]
    if not own:
        return qat
    if issubclass(kind, functional) and kind.__init__ is functional.__init__:
        return kind(qat._inputs_struct, qat._outputs_struct, name=qat.name)
    warnings.warn(
        f"{kind.__name__} has its own {', '.join(own)}, which the QAT model has not: it is a plain functional model, trained "
        "the way Keras trains one. To keep yours, put it into a subclass of keras.Model without an __init__ and make the "
        "model to train of that: Trained(qat.inputs, qat.outputs). It saves, freezes and exports as any QAT model.",
        stacklevel=3,
    )
    return qat


def _refusals(flat) -> list[Problem]:
    """The nodes whose configuration TFLite cannot express."""
    found = []
    for node in nodes_of(flat):
        row = row_of(node.operation)
        answer = row.refuses(node) if row is not None and row.refuses is not None else None
        if answer is not None:
            found.append(Problem(_place(node.operation), type(node.operation).__name__, *answer))
    return found or _mixed_samples(flat)


def _mixed_samples(flat) -> list[Problem]:
    """The nodes that make rows of a batch out of parts of several samples, or outputs that are no batch of results."""
    found, rows = [], rows_per_sample(flat)
    outputs = {id(tensor) for tensor in flat.outputs}
    for node in nodes_of(flat):
        count = rows[id(node.outputs[0])]
        is_output = id(node.outputs[0]) in outputs
        if count.denominator > 1 or (is_output and (count > 1 or batch_axis(node.outputs[0]) not in (0, None))):
            before, after = node.input_tensors[0].shape, node.outputs[0].shape
            reason = f"It mixes the batch into another axis ({before} → {after}): {count} rows of the result for each sample."
            if count == 1:
                reason = f"It is an output with the batch on axis {batch_axis(node.outputs[0])} ({after})."
            found.append(
                Problem(_place(node.operation), type(node.operation).__name__, reason, "Keep the batch axis as it is.")
            )
    return found


def _not_in_float(flat, rules: Rules) -> list[Problem]:
    """The look-ups that a rule leaves in float, though TFLite has no op for their function."""
    found = []
    for node in nodes_of(flat):
        if not isinstance(node.operation, Pointwise) or rules.scheme_of(_path(node.operation)) is not None:
            continue
        names = [key_of(inner.operation) for inner in nodes_of(node.operation.function)]
        if len(names) != 1 or names[0] not in FLOAT_OPS:
            reason = f"TFLite has no float op for it ({', '.join(map(str, names))})."
            way_out = "Leave it out of the rule: in int8 it is a look-up, which is exact."
            found.append(Problem(_path(node.operation), "Pointwise", reason, way_out))
    return found


def _bad_weights(flat) -> list[Problem]:
    found = []
    for layer in operations_of(flat):
        for weight in getattr(layer, "weights", ()):
            if "seed" not in weight.path and not np.all(np.isfinite(np.asarray(weight, np.float32))):
                reason = f"Its weight {weight.name!r} holds NaN or infinite values."
                found.append(Problem(_path(layer), type(layer).__name__, reason, "Load or train sound weights first."))
                break
    return found


def _input_ranges(flat, input_range) -> dict[str, tuple[float, float]]:
    """What is known of the inputs: what the user says, and what an integer type implies."""
    names = input_names(flat)
    known = {
        name: _INTEGER_INPUTS[tensor.dtype]
        for name, tensor in zip(names, flat.inputs, strict=True)
        if tensor.dtype in _INTEGER_INPUTS
    }
    if input_range is None:
        return known
    given = input_range if isinstance(input_range, dict) else dict.fromkeys(names, input_range)
    for name, pair in given.items():
        if name not in names:
            raise ValueError(
                f"input_range names an input the model does not have. Expected: {names}. Received: {name!r}"
            )
        if np.shape(pair) != (2,) or not pair[0] < pair[1] or not np.all(np.isfinite(pair)):
            raise ValueError(f"A range is (low, high) with low < high. Received for input {name!r}: {pair}")
    return {**known, **{name: (min(float(low), 0.0), max(float(high), 0.0)) for name, (low, high) in given.items()}}


def _path(operation) -> str:
    return operation.name.replace(".", "/")


def _place(operation) -> str:
    """The path, without the number of a keras.ops operation: code that runs several times has each problem once."""
    path = _path(operation)
    return path if isinstance(original(operation), keras.Layer) else re.sub(r"_\d+$", "", path)


def _row_before_planning(node, reasons: dict[str, str]) -> Row:
    row, keras_name = row_of(node.operation), type(original(node.operation)).__name__
    for name in (_path(node.operation), _place(node.operation)):
        if name in reasons:
            return Row(_path(node.operation), keras_name, "none", "-", "", "", reasons[name])
    return Row(_path(node.operation), keras_name, row.op if row else "none", "", "", "")


def _with_gone(rows: list[Row], prepared: _Prepared, model) -> list[Row]:
    """The rows, and one for each scaling or batch norm that lives on in its neighbours' weights, and each one's twin."""
    kinds = {layer.name: type(layer).__name__ for layer in model._flatten_layers()}
    surviving, place, behind = {row.layer for row in rows}, "", {}
    for node in nodes_of(prepared.traced):
        path = _path(node.operation)
        if path in surviving:
            place = path
        elif path in prepared.twins:
            same = f"same as {prepared.twins[path]}"
            behind.setdefault(place, {})[path] = Row(path, type(node.operation).__name__, same, "-", "", "")
        elif key_of(node.operation) in ("BatchNormalization", "ChannelScale"):
            names = path.split("/")[::-1]
            keras_name = next((kinds[name] for name in names if name in kinds), names[0])
            behind.setdefault(place, {})[path] = Row(path, keras_name, "folded", "-", "", "")
    return [
        *behind.pop("", {}).values(),
        *(shown for row in rows for shown in (row, *behind.pop(row.layer, {}).values())),
    ]


_WITHOUT_SITE = {"same": "as input", "tied": "as input", "index": "-"}  # range kinds of operations without a range


def _row(node, prepared: _Prepared) -> Row:
    decided, row = prepared.plan, row_of_node(node)
    operation = getattr(node.operation, "layer", node.operation)
    if decided.kinds[id(node)] == "float":
        inner = node.operation.operation
        return Row(_path(node.operation), type(inner).__name__, f"{row_of(inner).op}, float", "float", "", "")
    site = decided.sites.get(id(node.outputs[0]))
    if decided.kinds[id(node)] == "train":
        range_kind = "training only"
    elif id(node) in decided.fused:
        range_kind = f"{site.kind}, fused"
    elif site is None:
        range_kind = _WITHOUT_SITE.get(decided.kinds[id(node)], "behind the activation")
    else:
        range_kind = site.kind
    weights = getattr(node.operation, "weight_quantizer", None)
    bits = f"w{weights.spec.bits} a8" if weights is not None else ("" if range_kind == "training only" else "a8")
    shared = site is not None and len(decided.groups[site.group]) > 1
    norm = getattr(node.operation, "batch_norm", None)
    folded = "" if norm is None else f" + {'scaling' if isinstance(norm, ChannelScale) else type(norm).__name__}"
    name = getattr(operation, "stands_for", type(operation).__name__)
    if isinstance(operation, Pointwise):
        name = ", ".join(type(inner.operation).__name__ for inner in nodes_of(operation.function))
    keras_name = "BatchNormalization" if name == "ChannelScale" and folded else name + folded
    return Row(_path(node.operation), keras_name, row.op, range_kind, bits, str(site.group) if shared else "")
