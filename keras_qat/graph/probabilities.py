"""Softmaxes that weigh a sum: finer scores for them to read, and finer probabilities."""

import dataclasses
import math
from collections.abc import Callable

from keras_qat.compounds import Mask, Probabilities, Scores
from keras_qat.graph.walk import Reused, key_of, nodes_of, producers_of, readers_of, rewrite
from keras_qat.layers import Rescale
from keras_qat.operations import row_of

_MOVES = ("Reshape", "ops.ExpandDims", "ops.Reshape", "ops.Squeeze", "ops.Transpose")


def refine_probabilities(model, stays_in_float: Callable = lambda node: False):
    """`softmax(mask(c · q @ k))` that only matmuls read → `Probabilities` of `Scores`, the factor taken over by the softmax.

    SOFTMAX's own steps of 1/256 are too coarse for weights of a sum. At the model's output they stay; only a mask has
    `Scores` in front of it everywhere.
    """
    graph, reused = _Graph(producers_of(model), readers_of(model)), Reused()
    softmaxes = [node for node in nodes_of(model) if key_of(node.operation) == "ops.Softmax"]
    found = [_attention(node, graph, can_change=not stays_in_float(node)) for node in softmaxes]
    attentions = [attention for attention in found if attention is not None]
    if not attentions:
        return model
    begins = {id(attention.begin): attention for attention in attentions}
    weights = {id(attention.softmax): attention.factor for attention in attentions if attention.weighs}
    absorbed = {id(node) for attention in attentions if attention.weighs for node in attention.scalings}

    def visit(node, args, kwargs):
        if id(node) in begins:
            args = (_scores(begins[id(node)], args[0], graph), *args[1:])
        if id(node) in absorbed:
            return args[0]
        if id(node) in weights:
            return Probabilities(weights[id(node)], name=node.operation.name)(args[0])
        return reused[node.operation](*args, **kwargs)

    return rewrite(model, visit)


@dataclasses.dataclass
class _Attention:
    """What belongs to a softmax.

    Args:
        softmax: Its node.
        weighs: Only matmuls read its result, and it is to be replaced.
        begin: The node that is to read `Scores`: the first mask, or else the first that reads the scores.
        scalings: The nodes that multiply with a number between `begin` and the softmax; if it weighs, those in front too.
    """

    softmax: object
    weighs: bool
    begin: object
    scalings: list

    @property
    def factor(self) -> float:
        return math.prod(node.operation.scalars[0] for node in self.scalings)


def _attention(softmax, graph, can_change: bool) -> _Attention | None:
    chain, weighs = [softmax, *graph.chain_to(softmax.input_tensors[0])], can_change and graph.only_weighs(softmax)
    masks = [node for node in chain if isinstance(node.operation, Mask)]
    if not weighs and not masks:
        return None
    begin = (masks or chain)[-1]
    product = graph.lone_producer(chain[-1].input_tensors[0])
    if not weighs:
        chain = chain[: chain.index(begin)]
    elif product is not None and key_of(product.operation) == "ops.Matmul":
        chain += [node for factor in product.input_tensors for node in graph.chain_to(factor)]
    return _Attention(softmax, weighs, begin, [node for node in chain if _is_scaling(node)])


def _scores(attention: _Attention, x, graph):
    """Tells the range to the op that writes the scores. If that is none with a range of its own, one is put in for masks."""
    operation = attention.begin.operation
    mask = operation.keep if isinstance(operation, Mask) else None
    name = f"{attention.softmax.operation.name}.scores"
    if not graph.has_own_range(attention.begin.input_tensors[0]):
        if mask is None:
            return x
        x = Rescale(name=f"{name}.copy")(x)
    return Scores(attention.factor, mask, name=name)(x)


@dataclasses.dataclass
class _Graph:
    producers: dict
    readers: dict

    def only_weighs(self, node) -> bool:
        """Whether nothing but matmuls computes with a node's result."""
        return self._only_in_matmuls(node.outputs[0])

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

    def chain_to(self, tensor) -> list:
        """The masks, scalings and moves that lead to a tensor, backwards, as long as nothing else reads their results."""
        chain = []
        while (node := self.lone_producer(tensor)) is not None:
            if not (isinstance(node.operation, Mask) or _is_scaling(node) or _moves(node)):
                break
            chain.append(node)
            tensor = node.input_tensors[0]
        return chain

    def lone_producer(self, tensor):
        """The node that makes a tensor for just one reader; else None."""
        return self.producers.get(id(tensor)) if len(self.readers[id(tensor)]) == 1 else None

    def has_own_range(self, tensor) -> bool:
        """Whether an op writes the tensor to a range of its own, for one reader."""
        producer = self.lone_producer(tensor)
        row = None if producer is None else row_of(producer.operation)
        return row is not None and row.range_kind(producer) == "own"


def _passes_on(node) -> bool:
    row = row_of(node.operation)
    return _moves(node) or (row is not None and row.range == "train")


def _moves(node) -> bool:
    return key_of(node.operation) in _MOVES


def _is_scaling(node) -> bool:
    scalars = node.operation.scalars if key_of(node.operation) == "ChannelScale" else None
    return scalars is not None and scalars[0] > 0 and scalars[1] == 0
