"""Layers with weights → `Quantized` layers, taking in what can be folded into their integers without any loss."""

import inspect

from keras import ops

from keras_qat.batch_norms import multiplied_and_added
from keras_qat.fused_batch_norm import is_plain
from keras_qat.graph.emit import resizing
from keras_qat.graph.probabilities import refine_probabilities
from keras_qat.graph.walk import (
    Graph,
    Reused,
    calls_of,
    connect,
    key_of,
    nodes_of,
    path_of,
    producers_of,
    readers_of,
    rewrite,
)
from keras_qat.layers import ChannelScale, Quantized, Rescale
from keras_qat.operations import GONE, row_of
from keras_qat.primitives import Constant, ExactUpsampling, InFloat, Sum
from keras_qat.spec import Rules

_SUMS = {"ops.Add": 1, "ops.Subtract": -1}
_MOVES = {"RESHAPE", "TRANSPOSE", "STRIDED_SLICE"}


def fuse(model: Graph, rules: Rules) -> Graph:
    """Wraps every layer with weights, its batch norm or scaling inside of it where one follows it at every call.

    Args:
        model: A flat graph (see trace.py).
        rules: Choose the bits of each layer's weights by its path.
    """
    model = refine_probabilities(_merge_scalings(model), lambda node: _in_float(node, rules))
    model, scalings = _take_over_scalings(model, rules)
    return _wrap_weights(model, rules, scalings)


def _merge_scalings(model):
    """`(x · a + b) · c + d` → one layer, where nothing else reads the middle."""
    readers, producers, calls, reused = readers_of(model), producers_of(model), calls_of(model), Reused()

    def is_scaling(node):
        if node is None or key_of(node.operation) != "ChannelScale" or node.operation.learns:
            return False
        return calls[id(node.operation)] == 1

    def goes_on(node):
        """Whether the node's only reader is a scaling too."""
        following = readers[id(node.outputs[0])]
        return len(following) == 1 and is_scaling(following[0])

    numbers = {}  # node id → multiplier and offset of the whole chain up to it

    if not any(is_scaling(node) and goes_on(node) for node in nodes_of(model)):
        return model

    def visit(node, args, kwargs):
        if not is_scaling(node):
            return reused.call(node, args, kwargs)
        layer, before = node.operation, producers.get(id(node.input_tensors[0]))
        multiplier, offset = layer.factors, layer.offsets
        if is_scaling(before) and goes_on(before):
            first_multiplier, first_offset = numbers[id(before)]
            multiplier, offset = first_multiplier * layer.factors, first_offset * layer.factors + layer.offsets
        numbers[id(node)] = multiplier, offset
        if goes_on(node):
            return args[0]
        return ChannelScale(multiplier, offset, name=layer.name)(args[0])

    return rewrite(model, visit)


def _take_over_scalings(model, rules):
    """A positive factor disappears into the weights' scales of the layers that read it, if all readers have weights.

    So does a Rescaling of the model's input with an offset, into their biases too. With an offset, zero padding would no
    longer be zero: a padded convolution gets an explicit Pad with the value that means zero.

    Returns:
        The model, and layer id → (multiplier, offset) taken over.
    """
    readers, producers, calls, reused = readers_of(model), producers_of(model), calls_of(model), Reused()
    vanishing, taken = set(), {}
    for node in nodes_of(model):
        scalars = node.operation.scalars if key_of(node.operation) == "ChannelScale" else None
        if scalars is None or scalars[0] <= 0 or _in_float(node, rules):
            continue
        if scalars[1] != 0 and not _stems_from_input(node, producers):
            continue
        targets = _readers_of_values(node.outputs[0], readers)
        if all(_takes_over(target, scalars[1], calls, rules) for target in targets):
            vanishing.add(id(node))
            taken.update({id(target.operation): scalars for target in targets})

    if not vanishing:
        return model, {}

    def visit(node, args, kwargs):
        if id(node) in vanishing:
            return args[0]
        multiplier, offset = taken.get(id(node.operation), (1.0, 0.0))
        if offset != 0 and getattr(node.operation, "padding", "valid") != "valid":
            args = (_padded_like(node.operation, args[0], -offset / multiplier), *args[1:])
        return reused.call(node, args, kwargs)

    return rewrite(model, visit), taken


def _readers_of_values(tensor, readers) -> list:
    """The nodes that compute with a tensor's values, seen through those that only put them elsewhere."""
    found = []
    for node in readers[id(tensor)]:
        moves = node is not None and row_of(node.operation) is not None and row_of(node.operation).op in _MOVES
        found += _readers_of_values(node.outputs[0], readers) if moves else [node]
    return found


def _stems_from_input(node, producers) -> bool:
    """Whether nothing but training-only layers stands between a model input and the node."""
    tensor = node.input_tensors[0]
    while id(tensor) in producers:
        before = producers[id(tensor)]
        if row_of(before.operation).range != "train":
            return False
        tensor = before.input_tensors[0]
    return True


def _takes_over(node, offset: float, calls, rules) -> bool:
    if node is None or calls[id(node.operation)] != 1 or _in_float(node, rules):
        return False
    key = key_of(node.operation)
    if key in ("Conv2DTranspose", "ChannelScale"):
        return offset == 0 and not getattr(node.operation, "is_one_number", False)
    return key in {"Dense", "Conv1D", "Conv2D", "DepthwiseConv1D", "DepthwiseConv2D"}


def _padded_like(layer, x, value: float):
    """Pads `x` as the layer would, but with `value`; the layer goes on with padding="valid"."""
    pads = [[0, 0]]
    for size, window, stride, dilation in zip(
        x.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate, strict=True
    ):
        reach = (window - 1) * dilation
        total = reach if layer.padding == "causal" else max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)
        before = total if layer.padding == "causal" else total // 2
        pads.append([before, total - before])
    layer.padding = "valid"
    return ops.pad(x, [*pads, [0, 0]], mode="constant", constant_values=value)


def _wrap_weights(model, rules, input_scalings):
    norm_of = _foldable_norms(model, rules)
    folded = {id(norm_node.operation) for norm_node in norm_of.values()}
    reused, wrapped = Reused(), {}

    def visit(node, args, kwargs):
        operation = node.operation
        if id(operation) in folded:
            return args[0]
        if _in_float(node, rules):
            if id(operation) not in wrapped:
                wrapped[id(operation)] = InFloat(reused[operation], name=operation.name)
            parameters = list(inspect.signature(operation.call).parameters)
            count = next((n for n, x in enumerate(args) if isinstance(x, (slice, tuple))), len(args))
            # Keras takes nothing but tensors by position.
            return wrapped[id(operation)](*args[:count], **dict(zip(parameters[count:], args[count:])), **kwargs)
        if key_of(operation) == "ChannelScale" and operation.is_one_number:
            return _by_one_number(operation, args[0])
        if key_of(operation) in _SUMS:
            if id(operation) not in wrapped:
                wrapped[id(operation)] = Sum(_SUMS[key_of(operation)], name=operation.name)
            return connect(wrapped[id(operation)], (*args, *kwargs.values()), {}, node.outputs)
        if _is_upsampled_exactly(node, rules):
            return ExactUpsampling(resizing.exact_factors(node), name=operation.name)(args[0])
        if not _has_weights(operation):
            return reused.call(node, args, kwargs)
        if key_of(operation) == "BatchNormalization" and _is_per_tensor(operation, rules):
            if id(operation) not in wrapped:
                wrapped[id(operation)] = multiplied_and_added(operation)
            return wrapped[id(operation)](args[0], kwargs.get("training"))
        norm_node = norm_of.get(id(operation))
        if id(operation) not in wrapped:
            norm = norm_node and norm_node.operation
            wrapped[id(operation)] = _quantized(operation, norm, input_scalings, rules, args[0])
            wrapped[id(operation)].build(args[0].shape)
        # A frozen backbone is called with training=False: that matters to the batch norm.
        training = (norm_node or node).arguments.kwargs.get("training")
        options = {} if training is None else {"training": training}
        return connect(wrapped[id(operation)], (args[0],), options, node.outputs)

    return rewrite(model, visit)


def _by_one_number(scaling, x):
    """A MUL by a constant, or an ADD of one."""
    multiplier, offset = scaling.scalars
    if offset == 0:
        return Rescale(multiplier, name=scaling.name)(x)
    return Sum(name=scaling.name)(x, Constant([offset], name=f"{scaling.name}.constant")(x))


def _in_float(node, rules) -> bool:
    kind = row_of(node.operation).range_kind(node)
    return kind not in (*GONE, "constant") and rules.scheme_of(path_of(node.operation)) is None


def _is_upsampled_exactly(node, rules) -> bool:
    if row_of(node.operation).emit is not resizing.resize or resizing.exact_factors(node) is None:
        return False
    return rules.scheme_of(path_of(node.operation)).exact_upsampling or not resizing.kernels_find_pixels(node)


def _has_weights(operation) -> bool:
    row = row_of(operation)
    return row is not None and (bool(row.channels) or key_of(operation) == "BatchNormalization")


def _is_per_tensor(norm, rules) -> bool:
    has_more = not is_plain(norm) or norm.activity_regularizer is not None
    return not (has_more or rules.scheme_of(path_of(norm)).per_channel_norms)


def _foldable_norms(model, rules) -> dict[int, object]:
    """Layer id → a node of the batch norm or scaling that alone reads its output, at every call of both."""
    readers, calls, found, refused = readers_of(model), calls_of(model), {}, set()
    for node in nodes_of(model):
        layer = node.operation
        if not row_of(layer) or not row_of(layer).channels or key_of(layer) == "ChannelScale" or _in_float(node, rules):
            continue
        following = readers[id(node.outputs[0])]
        reader = following[0] if len(following) == 1 else None
        if (
            reader is None
            or key_of(reader.operation) not in ("BatchNormalization", "ChannelScale")
            or _in_float(reader, rules)
            or found.setdefault(id(layer), reader).operation is not reader.operation
        ):
            refused.add(id(layer))
    return {key: node for key, node in found.items() if key not in refused and calls[id(node.operation)] == calls[key]}


def _quantized(operation, norm, input_scalings, rules, x) -> Quantized:
    name = operation.name
    weights = rules.scheme_of(path_of(operation)).weights
    scaling = input_scalings.get(id(operation), (1.0, 0.0))
    if key_of(operation) == "BatchNormalization":
        # One that cannot be folded is a depthwise convolution over single pixels, its kernel all ones.
        norm, operation = operation, ChannelScale(name=f"{name}.ones")
        operation.build(x.shape)
    axes = row_of(operation).channels
    return Quantized(operation, axes, norm, scaling, weights.bits, weights.per_channel, name=name)
