"""Masks that people add to scores as very low numbers, `scores + (1 - mask) * -1e9`, become masks."""

import dataclasses

import keras
from keras import tree

from keras_qat.compounds import Mask
from keras_qat.graph.lower.attention import BELOW_ALL_SCORES
from keras_qat.graph.lower.truths import truth_of
from keras_qat.graph.walk import MOVES, Graph, Reused, clone, is_index, key_of, nodes_of, producers_of, rewrite
from keras_qat.truths import Not

_SUMS = ("Add", "ops.Add")
_CASTS = ("Number", "ops.Cast", "ops.ConvertToTensor", "ops.StopGradient")


@dataclasses.dataclass
class _Penalty:
    """What is added to scores where they are hidden, and nothing elsewhere.

    Args:
        scores: The other tensors of the sum: the scores, and a bias that the mask was added to.
        truth: The tensor of whole numbers that it comes from.
        moves: The nodes that move it, the first one first.
        hides_zero: Scores are hidden where the truth is 0, not where it is 1.
    """

    scores: list
    truth: object
    moves: list
    hides_zero: bool


def hide_what_is_added(model: Graph) -> Graph:
    """`scores + low * f(mask)`, of a mask of whole numbers → `Mask`. Added up on one grid the scores would be lost in it."""
    producers = producers_of(model)
    penalties = {id(node): _penalty(node, producers) for node in nodes_of(model) if key_of(node.operation) in _SUMS}
    if not any(penalties.values()):
        return model
    reused, new = Reused(), {}

    def visit(node, args, kwargs):
        tensors = [x for x in tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        new.update(zip(map(id, node.input_tensors), tensors, strict=True))
        penalty = penalties.get(id(node))
        if penalty is None:
            return reused.call(node, args, kwargs)
        flags = truth_of(new[id(penalty.truth)])
        for move in penalty.moves:
            again = clone(move.operation, f"{node.operation.name}.{move.operation.name}")
            flags = again(flags, *move.arguments.args[1:], **move.arguments.kwargs)
        keep = flags if penalty.hides_zero else Not(name=f"{node.operation.name}.keep")(flags)
        scores, *biases = [new[id(tensor)] for tensor in penalty.scores]
        for bias in biases:
            scores = clone(node.operation, f"{node.operation.name}.bias")(scores, bias)
        return Mask(name=node.operation.name)(scores, keep)

    return rewrite(model, visit)


def _penalty(node, producers) -> _Penalty | None:
    if len(node.input_tensors) != 2:
        return None
    for scores, added in (node.input_tensors, node.input_tensors[::-1]):
        if scores.shape != node.outputs[0].shape or len(scores.shape) != len(added.shape):
            continue
        for low, *biases in _splits(added, producers):
            found = _derived(low, producers)
            if found is None:
                continue
            truth, moves, (of_zero, of_one) = found
            if min(of_zero, of_one) <= BELOW_ALL_SCORES and max(of_zero, of_one) == 0:
                return _Penalty([scores, *biases], truth, moves, hides_zero=of_zero < of_one)
    return None


def _splits(tensor, producers):
    """What may be the mask, and what is added to it."""
    yield (tensor,)
    node = producers.get(id(tensor))
    while node is not None and key_of(node.operation) in _CASTS:
        node = producers.get(id(node.input_tensors[0]))
    if node is not None and key_of(node.operation) in _SUMS and len(node.input_tensors) == 2:
        one, other = node.input_tensors
        if len(one.shape) == len(other.shape):
            yield one, other
            yield other, one


def _derived(tensor, producers):
    """The whole numbers that a tensor comes from, how they are moved, and what becomes of 0 and of 1; None if that is not so."""
    moves, scalings = [], []
    while not is_index(tensor):
        node = producers.get(id(tensor))
        key = node and key_of(node.operation)
        if key == "ChannelScale" and node.operation.scalars is not None:
            scalings.append(node.operation.scalars)
        elif key in MOVES:
            moves.append(node)
        elif key not in _CASTS:
            return None
        tensor = node.input_tensors[0]
    values = [0.0, 1.0]
    for factor, offset in reversed(scalings):
        values = [value * factor + offset for value in values]
    return tensor, moves[::-1], values
