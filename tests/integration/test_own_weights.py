"""Layers that use weights of their own, and embeddings read both ways: they are learned, and come out as integers."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import exported_after_loading

import keras_qat as kq
import tflite_export

WORDS = np.random.default_rng(0).integers(0, 20, (64, 5)).astype("int32")
SERIES = np.random.default_rng(0).normal(size=(64, 5, 8)).astype("float32")


@keras.saving.register_keras_serializable("keras_qat_tests")
class MovesItsWeights(layers.Layer):
    """Transposes one weight and gives the other a batch axis before it uses them."""

    def build(self, input_shape):
        self.positions = self.add_weight(shape=input_shape[1:], initializer="random_normal")
        self.rows = self.add_weight(shape=(6, input_shape[-1]), initializer="random_normal")

    def call(self, x):
        return ops.matmul(x + ops.expand_dims(self.positions, 0), ops.transpose(self.rows))


@keras.saving.register_keras_serializable("keras_qat_tests")
class TakesRows(layers.Layer):
    """An embedding, written in keras.ops."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=(20, 8), initializer="random_normal")

    def call(self, ids):
        return ops.take(self.table, ids, axis=0)


@keras.saving.register_keras_serializable("keras_qat_tests")
class ThereAndBack(layers.Layer):
    """Words in, scores of words out."""

    def __init__(self, embedding=None, **kwargs):
        super().__init__(**kwargs)
        self.embedding = embedding or layers.ReversibleEmbedding(20, 8, logit_soft_cap=2.0)
        self.dense = layers.Dense(8)

    def call(self, ids):
        return self.embedding(self.dense(self.embedding(ids)), reverse=True)


class TiedByHand(ThereAndBack):
    def call(self, ids):
        return ops.matmul(self.dense(self.embedding(ids)), ops.transpose(self.embedding.embeddings))


@pytest.mark.parametrize(
    "layer, inputs, weights",
    [
        (MovesItsWeights(), SERIES, 2),
        (TakesRows(), WORDS, 1),
        (ThereAndBack(), WORDS, 3),
        (ThereAndBack(layers.ReversibleEmbedding(20, 8, tie_weights=False)), WORDS, 4),
    ],
    ids=["moved", "taken", "tied", "untied"],
)
def test_weights_are_learned_and_exact(layer, inputs, weights, tmp_path):
    keras.utils.set_random_seed(0)
    symbolic = keras.Input(inputs.shape[1:], dtype=inputs.dtype)
    model = keras.Model(symbolic, layer(symbolic))
    qat = kq.quantize(model)
    assert len(qat.trainable_variables) == len(model.trainable_variables) == weights
    before = [variable.numpy() for variable in qat.trainable_variables]
    qat.compile("adam", "mse")
    qat.fit(inputs, np.ones((64, *qat.output_shape[1:]), "float32"), verbose=0)
    assert not any(np.array_equal(old, new) for old, new in zip(before, qat.trainable_variables, strict=True))
    report = exported_after_loading(qat, tmp_path, inputs)
    assert report.parity.max_lsb <= 1, report


def test_a_reversible_embedding_is_one_table():
    symbolic = keras.Input((5,), dtype="int32")
    qat = kq.calibrate(kq.quantize(keras.Model(symbolic, ThereAndBack()(symbolic))), WORDS)
    program = kq.freeze(qat)
    (gather,), (matmul,) = ([op for op in program.ops if op.kind == kind] for kind in ("GATHER", "BATCH_MATMUL"))
    assert gather.inputs[0] == matmul.inputs[1]
    assert tflite_export.inspect(tflite_export.write(program)).weight_bytes < 500


def test_embeddings_tied_by_hand_are_told_apart():
    symbolic = keras.Input((5,), dtype="int32")
    model = keras.Model(symbolic, TiedByHand(layers.Embedding(20, 8))(symbolic))
    with pytest.warns(UserWarning, match="uses the weight '.*embeddings' of another layer.*ReversibleEmbedding"):
        qat = kq.quantize(model)
    assert len(qat.trainable_variables) == 4


class ZerosAtFirst(layers.Layer):
    """Two weights of the same numbers, both moved."""

    def build(self, input_shape):
        self.one, self.other = (self.add_weight(shape=(6, 8), initializer="zeros") for _ in range(2))

    def call(self, x):
        return ops.matmul(x, ops.transpose(self.one)) + ops.matmul(x, ops.transpose(self.other))


def test_weights_that_look_alike_are_not_made_one():
    symbolic = keras.Input((5, 8))
    qat = kq.quantize(keras.Model(symbolic, ZerosAtFirst()(symbolic)))
    assert len(qat.trainable_variables) == 2


def test_weights_that_nothing_tells_apart_are_not_made_one():
    """In a functional model the weight was moved long ago."""
    symbolic = keras.Input((5, 8))
    dense = layers.Dense(8, kernel_initializer="zeros")
    model = keras.Model(symbolic, ops.matmul(dense(symbolic), ops.transpose(dense.kernel)))
    with pytest.warns(UserWarning, match="numbers do not tell which.*Train the model for a step"):
        assert len(kq.quantize(model).trainable_variables) == 2


class ComputesWithItsWeight(layers.Layer):
    def build(self, input_shape):
        self.rows = self.add_weight(shape=(8, 6), initializer="random_normal")

    def call(self, x):
        return ops.matmul(x, 2.0 * self.rows) + np.arange(6, dtype="float32")


def test_what_is_computed_from_weights_is_told():
    symbolic = keras.Input((5, 8))
    model = keras.Model(symbolic, ComputesWithItsWeight(name="doubled")(symbolic))
    with pytest.warns(
        UserWarning, match="'doubled' computes with its weights .*not learned. Use the weights themselves"
    ) as told:
        kq.quantize(model)
    assert len(told) == 1


class Positions(layers.Layer):
    """An embedding of each place, as people write it: Keras runs it at once, on numbers that are no tensors of the model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words, self.places = layers.Embedding(20, 8), layers.Embedding(5, 8)

    def call(self, ids):
        return self.words(ids) + self.places(ops.arange(5))


def test_embedded_places_are_learned(recwarn):
    symbolic = keras.Input((5,), dtype="int32")
    assert len(kq.quantize(keras.Model(symbolic, Positions()(symbolic))).trainable_variables) == 2
    assert not [w for w in recwarn if "weight" in str(w.message)]
