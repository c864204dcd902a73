"""The table: what each operation does to the channels (the last axis) of its inputs, and how its weights go with them.

To add an operation, add a row. What has none is left as it is, and so are all channels that it reads or makes.

A row's `flow(node, sources, slots)` gets the `Channels` of the inputs and returns those of the output, or None where a
configuration is more than it knows. There are these kinds:

    kernels       outputs are sums over inputs: `slots.mix`
    per channel   an output channel is a function of the input channel at its place and has its slot
    ties          an output channel is a function of the channels at its place in all inputs, which stay or go together
    moves         channels are put side by side, or repeated: so are their slots
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import keras
import numpy as np
from keras import ops, tree

from keras_qat.graph.emit.shapes import slice_keys
from keras_qat.graph.lookups import LOOKUPS
from keras_qat.pruning.channels import Channels, Kernel

_POINTWISE = {
    keras.activations.get(name)
    for name in (
        "celu", "elu", "exponential", "gelu", "hard_shrink", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu",
        "linear", "log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink", "softplus",
        "softsign", "sparse_plus", "sparse_sigmoid", "squareplus", "tanh", "tanh_shrink",
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation.

    Args:
        flow: See above.
        axes: Name of a variable → its axes (of input channels, of output channels), None where it has no such axis.
        config: `(layer, inputs, outputs) -> changes` of its configuration for that many channels.
    """

    flow: Callable
    axes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    config: Callable | None = None


def row_of(node, key: str | None) -> Row | None:
    """The row of a node by the key of its operation, if there is one for its configuration."""
    operation = node.operation
    is_odd = (
        getattr(operation, "data_format", "channels_last") == "channels_first"
        or getattr(operation, "quantization_mode", None) is not None
        or getattr(operation, "lora_enabled", False)
    )
    data = tree.flatten(node.arguments.args[:1])
    has_masks = isinstance(operation, keras.Layer) and len(node.input_tensors) > len(data)
    if is_odd or len(node.outputs) != 1 or (has_masks and key != "MultiHeadAttention"):
        return None
    return ROWS.get(key)


# --- kernels ---------------------------------------------------------------------------------------------------------


def _dense(node, sources, slots):
    layer = node.operation
    return _mixed(layer, sources[0], _kernel(_array(layer.kernel), layer.bias), slots)


def _convolution(node, sources, slots):
    layer = node.operation
    if layer.groups != 1:
        return _depthwise(node, sources, slots) if layer.groups == len(sources[0]) else None
    kernel = _kernel(_array(layer.kernel), layer.bias, takes=not _pads_with_zeros(node))
    return _mixed(layer, sources[0], kernel, slots)


def _transposed(node, sources, slots):
    layer = node.operation
    if getattr(layer, "groups", 1) != 1:
        return None
    # How many of a position's neighbours are inside of the image, and which weights they meet, differs.
    takes = all(size == 1 for size in (*layer.kernel_size, *layer.strides))
    return _mixed(layer, sources[0], _kernel(np.moveaxis(_array(layer.kernel), -1, -2), layer.bias, takes), slots)


def _separable(node, sources, slots):
    layer = node.operation
    depthwise, pointwise = _array(layer.depthwise_kernel), _array(layer.pointwise_kernel)
    spatial = tuple(range(depthwise.ndim - 2))
    pointwise = pointwise.reshape(*depthwise.shape[-2:], -1)
    kernel = Kernel(
        nonzero=(np.any(depthwise != 0, spatial)[..., None] & (pointwise != 0)).any(axis=1),
        sums=np.einsum("im,imo->io", depthwise.sum(spatial), pointwise),
        bias=0.0 if layer.bias is None else _array(layer.bias),
        takes=not _pads_with_zeros(node),
    )
    return _mixed(layer, sources[0], kernel, slots)


def _attention(node, sources, slots):
    """Queries, keys and values of a head stay or go together; the output's kernel is what reads them.

    Attention gives every position a mean of the values, so constant values are what the output's kernel sees.
    """
    layer, roles = node.operation, attention_roles(node)
    if layer._use_gate or len(layer.output_dense.kernel.shape) != 3:
        return None
    of_tensor = dict(zip(map(id, node.input_tensors), sources, strict=True))
    masks = of_tensor.keys() - {id(tensor) for tensor in roles.values()}
    heads = slots.fresh(layer.num_heads, key=(id(layer), "heads"))
    for role, tensor in roles.items():
        dense = getattr(layer, f"{role}_dense")
        kernel = _array(dense.kernel)
        flat = _kernel(kernel.reshape(len(kernel), -1), dense.bias, takes=layer.use_bias)
        outputs = np.repeat(heads, kernel.shape[-1])
        values = slots.mix((id(layer), role), of_tensor[id(tensor)], flat, outputs)
    for mask in masks:
        slots.keep(of_tensor[mask].slots)
    if masks or layer._sliding_window is not None:
        values = values.only_zeros()  # where all is masked, Keras has zeros for weights
    dense = layer.output_dense
    flat = _kernel(_array(dense.kernel).reshape(len(values), -1), dense.bias, takes=layer.use_bias)
    return slots.mix((id(layer), "output"), values, flat)


def attention_roles(node) -> dict[str, keras.KerasTensor]:
    """What a MultiHeadAttention is called on; the values come last."""
    names = ("query", "value", "key")
    found = {**dict(zip(names, node.arguments.args, strict=False)), **node.arguments.kwargs}
    key = found.get("key")
    return {"query": found["query"], "key": found["value"] if key is None else key, "value": found["value"]}


def _mixed(layer, source, kernel, slots):
    return _activated(layer, slots.mix((id(layer), "kernel"), source, kernel), slots)


def _kernel(weights, bias, takes: bool = True) -> Kernel:
    """Of weights that lie as (..., inputs, outputs)."""
    spatial = tuple(range(weights.ndim - 2))
    bias = 0.0 if bias is None else _array(bias).ravel()
    sums = weights.sum(spatial) if spatial else weights
    return Kernel(np.any(weights != 0, spatial) if spatial else weights != 0, sums, bias, takes)


def _pads_with_zeros(node) -> bool:
    """Whether a convolution reads beyond the rim of its input."""
    layer, sizes = node.operation, node.input_tensors[0].shape[1:-1]
    extents = [(size - 1) * rate + 1 for size, rate in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    if layer.padding == "valid":
        return False
    if layer.padding == "causal" or None in sizes:
        return any(extent > 1 for extent in extents)
    return any(
        (math.ceil(size / stride) - 1) * stride + extent > size
        for size, stride, extent in zip(sizes, layer.strides, extents, strict=True)
    )


# --- per channel -----------------------------------------------------------------------------------------------------


def _depthwise(node, sources, slots):
    layer, source = node.operation, sources[0]
    weights = _array(layer.kernel)
    weights = weights.reshape(*weights.shape[:-2], len(source), -1)
    spatial = tuple(range(weights.ndim - 2))
    source = source.only_zeros() if _pads_with_zeros(node) else source
    is_zero = ~np.any(weights != 0, spatial)
    values = np.where(is_zero, 0.0, source.constants[:, None] * weights.sum(spatial)).ravel()
    values = values + (0.0 if layer.bias is None else _array(layer.bias))
    return _activated(layer, Channels(np.repeat(source.slots, weights.shape[-1]), values), slots)


def _batch_norm(node, sources, slots):
    layer, source = node.operation, sources[0]
    if layer.axis not in (-1, len(node.outputs[0].shape) - 1):
        return None
    scale = 1.0 / np.sqrt(_array(layer.moving_variance).astype("float64") + layer.epsilon)
    scale = scale if layer.gamma is None else scale * _array(layer.gamma)
    values = np.where(scale == 0, 0.0, (source.constants - _array(layer.moving_mean)) * scale)
    return source.with_constants(values if layer.beta is None else values + _array(layer.beta))


def _prelu(node, sources, slots):
    alpha, source = _array(node.operation.alpha), sources[0]
    alpha = alpha.reshape(-1, alpha.shape[-1])
    slope = np.where(np.all(alpha == alpha[0], axis=0), alpha[0], np.nan)
    return source.with_constants(np.where(source.constants >= 0, source.constants, source.constants * slope))


def _activation(node, sources, slots):
    return _activated(node.operation, sources[0], slots) if node.operation.activation in _POINTWISE else None


def _activated(layer, channels, slots):
    """Behind a layer's `activation`; one that may mix channels keeps them all."""
    if layer.activation is keras.activations.linear:
        return channels
    values = np.full(len(channels), np.nan)
    if layer.activation not in _POINTWISE:
        slots.keep(channels.slots)
        return channels.with_constants(values)
    known = ~np.isnan(channels.constants)
    if known.any():
        values[known] = _finite(layer.activation(ops.convert_to_tensor(channels.constants[known], "float32")))
    return channels.with_constants(values)


def _same(node, sources, slots):
    return sources[0] if node.outputs[0].shape[-1] == len(sources[0]) else None


def _beside_zeros(node, sources, slots):
    return sources[0].only_zeros()


def _padded(node, sources, slots):
    widths = node.operation.pad_width
    is_last_padded = len(widths) != len(node.outputs[0].shape) or any(widths[-1])
    return None if is_last_padded or len(node.input_tensors) > 1 else sources[0].only_zeros()


def _rescaled(node, sources, slots):
    layer = node.operation
    return _tied(node, sources, slots) if np.ndim(layer.scale) == np.ndim(layer.offset) == 0 else None


def _reduced(node, sources, slots, is_mean=True):
    axes, rank = node.operation.axis, len(node.input_tensors[0].shape)
    if axes is None or any(axis % rank == rank - 1 for axis in np.ravel(axes)):
        return None
    return sources[0] if is_mean else sources[0].only_zeros()


def _permuted(node, sources, slots):
    axes, rank = getattr(node.operation, "dims", None) or node.operation.axes, len(node.input_tensors[0].shape)
    return sources[0] if axes is not None and axes[-1] % rank == rank - 1 else None


def _resized(node, sources, slots):
    keeps_values = not getattr(node.operation, "pad_to_aspect_ratio", False)
    return _same(node, sources, slots) if keeps_values else None


def _sliced(node, sources, slots):
    """`x[...]` that takes all of the last axis."""
    keys, rank = slice_keys(node), len(node.input_tensors[0].shape)
    if any(isinstance(key, (keras.KerasTensor, np.ndarray, list)) for key in keys):
        return None
    taken = sum(key is not None and key is not Ellipsis for key in keys)
    last = keys[-1] if keys else Ellipsis
    reaches_last = taken == rank or (Ellipsis in keys and last is not Ellipsis)
    whole = last == slice(None) if reaches_last else last is not None or Ellipsis not in keys
    return sources[0] if whole and node.outputs[0].shape[-1] == len(sources[0]) else None


# --- ties ------------------------------------------------------------------------------------------------------------


def _tied(node, sources, slots, zero_wins=False):
    """Functions of numbers at the same place: `x + y`, `x * gate`, `relu(x)`. A tensor of one channel spreads out."""
    tensors, width = node.input_tensors, max(map(len, sources))
    if len({len(tensor.shape) for tensor in tensors}) > 1 or node.outputs[0].shape[-1] != width:
        return None
    if not isinstance(node.operation, keras.Layer) and not all(_is_one_number(x) for x in _constants_of(node)):
        return None
    full = [source for source in sources if len(source) == width]
    for source in sources:
        if len(source) == width:
            slots.tie(full[0].slots, source.slots)
        elif len(source) == 1:
            slots.keep(source.slots)
        else:
            return None
    return full[0].with_constants(_values(node, sources, width, zero_wins))


def _values(node, sources, width, zero_wins):
    rows = [np.broadcast_to(source.constants, width) for source in sources]
    known = ~np.isnan(rows).any(axis=0)
    values = np.full(width, np.nan)
    if known.any() and all("float" in tensor.dtype for tensor in node.input_tensors):
        shape = [1] * (len(node.outputs[0].shape) - 1) + [-1]
        filled = {
            id(tensor): ops.convert_to_tensor(row[known].reshape(shape), tensor.dtype)
            for tensor, row in zip(node.input_tensors, rows, strict=True)
        }
        args, kwargs = node.arguments.fill_in(filled)
        values[known] = _finite(node.operation.call(*args, **kwargs)).ravel()
    return np.where(np.any([row == 0 for row in rows], axis=0), 0.0, values) if zero_wins else values


def _constants_of(node) -> list:
    """What a keras.ops operation reads that is no tensor of the model: arguments, and options that are arrays."""
    options = [value for name, value in vars(node.operation).items() if not name.startswith("_")]
    arguments = [*node.arguments.args, *node.arguments.kwargs.values()]
    return [x for x in (*options, *arguments) if not isinstance(x, (keras.KerasTensor, str, type(None)))]


def _is_one_number(value) -> bool:
    return not isinstance(value, (keras.Variable, list, tuple)) and np.size(value) == 1


# --- moves -----------------------------------------------------------------------------------------------------------


def _concatenated(node, sources, slots):
    axis, rank = node.operation.axis, len(node.outputs[0].shape)
    if axis % rank != rank - 1:
        for source in sources[1:]:
            slots.tie(sources[0].slots, source.slots)
        same = np.all([source.constants == sources[0].constants for source in sources], axis=0)
        return sources[0].with_constants(np.where(same, sources[0].constants, np.nan))
    return Channels(*(np.concatenate([getattr(s, field) for s in sources]) for field in ("slots", "constants")))


def _reshaped(node, sources, slots):
    """Whole rows of channels, one behind the other (a Flatten), or still apart."""
    source = sources[0]
    times, rest = divmod(node.outputs[0].shape[-1] or 0, len(source))
    return None if rest or not times else Channels(np.tile(source.slots, times), np.tile(source.constants, times))


def _embedding(node, sources, slots):
    layer = node.operation
    slots.keep(sources[0].slots)
    table = _array(layer.embeddings)
    values = np.where(np.all(table == table[0], axis=0), table[0], np.nan)
    return Channels(slots.fresh(table.shape[1], key=(id(layer), "table")), values.astype("float64"))


def _array(variable) -> np.ndarray:
    return np.asarray(variable, "float32")


def _finite(values) -> np.ndarray:
    values = np.asarray(values, "float64")
    return np.where(np.isfinite(values), values, np.nan)


def _rows(flow, *names, **options) -> dict[str, Row]:
    return dict.fromkeys(names, Row(flow, **options))


def _of_each_rank(*names: str) -> list[str]:
    return [name.format(rank) for name in names for rank in (1, 2, 3)]


_PER_CHANNEL = (None, -1)
_KERNEL = {"kernel": (-2, -1), "bias": _PER_CHANNEL}
_product = functools.partial(_tied, zero_wins=True)
_summed = functools.partial(_reduced, is_mean=False)


def _units(layer, inputs, outputs):
    return {"units": outputs}


def _filters(layer, inputs, outputs):
    return {"filters": outputs, "groups": inputs} if getattr(layer, "groups", 1) > 1 else {"filters": outputs}


def _dimension(layer, inputs, outputs):
    return {"output_dim": outputs}


def _target_shape(layer, inputs, outputs):
    return {"target_shape": (*layer.target_shape[:-1], outputs)}


def _newshape(operation, inputs, outputs):
    return {"newshape": (*operation.newshape[:-1], outputs)}


ROWS: dict[str, Row] = {
    **_rows(_dense, "Dense", axes=_KERNEL, config=_units),
    **_rows(_convolution, *_of_each_rank("Conv{}D"), axes=_KERNEL, config=_filters),
    **_rows(
        _transposed,
        *_of_each_rank("Conv{}DTranspose"),
        axes={"kernel": (-1, -2), "bias": _PER_CHANNEL},
        config=_filters,
    ),
    **_rows(
        _separable,
        "SeparableConv1D", "SeparableConv2D",
        axes={"depthwise_kernel": (-2, None), "pointwise_kernel": (-2, -1), "bias": _PER_CHANNEL},
        config=_filters,
    ),
    **_rows(_depthwise, "DepthwiseConv1D", "DepthwiseConv2D", axes={"kernel": (-2, None), "bias": _PER_CHANNEL}),
    **_rows(
        _batch_norm,
        "BatchNormalization",
        axes=dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), _PER_CHANNEL),
    ),
    **_rows(_prelu, "PReLU", axes={"alpha": _PER_CHANNEL}),
    **_rows(_embedding, "Embedding", axes={"embeddings": _PER_CHANNEL}, config=_dimension),
    **_rows(_attention, "MultiHeadAttention"),
    **_rows(_activation, "Activation"),
    **_rows(
        _same,
        "ActivityRegularization", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise", "Identity",
        "RepeatVector", "ops.AveragePool", "ops.Identity", "ops.MaxPool", "ops.StopGradient",
        *_of_each_rank(
            "AdaptiveAveragePooling{}D", "AdaptiveMaxPooling{}D", "AveragePooling{}D", "Cropping{}D",
            "GlobalAveragePooling{}D", "GlobalMaxPooling{}D", "MaxPooling{}D", "SpatialDropout{}D", "UpSampling{}D",
        ),
    ),
    **_rows(_beside_zeros, *_of_each_rank("ZeroPadding{}D")),
    **_rows(_padded, "ops.Pad"),
    **_rows(_resized, "Resizing", "ops.Resize"),
    **_rows(_rescaled, "Rescaling"),
    **_rows(_reduced, "ops.Amax", "ops.Amin", "ops.Max", "ops.Mean", "ops.Min"),
    **_rows(_summed, "ops.Sum"),
    **_rows(_permuted, "Permute", "ops.Transpose"),
    **_rows(_sliced, "ops.GetItem"),
    **_rows(_product, "Multiply", "ops.Multiply"),
    **_rows(
        _tied,
        "Add", "Average", "ELU", "LeakyReLU", "Maximum", "Minimum", "ReLU", "Subtract",
        "ops.Add", "ops.Cast", "ops.Divide", "ops.HardSigmoid", "ops.HardSilu", "ops.LeakyRelu", "ops.Maximum",
        "ops.Minimum", "ops.Negative", "ops.Relu", "ops.Relu6", "ops.Sigmoid", "ops.Silu", "ops.Square", "ops.Subtract",
        "ops.Tanh", "ops.TrueDivide", "ops.Where", *LOOKUPS,
    ),
    **_rows(_concatenated, "Concatenate", "ops.Concatenate"),
    **_rows(_reshaped, "Flatten", "ops.ExpandDims", "ops.Squeeze"),
    **_rows(_reshaped, "Reshape", config=_target_shape),
    **_rows(_reshaped, "ops.Reshape", config=_newshape),
}  # fmt: skip
