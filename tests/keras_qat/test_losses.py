"""Losses that layers add themselves: a QAT model has those of the float model, computed on the same tensors."""

import keras
import numpy as np
import pytest
from cases import with_lively_batch_norms
from keras import layers, ops, regularizers

import keras_qat as kq
import tflite_export

IMAGE, VECTOR = (6, 6, 3), (12,)


@keras.saving.register_keras_serializable("keras_qat_tests")
class Sparse(layers.Layer):
    """Adds a loss made of a layer's output, and one made of its own input."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, "relu", name="inner")

    def call(self, x):
        y = self.inner(x)
        self.add_loss([0.1 * ops.mean(ops.square(y)), ops.mean(ops.abs(x))])
        return y


class Penalized(keras.Model):
    """A model that adds a loss in its own `call`, with a layer in it that does so, too."""

    def __init__(self):
        super().__init__()
        self.body, self.head = Sparse(), layers.Dense(3)

    def call(self, x):
        y = self.head(self.body(x))
        self.add_loss(ops.mean(ops.square(y - 1.0)))
        return y


class PassesThrough(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


class Composite(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(4, activity_regularizer=regularizers.L1(0.02))

    def call(self, x):
        return ops.relu(self.inner(x)) * 2.0


def chain(*inner, shape=VECTOR):
    x = inputs = keras.Input(shape)
    for layer in inner:
        x = layer(x)
    return keras.Model(inputs, x)


def called_twice():
    inputs, layer = keras.Input(VECTOR), layers.Dense(12, "relu", activity_regularizer="l2")
    return keras.Model(inputs, layer(layer(inputs)))


def subclassed():
    model = Penalized()
    model(np.zeros((1, *VECTOR), "float32"))
    return model


L1 = regularizers.L1(0.05)
MODELS = {
    "linear": lambda: chain(layers.Dense(5, activity_regularizer=L1)),
    "activation": lambda: chain(layers.Dense(5, "relu", activity_regularizer=L1), layers.Dense(2)),
    "softmax": lambda: chain(layers.Dense(5, "softmax", activity_regularizer="l2")),
    "in_front_of_batch_norm": lambda: chain(
        layers.Conv2D(5, 3, activity_regularizer=L1), layers.BatchNormalization(), layers.ReLU(), shape=IMAGE
    ),
    "of_batch_norm": lambda: chain(
        layers.Conv2D(5, 3), layers.BatchNormalization(activity_regularizer=L1), layers.ReLU(), shape=IMAGE
    ),
    "of_batch_norm_alone": lambda: chain(layers.ReLU(), layers.BatchNormalization(activity_regularizer=L1)),
    "behind_rescaling": lambda: chain(layers.Rescaling(0.5, 0.1), layers.Dense(5, activity_regularizer=L1)),
    "of_rescaling": lambda: chain(layers.Rescaling(0.5, 0.1, activity_regularizer=L1), layers.Dense(5)),
    "separable": lambda: chain(layers.SeparableConv2D(5, 3, activity_regularizer=L1), shape=IMAGE),
    "without_weights": lambda: chain(layers.MaxPooling2D(activity_regularizer=L1), layers.Flatten(), shape=IMAGE),
    "regularization_layer": lambda: chain(layers.Dense(5), layers.ActivityRegularization(0.01, 0.02), layers.ReLU()),
    "called_twice": called_twice,
    "of_a_composite": lambda: chain(Composite(activity_regularizer=L1), layers.Dense(3)),
    "nested": lambda: chain(chain(layers.Dense(12, "tanh", activity_regularizer=L1)), layers.Dense(3)),
    "add_loss": lambda: chain(layers.Dense(12), Sparse(), layers.Dense(3)),
    "add_loss_of_a_model": subclassed,
    "add_loss_that_passes_through": lambda: chain(layers.Dense(4), PassesThrough(), layers.ReLU()),
    "weights_too": lambda: chain(layers.Dense(5, kernel_regularizer="l2", activity_regularizer=L1)),
}


def prepared(make):
    keras.utils.set_random_seed(1)
    model = with_lively_batch_norms(make())
    qat = kq.quantize(model)
    x = np.random.default_rng(0).normal(size=(32, *qat.inputs[0].shape[1:])).astype("float32")
    return model, kq.calibrate(qat, x), x


def losses_of(model, x, **options) -> np.ndarray:
    model(x, **options)
    return np.sort([float(loss) for loss in model.losses])


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_losses_are_those_of_the_float_model(make):
    model, qat, x = prepared(make)
    for training in (False, True):
        expected = losses_of(model, x, training=training)
        assert len(expected) > 0 and np.all(expected > 0)
        np.testing.assert_allclose(losses_of(qat, x, training=training), expected, rtol=0.04)
    assert np.any(np.abs(losses_of(qat, 2 * x) / losses_of(qat, x) - 1) > 0.1)  # they are computed, not remembered


@pytest.mark.parametrize("name", ["activation", "in_front_of_batch_norm", "add_loss"])
def test_losses_are_trained_saved_and_not_in_the_file(name, tmp_path):
    model, qat, x = prepared(MODELS[name])
    qat.compile(keras.optimizers.SGD(0.1), loss=None)
    history = qat.fit(x, epochs=5, batch_size=32, verbose=0).history["loss"]
    assert history[-1] < history[0]
    assert qat.evaluate(x, verbose=0) == pytest.approx(losses_of(qat, x).sum(), rel=1e-5)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(losses_of(loaded, x), losses_of(qat, x))
    program, plain = kq.freeze(loaded), kq.freeze(prepared(lambda: without_losses(model))[1])
    assert [op.kind for op in program.ops] == [op.kind for op in plain.ops]
    assert tflite_export.verify(tflite_export.write(program), qat, x).exact


def without_losses(model):
    config = model.get_config()
    for layer in config["layers"]:
        layer["config"].pop("activity_regularizer", None)
        if layer["class_name"] == "Sparse":
            layer.update(module="keras.layers", class_name="Dense", registered_name=None)
            layer["config"] = {"units": 6, "activation": "relu", "name": layer["config"]["name"]}
    return keras.Model.from_config(config)


class PenalizesItsWeight(layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        self.add_loss(ops.sum(ops.square(self.scale)))
        return x * self.scale


def test_a_loss_of_weights_alone_is_told():
    model = chain(layers.Dense(4), PenalizesItsWeight(name="mine"))
    with pytest.warns(UserWarning, match="'mine' adds a loss that depends on no tensor.*regularizer"):
        kq.quantize(model)


def test_float_model_keeps_its_losses():
    model, _, x = prepared(MODELS["add_loss"])
    before = losses_of(model, x)
    kq.quantize(model)
    np.testing.assert_array_equal(losses_of(model, x), before)
    assert not [layer for layer in model._flatten_layers() if "add_loss" in vars(layer)]


@keras.saving.register_keras_serializable("keras_qat_tests")
class OwnWeights(layers.Layer):
    """One weight for each way in which code uses weights: multiplied, added, in a product, in an einsum."""

    def build(self, input_shape):
        for name, shape in (("gain", (8,)), ("places", (5, 8)), ("kernel", (8, 8)), ("mix", (8, 2, 4))):
            options = {"regularizer": "l2", "constraint": "non_neg", "initializer": "random_normal"}
            setattr(self, name, self.add_weight(shape=shape, name=name, **options))

    def call(self, x):
        x = ops.matmul(x * self.gain + self.places, self.kernel)
        return ops.einsum("abc,cde->abde", x, self.mix)


_SERIES, _VOLUME = (5, 8), (3, 4, 4, 2)
_OF_KERNEL = {"kernel_regularizer": "l2", "kernel_constraint": "non_neg", "bias_regularizer": "l1"}
_PENALTIES = {"gamma_regularizer": "l1", "beta_regularizer": "l2", "gamma_constraint": "non_neg"}
_PENALIZED_WEIGHTS = {
    "dense": (layers.Dense(3, kernel_regularizer="l2", bias_regularizer="l1", kernel_constraint="non_neg"), _SERIES),
    "einsum": (layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d", kernel_regularizer="l1"), _SERIES),
    "transposed, 1D": (layers.Conv1DTranspose(4, 3, **_OF_KERNEL), _SERIES),
    "3D": (layers.Conv3D(4, 2, **_OF_KERNEL), _VOLUME),
    "3D, groups": (layers.Conv3D(4, 2, groups=2, kernel_regularizer="l2"), _VOLUME),
    "3D, transposed": (layers.Conv3DTranspose(4, 2, **_OF_KERNEL), _VOLUME),
    "layer norm": (layers.LayerNormalization(**_PENALTIES), _SERIES),
    "group norm": (layers.GroupNormalization(2, **_PENALTIES), _SERIES),
    "batch norm": (layers.BatchNormalization(**_PENALTIES), _SERIES),
    "separable": (layers.SeparableConv1D(4, 3, depthwise_regularizer="l2", pointwise_regularizer="l1"), _SERIES),
    "recurrent": (layers.LSTM(4, kernel_regularizer="l2", recurrent_regularizer="l1"), _SERIES),
    "attention": (layers.GroupQueryAttention(4, 2, 1, kernel_regularizer="l2", bias_regularizer="l1"), _SERIES),
    "own weights": (OwnWeights(), _SERIES),
}


@pytest.mark.parametrize("layer, shape", _PENALIZED_WEIGHTS.values(), ids=_PENALIZED_WEIGHTS)
def test_regularizers_and_constraints_of_weights(layer, shape, tmp_path):
    inputs = keras.Input(shape)
    is_attention = isinstance(layer, layers.GroupQueryAttention)
    model = keras.Model(inputs, layer(inputs, inputs) if is_attention else layer(inputs))
    for number, weight in enumerate(model.trainable_weights):  # no zeros, whose penalty nothing could tell from none
        weight.assign(np.random.default_rng(number).normal(0.1, 0.3, weight.shape))
    qat = kq.quantize(model)
    qat.save(tmp_path / "qat.keras")
    for one in (qat, keras.saving.load_model(tmp_path / "qat.keras")):
        np.testing.assert_allclose(float(sum(one.losses)), float(sum(model.losses)), rtol=1e-5)
        count = [sum(weight.constraint is not None for weight in m.trainable_weights) for m in (one, model)]
        assert count[0] == count[1]
    assert model.losses


@pytest.mark.parametrize("layer_class", [layers.Conv3D, layers.Conv3DTranspose])
def test_constraints_of_axes_that_move_are_refused(layer_class):
    model = keras.Sequential([keras.Input(_VOLUME), layer_class(4, 2, kernel_constraint="max_norm", name="conv")])
    with pytest.raises(kq.UnsupportedModelError, match="'conv'.*MaxNorm.*NonNeg"):
        kq.quantize(model)


def test_regularizer_of_an_embedding():
    words = keras.Input((5,), dtype="int32")
    embedding = layers.Embedding(20, 8, embeddings_regularizer="l2", embeddings_constraint="non_neg")
    model = keras.Model(words, embedding(words))
    qat = kq.quantize(model)
    np.testing.assert_allclose(float(sum(qat.losses)), float(sum(model.losses)), rtol=1e-5)
    assert qat.trainable_weights[0].constraint is not None
