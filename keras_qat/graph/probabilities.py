"""Softmaxes that weigh a sum: 16 bits from the scores to what comes of it."""

import dataclasses
import math
from collections.abc import Callable

from keras_qat.compounds import Mask, Narrow, Probabilities, Scores, WideMatmul
from keras_qat.graph.walk import Reused, key_of, nodes_of, producers_of, readers_of, rewrite
from keras_qat.layers import Rescale
from keras_qat.operations import row_of
from tflite_export.program import unique_name

_MOVES = ("Reshape", "ops.ExpandDims", "ops.Reshape", "ops.Squeeze", "ops.Transpose")


def refine_probabilities(model, stays_in_float: Callable = lambda node: False):
    """`softmax(mask(c · q @ k)) @ v` where only matmuls read the softmax → `Probabilities` of `Scores` between two
    `WideMatmul`s, the factor taken over by the softmax. `Narrow` ends it, behind the dense layer that follows or at once.

    SOFTMAX's own steps of 1/256 are too coarse for weights of a sum, and so are 8 bits for the scores and for the sums
    themselves, most of which are small where many places count alike. At the model's output a softmax stays what it is;
    only a mask has `Scores` in front of it everywhere.
    """
    graph, reused = _Graph(producers_of(model), readers_of(model), stays_in_float), Reused()
    softmaxes = [node for node in nodes_of(model) if key_of(node.operation) == "ops.Softmax"]
    attentions = [found for found in (_attention(node, graph) for node in softmaxes) if found is not None]
    if not attentions:
        return model
    begins = {id(attention.begin): attention for attention in attentions}
    weights = {id(attention.softmax): attention.factor for attention in attentions if attention.weighs}
    absorbed = {id(node) for attention in attentions if attention.weighs for node in attention.scalings}
    wide = {id(node) for attention in attentions for node in attention.matmuls}
    ends = {id(graph.end_of(node)) for attention in attentions for node in attention.sums}
    names: list[str] = []

    def visit(node, args, kwargs):
        if id(node) in begins:
            args = (_scores(begins[id(node)], *args, graph=graph), *args[1:])
        if id(node) in absorbed:
            return args[0]
        name = node.operation.name
        if id(node) in weights:
            return Probabilities(weights[id(node)], name=name)(args[0])
        result = WideMatmul(name=name)(*args, **kwargs) if id(node) in wide else reused.call(node, args, kwargs)
        if id(node) not in ends:
            return result
        names.append(unique_name(f"{name}.narrow", names))  # a shared layer ends several
        return Narrow(name=names[-1])(result)

    return rewrite(model, visit)


@dataclasses.dataclass
class _Attention:
    """What belongs to a softmax.

    Args:
        softmax: Its node.
        begin: The node that is to read `Scores`: the first mask, or else the first that reads the scores.
        scalings: The nodes that multiply with a number between `begin` and the softmax; if it weighs, those in front too.
        sums: The matmuls that read its result, if they are all that does and none stays in float: it weighs sums.
        product: The matmul that makes its scores, if it weighs.
    """

    softmax: object
    begin: object
    scalings: list
    sums: list
    product: object = None

    @property
    def weighs(self) -> bool:
        return bool(self.sums)

    @property
    def factor(self) -> float:
        return math.prod(node.operation.scalars[0] for node in self.scalings)

    @property
    def matmuls(self) -> list:
        return self.sums if self.product is None else [self.product, *self.sums]


def _attention(softmax, graph) -> _Attention | None:
    chain, sums = [softmax, *graph.chain_to(softmax.input_tensors[0])], graph.matmuls_behind(softmax.outputs[0])
    if any(graph.stays_in_float(node) for node in (*chain, *sums)):
        sums = []
    masks = [node for node in chain if isinstance(node.operation, Mask)]
    if not sums and not masks:
        return None
    begin = (masks or chain)[-1]
    product = graph.lone_producer(chain[-1].input_tensors[0])
    if product is None or key_of(product.operation) != "ops.Matmul" or graph.stays_in_float(product) or not sums:
        product = None
    if not sums:
        chain = chain[: chain.index(begin)]
    elif product is not None:
        chain += [node for factor in product.input_tensors for node in graph.chain_to(factor)]
    return _Attention(softmax, begin, [node for node in chain if _is_scaling(node)], sums, product)


def _scores(attention: _Attention, x, *keep, graph):
    """Tells the range to the op that writes the scores. If that is none with a range of its own, one is put in for masks."""
    operation = attention.begin.operation
    is_mask = isinstance(operation, Mask)
    name = f"{attention.softmax.operation.name}.scores"
    if not graph.has_own_range(attention.begin.input_tensors[0]):
        if not is_mask:
            return x
        x = Rescale(name=f"{name}.copy")(x)
    return Scores(attention.factor, operation.keep if is_mask else None, name=name)(x, *(keep if is_mask else ()))


@dataclasses.dataclass
class _Graph:
    producers: dict
    readers: dict
    stays_in_float: Callable

    def matmuls_behind(self, tensor) -> list:
        """The matmuls that read a tensor, seen through moves; none if anything else computes with it."""
        matmuls = []
        for reader in self.readers.get(id(tensor), []):
            if reader is None:
                return []
            if key_of(reader.operation) == "ops.Matmul":
                found = [reader]
            else:
                found = self.matmuls_behind(reader.outputs[0]) if _passes_on(reader) else []
            if not found:
                return []
            matmuls += found
        return matmuls

    def end_of(self, matmul):
        """The node whose result goes back to 8 bits: the dense layer that alone reads the sums, or the matmul itself."""
        node = matmul
        while (reader := self.lone_reader(node)) is not None and _passes_on(reader):
            node = reader
        is_dense = reader is not None and key_of(reader.operation) == "Dense" and not self.stays_in_float(reader)
        if not is_dense or any(_folds(following) for following in self.readers[id(reader.outputs[0])]):
            return matmul
        return reader

    def lone_reader(self, node):
        found = self.readers.get(id(node.outputs[0]), [])
        return found[0] if len(found) == 1 else None

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


def _folds(node) -> bool:
    """Whether it would vanish in the dense layer in front."""
    return node is not None and (
        key_of(node.operation) in ("BatchNormalization", "ChannelScale") or row_of(node.operation).range == "clamp"
    )


def _is_scaling(node) -> bool:
    scalars = node.operation.scalars if key_of(node.operation) == "ChannelScale" else None
    return scalars is not None and scalars[0] > 0 and scalars[1] == 0
