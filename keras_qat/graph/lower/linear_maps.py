"""Linear maps along one axis after the other: resizing by any interpolation, uneven averages, Fourier transforms.

Each axis is multiplied by a constant matrix, a FULLY_CONNECTED. What a map of images does to its two axes is found by running it.
"""

import numpy as np
from keras import ops

from keras_qat.graph.walk import key_of

_LARGEST = 1024  # pixels along an axis: the matrix is of their square
_CHANNELS = 16  # of the images that a map is run on at a time, so that large ones fit into memory
_NATIVE = ("nearest", "bilinear")


def along(x, axis: int, matrix):
    """One axis of `x` times a matrix of shape (result, size)."""
    letters = "abcdefgh"[: len(x.shape)]
    axis = axis % len(letters)
    subscripts = f"{letters},z{letters[axis]}->{letters.replace(letters[axis], 'z')}"
    return ops.einsum(subscripts, x, np.asarray(matrix, "float32"))


def by_axes(function, sides: tuple[int, int]):
    """A map of images, (batch, height, width, channels), as one matrix for each axis; None where it is something else.

    Args:
        function: On arrays, alike for all channels.
        sides: The images' height and width.
    """
    if max(sides) > _LARGEST:
        return None
    height, width = sides
    matrices = [_matrix(function, sides, axis) for axis in (0, 1)]
    image = np.random.default_rng(0).normal(size=(1, height, width, 1)).astype("float32")
    found = np.einsum("bhwc,yh,xw->byxc", image, *matrices)
    if not np.allclose(found, _run(function, image), atol=1e-4):
        return None

    def apply(x):
        # The axis that shrinks first leaves less to do.
        for axis in sorted((1, 2), key=lambda axis: matrices[axis - 1].shape[0] / sides[axis - 1]):
            matrix = matrices[axis - 1]
            if not np.array_equal(matrix, np.eye(*matrix.shape)):
                x = along(x, axis, matrix)
        return x

    return apply


def _matrix(function, sides, axis: int) -> np.ndarray:
    """What a map does to one axis: of images whose rows (or columns) are those of an identity, one for each channel."""
    identity, parts = np.eye(sides[axis], dtype="float32"), []
    for begin in range(0, sides[axis], _CHANNELS):
        lines = np.expand_dims(identity[:, begin : begin + _CHANNELS], 1 - axis)
        result = _run(function, np.broadcast_to(lines[None], (1, *sides, lines.shape[-1])))[0]
        parts.append(np.take(result, result.shape[1 - axis] // 2, axis=1 - axis))  # the middle is not padded
    return np.concatenate(parts, axis=1)


def _run(function, array):
    return np.asarray(function(ops.convert_to_tensor(np.ascontiguousarray(array))))


def _resize(operation, args, kwargs):
    """By an interpolation that TFLite has no op for, with antialiasing, or with its proportions kept."""
    aspect = operation.crop_to_aspect_ratio or operation.pad_to_aspect_ratio
    if len(args[0].shape) != 4 or operation.data_format != "channels_last":
        return None
    if operation.interpolation in _NATIVE and not operation.antialias and not aspect:
        return None
    return by_axes(operation.call, args[0].shape[1:3])


def _up_sampling(layer, args, kwargs):
    if layer.interpolation in _NATIVE or layer.data_format != "channels_last":
        return None
    size = [side * factor for side, factor in zip(args[0].shape[1:3], layer.size, strict=True)]
    return lambda x: ops.image.resize(x, size, interpolation=layer.interpolation)


def adaptive_average(layer, x):
    """Windows that differ in size."""
    return by_axes(layer.call, x.shape[1:3]) if len(x.shape) == 4 and layer.data_format == "channels_last" else None


def _blur(operation, args, kwargs):
    """A depthwise convolution with what the blur makes of a single point."""
    if len(args[0].shape) != 4 or operation.data_format != "channels_last":
        return None
    height, width = operation.kernel_size
    point = np.zeros((1, 2 * height + 1, 2 * width + 1, 1), "float32")
    point[0, height, width] = 1.0
    mirrored = _run(operation.call, point)[0, height // 2 + 1 :, width // 2 + 1 :][:height, :width]
    kernel = mirrored[::-1, ::-1, :, None]
    return lambda x: ops.depthwise_conv(x, np.repeat(kernel, x.shape[-1], axis=2), padding="same")


def _fourier(axes: tuple[int, ...], inverse: bool = False):
    """Of a pair of tensors, real and imaginary, over these axes."""

    def rule(operation, args, kwargs):
        sizes = [args[0][0].shape[axis] for axis in axes]
        if None in sizes or len(args[0][0].shape) <= len(axes) or max(sizes) > _LARGEST:
            return None

        zero = [_is_zero(x) for x in args[0]]

        def transform(pair):
            real, imaginary = (None if is_zero else x for x, is_zero in zip(pair, zero, strict=True))
            for axis, size in zip(axes, sizes, strict=True):
                turns = (-1) ** (not inverse) * 2 * np.pi * np.outer(np.arange(size), np.arange(size)) / size
                scale = 1.0 / size if inverse else 1.0
                cosines, sines = np.cos(turns) * scale, np.sin(turns) * scale
                parts = [
                    [None if x is None else along(x, axis, m) for m in (cosines, sines)] for x in (real, imaginary)
                ]
                real = _sum(parts[0][0], parts[1][1], ops.subtract)
                imaginary = _sum(parts[0][1], parts[1][0], ops.add)
            return tuple(x * 0.0 if part is None else part for part, x in zip((real, imaginary), pair, strict=True))

        return transform

    return rule


def _real_fourier(operation, args, kwargs):
    """Of a real tensor along its last axis, which is cut or filled up to `fft_length`."""
    size = args[0].shape[-1]
    length = operation.fft_length or size
    if size is None or len(args[0].shape) < 2 or max(size, length) > _LARGEST:
        return None
    turns = 2 * np.pi * np.outer(np.arange(length // 2 + 1), np.arange(min(size, length))) / length
    return lambda x: tuple(
        along(x[..., :length] if length < size else x, -1, matrix) for matrix in (np.cos(turns), -np.sin(turns))
    )


def _is_zero(x) -> bool:
    operation = x._keras_history.operation
    return key_of(operation) == "ops.ZerosLike" or (key_of(operation) == "Constant" and not np.any(operation.values))


def _sum(one, other, add):
    if one is None or other is None:
        return one if other is None else (other if add is ops.add else -other)
    return add(one, other)


RULES = {
    "UpSampling2D": _up_sampling,
    "ops.FFT": _fourier((-1,)),
    "ops.FFT2": _fourier((-1, -2)),
    "ops.GaussianBlur": _blur,
    "ops.IFFT2": _fourier((-1, -2), inverse=True),
    "ops.RFFT": _real_fourier,
    "ops.Resize": _resize,
}
