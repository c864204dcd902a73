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


class StandardizedConv(layers.Layer):
    """As in Big Transfer and in networks without batch norms."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(3, 3, input_shape[-1], 4), name="kernel")

    def call(self, x):
        centred = self.kernel - ops.mean(self.kernel, (0, 1, 2), keepdims=True)
        return ops.conv(x, centred / (ops.std(self.kernel, (0, 1, 2), keepdims=True) + 1e-3), padding="same")


class ScaleAroundOne(layers.Layer):
    """As in the norms of Gemma."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=input_shape[-1:], initializer="random_normal")

    def call(self, x):
        return x * (1 + self.scale)


class Adapted(layers.Layer):
    """A kernel, and an adapter of low rank."""

    def build(self, input_shape):
        size = input_shape[-1]
        self.kernel, self.down, self.up = (self.add_weight(shape=s) for s in ((size, size), (size, 2), (2, size)))

    def call(self, x):
        return ops.matmul(x, self.kernel + ops.matmul(self.down, self.up))


class BiasTable(layers.Layer):
    """Of relative positions, as in Swin."""

    def build(self, input_shape):
        self.table = self.add_weight(shape=(9,), initializer="random_normal")

    def call(self, x):
        places = np.arange(5)
        return x + ops.take(self.table, places[:, None] - places[None] + 4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(StandardizedConv, (6, 6, 3)), (ScaleAroundOne, (5, 8)), (Adapted, (8,)), (BiasTable, (3, 5, 5))],
)
def test_what_is_computed_from_weights_is_learned(layer, shape, tmp_path, recwarn):
    symbolic = keras.Input(shape)
    shared = layer()
    model = keras.Model(
        symbolic, shared(layers.ReLU()(shared(symbolic))) if layer is not StandardizedConv else shared(symbolic)
    )
    x = np.random.default_rng(0).normal(size=(32, *shape)).astype("float32")
    qat = kq.calibrate(kq.quantize(model), x)
    assert not [w for w in recwarn if "weight" in str(w.message)]
    assert len(qat.trainable_variables) == 1
    expected = model.predict(x, verbose=0)
    noise = np.mean((qat.predict(x, verbose=0) - expected) ** 2)
    assert 10 * np.log10(np.mean(expected**2) / noise) > 30
    before = np.array(qat.trainable_variables[0])
    qat.compile(keras.optimizers.SGD(0.1), "mse")
    qat.fit(x, np.zeros_like(expected), epochs=2, verbose=0)
    assert not np.allclose(before, qat.trainable_variables[0])
    assert kq.export(qat, tmp_path / "model.tflite", verify_with=x).summary.is_full_int8


def test_a_lost_regularizer_of_computed_weights_is_told():
    symbolic = keras.Input((5, 8))
    layer = ScaleAroundOne(name="around_one")
    model = keras.Model(symbolic, layer(symbolic))
    layer.scale.regularizer = keras.regularizers.L2(1e-3)
    with pytest.warns(
        UserWarning, match="'around_one' computes with its weights.*without the regularizer.*.regularizer."
    ):
        kq.quantize(model)


@pytest.mark.parametrize(
    ("layer", "shape", "dtype"),
    [
        (lambda: layers.Dense(6), (8,), "float32"),
        (lambda: layers.EinsumDense("abc,cd->abd", (5, 6)), (5, 8), "float32"),
        (lambda: layers.Conv2D(6, 3, activation="relu"), (6, 6, 3), "float32"),
        (lambda: layers.Embedding(20, 6), (5,), "int32"),
    ],
)
def test_adapters_become_part_of_the_weight(layer, shape, dtype):
    symbolic, adapted = keras.Input(shape, dtype=dtype), layer()
    model = keras.Model(symbolic, adapted(symbolic))
    adapted.enable_lora(2)
    for weight in adapted.weights:
        if "lora" in weight.name:
            weight.assign(keras.random.normal(weight.shape, seed=1))
    x = np.random.default_rng(0).uniform(0, 5, (64, *shape)).astype(dtype)
    qat = kq.calibrate(kq.quantize(model), x)
    expected = model.predict(x, verbose=0)
    noise = np.mean((qat.predict(x, verbose=0) - expected) ** 2)
    assert 10 * np.log10(np.mean(expected**2) / noise) > 30
    assert not [weight for weight in qat.weights if "lora" in weight.path]


def test_layers_that_keras_quantized_are_refused():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, name="known")])
    model.layers[0].quantize("int8")
    with pytest.raises(kq.UnsupportedModelError, match="'known'.*Keras has quantized.*model.quantize"):
        kq.quantize(model)


class Latents(layers.Layer):
    """A weight on the left of a product, as in Perceiver."""

    def build(self, input_shape):
        self.latents = self.add_weight(shape=(1, 4, input_shape[1]), initializer="random_normal")

    def call(self, x):
        return ops.matmul(self.latents, x)


def test_a_weight_on_the_left_is_learned():
    symbolic = keras.Input((5, 8))
    model = keras.Model(symbolic, Latents()(symbolic))
    qat = kq.calibrate(kq.quantize(model), SERIES)
    assert len(qat.trainable_variables) == 1
    expected = model.predict(SERIES, verbose=0)
    assert np.mean((qat.predict(SERIES, verbose=0) - expected) ** 2) < 1e-3 * np.mean(expected**2)


class HiddenToken(layers.Layer):
    """A token in place of what is hidden, as masked autoencoders have."""

    def build(self, input_shape):
        self.token = self.add_weight(shape=(input_shape[-1],), initializer="random_normal")

    def call(self, x):
        return ops.where(np.arange(5)[:, None] % 2 == 0, x, self.token)


def test_a_token_that_where_chooses_is_learned():
    symbolic = keras.Input((5, 8))
    qat = kq.quantize(keras.Model(symbolic, HiddenToken()(symbolic)))
    assert len(qat.trainable_variables) == 1


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
