"""Ops that put values elsewhere."""

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from keras_qat.graph.emit.call import Call
from keras_qat.graph.rows import batch_axis
from keras_qat.graph.walk import path_of


def reshape(call: Call) -> None:
    call.reshape(call.inputs[0], call.output)


def transpose_order(node) -> list[int]:
    axes = node.operation.axes
    rank = len(node.input_tensors[0].shape)
    return [axis % rank for axis in axes] if axes is not None else list(reversed(range(rank)))


def transpose(call: Call) -> None:
    order = call.constant("order", transpose_order(call.node), "int32")
    call.op("TRANSPOSE", [call.inputs[0], order], call.output)


def depth_to_space(call: Call) -> None:
    call.op("DEPTH_TO_SPACE", call.inputs[:1], call.output, blockSize=call.operation.block_size)


def space_to_depth(call: Call) -> None:
    call.op("SPACE_TO_DEPTH", call.inputs[:1], call.output, blockSize=call.operation.block_size)


def pad_value(node) -> float:
    """What a Pad or ZeroPadding fills in."""
    values = [*node.arguments.args[1:], node.arguments.kwargs.get("constant_values")]
    return next((float(value) for value in values if value is not None), 0.0)


def _paddings(node) -> list[list[int]]:
    operation, rank = node.operation, len(node.input_tensors[0].shape)
    if hasattr(operation, "pad_width"):
        return np.broadcast_to(np.array(operation.pad_width), (rank, 2)).tolist()
    middle = operation.padding if rank == 4 else [operation.padding]
    return [[0, 0], *[list(pair) for pair in middle], [0, 0]]


# A mode of ops.pad → TFLite's
_MIRRORS = {"reflect": schema.MirrorPadMode.REFLECT, "symmetric": schema.MirrorPadMode.SYMMETRIC}


def pad(call: Call) -> None:
    paddings = call.constant("paddings", _paddings(call.node), "int32")
    mode = getattr(call.operation, "mode", "constant")
    if mode in _MIRRORS:
        return call.op("MIRROR_PAD", [call.inputs[0], paddings], call.output, mode=_MIRRORS[mode])
    value = pad_value(call.node)
    if value == 0:
        return call.op("PAD", [call.inputs[0], paddings], call.output)
    tensor = call.program.tensors[call.inputs[0]]
    grid = {"scale": tensor.scale, "zero_point": tensor.zero_point}
    call.op(
        "PADV2", [call.inputs[0], paddings, call.constant("value", tensor.quantize(value), "int8", **grid)], call.output
    )


def slice_keys(node) -> tuple:
    """What stands in the brackets of `x[...]`."""
    key = node.arguments.args[1] if len(node.arguments.args) > 1 else node.arguments.kwargs["key"]
    return tuple(key) if isinstance(key, (tuple, list)) else (key,)  # a model loaded from a file has lists


def strided_slice(call: Call) -> None:
    keys, rank = slice_keys(call.node), len(call.shape(call.inputs[0]))
    begin, end, step, shrink = [], [], [], 0
    for axis, key in enumerate(expanded(keys, rank)):
        size = call.shape(call.inputs[0])[axis]
        if isinstance(key, int):
            first, last, stride = key % size, key % size + 1, 1
            shrink |= 1 << axis
        else:
            first, last, stride = key.indices(size)
        begin.append(first), end.append(last), step.append(stride)
    # The whole batch, however large: its begin and end are masked out.
    whole = 1 << (batch_axis(call.node.input_tensors[0]) or 0)
    masks = {"beginMask": whole & ~shrink, "endMask": whole & ~shrink, "shrinkAxisMask": shrink}
    new_axes = [key for key in keys if key is None]
    bounds = [call.constant(*pair, "int32") for pair in (("begin", begin), ("end", end), ("step", step))]
    if not new_axes:
        return call.op("STRIDED_SLICE", [call.inputs[0], *bounds], call.output, **masks)
    sizes = [n for n, axis in zip(call.shape(call.output), _kept(keys, rank), strict=True) if axis]
    sliced = call.twin(call.output, sizes, "slice")
    call.op("STRIDED_SLICE", [call.inputs[0], *bounds], sliced, **masks)
    call.reshape(sliced, call.output)


def expanded(keys, rank) -> list:
    """The keys with the ellipsis and the missing ones written out, without new axes."""
    keys = [key for key in keys if key is not None]
    missing = [slice(None)] * (rank - sum(key is not Ellipsis for key in keys))
    if Ellipsis not in keys:
        return keys + missing
    at = keys.index(Ellipsis)
    return keys[:at] + missing + keys[at + 1 :]


def _kept(keys, rank) -> list[bool]:
    """For each axis of the result whether it is one of the input's (True) or a new one (False)."""
    keys = list(keys)
    given = sum(key is not None and key is not Ellipsis for key in keys)
    at = keys.index(Ellipsis) if Ellipsis in keys else len(keys)
    keys[at : at + 1] = [slice(None)] * (rank - given)
    return [key is not None for key in keys if not isinstance(key, int)]


def take(call: Call) -> None:
    """GATHER by constant indices, or by indices that the model computes."""
    indices = take_indices(call.node)
    if indices is None:
        values, indices = call.inputs
    else:
        values, indices = call.inputs[0], call.constant("indices", indices, "int32")
    call.op("GATHER", [values, indices], call.output, axis=call.operation.axis % len(call.shape(values)))


def take_indices(node) -> np.ndarray | None:
    """The constant indices of a Take, or None where they are a tensor."""
    if len(node.input_tensors) > 1:
        return None
    given = [*node.arguments.args[1:], *node.arguments.kwargs.values()][0]
    size = node.input_tensors[0].shape[node.operation.axis]
    return np.asarray(given) % size


def stack(call: Call) -> None:
    axis = call.operation.axis % len(call.shape(call.output))
    call.op("PACK", call.inputs, call.output, axis=axis, valuesCount=len(call.inputs))


def select(call: Call) -> None:
    """Where a mask is true the first tensor, else the second."""
    condition, *sides = call.node.arguments.args
    is_constant = len(call.inputs) == len(sides)
    flags = [call.constant("condition", np.asarray(condition, bool), "bool")] if is_constant else []
    call.op("SELECT_V2", [*flags, *call.inputs], call.output)


def broadcast(call: Call) -> None:
    shape = call.constant("shape", call.shape(call.output), "int32")
    call.op("BROADCAST_TO", [call.inputs[0], shape], call.output)


def constant_tensor(call: Call) -> None:
    if call.program.dynamic_batch and getattr(call.operation, "per_sample", False):
        raise ValueError(
            f"Layer {path_of(call.operation)!r}: it joins a constant to each sample, which TFLite cannot do for any batch size. "
            "Expected: dynamic_batch=False."
        )
    call.become_constant(call.operation.value)


def concatenation(call: Call) -> None:
    rank = len(call.shape(call.output))
    call.op("CONCATENATION", call.inputs, call.output, axis=call.operation.axis % rank)
