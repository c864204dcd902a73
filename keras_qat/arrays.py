"""keras.ops for the arithmetic of integers, which computes on numpy's arrays in numpy: `freeze` has nothing but those.

Eagerly a small TensorFlow operation takes 50 µs, numpy's takes 1, and a deep network has tens of thousands of them.
"""

import keras
import numpy as np

_SAME = (
    *("abs", "argmin", "broadcast_to", "ceil", "clip", "floor", "log", "log2", "logical_and", "maximum", "minimum"),
    *("ones_like", "power", "reshape", "round", "sign", "take", "where", "zeros_like"),
)
_IN_NUMPY = {
    **{name: getattr(np, name) for name in _SAME},
    **{
        name: lambda x, axis=None, keepdims=False, function=function: function(
            x, axis=axis if axis is None else tuple(axis), keepdims=keepdims
        )
        for name, function in (("max", np.max), ("min", np.min), ("sum", np.sum))
    },
    "cast": lambda x, dtype: np.asarray(x).astype(dtype)[()],
    "rsqrt": lambda x: np.asarray(keras.ops.rsqrt(x)),  # TensorFlow's own, whose last bit is not numpy's
    "stop_gradient": lambda x: x,
    "unstack": lambda x: list(x),
}


def is_numpy(value) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def read_as(other, variable):
    """A variable, as an array where `other` is one of numpy's."""
    return np.asarray(variable) if is_numpy(other) else variable


class _Ops:
    """keras.ops, computed by numpy where only arrays and plain numbers go in."""

    def __getattr__(self, name):
        in_keras, in_numpy = getattr(keras.ops, name), _IN_NUMPY.get(name)
        if in_numpy is None:
            return in_keras

        def either(*args, **kwargs):
            operands = [*args, *kwargs.values()]
            arrays = [is_numpy(x) for x in operands]
            if any(arrays) and all(
                array or x is None or isinstance(x, (bool, int, float, str, tuple, list))
                for array, x in zip(arrays, operands, strict=True)
            ):
                return in_numpy(*args, **kwargs)
            return in_keras(*args, **kwargs)

        setattr(self, name, either)
        return either


ops = _Ops()
