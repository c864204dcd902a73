"""The batch axis: where it is, and how many rows of it one sample has.

It need not stand in front: `qkv` is often transposed to (3, batch, heads, places, size) and taken apart. Rows are several
where windows were moved into the batch axis, as Swin and ViTDet do.
"""

import math
from fractions import Fraction

from keras_qat.graph.walk import key_of, nodes_of

_RESHAPES = ("Reshape", "ops.Reshape")


def rows_per_sample(model) -> dict[int, Fraction]:
    """Tensor id → the rows of its batch that belong to one sample of the model's; a whole number, but for what mixes samples."""
    rows = {id(tensor): Fraction(1) for tensor in model.inputs}
    for node in nodes_of(model):
        sources = [tensor for tensor in node.input_tensors if batch_axis(tensor) is not None]
        count = rows.get(id(sources[0]), Fraction(1)) if sources else Fraction(1)
        rows.update((id(tensor), count * _growth(node, tensor)) for tensor in node.outputs)
    return rows


def batch_axis(tensor) -> int | None:
    return tensor.shape.index(None) if None in tensor.shape else None


def _growth(node, result) -> Fraction:
    """How many times as many rows the result has."""
    before, after = (math.prod(size for size in x.shape if size is not None) for x in (node.input_tensors[0], result))
    is_reshape = key_of(getattr(node.operation, "operation", node.operation)) in _RESHAPES
    return Fraction(before, after) if is_reshape and batch_axis(result) is not None and after else Fraction(1)
