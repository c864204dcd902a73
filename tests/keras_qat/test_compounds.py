"""What normalizations and attention are made of."""

import keras
import numpy as np
import pytest

from keras_qat.compounds import InverseRoot, Mask, Probabilities, Scores
from keras_qat.layers import FakeQuant, calibrating
from keras_qat.quantizers import Fixed

_KEEP = np.tri(4, dtype=bool)


def _scores(seed=0):
    return np.random.default_rng(seed).normal(0, 3, (5, 4, 4)).astype("float32")


@pytest.mark.parametrize(
    "layer",
    [
        InverseRoot(1e-3, 1e-6, 8),
        Mask(_KEEP),
        Mask(np.random.default_rng(0).random((1, 3, 4)) > 0.5),
        Probabilities(0.5),
        Scores(0.5, _KEEP),
        Scores(),
    ],
    ids=lambda layer: layer.name,
)
def test_config_round_trip(layer):
    twin = type(layer).from_config(layer.get_config())
    assert twin.get_config() == layer.get_config()
    if isinstance(layer, Mask):
        np.testing.assert_array_equal(twin.keep, layer.keep)


def test_inverse_root_is_the_root_it_says():
    x = np.array([0.5, 2.0, 1e-9], "float32")
    np.testing.assert_allclose(InverseRoot(0.1)(x), 1 / np.sqrt(x + 0.1), rtol=1e-6)
    np.testing.assert_allclose(InverseRoot(floor=0.01, count=2)(x), 1 / np.sqrt(np.maximum(x / 2, 0.01)), rtol=1e-6)


def test_inverse_root_on_a_grid_does_not_look_below_one_step():
    layer, step = InverseRoot(1e-6), np.float32(0.02)
    np.testing.assert_allclose(layer(np.float32([0.0, 0.01, 0.02]), step, step), 1 / np.sqrt(step + 1e-6), rtol=1e-6)


def test_masked_scores_get_no_weight():
    weights = keras.ops.softmax(Mask(_KEEP)(_scores()), axis=-1)
    np.testing.assert_array_equal(np.asarray(weights)[:, ~_KEEP], 0.0)


def test_scores_are_left_alone_at_inference():
    np.testing.assert_array_equal(Scores(keep=_KEEP)(_scores()), _scores())


@pytest.mark.parametrize("keep", [None, _KEEP], ids=["all", "masked"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_scores_end_where_a_softmax_gives_nothing(keep, factor):
    raw = _scores()
    with calibrating():
        seen = np.asarray(Scores(factor, keep)(raw))
    best = np.where(True if keep is None else keep, raw, -np.inf).max(-1)
    lowest = seen.min()
    assert lowest >= best.min() - np.log(4 * 256) / factor - 1e-5
    if keep is None:
        np.testing.assert_array_equal(seen[raw > lowest], raw[raw > lowest])
    else:
        np.testing.assert_array_equal(seen[:, keep], raw[:, keep])
        assert np.all(4 * np.exp(factor * (seen[:, ~keep].max() - best)) <= 1 / 256 + 1e-6)


def test_probabilities_on_their_grid():
    """TFLite wants steps of exactly 1/32768 of a SOFTMAX in 16 bits."""
    grid = FakeQuant(Fixed(*Probabilities.LIMITS), bits=16)
    assert grid.parameters() == (np.float32(2**-15), 0)
    exact = Probabilities(0.5)(_scores())
    fine, scale = grid(exact)
    assert float(scale) == 2**-15
    np.testing.assert_allclose(fine, exact, atol=2**-16 + 1e-7)
    np.testing.assert_array_equal(fine * 2**15, np.round(fine * 2**15))
    assert float(np.max(grid(np.float32([[1.0, 0.0]]))[0])) == Probabilities.LIMITS[1]
