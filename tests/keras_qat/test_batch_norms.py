"""Batch norms that stand alone: MUL and ADD, which learn as Keras's layer does, or one op with a scale for each channel."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_qat as kq
import tflite_export
from keras_qat.batch_norms import NormMultiplier, NormOffset, multiplied_and_added

PER_CHANNEL = [kq.Rule("norm", kq.Scheme(per_channel_norms=True))]


def images(size=6, channels=5, count=32):
    generator = np.random.default_rng(0)
    spread = generator.uniform(0.5, 2.0, channels)
    return (generator.normal(0.3, spread, (count, size, size, channels))).astype("float32")


def lively(**options):
    """A batch norm that is not what it begins as."""
    norm = layers.BatchNormalization(name="norm", **options)
    norm.build((None, 6, 6, 5))
    generator = np.random.default_rng(1)
    for variable in norm.variables:
        variable.assign(generator.uniform(0.5, 1.5, variable.shape))
    return norm


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": False}, {"center": False}, {"momentum": 0.5, "epsilon": 0.1}, {"trainable": False}],
    ids=str,
)
def test_they_compute_what_keras_computes(options, training):
    norm, inputs = lively(**options), keras.Input((6, 6, 5))
    parts = keras.Model(inputs, multiplied_and_added(norm)(inputs))
    for _ in range(2 if training else 1):  # the second time on other moving averages
        expected, found = norm(images(), training=training), parts(images(), training=training)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(parts.get_layer("norm.multiplier").moving, norm.moving_variance, rtol=1e-5)
    np.testing.assert_allclose(parts.get_layer("norm.offset").moving, norm.moving_mean, rtol=1e-5)


def test_regularizers_and_constraints_live_on():
    options = {"gamma_regularizer": "l2", "beta_regularizer": keras.regularizers.L1(0.1), "gamma_constraint": "non_neg"}
    norm, inputs = lively(**options), keras.Input((6, 6, 5))
    parts = keras.Model(inputs, multiplied_and_added(norm)(inputs))
    np.testing.assert_allclose(sum(parts.losses), sum(norm.losses), rtol=1e-6)
    assert isinstance(parts.get_layer("norm.multiplier").weight.constraint, keras.constraints.NonNeg)


def net(channels=5):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, channels))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Conv2D(4, 3)(x))))


def test_from_training_to_the_runtimes(tmp_path):
    x = images(count=64)
    qat = kq.quantize(net())
    qat.compile("adam", "mse")
    losses = qat.fit(x, x.mean((1, 2))[:, :3], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    # A factor that learns takes the offset with it: at inference, too, the mean becomes beta.
    multiplier, offset = (qat.get_layer(f"norm.{name}") for name in ("multiplier", "offset"))
    multiplier.weight.assign([3.0] * 5)
    centre = offset.offset(offset.moving, multiplier.multiplier(multiplier.moving)) + ops.convert_to_tensor(
        offset.moving
    ) * multiplier.multiplier(multiplier.moving)
    np.testing.assert_allclose(centre, offset.weight, atol=1e-5)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert np.array_equal(loaded.predict(x, verbose=0), qat.predict(x, verbose=0))
    report = kq.export(loaded, tmp_path / "model.tflite", x)
    assert report.parity.mismatch == 0, report
    assert report.summary.is_full_int8 and [op.kind for op in report.summary.ops][:3] == ["MUL", "ADD", "CONV_2D"]


def test_arena_is_smaller_by_eight_bytes_a_channel(tmp_path):
    x, arenas = images(channels=256, count=8), []
    for rules in (PER_CHANNEL, []):
        qat = kq.calibrate(kq.quantize(net(256), rules=rules), x)
        arenas.append(kq.export(qat, tmp_path / "model.tflite", x, runtimes=("tflm",)).parity.arena_bytes)
    assert arenas[0] - arenas[1] > 6 * 256, arenas


def test_frozen_statistics_stay_and_gamma_goes_on_learning():
    x = images(count=64)
    qat = kq.quantize(net())
    qat.compile("adam", "mse")
    y = x.mean((1, 2))[:, :3]
    qat.fit(x, y, verbose=0)
    parts = [layer for layer in qat.layers if isinstance(layer, (NormMultiplier, NormOffset))]
    before = [[np.array(part.moving), np.array(part.weight)] for part in parts]
    qat.fit(x, y, verbose=0, callbacks=[kq.callbacks.QuantizationSchedule(freeze_batch_norm=0)])
    for (moving, weight), part in zip(before, parts, strict=True):
        assert np.array_equal(moving, part.moving) and not np.array_equal(weight, part.weight)
    config = parts[0].get_config()
    assert config["frozen_statistics"] and NormMultiplier.from_config(config).frozen_statistics


def test_a_shared_norm_stays_one(tmp_path):
    norm, inputs = lively(), keras.Input((6, 6, 5))
    pooled = layers.AveragePooling2D(2)(inputs)
    outputs = [layers.Flatten(name=name)(layers.ReLU()(norm(x))) for name, x in (("large", inputs), ("small", pooled))]
    qat = kq.quantize(keras.Model(inputs, outputs))
    assert len(qat.trainable_weights) == 2
    report = kq.export(kq.calibrate(qat, images()), tmp_path / "model.tflite", images())
    assert report.parity.mismatch == 0, report
    assert report.summary.op_counts["MUL"] == report.summary.op_counts["ADD"] == 2


def test_a_norm_that_is_more_than_its_averages_stays_one_op():
    inputs = keras.Input((6, 6, 5))
    outputs = layers.Conv2D(4, 3)(layers.ReLU()(layers.BatchNormalization(renorm=True, name="norm")(inputs)))
    rows = kq.explain(keras.Model(inputs, outputs)).rows
    assert "norm/product" not in {row.layer for row in rows}


def test_explain_shows_both_ops():
    rows = {row.layer: row.integer_op for row in kq.explain(net()).rows}
    assert rows["norm/product"] == "MUL" and rows["norm"] == "ADD / SUB"


def test_frozen_layers_stay_frozen():
    model = net()
    model.get_layer("norm").trainable = False
    qat = kq.quantize(model)
    assert not {weight.path for weight in qat.trainable_weights if "norm" in weight.path}


def test_with_a_scale_for_each_channel_it_is_one_op():
    qat = kq.calibrate(kq.quantize(net(), rules=PER_CHANNEL), images())
    summary = tflite_export.inspect(tflite_export.write(kq.freeze(qat)))
    assert [op.kind for op in summary.ops][:2] == ["DEPTHWISE_CONV_2D", "CONV_2D"]
