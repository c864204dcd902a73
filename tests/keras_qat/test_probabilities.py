"""Which softmaxes become `Probabilities`, and what they take over."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_qat.compounds import Mask, Narrow, Probabilities, Scores, WideMatmul
from keras_qat.graph.probabilities import refine_probabilities
from keras_qat.graph.walk import Graph, key_of, nodes_of
from keras_qat.layers import ChannelScale
from keras_qat.primitives import Clamp

_KEEP = np.tri(4, dtype=bool)


def _refined(build):
    """The model, rewritten; `build` maps queries, keys and values to the output."""
    inputs = [keras.Input((4, 8), name=name) for name in "qkv"]
    outputs = build(*inputs)
    return keras.Model(inputs, outputs), refine_probabilities(Graph(inputs, outputs)).model()


def _product(query, key):
    return ops.matmul(query, ops.transpose(key, (0, 2, 1)))


def _kinds(model) -> list:
    return [key_of(node.operation) for node in nodes_of(model)]


def _the(model, kind):
    (found,) = [layer for layer in model.layers if isinstance(layer, kind)]
    return found


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: ChannelScale(0.3)(_product(q, k)),
        lambda q, k: _product(ChannelScale(0.3)(q), k),
        lambda q, k: _product(ChannelScale(0.6)(q), ChannelScale(0.5)(k)),
        lambda q, k: Mask(_KEEP)(ChannelScale(0.3)(_product(q, k))),
        lambda q, k: ChannelScale(0.3)(Mask(_KEEP)(_product(q, k))),
        lambda q, k: ops.reshape(ChannelScale(0.3)(ops.reshape(_product(q, k), (-1, 2, 2, 4))), (-1, 4, 4)),
    ],
    ids=["scores", "queries", "both", "in front of a mask", "behind a mask", "between moves"],
)
def test_factors_are_taken_over(scores):
    model, refined = _refined(lambda q, k, v: ops.matmul(layers.Dropout(0.1)(ops.softmax(scores(q, k))), v))
    assert _the(refined, Probabilities).factor == pytest.approx(0.3)
    assert _the(refined, Scores).factor == pytest.approx(0.3)
    assert "ChannelScale" not in _kinds(refined) and "ops.Softmax" not in _kinds(refined)
    inputs = [np.random.default_rng(n).normal(0, 1, (3, 4, 8)).astype("float32") for n in range(3)]
    np.testing.assert_allclose(refined(inputs), model(inputs), atol=1e-4)


def test_scores_stand_right_behind_what_writes_them():
    _, refined = _refined(lambda q, k, v: ops.matmul(ops.softmax(Mask(_KEEP)(ChannelScale(0.3)(_product(q, k)))), v))
    kinds = ["ops.Transpose", "WideMatmul", "Scores", "Mask", "Probabilities", "WideMatmul", "Narrow"]
    assert _kinds(refined) == kinds
    np.testing.assert_array_equal(_the(refined, Scores).keep, _KEEP)


@pytest.mark.parametrize(
    "build",
    [
        lambda q, k, v: ops.softmax(_product(q, k)),
        lambda q, k, v: ops.softmax(ChannelScale(-0.3)(_product(q, k))) + 1.0,
    ],
    ids=["output", "read by more than matmuls"],
)
def test_other_softmaxes_stay(build):
    _, refined = _refined(build)
    assert "ops.Softmax" in _kinds(refined) and "Scores" not in _kinds(refined)


def test_what_others_read_stays():
    def build(q, k, v):
        scaled = ChannelScale(0.3)(_product(q, k))
        return ops.matmul(ops.softmax(scaled), v), scaled

    _, refined = _refined(build)
    assert _the(refined, Probabilities).factor == 1.0
    assert "ChannelScale" in _kinds(refined)


def test_masks_have_scores_in_front_at_the_output_too():
    _, refined = _refined(lambda q, k, v: ops.softmax(ChannelScale(0.3)(Mask(_KEEP)(_product(q, k)))))
    assert _kinds(refined) == ["ops.Transpose", "ops.Matmul", "Scores", "Mask", "ChannelScale", "ops.Softmax"]
    assert _the(refined, Scores).factor == pytest.approx(0.3)


def test_scores_without_a_range_of_their_own_are_copied_for_a_mask():
    _, refined = _refined(lambda q, k, v: ops.matmul(ops.softmax(Mask(_KEEP)(q[:, :, :4])), v))
    assert _kinds(refined) == [
        *("ops.GetItem", "Rescale", "Scores", "Mask", "Probabilities"),
        *("WideMatmul", "Narrow"),
    ]


def test_softmaxes_in_float_stay():
    inputs = keras.Input((4, 4))
    graph = Graph(inputs, ops.matmul(ops.softmax(Mask(_KEEP)(inputs * 1.0)), inputs))
    kinds = _kinds(refine_probabilities(graph, lambda node: True))
    assert "ops.Softmax" in kinds and "Scores" in kinds


@pytest.mark.parametrize(
    "behind, kinds",
    [
        (lambda x: x, ["WideMatmul", "Narrow"]),
        (lambda x: layers.Dense(3)(ops.reshape(x, (-1, 2, 16))), ["WideMatmul", "ops.Reshape", "Dense", "Narrow"]),
        (lambda x: Clamp(-1.0, 1.0)(layers.Dense(3)(x)), ["WideMatmul", "Narrow", "Dense", "Clamp"]),
        (lambda x: layers.Dense(3)(x) + layers.Dense(3)(x), ["WideMatmul", "Narrow", "Dense", "Dense", "ops.Add"]),
    ],
    ids=["output", "dense", "dense with an activation", "two dense layers"],
)
def test_where_the_sixteen_bits_end(behind, kinds):
    model, refined = _refined(lambda q, k, v: behind(ops.matmul(ops.softmax(_product(q, k)), v)))
    assert _kinds(refined)[_kinds(refined).index("Probabilities") + 1 :] == kinds
    assert all(isinstance(_the(refined, kind), kind) for kind in (Narrow, Probabilities))
    inputs = [np.random.default_rng(n).normal(0, 1, (3, 4, 8)).astype("float32") for n in range(3)]
    np.testing.assert_allclose(refined(inputs), model(inputs), atol=1e-4)


def test_matmuls_in_float_stay():
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, ops.matmul(ops.softmax(_product(inputs, inputs)), inputs))
    for kind in ("ops.Matmul", "ops.Softmax"):
        refined = refine_probabilities(model, lambda node, kind=kind: key_of(node.operation) == kind)
        assert not any(isinstance(layer, (WideMatmul, Narrow)) for layer in refined.layers)
