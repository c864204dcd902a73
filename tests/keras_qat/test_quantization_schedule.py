"""QuantizationSchedule in `fit`: what each stage computes, when it begins, in every mode of training, and what is saved."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import keras_qat as kq
from keras_qat.callbacks import GradientClipping, Pruning, QuantizationSchedule
from keras_qat.callbacks.train_function import StepCallback
from keras_qat.layers import FakeQuant, Quantized, Rescale
from keras_qat.primitives import InFloat, Slope
from keras_qat.schedules import Constant, OneShot, Polynomial, join

X = np.random.default_rng(0).normal(size=(40, 6, 6, 3)).astype("float32")
Y = X.mean((1, 2))[:, :2]
STEPS = 5  # of an epoch

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "several_steps": {"jit_compile": False, "steps_per_execution": 4},
}


def net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


def compiled(model=None, **options):
    """Eager unless told otherwise: few steps of a small net take less time than a trace."""
    model = model or kq.quantize(net())
    model.compile(keras.optimizers.SGD(0.05), "mse", **(options or MODES["eager"]))
    return model


def fit(model, *callbacks, epochs=4, initial_epoch=0):
    """Without the warning where a schedule goes on behind the end."""
    options = {"batch_size": 8, "shuffle": False, "verbose": 0, "epochs": epochs, "initial_epoch": initial_epoch}
    return model.fit(X, Y, callbacks=list(callbacks), **options).history


def ranges(model):
    grids = [layer for layer in model.layers if isinstance(layer, FakeQuant)]
    return np.concatenate([np.ravel(weight) for grid in grids for weight in grid.weights])


def statistics(model):
    norm = model.get_layer("conv").batch_norm
    return np.concatenate([norm.moving_mean, norm.moving_variance])


def bits(model):
    return {layer.name: layer.weight_quantizer.spec.bits for layer in model.layers if isinstance(layer, Quantized)}


class Watch(keras.callbacks.Callback):
    """Values of the model behind every run of the train function, by the number of steps done."""

    def __init__(self, *values):
        super().__init__()
        self.values, self.seen = values, {}

    def on_train_begin(self, logs=None):
        self.seen[self.step()] = [value(self.model) for value in self.values]

    def on_train_batch_end(self, batch, logs=None):
        self.on_train_begin()

    def step(self):
        return int(self.model.optimizer.iterations)

    def last_change(self, index) -> int:
        """The step behind which a value never changed again."""
        steps = sorted(self.seen)
        moves = [b for a, b in itertools.pairwise(steps) if np.any(self.seen[a][index] != self.seen[b][index])]
        return moves[-1] if moves else 0


class Traces(StepCallback):
    """Counts how often a training step is traced, and notes the bits that each step runs with."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def prepare(self):
        self.bits = keras.Variable(np.zeros(100, "float32"), trainable=False)
        self.rounding = keras.Variable(np.zeros(100, "float32"), trainable=False)

    def changed(self, gradients_and_variables):
        step = ops.cast(self.model.optimizer.iterations, "int32")
        conv = self.model.get_layer("conv")
        self.bits.assign(ops.where(ops.arange(100) == step, conv.weight_quantizer.levels[0], self.bits))
        self.rounding.assign(ops.where(ops.arange(100) == step, float(conv.rounds), self.rounding))
        self.count += 1
        return gradients_and_variables


# --- the stages ------------------------------------------------------------------------------------------------------


def styles():
    """Layers that have integers of their own besides weights."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", name="conv")(x))
    x = layers.LeakyReLU(0.2)(x) * -0.7
    x = layers.Concatenate()([ops.sigmoid(x), ops.clip(x, -0.1, 0.2), x])
    x = layers.Activation("hard_swish")(layers.DepthwiseConv2D(3)(x))
    x = layers.AveragePooling2D(2)(layers.BatchNormalization()(x))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("mode", ["graph"])
def test_before_the_start_it_trains_like_the_float_model(mode):
    plain = styles()
    qat, other = kq.quantize(plain), kq.quantize(plain)
    assert {type(layer) for layer in qat.layers} >= {Rescale, Slope}
    images = X[:4]
    before = np.asarray(qat(images, training=True))
    kq.calibrate(qat, X)
    for model in (plain, qat, other):
        fit(compiled(model, **MODES[mode]), *([QuantizationSchedule(1000)] if model is qat else []), epochs=1)

    def kernels(model):
        found = [layer for layer in model._flatten_layers() if hasattr(layer, "kernel") and not layer._layers]
        return {tuple(layer.kernel.shape): np.asarray(layer.kernel) for layer in found}

    for shape, kernel in kernels(plain).items():
        np.testing.assert_allclose(kernels(qat)[shape], kernel, atol=1e-5)
    assert any(np.abs(kernels(other)[shape] - kernel).max() > 1e-4 for shape, kernel in kernels(plain).items())
    # The stage was that of `fit` alone: called by hand, or without the callback, the model rounds as ever.
    assert all(layer.rounds for layer in qat.layers if hasattr(layer, "rounds"))
    assert np.any(before != plain(images, training=True))
    kq.freeze(qat)


def test_ranges_are_observed_before_the_start():
    qat = compiled()
    with pytest.warns(UserWarning, match=r"ends at step 20, .* at step 1000"):
        fit(qat, QuantizationSchedule(1000))
    assert all(layer.quantizer.seen[0, 2] == 20 for layer in qat.layers if isinstance(layer, FakeQuant))
    low, high = qat.get_layer("head.dense.range").quantizer.known_limits()
    y = net()(X)
    assert low < float(ops.max(y)) and high > float(ops.min(y))
    kq.freeze(qat)


@pytest.mark.parametrize("mode", MODES)
def test_each_stage_begins_at_its_step(mode):
    watch, traces = Watch(ranges, statistics), Traces()
    schedule = QuantizationSchedule(
        3, freeze_ranges=11, freeze_batch_norm=7, bits=Polynomial(8, 4, 4, 16, power=1), rules=[kq.Rule("head", None)]
    )
    qat = compiled(**MODES[mode])
    gamma = np.asarray(qat.get_layer("conv").batch_norm.gamma)
    history = fit(qat, traces, schedule, watch)
    # With several steps at a time, runs begin at 0, 4, 5, 9, 10, 14 and so on: an epoch has 5 steps.
    begins = {3: 4, 7: 9, 11: 14} if mode == "several_steps" else {3: 3, 7: 7, 11: 11}
    assert [watch.last_change(0), watch.last_change(1)] == [begins[11], begins[7]]
    assert np.any(qat.get_layer("conv").batch_norm.gamma != gamma)
    expected = np.round(np.clip(8 - 4 * (np.arange(20) - 4) / 12, 4, 8))
    np.testing.assert_array_equal(1 + np.log2(traces.bits[:20] + 1), expected)
    assert list(np.asarray(traces.rounding[:20])).index(1.0) == begins[3]
    assert bits(qat) == {"conv": 4, "head.dense": 8}
    assert history["weight_bits"] == [8.0, 6.0, 4.0, 4.0]
    if mode != "eager":
        assert traces.count <= 2 * 4


def test_no_trace_per_step():
    counts = []
    for epochs in (2, 6):
        traces = Traces()
        schedule = QuantizationSchedule(2, 6, 6, bits=Polynomial(8, 2, 0, 9))
        fit(compiled(**MODES["graph"]), traces, schedule, epochs=epochs)
        counts.append(traces.count)
    alone = Traces()
    fit(compiled(**MODES["graph"]), alone, epochs=1)
    assert counts[0] == counts[1] == 3 * alone.count


def test_with_ranges_and_statistics_at_rest_training_sees_what_inference_sees():
    qat = compiled()
    fit(qat, QuantizationSchedule(0, 10, 10))
    scale, _ = qat.get_layer("head.dense.range").parameters()
    before = qat.get_weights()
    in_training, at_inference = (np.asarray(qat(X, training=training)) for training in (True, False))
    steps = np.abs(in_training - at_inference) / scale
    assert steps.max() < 1.01  # `freeze` moves the multipliers of batch norms by a hair
    assert all(np.array_equal(a, b) for a, b in zip(before, qat.get_weights(), strict=True))


def test_a_batch_norm_in_float_comes_to_rest_too():
    inputs = keras.Input((6, 6, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    qat = compiled(kq.quantize(model, rules=[kq.Rule("norm", None)]))
    norm = next(layer.operation for layer in qat.layers if isinstance(layer, InFloat))
    watch = Watch(lambda _: np.concatenate([norm.moving_mean, norm.moving_variance]), lambda _: np.asarray(norm.gamma))
    fit(qat, QuantizationSchedule(freeze_batch_norm=7), watch)
    assert watch.last_change(0) == 7 and watch.last_change(1) == 20


# --- bits ------------------------------------------------------------------------------------------------------------


def test_annealed_weights_are_the_integers_of_the_file(tmp_path):
    qat = compiled()
    fit(qat, QuantizationSchedule(bits=Polynomial(8, 4, 0, 12, power=1)))
    report = kq.export(qat, tmp_path / "model.tflite", verify_with=X, runtimes=("litert", "xnnpack"))
    assert report.parity.max_lsb <= 1
    program = kq.freeze(qat)
    kernels = [tensor for tensor in program.tensors.values() if tensor.is_constant and tensor.dtype == "int8"]
    assert len(kernels) == 2 and all(np.abs(kernel.data).max() == 7 for kernel in kernels)
    dense, scale = np.asarray(qat.get_layer("head.dense").layer.kernel), np.array(kernels[1].scale)
    assert np.all(scale >= np.abs(dense).max(0) / 7.001)
    np.testing.assert_array_equal(kernels[1].data.T, np.round(dense / scale))


def test_bits_scheme_and_statistics_are_saved(tmp_path):
    qat = compiled()
    fit(qat, QuantizationSchedule(0, 5, 5, bits=4, rules=[kq.Rule("conv", Constant(6, begin=10))]))
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    assert bits(loaded) == bits(qat) == {"conv": 6, "head.dense": 4}
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), qat.predict(X, verbose=0))
    ours, theirs = (
        {t.name: t.data for t in kq.freeze(model).tensors.values() if t.is_constant} for model in (qat, loaded)
    )
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    # At rest it stays in further training, until another schedule says otherwise.
    found = ranges(qat), statistics(qat)
    fit(loaded)
    assert np.array_equal(ranges(loaded), found[0]) and np.array_equal(statistics(loaded), found[1])
    fit(loaded, QuantizationSchedule())
    assert np.any(ranges(loaded) != found[0]) and np.any(statistics(loaded) != found[1])
    assert bits(loaded) == {"conv": 6, "head.dense": 4}


def test_weights_alone_bring_the_bits_along(tmp_path):
    qat, twin = compiled(), compiled()
    fit(qat, QuantizationSchedule(bits=3))
    qat.save_weights(tmp_path / "qat.weights.h5")
    twin.load_weights(tmp_path / "qat.weights.h5")
    assert bits(twin) == {"conv": 3, "head.dense": 3}
    np.testing.assert_array_equal(twin.predict(X, verbose=0), qat.predict(X, verbose=0))


def test_early_stopping_restores_the_bits_of_the_best_epoch():
    qat = compiled()
    worse = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(late=float(epoch)))
    best = keras.callbacks.EarlyStopping("late", mode="min", patience=9, restore_best_weights=True)
    fit(qat, QuantizationSchedule(bits=OneShot(4, begin=5)), worse, best)
    assert bits(qat) == {"conv": 4, "head.dense": 4}  # chosen for the step behind epoch 0
    qat = compiled()
    fit(qat, QuantizationSchedule(bits=OneShot(4, begin=6)), worse, best)
    assert bits(qat) == {"conv": 8, "head.dense": 8}


def test_schedules_can_be_joined_and_count_epochs():
    traces = Traces()
    schedule = join([Constant(8), Constant(5), Constant(4)], [1, 2])
    qat = compiled()
    fit(qat, traces, QuantizationSchedule(0.4, freeze_ranges=2, bits=schedule, unit="epochs"))
    found = list(1 + np.log2(traces.bits[:20] + 1))
    assert found == [8] * 5 + [5] * 5 + [4] * 10
    assert list(np.asarray(traces.rounding[:20])).index(1.0) == 2
    assert qat.get_layer("head.dense.range").frozen and qat.get_layer("head.dense.range").quantizer.seen[0, 2] == 10


# --- several fits, several callbacks ---------------------------------------------------------------------------------


def test_a_second_fit_goes_on():
    whole, parts = compiled(), compiled()
    make = lambda: QuantizationSchedule(3, 12, 8, bits=Polynomial(8, 4, 0, 16, power=1))
    fit(whole, make())
    schedule = make()
    with pytest.warns(UserWarning, match="ends at step 10"):
        fit(parts, schedule, epochs=2)
    assert not parts.get_layer("head.dense.range").frozen and parts.get_layer("conv").frozen_statistics
    fit(parts, schedule, epochs=2)
    for a, b in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert parts.get_layer("head.dense.range").frozen


@pytest.mark.filterwarnings("ignore:This fit ends")
def test_compiled_anew_the_same_callback_goes_on_and_a_new_one_starts_over():
    qat, schedule = compiled(), QuantizationSchedule(0, 7, bits=OneShot(4, 12))
    fit(qat, schedule, epochs=2)
    assert qat.get_layer("head.dense.range").frozen and bits(qat)["conv"] == 8
    fit(compiled(qat), schedule, epochs=1)
    assert schedule.step == 15 and qat.get_layer("head.dense.range").frozen and bits(qat)["conv"] == 4
    watch = Watch(ranges)
    fit(compiled(qat), QuantizationSchedule(0, 3), watch, epochs=1)
    assert watch.last_change(0) == 3


def test_backup_and_restore(tmp_path):
    make = lambda: QuantizationSchedule(2, 7, 7, bits=Polynomial(8, 4, 0, 16, power=1))
    whole = compiled()
    fit(whole, make())

    class Accident(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fit(compiled(), keras.callbacks.BackupAndRestore(tmp_path), make(), Accident())
    again = compiled()
    watch = Watch(ranges)
    fit(again, keras.callbacks.BackupAndRestore(tmp_path), make(), watch)
    assert watch.step() == 20 and watch.last_change(0) <= 10
    for a, b in zip(whole.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.filterwarnings("ignore:This fit ends")
def test_an_interrupted_fit_leaves_no_stage_behind():
    qat = compiled()

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(qat, QuantizationSchedule(1000), Interrupt())
    assert all(layer.rounds for layer in qat.layers if isinstance(layer, (FakeQuant, Quantized)))
    traces = Traces()
    fit(qat, traces, epochs=1)
    assert np.all(traces.rounding[1:6] == 1.0)


@pytest.mark.parametrize("order, mode", [(1, "eager"), (-1, "xla")])
def test_together_with_clipping_and_pruning(order, mode):
    qat = compiled(**MODES[mode])
    callbacks = [
        GradientClipping(kq.clipping.ByGlobalNorm(0.1)),
        QuantizationSchedule(0, 8, 8, bits=Polynomial(8, 4, 0, 12)),
        Pruning(Polynomial(0.0, 0.5, 0, 10)),
    ]
    history = fit(qat, *callbacks[::order])
    assert {"grad_norm", "clipped", "sparsity", "weight_bits"} <= set(history)
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.01) and history["weight_bits"][-1] == 4
    assert np.mean(qat.get_layer("conv").layer.kernel == 0) == pytest.approx(0.5, abs=0.01)
    assert qat.get_layer("head.dense.range").quantizer.seen[0, 2] == 8
    kernel = next(t.data for t in kq.freeze(qat).tensors.values() if t.is_constant and len(t.shape) == 4)
    assert np.abs(kernel).max() == 7 and np.mean(kernel == 0) >= 0.5


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "freeze_before_start": (lambda: QuantizationSchedule(10, freeze_ranges=5), "freeze_ranges >= start.*start=10"),
    "negative": (lambda: QuantizationSchedule(-1), "start is a whole number of steps.*-1"),
    "half_a_step": (lambda: QuantizationSchedule(0.5), "start is a whole number of steps.*0.5"),
    "no_start": (lambda: QuantizationSchedule(None), "start is a whole number of steps.*None"),
    "text": (lambda: QuantizationSchedule(freeze_batch_norm="soon"), "freeze_batch_norm.*'soon'"),
    "nan": (lambda: QuantizationSchedule(freeze_ranges=float("nan"), unit="epochs"), "freeze_ranges.*nan"),
    "unit": (lambda: QuantizationSchedule(unit="batches"), "'steps' or 'epochs'.*'batches'"),
    "sparsity_for_bits": (lambda: QuantizationSchedule(bits=Polynomial(0.0, 0.5, 0, 9)), "2 to 8 bits"),
    "one_bit": (lambda: QuantizationSchedule(bits=1), "2 to 8.*1"),
    "sixteen_bits": (lambda: QuantizationSchedule(bits=16), "2 to 8.*16"),
    "backwards": (lambda: QuantizationSchedule(bits=Polynomial(8, 4, 9, 5)), "ends where it begins or later"),
    "too_many_bits": (lambda: QuantizationSchedule(bits=9), "2 to 8 bits.*Received: 9"),
    "bits_in_a_rule": (lambda: QuantizationSchedule(rules=[kq.Rule("conv", 0.5)]), "2 to 8 bits"),
    "no_rule": (lambda: QuantizationSchedule(rules=["conv"]), "kq.Rule"),
    "bits_for_a_sparsity": (lambda: Pruning(Polynomial(2, 4, 0, 9)), "share of the weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_refused_before_the_first_step():
    qat = compiled()
    before = qat.get_weights()
    calls = {
        "match no layer": [QuantizationSchedule(bits=4, rules=[kq.Rule("cnov", None)])],
        "never observed.*kq.calibrate": [QuantizationSchedule(freeze_ranges=0)],
        "Two QuantizationSchedule": [QuantizationSchedule(), QuantizationSchedule(bits=4)],
    }
    for message, callbacks in calls.items():
        with pytest.raises(ValueError, match=message):
            fit(qat, *callbacks)
    endless = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).repeat()
    with pytest.raises(ValueError, match="length of an epoch"):
        qat.fit(endless.filter(lambda x, y: True), callbacks=[QuantizationSchedule(1, unit="epochs")], verbose=0)
    with pytest.raises(ValueError, match="not a QAT model"):
        fit(compiled(net()), QuantizationSchedule())
    with pytest.raises(ValueError, match="model.compile"):
        callback = QuantizationSchedule()
        callback.set_model(kq.quantize(net()))
        callback.on_train_begin()
    assert all(np.array_equal(a, b) for a, b in zip(before, qat.get_weights(), strict=True))


def test_calibrated_ranges_can_be_kept_from_the_first_step_on():
    qat = compiled(kq.calibrate(kq.quantize(net()), X))
    found = ranges(qat)
    fit(qat, QuantizationSchedule(freeze_ranges=0))
    np.testing.assert_array_equal(ranges(qat), found)
