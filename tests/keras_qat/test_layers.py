"""The layers that know the grids they stand between: what they compute, their gradients, saving and loading."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_qat as kq
from keras_qat import kernels
from keras_qat.layers import HardSwish, Rescale, calibrating

INPUT_SCALE, OUTPUT_SCALE = tf.constant(0.031), tf.constant(0.012)
INTEGERS = np.arange(-128, 128).astype("float32")
ON_GRID = tf.constant(INTEGERS * 0.031)


def gradient_of(function, x):
    x = tf.Variable(x)
    with tf.GradientTape() as tape:
        y = function(x)
    return tape.gradient(y, x).numpy()


@pytest.mark.parametrize("factor", [0.3, -0.3, 1.0, 2.5, -1e-3])
def test_rescale_multiplies_integers(factor):
    layer = Rescale(factor)
    integer, scale, snapped = (float(x) for x in layer.integers(INPUT_SCALE, OUTPUT_SCALE))
    assert snapped == 1 and integer == int(integer) and 1 <= abs(integer) <= 127 and integer * factor > 0
    assert integer * scale == pytest.approx(factor, rel=0.02)
    exact = INTEGERS * integer * (np.float64(INPUT_SCALE) * scale / np.float64(OUTPUT_SCALE))
    found = np.floor(np.asarray(layer(ON_GRID, INPUT_SCALE, OUTPUT_SCALE)) / np.float32(OUTPUT_SCALE) + 0.5)
    np.testing.assert_array_equal(found, np.floor(exact + 0.5))
    slope = gradient_of(lambda x: layer(x, INPUT_SCALE, OUTPUT_SCALE), ON_GRID)
    np.testing.assert_allclose(slope, integer * scale, rtol=1e-6)


@pytest.mark.parametrize("factor", [0.3, -2.0])
def test_rescale_is_exact_without_grids_and_in_calibration(factor):
    np.testing.assert_allclose(Rescale(factor)(ON_GRID), ON_GRID * factor, rtol=1e-6)
    with calibrating():
        np.testing.assert_allclose(Rescale(factor)(ON_GRID, INPUT_SCALE, OUTPUT_SCALE), ON_GRID * factor, rtol=1e-6)


def test_hard_swish_is_keras_own_in_training_and_the_kernel_at_inference():
    layer = HardSwish()
    for arguments in ({}, {"input_scale": INPUT_SCALE, "output_scale": OUTPUT_SCALE, "training": True}):
        np.testing.assert_array_equal(layer(ON_GRID, **arguments), ops.hard_silu(ON_GRID))
        np.testing.assert_array_equal(
            gradient_of(lambda x: layer(x, **arguments), ON_GRID),  # noqa: B023
            gradient_of(ops.hard_silu, ON_GRID),
        )
    found = layer(ON_GRID, INPUT_SCALE, OUTPUT_SCALE, training=False) / OUTPUT_SCALE
    np.testing.assert_allclose(found, kernels.hard_swish(INTEGERS, INPUT_SCALE, OUTPUT_SCALE), atol=1e-4)
    assert np.abs(found - ops.hard_silu(ON_GRID) / OUTPUT_SCALE).max() < 1.5


def test_saved_and_loaded_they_compute_the_same(tmp_path):
    x = inputs = keras.Input((12,))
    x = layers.Activation("hard_swish")(layers.Dense(8)(x) * -0.3)
    x = layers.Concatenate()([ops.sigmoid(x), x])  # brings the sigmoid to the other grid
    qat = kq.quantize(keras.Model(inputs, layers.Dense(3)(x)))
    assert {type(layer) for layer in qat.layers} >= {Rescale, HardSwish}
    data = np.random.default_rng(0).normal(size=(64, 12)).astype("float32")
    kq.calibrate(qat, data).save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(loaded.predict(data, verbose=0), qat.predict(data, verbose=0))
    assert [layer.get_config() for layer in loaded.layers if isinstance(layer, Rescale)] == [
        layer.get_config() for layer in qat.layers if isinstance(layer, Rescale)
    ]


@pytest.mark.parametrize("scaling", [(1 / 255, 0.0), (0.5, 0.0), (1 / 127.5, -1.0), (1.0, 0.0)], ids=str)
def test_training_and_inference_compute_the_same(scaling):
    """With an input scaling taken over, and a bias that is not zero."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(*scaling)(inputs)
    model = keras.Model(inputs, layers.Conv2D(6, 3, bias_initializer=keras.initializers.RandomNormal(stddev=1.0))(x))
    images = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 3)).astype("float32")
    qat = kq.calibrate(kq.quantize(model), images)
    expected = model(images)
    step = float(np.ptp(expected)) / 255
    for training in (False, True):
        assert float(np.max(np.abs(qat(images, training=training) - expected))) < 6 * step
