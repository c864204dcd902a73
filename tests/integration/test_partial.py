"""Some layers in float, the others in integers: trained, saved, loaded, and compared on the runtimes."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_qat as kq
import tflite_export


def net():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(name="stem_bn")(x))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Activation("gelu", name="gelu")(layers.BatchNormalization(name="depthwise_bn")(x))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(5, activation="softmax", name="head")(x))


# the rules' patterns → the ops in float
_PATTERNS = {
    ("head*",): ["FULLY_CONNECTED", "SOFTMAX"],
    ("stem*",): ["CONV_2D", "MUL", "ADD", "RELU"],
    ("depthwise", "depthwise_bn"): ["DEPTHWISE_CONV_2D", "MUL", "ADD"],
    ("gelu",): ["GELU"],
    ("pool",): ["MEAN"],
}


def _images():
    return np.random.default_rng(0).normal(size=(64, 12, 12, 3)).astype("float32")


@pytest.mark.parametrize("patterns", _PATTERNS, ids=str)
def test_layers_left_in_float(patterns, tmp_path):
    images, rules = _images(), [kq.Rule(pattern, None) for pattern in patterns]
    qat = kq.quantize(net(), rules=rules)
    qat.compile("sgd", "sparse_categorical_crossentropy")
    qat.fit(images, np.arange(64) % 5, verbose=0)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert np.array_equal(qat.predict(images, verbose=0), loaded.predict(images, verbose=0))

    report = kq.export(loaded, tmp_path / "model.tflite", images, runtimes=("litert", "xnnpack"))
    assert report.parity.max_lsb <= 1, report
    assert not report.summary.is_full_int8 and "NOT full int8" in str(report)
    types = {tensor.name: tensor.dtype for tensor in report.summary.tensors}
    border = ("QUANTIZE", "DEQUANTIZE")
    ops = [op for op in report.summary.ops if op.kind not in border]
    assert [op.kind for op in ops if types[op.outputs[0]] == "float32"] == _PATTERNS[patterns]


def test_explain_says_so():
    rows = {row.layer: row.range for row in kq.explain(net(), rules=[kq.Rule("depthwise", None)]).rows}
    assert rows["depthwise"] == "float" and "float" not in {rows[name] for name in rows if name != "depthwise"}


def test_a_rule_for_everything_is_refused():
    with pytest.raises(ValueError, match="Nothing of the model is left to quantize"):
        kq.quantize(net(), rules=[kq.Rule("*", None)])


def test_without_rules_nothing_is_float():
    qat = kq.calibrate(kq.quantize(net()), _images())
    assert tflite_export.inspect(tflite_export.write(kq.freeze(qat))).is_full_int8


def test_a_look_up_that_tflite_cannot_compute_in_float_is_refused():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, layers.Dense(3)(layers.Activation("softplus", name="plus")(inputs)))
    with pytest.raises(kq.UnsupportedModelError, match="'plus'.*no float op.*Leave it out of the rule"):
        kq.quantize(model, rules=[kq.Rule("plus", None)])


@pytest.mark.parametrize(
    "layer",
    [layers.Lambda(lambda x: x[:, 1:], name="head"), layers.GRU(3, name="head"), layers.LSTM(3, name="head")],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_slice_are_left_in_float(layer, tmp_path):
    x = np.random.default_rng(0).normal(size=(64, 4, 5)).astype("float32")
    inputs = keras.Input((4, 5))
    model = keras.Model(inputs, layers.Dense(2)(layer(inputs)))
    qat = kq.calibrate(kq.quantize(model, rules=[kq.Rule("head/*", None), kq.Rule("head", None)]), x)
    report = kq.export(qat, tmp_path / "model.tflite", x)
    assert report.parity.max_lsb <= 1 and not report.summary.is_full_int8
