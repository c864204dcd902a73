"""Moves of axes, as little of them as there is to do."""

from keras import ops


def reshaped(x, shape):
    """`ops.reshape`, the batch axis kept; nothing where the shape is that already."""
    return x if len(x.shape) == len(shape) and tuple(x.shape[1:]) == tuple(shape[1:]) else ops.reshape(x, shape)


def transposed(x, order):
    """`ops.transpose`; a reshape where only axes of size 1 change places."""
    order = [int(axis) for axis in order]
    long = [axis for axis in order if x.shape[axis] != 1]
    if order[0] == 0 and long == sorted(long):
        return reshaped(x, (-1, *[x.shape[axis] for axis in order[1:]]))
    return ops.transpose(x, order)
