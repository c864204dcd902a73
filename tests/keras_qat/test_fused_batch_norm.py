"""The arithmetic of batch norms against Keras's own."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_qat import fused_batch_norm


@pytest.mark.parametrize("scale, center", [(True, True), (True, False), (False, True), (False, False)])
def test_batch_norm_as_multiplier_and_offset(scale, center):
    layer = keras.layers.BatchNormalization(scale=scale, center=center, epsilon=1e-2)
    layer.build((None, 6))
    generator = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(generator.uniform(0.2, 2, 6) * (1 if "variance" in weight.path else generator.choice([-1, 1], 6)))
    x = generator.normal(size=(9, 6)).astype("float32")
    multiplier, offset = fused_batch_norm.multiplier_and_offset(layer)
    np.testing.assert_allclose(x * multiplier + offset, layer(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("scale, center", [(True, True), (False, True), (True, False)])
def test_fused_batch_norm_does_what_keras_does(scale, center, frozen):
    generator = np.random.default_rng(0)
    x = tf.constant(generator.normal(size=(9, 5, 5, 6)) * 3 + 1, tf.float32)
    upstream = tf.constant(generator.normal(size=x.shape), tf.float32)
    found = []
    for fused in (False, True):
        layer = keras.layers.BatchNormalization(scale=scale, center=center, momentum=0.7)
        layer.build(x.shape)
        for weight, values in zip(layer.weights, np.random.default_rng(1).uniform(0.2, 2, (4, 6)), strict=False):
            weight.assign(values)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = fused_batch_norm.train_fused(layer, x, frozen) if fused else layer(x, training=not frozen)
        gradients = tape.gradient(y, [x, *(weight.value for weight in layer.trainable_weights)], upstream)
        found.append([y, *gradients, *layer.weights])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
