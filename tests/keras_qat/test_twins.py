"""What is computed twice is computed once."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_qat as kq
import tflite_export

_MASK = np.arange(8) % 2 == 0


def _frozen(build, outputs=lambda y: y, **options):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 8))
    model = keras.Model(inputs, outputs(build(layers.Conv2D(8, 1, name="stem")(inputs))))
    images = np.random.default_rng(0).normal(size=(16, 8, 8, 8)).astype("float32")
    qat = kq.calibrate(kq.quantize(model, **options), images)
    return qat, images, tflite_export.write(kq.freeze(qat))


def _padded(x):
    return layers.ZeroPadding2D(((0, 1), (0, 1)))(x)


def _ops(content):
    return [op.kind for op in tflite_export.inspect(content).ops]


@pytest.mark.parametrize(
    "build, count",
    [
        (lambda x: layers.Conv2D(4, 1)(layers.ReLU()(x)) + layers.Conv2D(4, 3, padding="same")(layers.ReLU()(x)), 4),
        (lambda x: layers.Conv2D(4, 1)(ops.relu(x)) + layers.Conv2D(4, 1)(layers.Activation("relu")(x)), 4),
        (lambda x: layers.AveragePooling2D(3, 1)(x) + layers.AveragePooling2D(3, 1)(x), 3),
        (lambda x: ops.sigmoid(x)[:, 1:] * ops.sigmoid(x)[:, 1:], 4),  # a twin makes twins of those behind it
        (lambda x: layers.MaxPooling2D(2, 1)(x) + layers.MaxPooling2D((2, 2), strides=1)(x), 3),
        (lambda x: x[:, 1:] + x[:, :-1], 4),
        (lambda x: layers.MaxPooling2D(2, 1)(x) + layers.MaxPooling2D(2, 1, padding="same")(x)[:, 1:, 1:], 5),
        (lambda x: ops.where(_MASK, x, -x) * ops.where(~_MASK, x, -x), 5),
        (lambda x: layers.Conv2D(4, 1)(x) + layers.Conv2D(4, 1)(x), 4),  # weights of their own
        (lambda x: layers.Conv2D(4, 3, 2)(_padded(x)) + layers.Conv2D(4, 3, 2)(_padded(x)), 4),  # folded into both
        (lambda x: layers.Conv2D(8, 3, 2)(_padded(x)) + layers.MaxPooling2D(3, 2)(_padded(x)), 5),
    ],
)
def test_as_many_ops_as_there_are_different_ones(build, count):
    qat, images, content = _frozen(build)
    assert len(_ops(content)) == count, _ops(content)
    assert tflite_export.verify(content, qat, images, runtimes=("litert",)).max_lsb == 0


def test_outputs_that_are_the_same_keep_their_names():
    qat, images, content = _frozen(lambda x: x, lambda x: {"one": layers.ReLU()(x), "other": layers.ReLU()(x)})
    found, expected = tflite_export.predict(content, images), qat.predict(images, verbose=0)
    assert set(found) == set(expected) == {"one", "other"}
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_dropouts_stay_different():
    inputs = keras.Input((64,))
    x = layers.Dense(64)(inputs)
    model = keras.Model(inputs, layers.Dropout(0.5)(x) - layers.Dropout(0.5)(x))
    assert np.any(kq.quantize(model)(np.ones((2, 64), "float32"), training=True))


def test_what_a_rule_leaves_in_float_stays_apart():
    def branches(x):
        return layers.Conv2D(4, 1)(layers.ReLU(name="one")(x)) + layers.Conv2D(4, 1)(layers.ReLU(name="two")(x))

    _, _, content = _frozen(branches, rules=[kq.Rule("two", None)])
    assert _ops(content).count("RELU") == 2 and not tflite_export.inspect(content).is_full_int8


def test_explain_tells_whose_twin_an_operation_is():
    inputs = keras.Input((8, 8, 8))
    x = layers.Conv2D(8, 1, name="stem")(inputs)
    branches = [layers.Conv2D(4, 1, name=f"{name}_conv")(layers.ReLU(name=name)(x)) for name in ("one", "two")]
    rows = {row.layer: row.integer_op for row in kq.explain(keras.Model(inputs, branches[0] + branches[1])).rows}
    assert {(rows["one"], rows["two"])} <= {("RELU", "same as one"), ("same as two", "RELU")}
