"""Lowered normalizations compute what the float layers compute, and learn what these learn."""

import keras
import numpy as np
import pytest
from cases import inputs_for
from cases_attention import NORMS
from keras import layers, ops

from keras_qat.compounds import InverseRoot
from keras_qat.graph.lower import lowering_of
from keras_qat.graph.lower.norms import UnitSpectralNorm
from keras_qat.graph.trace import trace
from keras_qat.graph.walk import key_of, nodes_of
from keras_qat.operations import row_of


def _lowered(model):
    graph, problems = trace(model, lambda one: isinstance(one, InverseRoot) or row_of(one) is not None, lowering_of)
    return graph.model(), problems


def _with_random_factors(model):
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if variable.name in ("gamma", "beta", "scale"):
            variable.assign(generator.normal(1, 0.5, variable.shape))
    return model


def _size(variables) -> int:
    return sum(int(np.prod(variable.shape)) for variable in variables)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_same_numbers_same_weights(case):
    model = _with_random_factors(case.one_op())
    flat, problems = _lowered(model)
    assert not problems
    inputs = inputs_for(model, 8)
    np.testing.assert_allclose(flat(inputs), model(inputs), atol=1e-5)
    assert _size(flat.trainable_variables) == _size(model.trainable_variables)


@pytest.mark.parametrize(
    "layer",
    [layers.LayerNormalization(), layers.RMSNormalization(), layers.GroupNormalization(2), layers.UnitNormalization()],
    ids=lambda layer: type(layer).__name__,
)
def test_zeros_stay_zeros(layer):
    inputs = keras.Input((4, 8))
    flat, _ = _lowered(keras.Model(inputs, layer(inputs)))
    np.testing.assert_array_equal(flat(np.zeros((2, 4, 8), "float32")), 0.0)


def test_layer_called_twice_shares_its_factors():
    layer, left, right = layers.LayerNormalization(), keras.Input((4, 8)), keras.Input((4, 8))
    flat, _ = _lowered(keras.Model([left, right], layer(left) - layer(right)))
    assert len(flat.trainable_variables) == 2


def test_frozen_layer_stays_frozen():
    inputs = keras.Input((4, 8))
    flat, _ = _lowered(keras.Model(inputs, layers.LayerNormalization(trainable=False)(inputs)))
    assert not flat.trainable_variables


def test_factors_that_are_computed_are_refused():
    inputs = keras.Input((4, 8))
    model = keras.Model(inputs, ops.layer_normalization(inputs, gamma=inputs[0, 0]))
    _, problems = _lowered(model)
    assert problems


@pytest.mark.parametrize(
    "build", [layers.LayerNormalization(axis=0), lambda x: ops.normalize(x, axis=None)], ids=["axis 0", "all axes"]
)
def test_normalizing_over_the_batch_is_refused(build):
    inputs = keras.Input(batch_shape=(2, 4, 8))
    _, problems = _lowered(keras.Model(inputs, build(inputs)))
    assert problems


def test_layer_norm_has_no_squares_on_a_grid_of_their_own():
    inputs = keras.Input((4, 8))
    flat, _ = _lowered(keras.Model(inputs, layers.LayerNormalization()(inputs)))
    kinds = [key_of(node.operation) for node in nodes_of(flat)]
    assert kinds.count("ops.Multiply") == 1 and kinds.count("ops.Matmul") == 1


def test_spectral_norm_becomes_a_constraint():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.SpectralNormalization(layers.Conv2D(6, 3, use_bias=False))(inputs))
    flat, _ = _lowered(model)
    (kernel,) = flat.trainable_variables
    assert isinstance(kernel.constraint, UnitSpectralNorm)
    assert model.layers[-1].layer.kernel_constraint is None
    constrained = np.reshape(kernel.constraint(kernel), (-1, 6))
    np.testing.assert_allclose(np.linalg.svd(constrained)[1][0], 1.0, atol=0.05)


def test_spectral_norm_of_nothing_is_nothing():
    np.testing.assert_array_equal(UnitSpectralNorm()(ops.zeros((3, 4))), 0.0)
