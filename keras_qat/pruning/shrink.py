"""Takes dead channels out of a model, with everything that depends on them."""

import dataclasses
import operator
import warnings

import keras
import numpy as np
from keras import ops, tree

from keras_qat.graph.added_losses import AddedLoss
from keras_qat.graph.lower import activations
from keras_qat.graph.trace import original, run_call, trace
from keras_qat.graph.walk import (
    Graph,
    Reused,
    calls_of,
    clone,
    fresh_inputs,
    input_names,
    key_of,
    nodes_of,
    operations_of,
    output_names,
    path_of,
    readers_of,
    rebuild,
)
from keras_qat.layers import is_qat
from keras_qat.pruning.channel_table import ROWS, row_of
from keras_qat.pruning.channels import Channels, Slots


def shrink(model: keras.Model, *, inputs=None) -> keras.Model:
    """A smaller model with the same outputs: without the channels that pruning has left dead.

    A channel is dead if its value is always the same, whatever the input (its kernel is zero, or the batch norm's gamma
    behind it), or if nothing reads it. Its value, if it is not zero, goes into the biases of the layers that read it. A
    dead channel stays only where that would not be exact (a value other than zero beside zero padding), or where an
    addition ties it to one that is alive. Neurons of dense layers and heads of `MultiHeadAttention` are channels, too.
    Custom layers with weights of their own, and other layers that shrink knows nothing of, keep all channels that they
    read and make, as do the model's inputs and outputs.

    Args:
        model: Any built float Keras 3 model, as `kq.callbacks.Pruning(..., pattern=kq.pruning.Channels())` leaves it.
            It is left as it is.
        inputs: A `keras.Input` (or a structure of them) for a subclassed model that never saw data.

    Returns:
        A functional model of Keras's own layers, all float32, not compiled, with inputs and outputs of the same names.

    Example:
        ```python
        model.fit(x, y, callbacks=[kq.callbacks.Pruning(0.5, pattern=kq.pruning.Channels())])
        small = kq.pruning.shrink(model)
        print(kq.pruning.compare(model, small))
        qat = kq.quantize(small)
        ```
    """
    if isinstance(model, keras.Model) and is_qat(model):
        raise ValueError(
            f"kq.pruning.shrink takes a float model. Received: {model.name!r}, which kq.quantize made. Shrink the float"
            " model first, then quantize the small one."
        )
    flat = flattened(model, inputs)
    _rename_outputs(flat, _output_names(model, flat))
    builder, new_inputs = _Builder(flat, _analysis(flat)), fresh_inputs(flat)
    return keras.Model(new_inputs, rebuild(flat, builder.visit, tree.flatten(new_inputs)), name=flat.name)


def coupled_channels(model: keras.Model) -> dict[str, tuple[int, ...]]:
    """What tells which output channels of kernels can only go together: those of the same number, in whatever kernels.

    Returns:
        The numbers of a layer's output channels by the path of the layer; empty for what cannot be taken apart.
    """
    if is_qat(model):
        return {}
    try:
        with warnings.catch_warnings(action="ignore"):  # what they say is of the smaller model
            flat = flattened(model)
    except ValueError:
        return {}
    slots, paths = _analysis(flat).slots, {id(layer): path_of(layer) for layer in operations_of(flat)}
    label = slots.labels()
    return {
        paths[layer_id]: tuple(label[mixing.outputs].tolist())
        for (layer_id, what), mixing in slots.mixings.items()
        if what == "kernel"
    }


# --- one flat graph --------------------------------------------------------------------------------------------------


def flattened(model: keras.Model, inputs=None) -> Graph:
    """A copy of a model with every layer that is made of layers opened, as far as that goes; Keras's own stay whole."""
    graph = getattr(model, "_functional", None) or model
    if inputs is None and hasattr(graph, "_inputs_struct"):
        inputs = fresh_inputs(graph)
    try:
        flat, _ = trace(model, _is_whole, _rule, inputs)
    except Exception as error:
        raise ValueError(
            f"Model {model.name!r} cannot be taken apart: {type(error).__name__}: {error} Expected a model whose `call`"
            " runs on symbolic tensors (keras.Input), made of layers that from_config can copy."
        ) from error
    _check(flat)
    for layer in operations_of(flat):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
    return flat


def _is_whole(operation) -> bool:
    """Whether trace leaves an operation as it is."""
    if not isinstance(operation, keras.Layer):
        return not isinstance(operation, keras.Function)
    return key_of(operation) not in (None, "Lambda") and not isinstance(operation, keras.Model)


def _rule(operation, args, kwargs):
    """What trace is to open an operation by: for an `activation=` of somebody else, that function behind the rest.

    Raises for custom layers that have to stay closed.
    """
    key = key_of(operation)
    if key is None and isinstance(operation, keras.Layer) and _does_more(operation, args, kwargs):
        raise ValueError("It does more than to call layers and keras.ops.")
    activation = getattr(operation, "activation", None)
    is_foreign = getattr(keras.activations, getattr(activation, "__name__", ""), None) is not activation
    rule = activations.RULES.get(key) if is_foreign and key in ROWS else None
    return None if rule is None else rule(operation, args, kwargs)


def _does_more(layer, args, kwargs) -> bool:
    """Whether a custom layer has weights of its own, reads those of layers in it, or adds a loss."""
    if layer._trainable_variables or layer._non_trainable_variables:
        return True
    graph, _, _ = run_call(layer.call, layer, args, kwargs)
    nodes = [] if graph is None else nodes_of(graph)
    return any(isinstance(node.operation, AddedLoss) or _values_in(node) for node in nodes)


def _values_in(node) -> list:
    """The weights, or what was computed from weights, among the arguments of a call."""
    arguments = tree.flatten((node.arguments.args, node.arguments.kwargs))
    return [x for x in arguments if isinstance(x, keras.Variable) or ops.is_tensor(x)]


def _check(flat) -> None:
    """Every weight has to belong to a layer."""
    for node in nodes_of(flat):
        if isinstance(node.operation, AddedLoss):
            warnings.warn(
                f"Model {flat.name!r} adds a loss in its `call`, which the smaller model does not have. Have a custom "
                "layer add it.",
                stacklevel=4,
            )
        for value in _values_in(node):
            if isinstance(value, keras.Variable):
                raise ValueError(
                    f"Operation {path_of(node.operation)!r} reads the weight {value.path!r} itself. Expected weights "
                    "that layers alone read. Put the operation and the weight into a custom layer."
                )


def _output_names(model, flat) -> list[str]:
    graph = getattr(model, "_functional", None) or model
    return list(getattr(graph, "output_names", None) or output_names(flat))


# --- what goes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Analysis:
    """The channels of every tensor by its id, the mixings, and for each slot whether it stays."""

    channels: dict[int, Channels]
    slots: Slots
    alive: np.ndarray

    def kept(self, tensor) -> np.ndarray:
        return self.alive[self.channels[id(tensor)].slots]


def _analysis(flat) -> _Analysis:
    slots = Slots()
    channels, unknown = {id(tensor): _unknown(tensor, slots) for tensor in flat.inputs}, []
    for node in nodes_of(flat):
        sources = [channels[id(tensor)] for tensor in node.input_tensors]
        result = _flow(node, sources, slots)
        if result is None:
            unknown.append(id(node.operation))
            for source in sources:
                slots.keep(source.slots)
            channels.update({id(tensor): _unknown(tensor, slots) for tensor in node.outputs})
        else:
            channels[id(node.outputs[0])] = result
    for layer_id in unknown:
        slots.keep_layer(layer_id)
    for tensor in flat.outputs:
        slots.keep(channels[id(tensor)].slots)
    return _Analysis(channels, slots, slots.alive())


def _flow(node, sources, slots) -> Channels | None:
    if isinstance(node.operation, AddedLoss):
        return sources[0]
    row = row_of(node, key_of(node.operation))
    if row is None or not sources or not all(map(len, sources)):
        return None
    if row.axes or row.config:
        for place, source in enumerate(sources):
            slots.agree((id(node.operation), place), source.slots)
    return row.flow(node, sources, slots)


def _unknown(tensor, slots) -> Channels:
    count = (tensor.shape[-1] or 0) if len(tensor.shape) > 1 else 0
    channels = slots.variable(count)
    slots.keep(channels.slots)
    return channels


# --- the smaller model -----------------------------------------------------------------------------------------------


class _Builder:
    """Calls what becomes of each operation."""

    def __init__(self, flat, analysis: _Analysis):
        self.analysis = analysis
        self._readers, self._calls = readers_of(flat), calls_of(flat)
        self._reused, self._made = Reused(), {}
        self._left_to_norms: dict[int, np.ndarray] = {}

    def visit(self, node, args, kwargs):
        operation = original(node.operation)
        if isinstance(operation, AddedLoss):
            return args[0]
        if id(operation) in self._made:
            return self._made[id(operation)](*args, **kwargs)
        if operation is not node.operation:
            return self._copy(operation, node.operation.name, args, kwargs)
        changes, values = self._attention(node) if _is_attention(operation) else self._changes(node)
        smaller = self._made[id(operation)] = self._smaller(node, changes)
        outputs = smaller(*args, **kwargs)
        for path, value in values.items():
            operator.attrgetter(path)(smaller).assign(value)
        return outputs

    def _copy(self, layer, name, args, kwargs):
        """Calls a copy of a layer that trace could not open. Only when it is called are all of its weights there."""
        try:
            copy = type(layer).from_config({**layer.get_config(), "name": name, "dtype": "float32"})
            copy.trainable = layer.trainable
            outputs = copy(*args, **kwargs)
            for new, old in zip(copy.weights, layer.weights, strict=True):
                new.assign(old)
        except Exception as error:
            raise ValueError(
                f"Layer {name.replace('.', '/')!r} cannot be copied: {type(error).__name__}: {error} Expected a layer "
                "that from_config makes from get_config."
            ) from error
        self._made[id(layer)] = copy
        return outputs

    def _smaller(self, node, changes):
        """The operation itself where it keeps all of its channels, or a new one."""
        operation = node.operation
        if not changes and all(np.all(self.analysis.kept(x)) for x in (*node.input_tensors, *node.outputs)):
            return self._reused[operation]
        if not isinstance(operation, keras.Layer):
            smaller = clone(operation)
            vars(smaller).update(changes)
            return smaller
        smaller = type(operation).from_config({**operation.get_config(), **changes})
        smaller.trainable = operation.trainable
        return smaller

    def _changes(self, node) -> tuple[dict, dict[str, np.ndarray]]:
        """What changes in an operation's configuration, and its new weights."""
        operation, row = node.operation, row_of(node, key_of(node.operation))
        kept = [self.analysis.kept(tensor) for tensor in (*node.input_tensors[:1], *node.outputs[:1])]
        shift = self._left_to_norms.get(id(node.input_tensors[0])) if node.input_tensors else None
        if row is None or (all(map(np.all, kept)) and shift is None):
            return {}, {}
        changes = row.config(operation, *(int(each.sum()) for each in kept)) if row.config else {}
        values = {
            name: _taken(np.asarray(getattr(operation, name)), axes, kept)
            for name, axes in row.axes.items()
            if getattr(operation, name) is not None
        }
        if shift is not None:
            values["moving_mean"] = values["moving_mean"] - shift
        mixing = self.analysis.slots.mixings.get((id(operation), "kernel"))
        gained = 0.0 if mixing is None else mixing.shift(self.analysis.alive)
        if np.any(gained):
            if "bias" not in values and self._norm_alone_reads(node):
                self._left_to_norms[id(node.outputs[0])] = gained
            else:
                changes["use_bias"] = True
                values["bias"] = values.get("bias", 0.0) + gained
        return changes, values

    def _norm_alone_reads(self, node) -> bool:
        """Whether a batch norm can have a constant in its mean that the layer in front has no bias for."""
        following = self._readers[id(node.outputs[0])]
        if len(following) > 1 or following[0] is None or node.operation.activation is not keras.activations.linear:
            return False
        row = row_of(following[0], key_of(following[0].operation))
        called_once = all(self._calls[id(each.operation)] == 1 for each in (node, following[0]))
        return called_once and row is not None and "moving_mean" in row.axes

    def _attention(self, node) -> tuple[dict, dict[str, np.ndarray]]:
        layer, alive, slots = node.operation, self.analysis.alive, self.analysis.slots
        if (id(layer), "output") not in slots.mixings:
            return {}, {}
        heads = alive[slots.fresh(layer.num_heads, key=(id(layer), "heads"))]
        changes, values = {}, {}
        for role in ("query", "key", "value", "output"):
            dense, mixing = getattr(layer, f"{role}_dense"), slots.mixings[id(layer), role]
            inputs = heads if role == "output" else alive[mixing.inputs.slots]
            outputs = alive[mixing.outputs] if role == "output" else heads
            kernel = np.asarray(dense.kernel)
            values[f"{role}_dense.kernel"] = _taken(kernel, (0, -1 if role == "output" else 1), (inputs, outputs))
            if dense.bias is not None:
                bias = _taken(np.asarray(dense.bias), (None, 0), (inputs, outputs))
                values[f"{role}_dense.bias"] = bias + mixing.shift(alive).reshape(bias.shape)
            if not (inputs.all() and outputs.all()):
                changes = {"num_heads": int(heads.sum())}
        if changes:
            changes["output_shape"] = (int(alive[slots.mixings[id(layer), "output"].outputs].sum()),)
        return changes, values if changes else {}


def _is_attention(operation) -> bool:
    return key_of(operation) == "MultiHeadAttention"


def _taken(weights, axes, kept) -> np.ndarray:
    """What is left of the weights. An axis with several weights for each channel has them side by side."""
    for axis, stay in zip(axes, kept, strict=True):
        if axis is not None and weights.shape[axis] >= len(stay):
            weights = np.compress(np.repeat(stay, weights.shape[axis] // len(stay)), weights, axis)
    return weights


def _rename_outputs(flat, names) -> None:
    """Outputs get the names that losses and metrics go by, where it is not their layer that is called so."""
    operations = operations_of(flat)
    final = [tensor._keras_history.operation for tensor in flat.outputs]
    for name, operation in zip(names, final, strict=True):
        namesakes = [other for other in operations if other.name == name]
        if name in input_names(flat) or any(other in final for other in namesakes):
            continue
        for other in namesakes:
            other.name = f"{name}.{type(other).__name__.lower()}"
        operation.name = name
