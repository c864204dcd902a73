"""Einsum and its kin: every contraction of two tensors is a matmul, of a tensor with weights a Dense, between moves of axes."""

import dataclasses
import math
import string

import keras
import numpy as np
from keras import ops

from keras_qat.graph.lower.activations import symbolic
from keras_qat.graph.lower.moves import reshaped, transposed
from keras_qat.graph.lower.weights import dense_of, is_learned, penalties
from keras_qat.primitives import Constant


def labels_of(subscripts: str, ranks: list[int]) -> tuple[list[str], str] | None:
    """The axes of the operands and of the result, one letter each, "..." written out; None for what we do not open.

    Args:
        subscripts: Of an einsum, "ab...,bc->a...c".
        ranks: Of the operands.
    """
    subscripts = subscripts.replace(" ", "")
    left, arrow, result = subscripts.partition("->")
    operands, unused = left.split(","), [c for c in string.ascii_letters if c not in subscripts]
    widths = [
        rank - len(one.replace("...", "")) if "..." in one else 0 for one, rank in zip(operands, ranks, strict=True)
    ]
    spelled = unused[: max(widths)]
    operands = [
        one.replace("...", "".join(spelled[len(spelled) - width :]))
        for one, width in zip(operands, widths, strict=True)
    ]
    if any(len(set(one)) < len(one) or len(one) != rank for one, rank in zip(operands, ranks, strict=True)):
        return None  # a diagonal
    if not arrow:
        letters = "".join(operands)
        result = "..." + "".join(sorted(c for c in letters if letters.count(c) == 1 and c not in spelled))
    return operands, result.replace("...", "".join(spelled))


def _einsum(operation, args, kwargs):
    found = labels_of(operation.subscripts, [len(x.shape) for x in args])
    if found is None or len(args) > 2:
        return None
    operands, result = found
    tensors = [isinstance(x, keras.KerasTensor) for x in args]
    at = tensors.index(True)
    if operands[at][0] != result[:1]:
        return None  # it moves the batch axis, or sums over it
    if len(args) == 1:
        return lambda x: _permuted(*_summed(x, operands[0], result), result)
    if all(tensors):
        return _contraction(*operands, result) if operands[0][0] == operands[1][0] else None
    other = args[1 - at]
    contract = _contraction_with_weights(
        operands[at],
        operands[1 - at],
        result,
        other,
        is_learned(other),
        operation.name,
        **penalties(other, "kernel_"),
    )
    return contract and (lambda *operands: contract(operands[at]))


@dataclasses.dataclass(frozen=True)
class _Axes:
    """What the axes of a contraction are to a matmul.

    Args:
        leading: In both operands and the result; the batch first.
        rows: In the first operand and the result.
        inner: In both operands only: what is summed over.
        columns: In the second operand and the result.
    """

    leading: list[str]
    rows: list[str]
    inner: list[str]
    columns: list[str]

    def multiplied(self, x, labels: str, matrices, sizes: dict, result: str):
        """`x` times matrices of shape (batch, leading, inner, columns), its axes where the result wants them."""
        *middle, depth, _ = self.matrix_shape(sizes)
        x = _permuted(x, labels, [*self.leading, *self.rows, *self.inner])
        x = reshaped(x, (-1, *middle, _count(sizes, self.rows), depth))
        made = [*self.leading, *self.rows, *self.columns]
        product = reshaped(ops.matmul(x, matrices), (-1, *[sizes[c] for c in made[1:]]))
        return _permuted(product, made, result)

    def matrix_shape(self, sizes: dict) -> list[int]:
        """Of the second operand, without its batch axis."""
        middle = [_count(sizes, self.leading[1:])] if len(self.leading) > 1 else []
        return [*middle, _count(sizes, self.inner), _count(sizes, self.columns)]


def _axes(first: str, second: str, result: str) -> _Axes:
    leading = [c for c in result if c in first and (c in second or c == result[0])]
    rows, columns = ([c for c in result if c in one and c not in leading] for one in (first, second))
    return _Axes(leading, rows, [c for c in first if c in second and c not in result], columns)


def _contraction(first: str, second: str, result: str):
    """Of two tensors: a matmul."""
    axes = _axes(first, second, result)
    if axes.rows and axes.columns and result.index(axes.columns[0]) < result.index(axes.rows[0]):
        swapped = _contraction(second, first, result)
        return lambda x, y: swapped(y, x)

    def contract(x, y):
        x, x_labels = _summed(x, first, second + result)
        y, y_labels = _summed(y, second, first + result)
        sizes = dict(zip(x_labels + y_labels, (*x.shape, *y.shape), strict=True))
        y = _permuted(y, y_labels, [*axes.leading, *axes.inner, *axes.columns])
        return axes.multiplied(x, x_labels, reshaped(y, (-1, *axes.matrix_shape(sizes))), sizes, result)

    return contract


def _contraction_with_weights(
    labels: str, kernel_labels: str, result: str, kernel, learned, name, bias=None, **options
):
    """Of a tensor and weights: a Dense, or where the weights differ along an axis of the tensor a matmul with a constant.

    Args:
        bias: For each axis of the weights that the tensor does not have, flat.
        options: Of the Dense.
    """
    if labels[0] in kernel_labels:
        return None
    alone = tuple(n for n, c in enumerate(kernel_labels) if c not in labels and c not in result)
    kernel, kernel_labels = np.sum(np.asarray(kernel, "float32"), axis=alone), _needed(kernel_labels, labels + result)
    axes = _axes(_needed(labels, kernel_labels + result), kernel_labels, result)
    kernel_sizes = dict(zip(kernel_labels, kernel.shape, strict=True))
    order = [kernel_labels.index(c) for c in [*axes.leading[1:], *axes.inner, *axes.columns]]
    matrices = np.transpose(kernel, order).reshape(1, *axes.matrix_shape(kernel_sizes))
    differ = len(axes.leading) > 1
    if differ:
        penalty = {what: options[f"kernel_{what}"] for what in ("regularizer", "constraint")}
        weights = Constant(matrices, trainable=learned, name=name, **penalty)
    else:
        weights = dense_of(matrices[0], bias, trainable=learned, name=name, **options)

    def contract(x):
        x, left = _summed(x, labels, kernel_labels + result)
        sizes = dict(zip(left, x.shape, strict=True)) | kernel_sizes
        if differ:
            return axes.multiplied(x, left, weights(x), sizes, result)
        x = _permuted(x, left, [*axes.leading, *axes.rows, *axes.inner])
        kept = [sizes[c] for c in axes.rows]
        y = reshaped(
            weights(reshaped(x, (-1, *kept, _count(sizes, axes.inner)))), (-1, *kept, *[sizes[c] for c in axes.columns])
        )
        return _permuted(y, [*axes.leading, *axes.rows, *axes.columns], result)

    return contract


def _count(sizes: dict, labels) -> int:
    return math.prod(sizes[c] for c in labels)


def _summed(x, labels: str, needed: str):
    """`x` summed over the axes that nothing else needs, and the labels that are left."""
    axes = tuple(n for n, c in enumerate(labels) if c not in needed)
    return (ops.sum(x, axis=axes) if axes else x), _needed(labels, needed)


def _needed(labels: str, needed: str) -> str:
    return "".join(c for c in labels if c in needed)


def _permuted(x, labels, wanted):
    return transposed(x, [list(labels).index(c) for c in wanted])


def _einsum_dense(layer, args, kwargs):
    """Its bias joins the Dense where there is one number for each new axis; otherwise it is added behind."""
    kernel = layer.kernel
    found = labels_of(layer.equation, [len(args[0].shape), len(kernel.shape)])
    if found is None or found[0][0][0] != found[1][0]:
        return None
    (labels, kernel_labels), result = found
    has_bias, per_column = layer.bias is not None, False
    if has_bias:
        columns = {c for c in kernel_labels if c not in labels}
        per_column = columns == set(layer.bias_axes) and not any(c in labels and c in result for c in kernel_labels)
    contract = _contraction_with_weights(
        labels,
        kernel_labels,
        result,
        kernel,
        layer.trainable,
        layer.name,
        bias=np.ravel(np.asarray(layer.bias, "float32")) if per_column else None,
        kernel_regularizer=layer.kernel_regularizer,
        bias_regularizer=layer.bias_regularizer,
        kernel_constraint=layer.kernel_constraint,
        bias_constraint=layer.bias_constraint,
    )
    added = None
    if has_bias and not per_column:
        added = Constant(layer.bias, trainable=layer.trainable, name="bias", **penalties(layer.bias))
    activation = symbolic(layer.activation)

    def apply(inputs):
        y = contract(inputs)
        return activation(y if added is None else y + added(y))

    return contract and apply


def _dot(layer, args, kwargs):
    """`keras.layers.Dot`: one axis of each tensor is summed up, sample by sample."""

    def dot(inputs):
        ranks = [len(x.shape) for x in inputs]
        axes = [layer.axes] * 2 if isinstance(layer.axes, int) else layer.axes
        axes = [axis % rank for axis, rank in zip(axes, ranks, strict=True)]
        if layer.normalize:
            inputs = [ops.normalize(x, axis=axis) for x, axis in zip(inputs, axes, strict=True)]
        letters = iter(string.ascii_lowercase[2:])
        first, second = (
            "".join("a" if n == 0 else "b" if n == axis else next(letters) for n in range(rank))
            for axis, rank in zip(axes, ranks, strict=True)
        )
        result = "".join(c for c in first + second[1:] if c != "b")
        product = ops.einsum(f"{first},{second}->{result}", *inputs)
        return ops.expand_dims(product, -1) if len(result) == 1 else product

    return dot


def _tensordot(operation, args, kwargs):
    """Of a tensor and weights."""
    x, kernel = args
    if not isinstance(x, keras.KerasTensor) or isinstance(kernel, keras.KerasTensor):
        return None
    rank, depth, axes = len(x.shape), len(kernel.shape), operation.axes
    if isinstance(axes, int):
        axes = list(range(rank - axes, rank)), list(range(axes))
    pairs = [(int(one) % rank, int(other) % depth) for one, other in zip(*map(np.ravel, axes), strict=True)]
    labels = string.ascii_lowercase[:rank]
    letters = iter(string.ascii_lowercase[rank:])
    of_kernel = {other: labels[one] for one, other in pairs}
    kernel_labels = "".join(of_kernel[n] if n in of_kernel else next(letters) for n in range(depth))
    result = "".join(c for c in labels if c not in kernel_labels) + "".join(c for c in kernel_labels if c not in labels)
    return lambda x, kernel: ops.einsum(f"{labels},{kernel_labels}->{result}", x, kernel)


RULES = {
    "Dot": _dot,
    "EinsumDense": _einsum_dense,
    "ops.Einsum": _einsum,
    "ops.Tensordot": _tensordot,
}
