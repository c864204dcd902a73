"""Lowered attention and contractions compute what the float layers compute, and learn what these learn."""

import keras
import numpy as np
import pytest
from cases import inputs_for
from cases_attention import ATTENTION, CONTRACTIONS
from keras import layers, ops

from keras_qat.compounds import InverseRoot, Mask
from keras_qat.graph.lower import lowering_of
from keras_qat.graph.lower.attention import added_mask, masked
from keras_qat.graph.lower.contractions import labels_of
from keras_qat.graph.lower.moves import reshaped, transposed
from keras_qat.graph.trace import trace
from keras_qat.graph.walk import key_of, nodes_of
from keras_qat.operations import row_of

# Keras has one learned number where a ChannelScale or Dense has one for each feature.
_ONE_BECOMES_MANY = {"attention", "attention_concat"}


def _lowered(model):
    graph, problems = trace(
        model, lambda one: isinstance(one, (InverseRoot, Mask)) or row_of(one) is not None, lowering_of
    )
    return graph.model(), problems


def _size(variables) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)


def _kinds(model) -> list:
    return [key_of(node.operation) for node in nodes_of(model)]


@pytest.mark.parametrize("case", [*ATTENTION, *CONTRACTIONS], ids=str)
def test_same_numbers_same_weights(case):
    model = case.one_op()
    for variable in model.trainable_variables:
        variable.assign_add(np.random.default_rng(0).normal(0, 0.1, variable.shape))
    flat, problems = _lowered(model)
    assert not problems
    inputs = inputs_for(model, 8)
    np.testing.assert_allclose(flat(inputs), model(inputs), atol=1e-5)
    if case.name not in _ONE_BECOMES_MANY:
        assert _size(flat.trainable_variables) == _size(model.trainable_variables)


def test_scores_are_returned_too():
    inputs = keras.Input((6, 8))
    outputs = layers.MultiHeadAttention(2, 4)(inputs, inputs, return_attention_scores=True, use_causal_mask=True)
    model = keras.Model(inputs, outputs)
    flat, problems = _lowered(model)
    assert not problems
    x = inputs_for(model, 4)
    for ours, theirs in zip(flat(x), model(x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_group_query_attention_repeats_nothing():
    inputs = keras.Input((6, 8))
    layer = layers.GroupQueryAttention(4, 4, 2)
    flat, _ = _lowered(keras.Model(inputs, layer(inputs, inputs)))
    assert layer.num_repeats == 2
    shapes = [node.outputs[0].shape for node in nodes_of(flat) if key_of(node.operation) == "ops.Matmul"]
    assert shapes == [(None, 2, 12, 6), (None, 2, 12, 4)]


def test_einsum_dense_keeps_regularizers_constraints_and_activation():
    inputs = keras.Input((6, 8))
    layer = layers.EinsumDense(
        "abc,cde->abde",
        (None, 3, 5),
        activation="relu",
        bias_axes="de",
        kernel_regularizer=keras.regularizers.L2(0.1),
        kernel_constraint=keras.constraints.NonNeg(),
    )
    model = keras.Model(inputs, layer(inputs))
    flat, _ = _lowered(model)
    assert _kinds(flat) == ["Dense", "ops.Reshape", "ops.Relu"]
    (dense,) = [one for one in flat.layers if isinstance(one, layers.Dense)]
    np.testing.assert_allclose(sum(flat.losses), sum(model.losses), rtol=1e-6)
    assert isinstance(dense.kernel_constraint, keras.constraints.NonNeg)


@pytest.mark.parametrize(
    "build",
    [
        lambda x: ops.einsum("abc,dbc->ad", x, x),
        lambda x: ops.einsum("abc,abc,abc->abc", x, x, x),
        lambda x: ops.einsum("abc->bca", x),
        lambda x: ops.einsum("abb->ab", x),
    ],
    ids=["over the batch", "three tensors", "moves the batch", "diagonal"],
)
def test_what_has_no_integer_form_is_refused(build):
    inputs = keras.Input(batch_shape=(2, 8, 8))
    _, problems = _lowered(keras.Model(inputs, build(inputs)))
    assert problems


@pytest.mark.parametrize(
    "subscripts, ranks, expected",
    [
        ("ab,bc->ac", [2, 2], (["ab", "bc"], "ac")),
        (" ab, bc -> ac ", [2, 2], (["ab", "bc"], "ac")),
        ("...x,xy->...y", [4, 2], (["abcx", "xy"], "abcy")),
        ("...x,...x->...", [3, 2], (["abx", "bx"], "ab")),
        ("ab,bc", [2, 2], (["ab", "bc"], "ac")),
        ("ba,cb", [2, 2], (["ba", "cb"], "ac")),
        ("aab->ab", [3], None),
    ],
)
def test_labels(subscripts, ranks, expected):
    assert labels_of(subscripts, ranks) == expected


def test_moves_that_move_nothing_are_left_out():
    x = keras.Input((6, 1, 8))
    assert reshaped(x, (-1, 6, 1, 8)) is x
    assert transposed(x, (0, 1, 2, 3)) is x
    assert transposed(x, (0, 2, 1, 3))._keras_history.operation.__class__.__name__ == "Reshape"
    assert transposed(x, (0, 3, 2, 1))._keras_history.operation.__class__.__name__ == "Transpose"


def test_additive_masks_are_told_from_biases():
    assert added_mask(np.array([0.0, -50.0], "float32")) is None
    assert added_mask(np.array(-1e9, "float32")) is None
    scores = keras.Input((3, 2))
    assert isinstance(added_mask(np.array([0.0, -1e9], "float32"))(scores)._keras_history.operation, Mask)


@pytest.mark.parametrize(
    "keep", [np.zeros((3, 2)), np.tri(6).reshape(2, 3, 6)[..., :2]], ids=["empty row", "by sample"]
)
def test_masks_that_are_no_constants_are_refused(keep):
    with pytest.raises(ValueError, match="Expected a mask"):
        masked(keras.Input((3, 2)), keep)
