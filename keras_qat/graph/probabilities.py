"""Softmaxes that weigh a sum: finer scores for them to read, and finer probabilities."""

import dataclasses

from keras_qat.compounds import Mask, Probabilities, Scores
from keras_qat.graph.walk import Copies, key_of, nodes_of, producers_of, readers_of, rewrite
from keras_qat.layers import Rescale
from keras_qat.operations import row_of

_MOVES = ("Reshape", "ops.ExpandDims", "ops.Reshape", "ops.Squeeze", "ops.Transpose")


def refine_probabilities(model):
    """`softmax(mask(c · x))` that only matmuls read → `Probabilities` of `Scores`, the factor taken over by the softmax.

    SOFTMAX's own steps of 1/256 are too coarse for weights of a sum. At the model's output they stay.
    """
    graph, copies = _Graph(producers_of(model), readers_of(model)), Copies()
    changes = [_change(node, graph) for node in nodes_of(model) if graph.only_weighs(node)]
    factors = {id(change.softmax): change.factor for change in changes}
    scalings = {id(one) for change in changes for one in change.scalings}
    begins = {id(change.begin): change for change in changes}

    def visit(node, args, kwargs):
        if id(node) in begins:
            args = (_scores(begins[id(node)], args[0], graph), *args[1:])
        if id(node) in scalings:
            return args[0]
        if id(node) in factors:
            return Probabilities(factors[id(node)], name=node.operation.name)(args[0])
        return copies[node.operation](*args, **kwargs)

    return rewrite(model, visit)


@dataclasses.dataclass
class _Change:
    """A softmax to refine.

    Args:
        softmax: Its node.
        begin: The node that is to read `Scores`: the first mask, or else the first that reads the scores.
        scalings: The nodes that multiply on the way.
        factor: What they multiply with.
    """

    softmax: object
    begin: object
    scalings: list
    factor: float


def _change(softmax, graph) -> _Change:
    chain = [softmax, *graph.in_front_of(softmax)]
    scalings, factor = [node for node in chain if _is_scaling(node)], 1.0
    for node in scalings:
        factor *= node.operation.scalars[0]
    masks = [node for node in chain if isinstance(node.operation, Mask)]
    return _Change(softmax, (masks or chain)[-1], scalings, factor)


def _scores(change: _Change, x, graph):
    """Tells the range to the op that writes the scores. If that is none which has a range of its own, one is put in."""
    mask = change.begin.operation.keep if isinstance(change.begin.operation, Mask) else None
    name = f"{change.softmax.operation.name}.scores"
    if not graph.has_own_range(change.begin.input_tensors[0]):
        if mask is None:
            return x
        x = Rescale(name=f"{name}.copy")(x)
    return Scores(change.factor, mask, name=name)(x)


@dataclasses.dataclass
class _Graph:
    producers: dict
    readers: dict

    def only_weighs(self, node) -> bool:
        """Whether it is a softmax that nothing but matmuls computes with."""
        return key_of(node.operation) == "ops.Softmax" and self._only_in_matmuls(node.outputs[0])

    def _only_in_matmuls(self, tensor) -> bool:
        found = self.readers.get(id(tensor), [])
        return bool(found) and all(
            reader is not None
            and (
                key_of(reader.operation) == "ops.Matmul"
                or (_passes_on(reader) and self._only_in_matmuls(reader.outputs[0]))
            )
            for reader in found
        )

    def in_front_of(self, node) -> list:
        """The masks, scalings and moves between a softmax and its scores, backwards, where nothing else reads them."""
        chain = []
        while (node := self.producers.get(id(node.input_tensors[0]))) is not None:
            is_alone = len(self.readers[id(node.outputs[0])]) == 1
            if not is_alone or not (isinstance(node.operation, Mask) or _is_scaling(node) or _moves(node)):
                break
            chain.append(node)
        return chain

    def has_own_range(self, tensor) -> bool:
        """Whether an op writes the tensor to a range of its own, for one reader."""
        producer = self.producers.get(id(tensor))
        row = None if producer is None else row_of(producer.operation)
        return row is not None and row.range_kind(producer) == "own" and len(self.readers[id(tensor)]) == 1


def _passes_on(node) -> bool:
    row = row_of(node.operation)
    return _moves(node) or (row is not None and row.range == "train")


def _moves(node) -> bool:
    return key_of(node.operation) in _MOVES


def _is_scaling(node) -> bool:
    scalars = node.operation.scalars if key_of(node.operation) == "ChannelScale" else None
    return scalars is not None and scalars[0] > 0 and scalars[1] == 0
