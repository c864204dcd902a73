"""Normalizations by the statistics of each sample."""

import math

import keras
import numpy as np
from keras import ops

from keras_qat.compounds import InverseRoot
from keras_qat.graph.lower.moves import reshaped, transposed
from keras_qat.graph.lower.weights import dense_of, is_learned, penalties
from keras_qat.graph.walk import clone, config_of
from keras_qat.layers import ChannelScale
from keras_qat.primitives import Constant


def _layer_norm(layer, args, kwargs):
    if layer.rms_scaling:
        return None
    affine = _affine(layer.gamma, layer.beta, layer.trainable, layer.name)
    return lambda inputs: _normalized(inputs, layer.axis, layer.epsilon, affine, centred=True)


def _layer_norm_op(operation, args, kwargs):
    if operation.rms_scaling or _computed(args[1:], kwargs):
        return None

    def normalize(x, gamma=None, beta=None):
        affine = _affine(gamma, beta, is_learned(gamma) or is_learned(beta), operation.name)
        return _normalized(x, operation.axis, _epsilon(operation), affine, centred=True)

    return normalize


def _rms_norm(layer, args, kwargs):
    affine = _affine(layer.scale, None, layer.trainable, layer.name)
    return lambda x: _normalized(x, layer.axis, layer.epsilon, affine)


def _rms_norm_op(operation, args, kwargs):
    if _computed(args[1:], kwargs):
        return None

    def normalize(x, scale=None):
        affine = _affine(scale, None, is_learned(scale), operation.name)
        return _normalized(x, operation.axis, _epsilon(operation), affine)

    return normalize


def _computed(args, kwargs) -> bool:
    """Whether the factors come out of the model instead of being weights."""
    return any(isinstance(x, keras.KerasTensor) for x in (*args, *kwargs.values()))


def _epsilon(operation) -> float:
    return keras.config.epsilon() if operation.epsilon is None else operation.epsilon


def _normalized(x, axes, epsilon, affine, centred=False):
    """Each row over `axes` divided by its root mean square, its mean taken off first if `centred`.

    The sum of squares is a matrix product of the row with itself, which adds up exactly. Squares on a grid of their own
    would lose the rows that are small next to others.

    `√n · d / √(Σd² + n·ε)`, where there are factors that take in the √n: what is left of the root is TFLite's RSQRT, if ε
    does not matter. `d / √(Σd² / n + ε)` where there are none.
    """
    rows, restored = _rows(x, axes)
    if centred:
        rows = rows - ops.mean(rows, axis=-1, keepdims=True)
    count = rows.shape[-1]
    if not isinstance(affine, ChannelScale):
        return restored(affine(rows * InverseRoot(epsilon, count=count, name="inverse_root")(_sum_of_squares(rows))))
    inverse = InverseRoot(count * epsilon, name="inverse_root")(_sum_of_squares(rows))
    return restored(affine(ops.multiply(rows * inverse, math.sqrt(count))))


def _sum_of_squares(rows):
    """Over the last axis, which stays as one of size 1."""
    flat = reshaped(rows, (-1, math.prod(rows.shape[1:-1]), 1, rows.shape[-1]))
    return reshaped(ops.matmul(flat, ops.transpose(flat, (0, 1, 3, 2))), (-1, *rows.shape[1:-1], 1))


def _rows(x, axes):
    """`x` with the values over `axes` on the last of 4 axes, and the function that brings such a tensor back to its form.

    A depthwise convolution, which the factors per channel become, reads 4 axes.
    """
    rank = len(x.shape)
    axes = sorted(axis % rank for axis in ([axes] if isinstance(axes, int) else axes))
    if 0 in axes:
        raise ValueError(f"It normalizes over the batch. Expected: axes behind it. Received: axis={axes}")
    others = [axis for axis in range(1, rank) if axis not in axes]
    order = [0, *others, *axes]
    sizes = [x.shape[axis] for axis in order[1:]]
    rest, size = sizes[: len(others)], math.prod(sizes[len(others) :])

    def restored(rows):
        return transposed(reshaped(rows, (-1, *sizes)), np.argsort(order))

    x = transposed(x, order)
    return reshaped(x, (-1, *(rest if len(rest) == 2 else (math.prod(rest), 1)), size)), restored


def _affine(gamma, beta, trainable, name):
    """`y · gamma + beta` per channel; either may be missing."""
    options = {**penalties(gamma, "kernel_"), **penalties(beta, "bias_")}
    penalty = penalties(beta)
    gamma, beta = (None if values is None else np.ravel(np.asarray(values, "float32")) for values in (gamma, beta))
    if gamma is not None:
        return ChannelScale(gamma, beta, trainable=trainable, name=name, **options)
    if beta is None:
        return lambda y: y
    constant = Constant(beta, trainable=trainable, name=name, **penalty)
    return lambda y: y + constant(y)


def _batch_norm(layer, args, kwargs):
    """Along another axis than the last: moved there and back."""
    rank = len(args[0].shape)
    axis = layer.axis % rank
    if axis == rank - 1:
        return None
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    norm = type(layer).from_config({**config_of(layer), "axis": -1, "dtype": "float32"})
    norm.trainable = layer.trainable
    norm.build([args[0].shape[axis] for axis in order])
    for mine, weight in zip(norm.weights, layer.weights, strict=True):
        mine.assign(weight)

    def normalize(inputs, training=None, mask=None):
        return transposed(norm(transposed(inputs, order), training=training), order)

    return normalize


def _group_norm(layer, args, kwargs):
    """Means over the image first, then over the channels of each group, written back to all of them."""
    rank = len(args[0].shape)
    if layer.axis % rank != rank - 1:
        return None
    channels, affine = args[0].shape[-1], _affine(layer.gamma, layer.beta, layer.trainable, layer.name)
    mean, variance = (_group_mean(channels, layer.groups, name) for name in ("mean", "variance"))

    def normalize(inputs):
        rest = inputs.shape[1:-1]
        x = reshaped(inputs, (-1, math.prod(rest[:-1]), math.prod(rest[-1:]), channels))
        x = x - mean(x)
        y = affine(x * InverseRoot(layer.epsilon, name="inverse_root")(variance(ops.square(x))))
        return reshaped(y, (-1, *inputs.shape[1:]))

    return normalize


def _group_mean(channels: int, groups: int, name: str):
    """The mean of an image over each group of channels, for every channel of the group."""
    size = channels // groups
    averages = np.kron(np.eye(groups), np.full((size, size), 1 / size))
    dense = None if size == 1 else dense_of(averages[:, :1] if groups == 1 else averages, name=name)

    def mean(image):
        pooled = ops.mean(image, axis=(1, 2), keepdims=True)
        return pooled if dense is None else dense(pooled)

    return mean


def _unit_norm(layer, args, kwargs):
    return lambda inputs: ops.normalize(inputs, axis=layer.axis, order=2, epsilon=1e-12)


def _normalize(operation, args, kwargs):
    """`x / max(norm(x), epsilon)`."""
    axes, epsilon = operation.axis, _epsilon(operation)
    if axes is None:
        return None  # over the batch too
    if operation.order == 1:
        return lambda x: x / ops.maximum(ops.sum(ops.abs(x), axis=axes, keepdims=True), epsilon)
    if operation.order != 2:
        return None

    def normalize(x):
        rows, restored = _rows(x, axes)
        return restored(rows * InverseRoot(floor=epsilon**2, name="inverse_root")(_sum_of_squares(rows)))

    return normalize


def _spectral_norm(layer, args, kwargs):
    """The layer inside, its kernel divided by its largest singular value after each training step."""
    inner = layer.layer
    what = "kernel_constraint" if hasattr(inner, "kernel_constraint") else "embeddings_constraint"
    before = getattr(inner, what)
    setattr(inner, what, UnitSpectralNorm(layer.power_iterations))
    try:
        return clone(inner)
    finally:
        setattr(inner, what, before)


@keras.saving.register_keras_serializable("keras_qat")
class UnitSpectralNorm(keras.constraints.Constraint):
    """A kernel divided by its largest singular value, found by power iteration from its largest column."""

    def __init__(self, power_iterations: int = 1):
        self.power_iterations = power_iterations

    def __call__(self, kernel):
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        right = ops.one_hot(ops.argmax(ops.sum(ops.square(matrix), axis=0)), kernel.shape[-1], dtype="float32")[:, None]
        for _ in range(self.power_iterations + 4):
            left = ops.normalize(matrix @ right, axis=0)
            right = ops.normalize(ops.transpose(matrix) @ left, axis=0)
        largest = ops.norm(matrix @ right)
        return kernel / ops.where(largest > 0, largest, 1.0)

    def get_config(self):
        return {"power_iterations": self.power_iterations}


RULES = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "SpectralNormalization": _spectral_norm,
    "UnitNormalization": _unit_norm,
    "ops.LayerNorm": _layer_norm_op,
    "ops.Normalize": _normalize,
    "ops.RMSNorm": _rms_norm_op,
}
