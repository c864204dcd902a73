"""Int8Evaluation in `fit`: the metrics of the file that `kq.export` writes, run by LiteRT."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import keras_qat as kq
import tflite_export
from keras_qat.callbacks import GradientClipping, Int8Evaluation, QuantizationSchedule, int8_evaluation

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(size=(64, 6, 6, 3)).astype("float32")
Y = X.mean((1, 2)).argmax(-1)
X_VAL = GENERATOR.normal(size=(50, 6, 6, 3)).astype("float32")
Y_VAL = X_VAL.mean((1, 2)).argmax(-1)


def net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(8, 3, use_bias=False)(inputs)))
    x = layers.Dense(3, activation="softmax", kernel_regularizer="l2", name="label")(layers.Flatten()(x))
    return keras.Model(inputs, x)


def compiled(model=None, **options):
    model = model or kq.quantize(net())
    options = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"], "run_eagerly": True, **options}
    model.compile(keras.optimizers.Adam(0.01), **options)
    return model


def fit(model, *callbacks, x=X, y=Y, epochs=2, **options):
    return model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, callbacks=list(callbacks), **options).history


def on_litert(model, folder, x=X_VAL):
    """The file's own outputs, by hand."""
    kq.export(model, folder / "model.tflite", verify_with=X, runtimes=("xnnpack",))
    return tflite_export.predict(folder / "model.tflite", x)


def test_metrics_are_those_of_the_exported_file(tmp_path):
    qat = compiled()
    history = fit(qat, Int8Evaluation(X_VAL, Y_VAL))
    real, simulated = on_litert(qat, tmp_path), qat.predict(X_VAL, verbose=0)
    accuracies = [np.mean(outputs.argmax(-1) == Y_VAL) for outputs in (real, simulated)]
    losses = [-np.mean(np.log(np.maximum(p[np.arange(50), Y_VAL], 1e-7))) for p in (real, simulated)]
    for name, (found, expected) in {"accuracy": accuracies, "loss": losses}.items():
        assert len(history[f"val_int8_{name}"]) == 2
        assert history[f"val_int8_{name}"][-1] == pytest.approx(found, rel=1e-5)
        assert history[f"val_int8_{name}_gap"][-1] == pytest.approx(found - expected, abs=1e-5)


def test_the_gap_shows_what_the_simulation_does_not_know(monkeypatch):
    """Without that the test above could compare the simulation with itself."""
    monkeypatch.setattr(tflite_export, "predict", lambda content, inputs, runtime: np.eye(3)[(Y_VAL + 1) % 3])
    qat = compiled()
    history = fit(qat, Int8Evaluation(X_VAL, Y_VAL), validation_data=(X_VAL, Y_VAL))
    assert history["val_int8_accuracy"] == [0.0, 0.0]
    assert history["val_int8_accuracy_gap"] == pytest.approx([-a for a in history["val_accuracy"]], abs=1e-6)


@pytest.mark.parametrize("options", [{"steps_per_execution": 2}], ids=str)
def test_training_goes_on_as_if_it_were_not_there(options):
    options = {"run_eagerly": False, "jit_compile": False, **options}
    plain, watched = compiled(**options), compiled(**options)
    expected = fit(plain, shuffle=False, validation_data=(X_VAL, Y_VAL))
    history = fit(watched, Int8Evaluation(X_VAL, Y_VAL), shuffle=False, validation_data=(X_VAL, Y_VAL))
    assert {name: history[name] for name in expected} == expected
    assert all(np.array_equal(a, b) for a, b in zip(plain.get_weights(), watched.get_weights(), strict=True))
    assert abs(history["val_int8_accuracy_gap"][-1]) <= 0.02
    assert history["val_int8_accuracy"][-1] - history["val_int8_accuracy_gap"][-1] == pytest.approx(
        history["val_accuracy"][-1], abs=1e-6
    )


def test_metrics_keep_their_state():
    class Later(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.accuracy = self.model.get_metrics_result()["accuracy"], logs["accuracy"]

    later = Later()
    fit(compiled(), Int8Evaluation(X_VAL, Y_VAL), later, epochs=1)
    assert float(later.accuracy[0]) == pytest.approx(later.accuracy[1])


def test_checkpoint_and_early_stopping_follow_the_file(tmp_path):
    qat, path = compiled(), tmp_path / "best.keras"
    callbacks = [
        Int8Evaluation(X_VAL, Y_VAL),
        keras.callbacks.ModelCheckpoint(path, monitor="val_int8_accuracy", mode="max", save_best_only=True),
        keras.callbacks.EarlyStopping("val_int8_loss", mode="min", min_delta=100.0, patience=2),
    ]
    history = fit(qat, *callbacks, epochs=9)
    assert len(history["val_int8_accuracy"]) == 3  # stopped by a loss that never gets better by 100
    best = np.mean(on_litert(keras.saving.load_model(path), tmp_path).argmax(-1) == Y_VAL)
    assert best == pytest.approx(max(history["val_int8_accuracy"]))


def test_every_other_epoch():
    seen = []
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append("val_int8_loss" in logs))
    fit(compiled(), Int8Evaluation(X_VAL, Y_VAL, every=2), note, epochs=4)
    assert seen == [False, True, False, True]


# --- kinds of models and data ----------------------------------------------------------------------------------------


def two_ended():
    keras.utils.set_random_seed(0)
    image, extra = keras.Input((6, 6, 3), name="image"), keras.Input((4,), name="extra")
    x = layers.Concatenate()([layers.Flatten()(layers.Conv2D(4, 3)(image)), layers.Dense(4)(extra)])
    outputs = {"size": layers.Dense(1, name="size")(x), "label": layers.Dense(3, activation="softmax", name="label")(x)}
    return keras.Model({"image": image, "extra": extra}, outputs)


def several(x, y):
    extra = x[:, 0, 0, :1].repeat(4, -1)
    return {"image": x, "extra": extra}, {"size": x.mean((1, 2, 3))[:, None], "label": y}


SEVERAL = {
    "loss": {"label": "sparse_categorical_crossentropy", "size": "mse"},
    "metrics": {"label": ["accuracy"], "size": ["mae"]},
    "loss_weights": {"label": 1.0, "size": 0.5},
}


def test_several_inputs_and_outputs_by_name(tmp_path):
    qat = compiled(kq.quantize(two_ended()), **SEVERAL)
    (x, y), (x_val, y_val) = several(X, Y), several(X_VAL, Y_VAL)
    history = fit(qat, Int8Evaluation(x_val, y_val), x=x, y=y)
    kq.export(qat, tmp_path / "model.tflite", verify_with=x_val, runtimes=("xnnpack",))
    real = tflite_export.predict(tmp_path / "model.tflite", x_val)
    assert history["val_int8_label_accuracy"][-1] == pytest.approx(np.mean(real["label"].argmax(-1) == Y_VAL))
    assert history["val_int8_size_mae"][-1] == pytest.approx(np.mean(np.abs(real["size"] - y_val["size"])), rel=1e-5)
    losses = [history[f"val_int8_{name}"][-1] for name in ("loss", "label_loss", "size_loss")]
    assert losses[0] == pytest.approx(losses[1] + 0.5 * losses[2], rel=1e-5)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 7

    def __getitem__(self, index):
        part = slice(8 * index, 8 * index + 8)
        return X_VAL[part], Y_VAL[part], np.linspace(0, 1, 50)[part]


def dataset(batch=8, drop_remainder=False):
    samples = tf.data.Dataset.from_tensor_slices((X_VAL, Y_VAL, np.linspace(0, 1, 50)))
    return samples.shuffle(50).batch(batch, drop_remainder=drop_remainder)


SOURCES = {
    "arrays": lambda: Int8Evaluation(X_VAL, Y_VAL, sample_weight=np.linspace(0, 1, 50)),
    "shuffled_dataset": lambda: Int8Evaluation(dataset()),
    "py_dataset": lambda: Int8Evaluation(Batches()),
    "endless_dataset": lambda: Int8Evaluation(dataset(10, drop_remainder=True).repeat(), steps=5),
}


@pytest.mark.parametrize("portion", [1, 2**27])
def test_every_source_of_the_same_data_gives_the_same(monkeypatch, portion):
    monkeypatch.setattr(int8_evaluation, "_PORTION_BYTES", portion)
    monkeypatch.setattr(int8_evaluation, "_METRIC_SAMPLES", 16)
    qat = compiled(weighted_metrics=["accuracy"])
    kq.calibrate(qat, X)
    qat.evaluate(X, Y, verbose=0)  # makes the variables of the metrics
    found = {}
    for name, make in SOURCES.items():
        callback = make()
        callback.set_model(qat)
        callback.on_train_begin()
        found[name] = callback.evaluate()
    for name, values in found.items():
        assert values == pytest.approx(found["arrays"], rel=1e-4, abs=1e-5), name
    assert any(name.endswith("accuracy") for name in found["arrays"])


def test_a_metric_that_is_no_number():
    class PerClass(keras.metrics.Metric):
        def __init__(self):
            super().__init__(name="per_class")
            self.hits = self.add_weight(shape=(3,), initializer="zeros", name="hits")

        def update_state(self, y_true, y_pred, sample_weight=None):
            hit = keras.ops.cast(keras.ops.equal(keras.ops.argmax(y_pred, -1), keras.ops.ravel(y_true)), "float32")
            self.hits.assign_add(keras.ops.sum(keras.ops.one_hot(keras.ops.ravel(y_true), 3) * hit[:, None], 0))

        def result(self):
            return keras.ops.convert_to_tensor(self.hits)

    history = fit(compiled(metrics=[PerClass(), "accuracy"]), Int8Evaluation(X_VAL, Y_VAL), epochs=1)
    assert np.sum(history["val_int8_per_class"][0]) == pytest.approx(50 * history["val_int8_accuracy"][0])


def test_activity_regularizers_and_other_callbacks():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, activity_regularizer=keras.regularizers.L2(0.01))(inputs)
    qat = compiled(
        kq.quantize(keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))),
        run_eagerly=False,
        jit_compile=True,
    )
    callbacks = [GradientClipping(kq.clipping.ByNorm(1.0)), QuantizationSchedule(0, 1), Int8Evaluation(X_VAL, Y_VAL)]
    history = fit(qat, *callbacks)
    assert {"val_int8_accuracy", "val_int8_loss_gap", "grad_norm"} <= set(history)
    assert all(np.abs(history["val_int8_loss_gap"]) < 0.05)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "no_targets": (lambda: Int8Evaluation(X_VAL), "no targets.*y=None"),
    "two_sources": (lambda: Int8Evaluation(dataset(), Y_VAL), "brings its targets"),
    "every": (lambda: Int8Evaluation(X_VAL, Y_VAL, every=0), "every is a whole number.*0"),
    "batch_size": (lambda: Int8Evaluation(X_VAL, Y_VAL, batch_size=2.5), "batch_size is a whole number.*2.5"),
    "endless": (lambda: Int8Evaluation(dataset().repeat()), "no end.*steps="),
    "lengths": (lambda: Int8Evaluation(X_VAL, Y_VAL[:-1]), r"same number of samples.*\[49, 50\]"),
    "empty": (lambda: Int8Evaluation(X_VAL[:0], Y_VAL[:0]), "1 or more"),
    "runtime": (lambda: Int8Evaluation(X_VAL, Y_VAL, runtime="gpu"), "Unknown runtime"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


MISFITS = {
    "float_model": (net, X_VAL, Y_VAL, "not a QAT model"),
    "shape": (lambda: kq.quantize(net()), X_VAL[:, 1:], Y_VAL, r"'image': \(6, 6, 3\).*\(5, 6, 3\)"),
    "count": (lambda: kq.quantize(net()), [X_VAL, X_VAL], Y_VAL, "does not fit"),
    "name": (lambda: kq.quantize(two_ended()), {"image": X_VAL}, Y_VAL, r"lacks \['extra'\]"),
    "dataset": (lambda: kq.quantize(net()), dataset().map(lambda x, y, w: x), None, "no targets"),
    "unbatched": (lambda: kq.quantize(net()), dataset().unbatch(), None, "does not fit"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_before_the_first_step(name):
    make, x, y, message = MISFITS[name]
    model = make()
    model.compile("sgd", "mse")
    before = model.get_weights()
    callback = Int8Evaluation(x, y)
    callback.set_model(model)
    with pytest.raises(ValueError, match=message):
        callback.on_train_begin()
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_model_that_is_not_compiled_is_refused():
    callback = Int8Evaluation(X_VAL, Y_VAL)
    callback.set_model(kq.quantize(net()))
    with pytest.raises(ValueError, match="model.compile"):
        callback.on_train_begin()
