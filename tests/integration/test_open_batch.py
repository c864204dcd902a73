"""Layers as people write them: they compute with the size of the batch, return None, put weights on the left."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import exported_after_loading

import keras_qat as kq

SERIES = np.random.default_rng(0).normal(size=(64, 6, 8)).astype("float32")
MAPS = np.random.default_rng(0).normal(size=(64, 4, 4, 8)).astype("float32")


@keras.saving.register_keras_serializable("keras_qat_tests")
class ClassToken(layers.Layer):
    """A learned row in front of each sample's, and a learned embedding of the places."""

    def build(self, input_shape):
        _, length, width = input_shape
        self.token = self.add_weight(shape=(1, 1, width), initializer="random_normal")
        self.places = self.add_weight(shape=(length + 1, width), initializer="random_normal")

    def call(self, x):
        batch, length, width = ops.shape(x)
        x = ops.concatenate([ops.tile(self.token, (batch, 1, 1)), x], axis=1)
        return x + ops.broadcast_to(self.places, (batch, length + 1, width))


@keras.saving.register_keras_serializable("keras_qat_tests")
class PlacesAlone(layers.Layer):
    """What it returns depends on the shape of its input alone."""

    def build(self, input_shape):
        self.places = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, x):
        return ops.broadcast_to(self.places, ops.shape(x))


@keras.saving.register_keras_serializable("keras_qat_tests")
class PlacesAdded(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.places, self.add, self.join = PlacesAlone(), layers.Add(), layers.Concatenate()

    def call(self, x):
        return self.join([self.add([x, self.places(x)]), x])


@keras.saving.register_keras_serializable("keras_qat_tests")
class Heads(layers.Layer):
    """Attention by hand. Its scores are there on request."""

    def __init__(self, heads=2, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.qkv, self.out = heads, layers.Dense(24), layers.Dense(8)

    def call(self, x, with_scores=False):
        batch, length = ops.shape(x)[0], ops.shape(x)[1]
        qkv = ops.reshape(self.qkv(x), (batch, length, 3, self.heads, -1))
        query, key, value = (ops.transpose(qkv[:, :, index], (0, 2, 1, 3)) for index in range(3))
        weights = ops.softmax(ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))), axis=-1)
        mixed = ops.reshape(ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3)), (batch, length, 8))
        return self.out(mixed), (weights if with_scores else None)


@keras.saving.register_keras_serializable("keras_qat_tests")
class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.drop = Heads(), layers.Identity(dtype=self.dtype_policy)

    def call(self, x):
        mixed, _ = self.heads(x)
        return x + self.drop(mixed)


@keras.saving.register_keras_serializable("keras_qat_tests")
class WeightsOnTheLeft(layers.Layer):
    def build(self, input_shape):
        self.scale, self.bias = (self.add_weight(shape=(), initializer="ones") for _ in range(2))

    def call(self, x):
        return self.scale * x + self.bias


@keras.saving.register_keras_serializable("keras_qat_tests")
class StateOfZeros(layers.Layer):
    """A recurrence that begins with a state for each sample."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(8, activation="tanh")

    def call(self, x):
        state = ops.zeros((ops.shape(x)[0], 8))
        for step in range(3):
            state = self.dense(ops.concatenate([x[:, step], state], axis=-1))
        return state


LAYERS = {
    "class_token": (ClassToken, SERIES, 2),
    "places": (PlacesAdded, SERIES, 1),
    "heads": (Block, SERIES, 4),
    "left": (WeightsOnTheLeft, MAPS, 2),
    "state": (StateOfZeros, SERIES, 2),
}


def _model(layer, inputs):
    symbolic = keras.Input(inputs.shape[1:])
    return keras.Model(symbolic, layers.Dense(3)(layers.Flatten()(layer()(symbolic))))


@pytest.mark.parametrize("layer, inputs, weights", LAYERS.values(), ids=LAYERS)
def test_trained_and_exact(layer, inputs, weights, tmp_path):
    keras.utils.set_random_seed(0)
    model = _model(layer, inputs)
    qat = kq.quantize(model)
    assert len(qat.trainable_variables) == weights + 2
    before = [variable.numpy() for variable in qat.trainable_variables]
    qat.compile("adam", "mse")
    qat.fit(inputs, np.ones((64, 3), "float32"), batch_size=24, verbose=0)  # the last batch is smaller
    assert not any(np.array_equal(old, new) for old, new in zip(before, qat.trainable_variables, strict=True))
    report = exported_after_loading(qat, tmp_path, inputs)
    assert report.parity.max_lsb <= 1, report


@pytest.mark.parametrize("layer, inputs, weights", LAYERS.values(), ids=LAYERS)
def test_close_to_the_float_model_for_every_batch(layer, inputs, weights):
    keras.utils.set_random_seed(0)
    model = _model(layer, inputs)
    qat = kq.calibrate(kq.quantize(model), inputs)
    for size in (1, 5, 24):
        expected, given = (np.array(one(inputs[:size])) for one in (model, qat))
        assert np.sqrt(np.mean(np.square(expected - given))) < 0.05 * np.std(model(inputs))


class DividesByTheBatch(layers.Layer):
    def call(self, x):
        return x / ops.cast(ops.shape(x)[0], "float32")


class OtherSteps(layers.Layer):
    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, x):
        return x + x if ops.shape(x)[0] > 20 else x * x - x


class NumbersTheSamples(layers.Layer):
    def call(self, x):
        return x + ops.cast(ops.arange(ops.shape(x)[0])[:, None, None], "float32")


@pytest.mark.parametrize(
    "layer, words",
    [
        (DividesByTheBatch, "computes with the size of the batch. It computes numbers from it"),
        (OtherSteps, "computes with the size of the batch. It takes other steps where the batch has another size"),
        (
            NumbersTheSamples,
            "computes with the size of the batch. It makes constants that differ from sample to sample",
        ),
    ],
)
def test_what_does_not_hold_for_every_batch_is_refused(layer, words):
    with pytest.raises(kq.UnsupportedModelError, match=words):
        kq.quantize(_model(layer, SERIES))


def test_a_constant_for_each_sample_needs_a_batch_of_one():
    qat = kq.calibrate(kq.quantize(_model(ClassToken, SERIES)), SERIES)
    with pytest.raises(ValueError, match="class_token.*joins a constant to each sample.*dynamic_batch=False"):
        kq.freeze(qat, dynamic_batch=True)
