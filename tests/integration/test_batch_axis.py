"""The batch axis is not always in front, and has several rows for a sample where a model cuts its input into windows."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import exported_after_loading

import keras_qat as kq
import tflite_export

SERIES = np.random.default_rng(0).normal(size=(64, 10, 16)).astype("float32")
MAPS = np.random.default_rng(0).normal(size=(64, 8, 8, 16)).astype("float32")


@keras.saving.register_keras_serializable("keras_qat_tests")
class Attention(layers.Layer):
    """Queries, keys and values of one dense layer, put in front of the batch and taken apart there.

    Args:
        how: They are taken out one by one ("index"), all at once ("unstack"), or with the heads moved into the batch
            ("merged").
    """

    def __init__(self, how, heads=2, **kwargs):
        super().__init__(**kwargs)
        self.how, self.heads = how, heads

    def build(self, input_shape):
        self.qkv, self.out = layers.Dense(3 * input_shape[-1]), layers.Dense(input_shape[-1])
        self.qkv.build(input_shape)
        self.out.build(input_shape)

    def call(self, x):
        _, places, width = x.shape
        qkv = ops.reshape(self.qkv(x), (-1, places, 3, self.heads, width // self.heads))
        qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))
        if self.how == "merged":
            qkv = ops.reshape(qkv, (3, -1, places, width // self.heads))
        query, key, value = [qkv[n] for n in range(3)] if self.how == "index" else ops.unstack(qkv, 3, axis=0)
        scores = ops.softmax(ops.matmul(0.35 * query, ops.swapaxes(key, -2, -1)), axis=-1)
        y = ops.reshape(ops.matmul(scores, value), (-1, self.heads, places, width // self.heads))
        return self.out(ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (-1, places, width)))

    def get_config(self):
        return {**super().get_config(), "how": self.how, "heads": self.heads}


def windows(x, size=4):
    """Of a map, each a sample of a series of its own."""
    _, height, width, channels = x.shape
    x = ops.reshape(x, (-1, height // size, size, width // size, size, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, size * size, channels))


def joined(x, shape, size=4):
    height, width, channels = shape
    x = ops.reshape(x, (-1, height // size, width // size, size, size, channels))
    return ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, height, width, channels))


def shifted(x):
    y = joined(Attention("merged")(windows(ops.roll(x, (-2, -2), (1, 2)))), x.shape[1:])
    return x + ops.roll(y, (2, 2), (1, 2))


APART = np.float32(-100 * (np.arange(16)[:, None] % 4 // 2 != np.arange(16) % 4 // 2))  # the halves of a window


def masked(x):
    """As Swin hides from each other what only a shift brought into one window."""
    query, key, value = (ops.reshape(layers.Dense(16)(windows(x)), (-1, 4, 16, 16)) for _ in range(3))
    scores = 0.25 * ops.matmul(query, ops.swapaxes(key, -2, -1)) + np.stack([0 * APART, APART, APART, APART])[None]
    return joined(ops.reshape(ops.matmul(ops.softmax(scores, axis=-1), value), (-1, 16, 16)), x.shape[1:])


def convolved(x):
    y = ops.reshape(windows(x), (-1, 4, 4, x.shape[-1]))
    y = layers.MaxPooling2D(2)(layers.Conv2D(16, 3, padding="same")(y))
    return joined(ops.reshape(y, (-1, 4, 16)), (4, 4, 16), size=2)


CASES = {
    "indexed": (SERIES, lambda x: x + Attention("index")(x)),
    "unstacked": (SERIES, lambda x: x + Attention("unstack")(x)),
    "heads_in_the_batch": (SERIES, lambda x: x + Attention("merged")(x)),
    "windows": (MAPS, lambda x: x + joined(Attention("index")(windows(x)), x.shape[1:])),
    "shifted_windows": (MAPS, shifted),
    "windows_of_keras": (
        MAPS,
        lambda x: joined(layers.MultiHeadAttention(2, 8)(windows(x), windows(x)), x.shape[1:]),
    ),
    "windows_masked": (MAPS, masked),
    "windows_convolved": (MAPS, convolved),
}


def model_of(x, call) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input(x.shape[1:])
    y = layers.Flatten()(call(layers.Dense(16)(inputs)))
    return keras.Model(inputs, layers.Dense(5)(y))


@pytest.mark.parametrize("name", CASES)
def test_it_becomes_integers(name, tmp_path):
    x, call = CASES[name]
    model = model_of(x, call)
    qat = kq.quantize(model)
    qat.compile("adam", "mse")
    qat.fit(x, np.zeros((len(x), 5), "float32"), batch_size=32, verbose=0)
    report = exported_after_loading(qat, tmp_path, x)
    assert report.summary.is_full_int8 and report.parity.exact, report
    assert len(report.parity.results) == 3, report.parity.skipped


@pytest.mark.parametrize("name", CASES)
def test_it_stays_close_to_float(name):
    x, call = CASES[name]
    model = model_of(x, call)
    qat = kq.calibrate(kq.quantize(model), x)
    expected = model.predict(x, verbose=0)
    error = qat.predict(x, verbose=0) - expected
    assert 10 * np.log10(np.mean(expected**2) / np.mean(error**2)) >= 27


def test_each_layer_can_be_compared():
    x, call = CASES["shifted_windows"]
    qat = kq.calibrate(kq.quantize(model_of(x, call)), x)
    parity = tflite_export.verify(tflite_export.write(kq.freeze(qat)), qat, x, runtimes=("litert",), per_layer=True)
    assert len(parity.layers) >= 10 and max(layer.max_lsb for layer in parity.layers) <= 1


REFUSED = {
    "samples_mixed": lambda x: layers.Dense(2)(ops.reshape(ops.reshape(x, (-1, 160)), (-1, 3, 32))),
    "rows_at_the_end": lambda x: ops.reshape(x, (-1, 80)),
    "batch_not_in_front": lambda x: ops.transpose(x, (1, 0, 2)),
    "batch_sliced": lambda x: ops.transpose(x, (1, 0, 2))[:, 1:],
    "batch_summed": lambda x: ops.mean(ops.transpose(x, (1, 0, 2)), axis=1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_other_samples_is_refused(name):
    inputs = keras.Input((10, 16))
    with pytest.raises(kq.UnsupportedModelError, match="batch"):
        kq.quantize(keras.Model(inputs, REFUSED[name](inputs)))


def test_no_file_for_any_batch_size():
    x, call = CASES["windows"]
    qat = kq.calibrate(kq.quantize(model_of(x, call)), x)
    with pytest.raises(ValueError, match="batch is not its first axis, or has several rows.*dynamic_batch=False"):
        kq.freeze(qat, dynamic_batch=True)
