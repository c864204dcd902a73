"""What a custom layer hands to `add_loss` in its `call`, carried over into the QAT model's losses."""

import contextlib
import warnings

import keras
from keras import tree

from keras_qat.graph.walk import clone, rebuild


@keras.saving.register_keras_serializable("keras_qat")
class AddedLoss(keras.layers.Layer):
    """Lets its first argument through and adds a loss that is a function of the others.

    Args:
        function: A functional model from a list of tensors to a list of losses, made of keras.ops.
    """

    def __init__(self, function, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.function = keras.saving.deserialize_keras_object(function) if isinstance(function, dict) else function
        self.supports_masking = True

    def call(self, x, *sources):
        self.add_loss(self.function(list(sources)))
        return x

    def compute_output_spec(self, x, *sources):
        return keras.KerasTensor(x.shape, x.dtype)

    def get_config(self):
        return {**super().get_config(), "function": keras.saving.serialize_keras_object(self.function)}


@contextlib.contextmanager
def collected(layer):
    """While the layer's `call` runs on symbolic tensors, which Keras's `add_loss` refuses, its losses gather in a list."""
    found = []
    if not isinstance(layer, keras.Layer):
        yield found
        return
    layer.add_loss = lambda loss: found.extend(tree.flatten(loss))
    try:
        yield found
    finally:
        del layer.add_loss


def with_losses(outputs, losses, layer_name: str):
    """The outputs of a call, the first of them on its way through a layer that adds the call's losses."""
    symbolic = [loss for loss in losses if isinstance(loss, keras.KerasTensor)]
    if len(symbolic) < len(losses):
        warnings.warn(
            f"Layer {layer_name!r} adds a loss that depends on no tensor, only on weights: the QAT model does not have "
            "it. Give the weight a regularizer instead: add_weight(..., regularizer=...).",
            stacklevel=2,
        )
    if not symbolic:
        return outputs
    sources = _sources(symbolic)
    first, *others = tree.flatten(outputs)
    first = AddedLoss(_function(sources, symbolic), name="added_loss")(first, *sources)
    return tree.pack_sequence_as(outputs, [first, *others])


def _sources(losses: list) -> list:
    """The tensors at which a loss begins: behind them there is nothing but keras.ops."""
    found, pending = {}, list(losses)
    while pending:
        tensor = pending.pop()
        node = _node_of(tensor)
        if node is None:
            found[id(tensor)] = tensor
        else:
            pending += node.input_tensors
    return list(found.values())


def _node_of(tensor):
    """The keras.ops call that makes a tensor; None if a layer makes it, or one with weights among its arguments."""
    history = getattr(tensor, "_keras_history", None)
    if history is None or history.operation is None or isinstance(history.operation, keras.Layer):
        return None
    node = history.operation._inbound_nodes[history.node_index]
    arguments = tree.flatten((node.arguments.args, node.arguments.kwargs))
    return None if any(isinstance(x, keras.Variable) for x in arguments) else node


def _function(sources, losses) -> keras.Model:
    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in sources]
    graph = keras.Function(sources, losses)
    return keras.Model(
        inputs, rebuild(graph, lambda node, args, kwargs: clone(node.operation)(*args, **kwargs), inputs)
    )
