"""Moving, cutting and joining."""

import math

import keras
import numpy as np
from keras import ops

from keras_qat.compounds import TransposedMatmul
from keras_qat.graph.lower.weights import dense_of, is_learned, penalties
from keras_qat.graph.walk import is_index, key_of
from keras_qat.primitives import Constant
from keras_qat.truths import Comparison


def _split(operation, args, kwargs):
    axis, given = operation.axis, operation.indices_or_sections
    size = args[0].shape[axis]
    ends = [size // given * (n + 1) for n in range(given)] if isinstance(given, int) else [*given, size]
    pieces = [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    return lambda x: [x[_at(axis, piece, len(x.shape))] for piece in pieces]


def _unstack(operation, args, kwargs):
    axis = operation.axis
    return lambda x: [x[_at(axis, index, len(x.shape))] for index in range(x.shape[axis])]


def _at(axis: int, key, rank: int) -> tuple:
    keys = [slice(None)] * rank
    keys[axis] = key
    return tuple(keys)


def _swap_axes(operation, args, kwargs):
    order = list(range(len(args[0].shape)))
    one, other = operation.axis1, operation.axis2
    order[one], order[other] = order[other], order[one]
    return lambda x: ops.transpose(x, order)


def _move_axes(operation, args, kwargs):
    rank = len(args[0].shape)
    sources = [axis % rank for axis in np.ravel(operation.source)]
    targets = [axis % rank for axis in np.ravel(operation.destination)]
    order = [axis for axis in range(rank) if axis not in sources]
    for target, source in sorted(zip(targets, sources, strict=True)):
        order.insert(target, source)
    return lambda x: ops.transpose(x, [int(axis) for axis in order])


def _tile(operation, args, kwargs):
    """Copies joined together: TensorFlow Lite Micro has no TILE."""
    rank = len(args[0].shape)
    counts = [1] * (rank - np.size(operation.repeats)) + [int(count) for count in np.ravel(operation.repeats)]
    if len(counts) != rank or counts[0] != 1:
        return None

    def tile(x):
        for axis, count in enumerate(counts):
            x = ops.concatenate([x] * count, axis=axis) if count > 1 else x
        return x

    return tile


def _repeat(operation, args, kwargs):
    """Each slice several times: a gather of repeated indices."""
    axis, size = operation.axis, args[0].shape[operation.axis or 0]
    if axis is None or size is None or isinstance(operation.repeats, keras.KerasTensor):
        return None
    if operation.repeats == 1:
        return lambda x: x
    return lambda x: ops.take(x, np.repeat(np.arange(size), operation.repeats).tolist(), axis=axis)


def _flip(operation, args, kwargs):
    if operation.axis is None:
        return None
    axes = [operation.axis] if isinstance(operation.axis, int) else list(operation.axis)

    def flip(x):
        for axis in axes:
            x = ops.take(x, list(reversed(range(x.shape[axis]))), axis=axis)
        return x

    return flip


def _roll(operation, args, kwargs):
    axes, shifts = np.ravel(operation.axis), np.ravel(operation.shift)
    if operation.axis is None or any(args[0].shape[axis] is None for axis in axes):
        return None

    def roll(x):
        for axis, shift in zip(axes.tolist(), np.broadcast_to(shifts, axes.shape).tolist(), strict=True):
            begin, rank = -shift % x.shape[axis], len(x.shape)
            parts = _at(axis, slice(begin, None), rank), _at(axis, slice(0, begin), rank)
            x = ops.concatenate([x[part] for part in parts], axis=axis) if begin else x
        return x

    return roll


def _rot_90(operation, args, kwargs):
    """A quarter turn from the first axis to the second: they change places, and one of them is reversed."""
    first, second = (axis % len(args[0].shape) for axis in operation.axes)
    turns = operation.k % 4

    def rotate(x):
        for axis in {1: [second], 2: [first, second], 3: [first]}.get(turns, []):
            x = ops.flip(x, axis)
        return ops.swapaxes(x, first, second) if turns % 2 else x

    return rotate


def _diagonal(operation, args, kwargs):
    """Its places among those of both axes, one behind the other."""
    rank = len(args[0].shape)
    axes = operation.axis1 % rank, operation.axis2 % rank
    order = [axis for axis in range(rank) if axis not in axes] + list(axes)
    *kept, rows, columns = (args[0].shape[axis] for axis in order)
    places = np.diagonal(np.arange(rows * columns).reshape(rows, columns), operation.offset).tolist()
    return lambda x: ops.take(ops.reshape(ops.transpose(x, order), (-1, *kept[1:], rows * columns)), places, axis=-1)


def _trace(operation, args, kwargs):
    return lambda x: ops.sum(ops.diagonal(x, operation.offset, operation.axis1, operation.axis2), axis=-1)


def _window(x, begin, sizes) -> list[slice] | None:
    """What a slice of this shape that begins at these constants takes from each axis, all of the batch."""
    if isinstance(begin, keras.KerasTensor) or any(isinstance(one, keras.KerasTensor) for one in begin):
        return None
    begin, first = [int(one) for one in begin], sizes[0]
    if begin[0] != 0 or not (first is None or first == -1 or first == x.shape[0]):
        return None
    sizes = [
        full - at if size == -1 else size for full, at, size in zip(x.shape[1:], begin[1:], sizes[1:], strict=True)
    ]
    return [slice(None), *[slice(at, at + size) for at, size in zip(begin[1:], sizes, strict=True)]]


def _slice(operation, args, kwargs):
    window = _window(args[0], args[1], operation.shape)
    return window and (lambda x, *_: x[tuple(window)])


def _slice_update(operation, args, kwargs):
    """What lies in front of the window and behind it, joined with what comes in, one axis within the other."""
    x, begin, updates = args
    window = _window(x, begin, updates.shape)
    if not window or not all(isinstance(one, keras.KerasTensor) for one in (x, updates)):
        return None

    def update(x, _, updates):
        def filled(part, axis):
            if axis == len(window):
                return updates
            cut, size, rank = window[axis], part.shape[axis], len(window)
            if axis == 0 or (cut.start == 0 and cut.stop == size):
                return filled(part, axis + 1)
            inside = filled(part[_at(axis, cut, rank)], axis + 1)
            outer = [part[_at(axis, slice(0, cut.start), rank)]], [part[_at(axis, slice(cut.stop, None), rank)]]
            front, back = outer[0] if cut.start else [], outer[1] if cut.stop < size else []
            return ops.concatenate([*front, inside, *back], axis=axis)

        return filled(x, 0)

    return update


def _repeat_vector(layer, args, kwargs):
    return lambda x: ops.concatenate([ops.expand_dims(x, 1)] * layer.n, axis=1)


def _embedding(layer, args, kwargs):
    table = Constant(layer.embeddings, trainable=layer.trainable, name="table", **penalties(layer.embeddings))
    return lambda ids: ops.take(table(ids), ops.cast(ids, "int32"), axis=0)


def _reversible_embedding(layer, args, kwargs):
    """Both ways through one table, if they are tied."""
    table = Constant(layer.embeddings, trainable=layer.trainable, name="table", **penalties(layer.embeddings))
    own = None
    if not layer.tie_weights:
        kernel = layer.reverse_embeddings
        own = dense_of(kernel, None, layer.trainable, "reverse", **penalties(kernel, "kernel_"))
    tied, cap = TransposedMatmul(name="reverse"), layer.logit_soft_cap

    def embed(inputs, reverse=False):
        if not reverse:
            return ops.take(table(inputs), ops.cast(inputs, "int32"), axis=0)
        x = inputs if len(inputs.shape) > 2 else ops.expand_dims(inputs, 1)
        logits = tied(x, table(x)) if own is None else own(x)
        logits = logits if len(inputs.shape) > 2 else ops.squeeze(logits, 1)
        return logits if cap is None else ops.tanh(logits / cap) * cap

    return embed


def _take(operation, args, kwargs):
    """From a table: an embedding, written in keras.ops."""
    table = args[0]
    if isinstance(table, keras.KerasTensor) or operation.axis != 0:
        return None
    table = Constant(np.asarray(table), trainable=is_learned(table), name="table", **penalties(table))
    return lambda _, ids: ops.take(table(ids), ops.cast(ids, "int32"), axis=0)


def _take_along_axis(operation, args, kwargs):
    """By constant places, alike for all samples: a GATHER from all numbers of a sample."""
    x, places = args[0], args[1] if len(args) > 1 else kwargs.get("indices")
    if isinstance(places, keras.KerasTensor) or operation.axis in (None, 0, -len(x.shape)) or np.shape(places)[0] != 1:
        return None
    sizes, axis = list(x.shape[1:]), operation.axis % len(x.shape) - 1
    numbers, places = np.arange(math.prod(sizes)).reshape(sizes), np.asarray(places)[0]
    found = np.take_along_axis(
        numbers, np.broadcast_to(places, [*sizes[:axis], places.shape[axis], *sizes[axis + 1 :]]), axis
    )
    return lambda x, *_, **__: ops.reshape(
        ops.take(ops.reshape(x, (-1, numbers.size)), found.ravel().tolist(), axis=1), (-1, *found.shape)
    )


def _one_hot(operation, args, kwargs):
    """Rows of an identity matrix."""
    if not is_index(args[0]) or args[0].dtype == "bool":
        return None
    table, axis = np.eye(operation.num_classes), operation.axis
    if axis in (-1, len(args[0].shape)):
        return lambda ids: ops.take(table, ids, axis=0)
    return lambda ids: ops.moveaxis(ops.take(table, ids, axis=0), -1, axis)


def _categories(layer, args, kwargs):
    """CategoryEncoding: ids to one row of zeros and ones for each sample."""
    ids = args[0]
    if not is_index(ids) or layer.output_mode not in ("one_hot", "multi_hot") or "count_weights" in kwargs:
        return None

    def encode(ids):
        rows = ops.one_hot(ids, layer.num_tokens)
        if layer.output_mode == "multi_hot" and len(ids.shape) > 1:
            return ops.max(rows, axis=-2)
        return ops.squeeze(rows, axis=-2) if ids.shape[-1:] == (1,) else rows

    return encode


def _triangle(operation, args, kwargs):
    kept = np.triu if key_of(operation) == "ops.Triu" else np.tril
    return lambda x: ops.where(kept(np.ones((1, *x.shape[1:]), bool), operation.k), x, 0.0)


def _difference(operation, args, kwargs):
    axis = operation.axis

    def difference(x):
        for _ in range(operation.n):
            rank = len(x.shape)
            x = x[_at(axis, slice(1, None), rank)] - x[_at(axis, slice(None, -1), rank)]
        return x

    return difference


def _append(operation, args, kwargs):
    return None if operation.axis is None else lambda one, other: ops.concatenate([one, other], axis=operation.axis)


def _flatten(layer, args, kwargs):
    """channels_first: Keras moves the channels to the end before it flattens."""
    rank = len(args[0].shape)
    if layer.data_format != "channels_first" or rank < 3:
        return None
    return lambda x: ops.reshape(ops.transpose(x, (0, *range(2, rank), 1)), (-1, math.prod(x.shape[1:])))


def _softmax(operation, args, kwargs):
    """Along another axis than the last: moved there and back."""
    rank, axis = len(args[0].shape), operation.axis
    if not isinstance(axis, int) or axis % rank in (0, rank - 1):
        return None
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    return lambda x, *_: ops.transpose(ops.softmax(ops.transpose(x, order), axis=-1), order)


def _join(operation, args, kwargs):
    """With constants, which each sample gets a copy of: a class token."""
    if all(isinstance(x, keras.KerasTensor) for x in args[0]):
        return None

    def join(tensors):
        anchor = _first_tensor(tensors)
        tensors = [x if isinstance(x, keras.KerasTensor) else _for_each_sample(x)(anchor) for x in tensors]
        if key_of(operation) == "ops.Stack":
            return ops.stack(tensors, axis=operation.axis)
        return ops.concatenate(tensors, axis=operation.axis)

    return join


def _first_tensor(tensors):
    return next(x for x in tensors if isinstance(x, keras.KerasTensor))


def _for_each_sample(values) -> Constant:
    if np.shape(values)[0] != 1:
        raise ValueError(f"It joins a constant of the shape {np.shape(values)}. Expected: 1 in front, for one sample.")
    constant = np.asarray(values, "float32")
    return Constant(constant, trainable=is_learned(values), per_sample=True, name="constant", **penalties(values))


def _filled(operation, args, kwargs):
    """A constant for each sample; of whole numbers the truth values that they stand for in a mask."""
    is_one = key_of(operation) == "ops.OnesLike"
    if is_index(args[0]):
        return Comparison("greater_equal" if is_one else "less", -(2**31), name=operation.name)
    return lambda x: _for_each_sample(np.full((1, *x.shape[1:]), float(is_one)))(x)


def _identity(layer, args, kwargs):
    return lambda inputs: inputs


RULES = {
    "Concatenate": _join,
    "CategoryEncoding": _categories,
    "Embedding": _embedding,
    "Flatten": _flatten,
    "Identity": _identity,
    "RepeatVector": _repeat_vector,
    "ReversibleEmbedding": _reversible_embedding,
    "ops.Append": _append,
    "ops.Concatenate": _join,
    "ops.Diagonal": _diagonal,
    "ops.Diff": _difference,
    "ops.Flip": _flip,
    "ops.Moveaxis": _move_axes,
    "ops.Hstack": lambda operation, args, kwargs: lambda tensors: ops.concatenate(tensors, axis=1),
    "ops.OneHot": _one_hot,
    "ops.OnesLike": _filled,
    "ops.Repeat": _repeat,
    "ops.Roll": _roll,
    "ops.Rot90": _rot_90,
    "ops.Slice": _slice,
    "ops.SliceUpdate": _slice_update,
    "ops.Softmax": _softmax,
    "ops.Split": _split,
    "ops.Stack": _join,
    "ops.Swapaxes": _swap_axes,
    "ops.Take": _take,
    "ops.TakeAlongAxis": _take_along_axis,
    "ops.Tile": _tile,
    "ops.Trace": _trace,
    "ops.Tril": _triangle,
    "ops.Triu": _triangle,
    "ops.Unstack": _unstack,
    "ops.ZerosLike": _filled,
}
