"""Attention: products of queries and keys, masked, through a softmax, as weights of the values."""

import contextlib
import functools

import keras
import numpy as np
from keras import ops

from keras_qat.compounds import Mask
from keras_qat.graph.lower import contractions
from keras_qat.graph.lower.moves import reshaped, transposed
from keras_qat.graph.lower.truths import chosen, counts, truth_of
from keras_qat.graph.lower.weights import dense_of
from keras_qat.layers import ChannelScale
from keras_qat.truths import Logic, Not

# What code puts in for masked scores, or adds to them, is far below this; no score is.
BELOW_ALL_SCORES = -1e3


def _dot_product_attention(operation, args, kwargs):
    """`softmax(q · kᵀ · scale + bias) · v` for each head.

    Heads that share a key and a value become more rows of one head, so that neither has to be repeated.
    """
    is_causal = operation.is_causal

    def attend(query, key, value, bias=None, mask=None, scale=None):
        (length, heads, size), (places, groups) = query.shape[1:], key.shape[1:3]
        shape = (groups, heads // groups * length)
        bias, mask = _split(bias, mask, _causal_mask(length, places) if is_causal else None)
        bias, mask = (_by_group(one, heads, length, (*shape, places)) for one in (bias, mask))
        rows = reshaped(transposed(query, (0, 2, 1, 3)), (-1, *shape, size))
        scores = ops.matmul(rows, transposed(key, (0, 2, 3, 1))) * (size**-0.5 if scale is None else float(scale))
        weights = ops.softmax(masked(scores if bias is None else scores + bias, mask), axis=-1)
        result = ops.matmul(weights, transposed(value, (0, 2, 1, 3)))
        return transposed(reshaped(result, (-1, heads, length, value.shape[-1])), (0, 2, 1, 3))

    return attend


def _by_group(added, heads, length, shape):
    """A bias or mask that broadcasts to (batch, heads, length, places), for scores of another shape."""
    if added is None or shape[0] == heads:
        return added
    whole = (heads, length, shape[-1])
    if is_computed(added) and added.shape[1:3] == (1, 1) and added.dtype == "bool":
        return added
    if is_computed(added):
        return ops.reshape(ops.broadcast_to(added, (added.shape[0], *whole)), (-1, *shape))
    return np.broadcast_to(added, (1, *whole)).reshape(1, *shape)


def _causal_mask(length: int, places: int) -> np.ndarray:
    return np.tril(np.ones((length, places), bool))


def _split(bias, *masks):
    """The bias without what only masks, and one mask of everything that does; each None if nothing is left of it."""
    if isinstance(bias, keras.KerasTensor) or bias is None:
        return bias, _all_of(*masks)
    keep, bias = _additive_mask(np.asarray(bias, "float32"))
    return (bias if np.any(bias) else None), _all_of(keep, *masks)


def _additive_mask(values: np.ndarray):
    """Constants added to scores: which of them leave the scores in sight (None: all), and what they add there."""
    keep = values > BELOW_ALL_SCORES
    if np.all(keep) or not np.any(keep):
        return None, values
    return keep, np.where(keep, values, 0.0)


def added_mask(values: np.ndarray):
    """`x + values`, where some of the values are there to push scores out of the softmax's sight; None if none is."""
    keep, rest = _additive_mask(values)
    return None if keep is None else lambda scores: masked(scores + rest if np.any(rest) else scores, keep)


def _all_of(*masks):
    """One mask of several, constant ones and computed ones; None if there is none."""
    masks = [mask for mask in masks if mask is not None]
    constant = [np.asarray(mask, bool) for mask in masks if not is_computed(mask)]
    computed = [truth_of(mask) for mask in masks if is_computed(mask)]
    if not computed:
        return functools.reduce(np.logical_and, constant) if constant else None
    both = functools.reduce(lambda one, other: Logic("logical_and", name="mask")(one, other), computed)
    return Logic("logical_and", functools.reduce(np.logical_and, constant), name="mask")(both) if constant else both


def is_computed(mask) -> bool:
    return isinstance(mask, keras.KerasTensor)


def masked(scores, keep):
    """`scores` where `keep` is true, out of the softmax's sight elsewhere."""
    if is_computed(keep):
        if len(keep.shape) != len(scores.shape):
            raise ValueError(
                f"It masks scores of the shape {scores.shape}. Received: a mask of the shape {keep.shape}."
            )
        return Mask(name="mask")(scores, truth_of(keep))
    if keep is None or np.all(keep):
        return scores
    keep = np.asarray(keep, bool)
    keep = keep.reshape((1,) * (len(scores.shape) - keep.ndim) + keep.shape)
    if keep.shape[0] != 1 or not np.all(np.any(keep, axis=-1)):
        raise ValueError(
            "Expected a mask that is the same for all samples and leaves something to each row. Received: "
            f"shape {keep.shape}, {int(np.sum(~np.any(keep, axis=-1)))} rows with nothing."
        )
    return Mask(keep, name="mask")(scores)


def _where(operation, args, kwargs):
    """Scores out of the softmax's sight, or a choice between tensors and constants."""
    condition, *sides = [*args, *kwargs.values()]
    tensors = [is_computed(side) for side in sides]
    if len(sides) != 2 or all(tensors) or (is_computed(condition) and not counts(condition)):
        return None
    if any(tensors):
        at = tensors.index(True)
        if np.all(np.asarray(sides[1 - at]) <= BELOW_ALL_SCORES):
            return lambda keep, *sides: masked(sides[at], keep if at == 0 else _not(keep))
    if is_computed(condition):
        return lambda keep, *sides: chosen(truth_of(keep), *sides)
    return (lambda keep, *sides: chosen(np.asarray(keep, bool), *sides)) if any(tensors) else None


def _not(keep):
    return Not(name="mask")(truth_of(keep)) if is_computed(keep) else ~np.asarray(keep, bool)


def _softmax_layer(layer, args, kwargs):
    """With a mask; over several axes at once as over one that holds them all, the last one."""
    axes = [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)

    def softmax(inputs, mask=None):
        rank = len(inputs.shape)
        behind = sorted(axis % rank for axis in axes)
        order = [axis for axis in range(rank) if axis not in behind] + behind
        if order == list(range(rank)):
            return softmax_of_last(inputs, mask)
        if is_computed(mask):
            raise ValueError(
                f"It masks axes that are not the last ones, {layer.axis} of {rank}. Expected: a constant mask."
            )
        if mask is not None:
            mask = np.transpose(np.broadcast_to(np.asarray(mask, bool), (1, *inputs.shape[1:])), order)
        return transposed(softmax_of_last(transposed(inputs, order), mask), np.argsort(order).tolist())

    def softmax_of_last(inputs, mask):
        rank = len(inputs.shape)
        first = rank - len(axes)
        if is_computed(mask) and first != rank - 1:
            raise ValueError(f"It masks several axes at once, {layer.axis}. Expected: a constant mask, or one axis.")
        if mask is not None and not is_computed(mask):
            mask = np.broadcast_to(np.asarray(mask, bool), (1, *inputs.shape[1:])).reshape(
                1, *inputs.shape[1:first], -1
            )
        scores = reshaped(inputs, (-1, *inputs.shape[1:first], int(np.prod(inputs.shape[first:]))))
        return reshaped(ops.softmax(masked(scores, mask), axis=-1), (-1, *inputs.shape[1:]))

    return softmax


def _multi_head_attention(layer, args, kwargs):
    """The layer's own call, told the causal mask: inside of it the length of its sequences is unknown.

    Of a GroupQueryAttention without the repeats of keys and values, where `dot_product_attention` follows, which does
    without them.
    """

    @functools.wraps(layer.call)
    def attend(query, value, key=None, attention_mask=None, use_causal_mask=False, **kwargs):
        if use_causal_mask:
            causal = _causal_mask(query.shape[1], value.shape[1])[None]
            attention_mask = _all_of(attention_mask, causal)
        if is_computed(of_query := kwargs.get("query_mask")):
            query._keras_mask = of_query  # where the layer looks for it
        takes_scores = kwargs.get("return_attention_scores") or getattr(layer, "dropout", 0) > 0
        repeats = getattr(layer, "num_repeats", 1)
        with _attribute(layer, num_repeats=repeats if takes_scores else 1):
            return layer.call(query, value, key=key, attention_mask=attention_mask, **kwargs)

    return attend


@contextlib.contextmanager
def _attribute(layer, **values):
    """A layer's attributes set for a while."""
    before = {name: getattr(layer, name) for name in values if hasattr(layer, name)}
    for name in before:
        setattr(layer, name, values[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(layer, name, value)


def _attention(layer, args, kwargs):
    """`keras.layers.Attention` and `AdditiveAttention`."""
    adds = isinstance(layer, keras.layers.AdditiveAttention) or layer.score_mode == "concat"
    scores_of = _additive_scores(layer, args[0][0].shape[-1]) if adds else _product_scores(layer)
    dropout = keras.layers.Dropout(layer.dropout, name="dropout") if layer.dropout > 0 else None

    def attend(inputs, mask=None, training=None, return_attention_scores=False, use_causal_mask=False):
        query, value, key = inputs[0], inputs[1], inputs[-1]
        of_query, of_value = (*(mask or ()), None, None)[:2]
        if of_query is not None:
            raise ValueError("It is given a mask of its queries. Expected: one of its values, mask=[None, mask].")
        scores = scores_of(query, key)
        causal = _causal_mask(*scores.shape[-2:])[None] if use_causal_mask else None
        keep = _all_of(of_value if of_value is None else ops.expand_dims(of_value, -2), causal)
        weights = ops.softmax(masked(scores, keep), axis=-1)
        result = ops.matmul(weights if dropout is None else dropout(weights), value)
        return (result, weights) if return_attention_scores else result

    return attend


def _product_scores(layer):
    scaled = _scaled(layer)
    return lambda query, key: ops.matmul(scaled(query), transposed(key, (0, 2, 1)))


def _additive_scores(layer, features):
    """`Σ w · tanh(scale · (q + k))` over the features: a Dense with one output, behind a tanh."""
    if isinstance(layer, keras.layers.AdditiveAttention):
        weights, scaled = np.ones(features) if layer.scale is None else layer.scale, lambda x: x
    else:
        weights, scaled = np.full(features, np.asarray(layer.concat_score_weight)), _scaled(layer)
    is_learned = layer.trainable and bool(layer.weights)
    total = dense_of(np.reshape(np.asarray(weights), (features, 1)), trainable=is_learned, name="score")

    def scores_of(query, key):
        both = ops.expand_dims(query, -2) + ops.expand_dims(key, -3)
        return ops.squeeze(total(ops.tanh(scaled(both))), axis=-1)

    return scores_of


def _scaled(layer):
    """The layer's learned factor: one number in Keras, here one for each feature, all starting from it."""
    if layer.scale is None:
        return lambda x: x
    return ChannelScale(np.asarray(layer.scale), trainable=layer.trainable, name="scale")


RULES = {
    **contractions.RULES,
    "AdditiveAttention": _attention,
    "Attention": _attention,
    "GroupedQueryAttention": _multi_head_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Softmax": _softmax_layer,
    "ops.DotProductAttention": _dot_product_attention,
    "ops.Where": _where,
}
