"""Calls that compute with the size of the batch, `ops.shape(x)[0]`, which is open while tracing.

Such a call runs twice, on batches of two sizes. What differs between the two graphs depends on the batch, and is written so
that it holds for any: a -1 in a reshape, one sample in place of many alike.
"""

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from keras_qat.graph.walk import key_of

# They have many divisors. Each runs on a batch twice as large too, so that quotients which are rounded show. The second is for
# what divides the batch by a number of windows.
_SIZES = (12, 20160)
_ARRAYS = (np.ndarray, tf.Tensor)
_Tile = type(ops.tile(keras.KerasTensor((1,)), 1)._keras_history.operation)


class _Open:
    """In place of a number that depends on the batch."""


class DependsOnBatch(ValueError):
    """A call does something with the size of the batch that cannot be written for any."""


def run_on_two_batches(run):
    """The graph of a call, for a batch of any size.

    Raises:
        DependsOnBatch: if there is none; whatever the call raises itself where it runs on neither batch.

    Args:
        run: `size -> (graph, ...)`, which runs the call on a batch of that size.

    Returns:
        What `run` returns for the first size, its graph edited.
    """
    try:
        return _generalized(run, _SIZES[0])
    except DependsOnBatch:
        raise
    except Exception:
        return _generalized(run, _SIZES[1])


def _generalized(run, size: int):
    ran, (other, *_) = run(size), run(2 * size)
    graph = ran[0]
    if graph is None:
        return ran
    if [type(node.operation) for node in graph.nodes] != [type(node.operation) for node in other.nodes]:
        raise DependsOnBatch("It takes other steps where the batch has another size.")
    for node, twin in zip(graph.nodes, other.nodes, strict=True):
        _generalize(node, twin)
    graph._outputs_struct = tree.map_structure(_merged, graph._outputs_struct, other._outputs_struct)
    return ran


def _generalize(node, twin) -> None:
    """Edits a call, and the operation that is called, so that they hold for any batch."""
    arguments, others = node.arguments, twin.arguments
    arguments.args, arguments.kwargs = tree.map_structure(
        _merged, (arguments.args, arguments.kwargs), (others.args, others.kwargs)
    )
    if isinstance(node.operation, keras.Layer):
        return
    options = {
        name: tree.map_structure(_merged, value, vars(twin.operation)[name])
        for name, value in vars(node.operation).items()
        if not name.startswith("_") and name != "name"
    }
    depending = [name for name, value in options.items() if any(isinstance(x, _Open) for x in tree.flatten(value))]
    if any(isinstance(x, _Open) for x in tree.flatten((arguments.args, arguments.kwargs))):
        depending.append("an argument")
    if depending:
        node.operation = _for_any_batch(node, options, depending)
    else:
        vars(node.operation).update(options)


def _for_any_batch(node, options, depending):
    """An operation that does the same, whatever the size of the batch."""
    key, shape = key_of(node.operation), node.outputs[0].shape
    if key == "ops.Reshape" and depending == ["newshape"]:
        sizes = tree.flatten(options["newshape"])
        if sum(isinstance(size, _Open) for size in sizes) == 1:
            wanted = [-1 if isinstance(given, _Open) else size for given, size in zip(sizes, shape, strict=True)]
            return type(node.operation)(wanted, name=node.operation.name)
    if key == "ops.BroadcastTo" and depending == ["shape"]:
        old = node.input_tensors[0].shape
        if len(old) == len(shape) and old[0] == shape[0]:
            repeats = [1, *(new // size for new, size in zip(shape[1:], old[1:], strict=True))]
            return _Tile(repeats, name=node.operation.name)
    raise DependsOnBatch(f"{key} gets the size of the batch as {' and '.join(depending)}.")


def _merged(one, other):
    """What two runs gave for the same thing."""
    if one is other or isinstance(one, keras.KerasTensor):
        return one
    if isinstance(one, int) and isinstance(other, int) and one != other and 2 * one == other:
        return _Open()
    if getattr(one, "shape", ()) != getattr(other, "shape", ()):
        return _one_sample(one, other)
    if isinstance(one, (int, float, *_ARRAYS)) and not np.array_equal(one, other):
        raise DependsOnBatch("It computes numbers from it.")
    return one


def _one_sample(one, other):
    """Of a constant that repeats the same for each sample."""
    sizes = (one.shape[0], other.shape[0])
    if tuple(one.shape[1:]) != tuple(other.shape[1:]) or 2 * sizes[0] != sizes[1]:
        raise DependsOnBatch(f"It makes constants of the shapes {one.shape} and {other.shape}.")
    sample = one[:1]
    if not np.array_equal(one, np.repeat(sample, sizes[0], axis=0)):
        raise DependsOnBatch("It makes constants that differ from sample to sample.")
    return sample
