"""What hundreds of layers compute in the same way, put into a graph once and called from there.

Scales and ranges are arithmetic on single numbers, and it takes a hundred small operations to find a grid. TensorFlow takes
half a millisecond to put one of them into a graph: for a layer more than all of its own operations take, and an unrolled
recurrent layer has dozens of grids.
"""

import functools

import tensorflow as tf


def traced_once(function):
    """Decorates a function of tensors, through which no gradient goes. In a graph it is one operation.

    Arguments that are no tensors are part of what is traced: numbers, strings, tuples, a `Spec`. Results have axes of any
    size, as soon as it was called with different ones. On numpy's arrays the function is what it was.
    """

    def stopped(*args):
        return tf.nest.map_structure(tf.stop_gradient, function(*args))

    @functools.cache
    def traced(axes, fixed):
        """For tensors with so many axes each ("None" where nobody knows; None: it is no tensor), and what all else is."""

        @tf.function(autograph=False, reduce_retracing=True)
        def of_tensors(*tensors):
            remaining = iter(tensors)
            args = [value if count is None else next(remaining) for count, value in zip(axes, fixed, strict=True)]
            return stopped(*args)

        return of_tensors

    @functools.wraps(function)
    def call(*args):
        if not any(map(tf.is_tensor, args)):
            return function(*args)
        if tf.executing_eagerly():
            return stopped(*args)
        args = [tf.convert_to_tensor(value) if tf.is_tensor(value) else value for value in args]
        axes = tuple(str(value.shape.rank) if tf.is_tensor(value) else None for value in args)
        fixed = tuple(None if tf.is_tensor(value) else value for value in args)
        return traced(axes, fixed)(*[value for value in args if tf.is_tensor(value)])

    return call
