"""The callback Pruning: zeros stay zeros through everything that happens to a model, and what it refuses."""

import itertools
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers
from pruned import (
    LOSS,
    STEPS,
    Deep,
    X,
    Y,
    best,
    fit,
    float_net,
    n_of_m,
    small,
    targets_of,
    tiny,
    train,
    zeros,
)

import keras_qat as kq
from keras_qat import schedules
from keras_qat.callbacks import GradientClipping, Pruning
from keras_qat.pruning import Blocks, Channels, NofM, Policy, Weights

# --- in training -----------------------------------------------------------------------------------------------------

MODES = {
    "graph": {},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "several_steps": {"steps_per_execution": 2},
}
PATTERNS = {"weights": Weights(), "blocks": Blocks(2, 2), "channels": Channels(), "n_of_m": NofM(2, 4)}
RAMP = schedules.Polynomial(0.0, 0.5, 2, 10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_in_every_mode(pattern, mode):
    pruning = Pruning(RAMP, pattern=PATTERNS[pattern])
    model = train(tiny(), [pruning], **MODES[mode])
    history = model.history.history["sparsity"]
    assert history[-1] == pytest.approx(0.5, abs=0.01) and history == sorted(history)
    for target in pruning.targets:
        assert zeros(target.variable) == pytest.approx(0.5, abs=0.03), target.path
        if PATTERNS[pattern] == NofM(2, 4):
            mask = np.asarray(target.variable) != 0
            assert np.array_equal(mask, n_of_m(mask.astype("float32"), 2, 4, target.layout.inner))


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.9, 0.99])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsities_from_none_to_nearly_all(sparsity, scope):
    model = train(tiny(), [Pruning(sparsity, scope=scope)], epochs=1)
    assert model.history.history["sparsity"][-1] == pytest.approx(sparsity, abs=0.003)


class Watch(keras.callbacks.Callback):
    """The zeros of some kernels after every batch."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.seen = names, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append([zeros(self.model.get_layer(name).kernel) for name in self.names])


def test_the_schedule_is_followed_step_by_step():
    schedule, watch = schedules.Polynomial(0.0, 0.8, 2, 10, frequency=2), Watch("dense")
    train(tiny(), [Pruning(schedule), watch])
    size, chosen = tiny().get_layer("dense").kernel.shape, 0.0
    for step, (seen,) in enumerate(watch.seen, start=1):
        if schedule.due(step):
            kept = max(round(np.prod(size) * (1 - float(schedule(step)))), 1)
            chosen = 1 - kept / np.prod(size)
        assert seen == pytest.approx(chosen, abs=1.5 / np.prod(size)), step


OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(0.05, momentum=0.9),
    "adamw": lambda: optimizers.AdamW(0.01),
    "schedule_free": lambda: optimizers.ScheduleFreeAdamW(0.01),
    "ema": lambda: optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
    "ema_at_the_end": lambda: optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "loss_scale": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01), initial_scale=64.0),
    "accumulation": lambda: optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "multi": lambda: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.Adam(0.01), {"dense/.*": optimizers.SGD(0.01)})
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros_after_every_step_of_every_optimizer(name):
    watch, pruning = Watch("conv", "dense"), Pruning(schedules.OneShot(0.75, 3))
    model = train(tiny(), [pruning, watch], optimizer=OPTIMIZERS[name]())
    begin = 6 if name == "accumulation" else 3
    assert watch.seen == [[0.0, 0.0]] * (begin - 1) + [[0.75, 0.75]] * (12 - begin + 1)
    assert zeros(model.get_layer("conv").kernel) == 0.75 and pruning.step == (6 if name == "accumulation" else 12)
    # ... and they have one sign, so that they compress
    kernel = np.asarray(model.get_layer("conv").kernel)
    assert not np.any(np.signbit(kernel[kernel == 0]))


@pytest.mark.parametrize(
    "options", [{}, {"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str
)
@pytest.mark.parametrize("pattern", ["weights", "channels"])
def test_a_checkpoint_in_the_middle_of_an_epoch_is_sparse(pattern, options, tmp_path):
    saved = keras.callbacks.ModelCheckpoint(str(tmp_path / "{batch}.keras"), save_freq=1)
    pruning = Pruning(schedules.OneShot(0.5, 2), pattern=PATTERNS[pattern])
    train(tiny(), [pruning, saved], epochs=1, **options)
    files = sorted(tmp_path.glob("*.keras"))
    shares = [zeros(keras.models.load_model(file).get_layer("dense").kernel) for file in files]
    assert shares == ([0.5, 0.5] if options.get("steps_per_execution") else [0.0, 0.5, 0.5, 0.5])


def linear():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(5, use_bias=False, name="only")])
    model.compile(optimizers.SGD(0.05), "mse")
    return model


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_criteria_follow_their_formulas(criterion, mode):
    generator = np.random.default_rng(5)
    x, y = generator.normal(size=(24, 6)).astype("float32"), generator.normal(size=(24, 5)).astype("float32")
    model = linear()
    model.compile(optimizers.SGD(0.05), "mse", jit_compile=mode == "xla")
    weight, scores = np.float64(model.get_weights()[0]), 0.0
    for batch in (slice(0, 8), slice(8, 16), slice(16, 24)):
        gradient = 2 * x[batch].T @ (x[batch] @ weight - y[batch]) / y[batch].size
        scores = scores + {"taylor": abs(gradient * weight), "movement": -gradient * weight}.get(criterion, 0)
        weight -= 0.05 * gradient
    scores = abs(weight) if criterion == "magnitude" else scores
    pruning = Pruning(schedules.OneShot(0.6, 3), [kq.Rule("only", Policy())], criterion=criterion)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[pruning])
    expected = np.where(best(scores, 12), weight, 0)
    np.testing.assert_allclose(model.get_weights()[0], expected, atol=1e-6)


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_by_gradients_what_is_gone_stays_gone(criterion, scope):
    seen = []

    class Masks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.concatenate([np.ravel(self.model.get_layer(n).kernel) != 0 for n in ("conv", "dense")]))

    schedule = schedules.Polynomial(0.0, 0.8, 0, 12, frequency=2)
    train(tiny(), [Pruning(schedule, criterion=criterion, scope=scope), Masks()], optimizer=optimizers.Adam(0.05))
    assert all(np.all(before[after]) for before, after in itertools.pairwise(seen))
    assert seen[0].all() and seen[-1].mean() == pytest.approx(0.2, abs=0.01)


def test_gradient_criteria_at_step_0_wait_for_the_first_gradient():
    watch = Watch("dense")
    train(tiny(), [Pruning(schedules.OneShot(0.5), criterion="taylor"), watch], epochs=1)
    assert watch.seen == [[0.5]] * 4


def test_weights_are_gone_before_the_first_step_otherwise():
    """Nothing is learned from the weights that a schedule removes at step 0."""
    model, other = small(), small()
    for one in (model, other):
        one.compile(optimizers.SGD(0.01), LOSS)
    kernel = np.asarray(other.get_layer("dense").kernel)
    other.get_layer("dense").kernel.assign(np.where(best(abs(kernel), kernel.size // 2), kernel, 0))
    alone = [kq.Rule("dense", None), kq.Rule("*", Policy())]
    assert len(targets_of(model, alone)) > 3
    fit(model, [Pruning(schedules.OneShot(0.5), [kq.Rule("dense", Policy()), kq.Rule("*", None)])], 1, X[:16], Y[:16])
    fit(other, [], 1, X[:16], Y[:16])
    np.testing.assert_allclose(model.get_layer("classes").kernel, other.get_layer("classes").kernel, atol=1e-6)


def test_global_scope_in_training():
    pruning = Pruning(RAMP, scope="global", floor=0.2)
    model = train(small(), [pruning])
    shares = {target.path: zeros(target.variable) for target in pruning.targets}
    assert model.history.history["sparsity"][-1] == pytest.approx(0.5, abs=1e-3)
    assert len({round(share, 2) for share in shares.values()}) == 3 and max(shares.values()) <= 0.8 + 1e-6


def test_cyclic_schedules_let_weights_regrow():
    watch = Watch("dense")
    pruning = Pruning(schedules.Cyclic(0.2, 0.8, 0, 12, cycles=2, power=1, frequency=1))
    train(tiny(), [pruning, watch], epochs=4)
    shares = [share for (share,) in watch.seen]
    assert max(shares[:5]) == pytest.approx(0.8, abs=0.01) and shares[5] == pytest.approx(0.2, abs=0.01)
    assert shares[11] == shares[-1] == pytest.approx(0.8, abs=0.01)


def test_n_of_m_is_chosen_again_as_training_goes_on():
    watch = []

    class Masks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            watch.append(np.asarray(self.model.get_layer("dense").kernel) != 0)

    again = schedules.Constant(0.5, frequency=1)
    train(tiny(), [Pruning(again, pattern=NofM(2, 4)), Masks()], optimizer=optimizers.Adam(0.05))
    assert len({mask.tobytes() for mask in watch}) > 1 and all(mask.mean() == 0.5 for mask in watch)


def test_epochs_as_the_unit():
    watch = Watch("dense")
    train(tiny(), [Pruning(schedules.OneShot(0.5, 1), unit="epochs"), watch], epochs=2)
    assert watch.seen == [[0.0]] * (STEPS - 1) + [[0.5]] * (STEPS + 1)


def test_epochs_need_a_length():
    generator = ((X[:16], Y[:16]) for _ in range(5))
    model = tiny()
    model.compile("sgd", LOSS)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(generator, verbose=0, callbacks=[Pruning(schedules.OneShot(0.5, 1), unit="epochs")])


def test_tfmot_schedule_objects(monkeypatch):
    assert tf.keras.__version__ == keras.__version__  # else tfmot would switch the process to legacy Keras
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "")  # which tfmot sets: gone again behind the test
    sparsity = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    watch, schedule = Watch("dense"), sparsity.PolynomialDecay(0.0, 0.5, 0, 10, frequency=4)
    train(tiny(), [Pruning(schedule), watch])
    assert watch.seen[-3:] == [[0.5]] * 3


def test_steps_left_out_do_not_count():
    broken = X.copy()
    broken[20] = np.nan
    watch = Watch("dense")
    clip = GradientClipping(None)
    pruning = Pruning(schedules.OneShot(0.5, 2))
    train(tiny(), [clip, pruning, watch], epochs=1, x=broken)
    assert watch.seen == [[0.0], [0.0], [0.5], [0.5]] and pruning.step == 3


def test_a_fit_too_short_for_its_schedule_is_pointed_out():
    with pytest.warns(UserWarning, match="ends at step 4, the pruning schedule at step 10"):
        train(tiny(), [Pruning(RAMP)], epochs=1)


def test_a_subclassed_model_that_fit_builds():
    model = train(Deep(), [Pruning(RAMP)])
    assert [zeros(layer.kernel) for layer in (model.first, *model.block)] == [0.5, 0.5, 0.0]


# --- surviving -------------------------------------------------------------------------------------------------------

LONG = schedules.Polynomial(0.0, 0.8, 0, 24, frequency=2)


def assert_same(model, other):
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def begun(callbacks, epochs=3):
    return train(tiny(), callbacks, epochs=epochs, optimizer=optimizers.SGD(0.05, momentum=0.9))


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "movement"])
def test_a_second_fit_goes_on(criterion):
    whole = begun([Pruning(LONG, criterion=criterion)], epochs=6)
    pruning = Pruning(LONG, criterion=criterion)
    model = begun([pruning])
    assert pruning.step == 12
    fit(model, [pruning])
    assert pruning.step == 24
    assert_same(model, whole)


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_the_sums_of_steps_go_on_in_a_loaded_model(criterion, tmp_path):
    pruning = Pruning(LONG, criterion=criterion)
    model = begun([pruning])
    model.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    fit(loaded, [pruning])
    assert pruning.step == 24
    assert_same(loaded, begun([Pruning(LONG, criterion=criterion)], epochs=6))


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("same_callback", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_save_and_load_in_mid_training_goes_on(pattern, same_callback, tmp_path):
    final = 0.5 if pattern == "n_of_m" else 0.8
    schedule = schedules.Polynomial(0.0, final, 0, 24, frequency=2)
    pruning = Pruning(schedule, pattern=PATTERNS[pattern])
    model = begun([pruning])
    model.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    fit(model, [pruning])
    pruning = pruning if same_callback else Pruning(schedule, pattern=PATTERNS[pattern])
    fit(loaded, [pruning])
    assert pruning.step == 24
    assert_same(loaded, model)


CYCLES = schedules.Cyclic(0.2, 0.8, 0, 24, cycles=3, frequency=1)
AFTER_TRAINING = {
    "polynomial": lambda: Pruning(LONG),
    "cyclic": lambda: Pruning(CYCLES),
    "endless": lambda: Pruning(schedules.Constant(0.5, frequency=3)),
    "rules": lambda: Pruning(LONG, [kq.Rule("conv", schedules.Polynomial(0.0, 0.3, 4, 24, frequency=2))]),
    "late": lambda: Pruning(schedules.OneShot(0.5, 18)),
    "cycles_of_some": lambda: Pruning(0.3, [kq.Rule("dense", CYCLES)]),
}


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("trained", [0, 3])
@pytest.mark.parametrize("name", AFTER_TRAINING)
def test_a_model_saved_twice_while_it_was_pruned_goes_on(name, trained, tmp_path):
    """Also one that had trained before, and by cycles, which have the same sparsity at several steps."""
    model = tiny()
    model.compile(optimizers.SGD(0.05, momentum=0.9), LOSS)
    fit(model, [], epochs=trained)
    pruning, loaded = AFTER_TRAINING[name](), model
    for save in range(2):
        fit(loaded, [AFTER_TRAINING[name]()], epochs=2)
        loaded.save(tmp_path / f"{save}.keras")
        loaded = keras.models.load_model(tmp_path / f"{save}.keras")
    last = AFTER_TRAINING[name]()
    fit(loaded, [last], epochs=1)
    assert last.step == 20

    whole = tiny()
    whole.compile(optimizers.SGD(0.05, momentum=0.9), LOSS)
    fit(whole, [], epochs=trained)
    fit(whole, [pruning], epochs=5)
    assert_same(loaded, whole)


@pytest.mark.filterwarnings("ignore:This fit ends")
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("pretrained", [False, True])
def test_backup_and_restore(pruning_first, pretrained, tmp_path):
    """In a new process: a new model, a new callback."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise KeyboardInterrupt

    def fresh():
        model = tiny()
        model.compile(optimizers.SGD(0.05, momentum=0.9), LOSS)
        if pretrained:
            fit(model, [], epochs=2)
        backup, pruning = keras.callbacks.BackupAndRestore(str(tmp_path / "backup")), Pruning(LONG)
        return model, [pruning, backup] if pruning_first else [backup, pruning]

    uninterrupted, (*_,) = fresh()
    fit(uninterrupted, [Pruning(LONG)], epochs=6)
    model, callbacks = fresh()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [*callbacks, Interrupt()], epochs=6)
    model, callbacks = fresh()
    fit(model, callbacks, epochs=6)
    assert next(each for each in callbacks if isinstance(each, Pruning)).step == 24
    assert zeros(model.get_layer("dense").kernel) == pytest.approx(0.8, abs=0.01)
    assert_same(model, uninterrupted)


@pytest.mark.filterwarnings("ignore:This fit ends")
def test_restored_in_the_middle_of_an_epoch(tmp_path):
    """Keras then begins that epoch anew; the optimizer's clock goes on, and with it the schedule."""

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == 10:
                raise KeyboardInterrupt

    def fresh():
        model = tiny()
        model.compile(optimizers.SGD(0.05, momentum=0.9), LOSS)
        backup, pruning = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"), save_freq=3), Pruning(LONG)
        return model, pruning, backup

    model, *callbacks = fresh()
    with pytest.raises(KeyboardInterrupt):
        fit(model, [*callbacks, Interrupt()], epochs=6)
    model, pruning, backup = fresh()
    watch = Watch("dense")
    fit(model, [pruning, backup, watch], epochs=6)
    done = int(model.optimizer.iterations)
    assert pruning.step == done and len(watch.seen) == done - 9
    assert watch.seen[0][0] == pytest.approx(float(schedules.last_chosen(LONG, 10)), abs=0.01)
    assert zeros(model.get_layer("dense").kernel) == pytest.approx(0.8, abs=0.01)


@pytest.mark.filterwarnings("ignore:This fit ends")
def test_compiling_anew_does_not_start_over():
    pruning, watch = Pruning(LONG), Watch("dense")
    model = begun([pruning])
    model.compile(optimizers.SGD(0.01), LOSS)
    before = zeros(model.get_layer("dense").kernel)
    fit(model, [pruning, watch])
    assert pruning.step == 24 and watch.seen[-1][0] == pytest.approx(0.8, abs=0.01)
    assert before > 0.6 and all(share >= before for (share,) in watch.seen)


def test_another_model_starts_over():
    pruning, watch = Pruning(schedules.OneShot(0.5, 2)), Watch("dense")
    train(tiny(), [pruning], epochs=1)
    train(tiny(), [pruning, watch], epochs=1)
    assert watch.seen == [[0.0], [0.5], [0.5], [0.5]]


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_grew_back_without_the_callback_is_removed_again(criterion, scope):
    pruning = Pruning(schedules.OneShot(0.5, 2), criterion=criterion, scope=scope)
    model, watch = train(tiny(), [pruning], epochs=1), Watch("conv", "dense")
    fit(model, [], epochs=1)
    assert zeros(model.get_layer("dense").kernel) < 0.01
    history = fit(model, [pruning, watch], epochs=1)
    assert history["sparsity"] == [0.5] and len({tuple(seen) for seen in watch.seen}) == 1
    if scope == "layer":
        assert watch.seen[0] == [0.5, 0.5]


def test_a_trained_model_starts_at_step_0():
    model, watch = train(tiny(), [], epochs=3), Watch("dense")
    fit(model, [Pruning(schedules.OneShot(0.5, 2)), watch], epochs=1)
    assert watch.seen == [[0.0], [0.5], [0.5], [0.5]]


def test_layers_that_no_callback_pruned_before_start_at_step_0():
    """Though others have, and the optimizer's clock has gone on."""
    first = Pruning(0.5, [kq.Rule("dense", None)])
    model, watch = train(tiny(), [first], epochs=3), Watch("conv", "dense")
    kept = Pruning(0.5, [kq.Rule("dense", None)])
    fit(model, [kept, Pruning(schedules.OneShot(0.25, 2), [kq.Rule("conv", None)]), watch], epochs=1)
    assert watch.seen == [[0.5, 0.0], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25]] and kept.step == 16


def test_the_step_can_be_told():
    model, watch = train(tiny(), [], epochs=3), Watch("dense")
    fit(model, [Pruning(schedules.OneShot(0.5, 102), initial_step=100), watch], epochs=1)
    assert watch.seen == [[0.0], [0.5], [0.5], [0.5]]


def test_kernels_that_start_as_zeros_can_grow():
    model = keras.Sequential(
        [keras.Input((256,)), layers.Dense(8, kernel_initializer="zeros", name="zero"), layers.Dense(3)]
    )
    train(model, [Pruning(schedules.OneShot(0.5, 3))], x=X.reshape(64, 256), epochs=2)
    assert zeros(model.get_layer("zero").kernel) == 0.5


PLAIN = """
    import sys
    import keras, numpy as np
    model = keras.models.load_model(sys.argv[1])
    assert "keras_qat" not in sys.modules
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 4)).astype("float32")
    print(float(np.mean(np.asarray(model.get_layer("dense").kernel) == 0)), int(model.optimizer.iterations))
    model.fit(x, x[:, :3, 0, 0].argmax(1), verbose=0)
"""


def test_a_model_saved_in_training_needs_nothing_of_ours(tmp_path):
    saved = keras.callbacks.ModelCheckpoint(str(tmp_path / "net.keras"), save_freq=3)
    callbacks = [Pruning(0.5), GradientClipping(kq.clipping.Percentile(50, 4)), saved]
    train(small(), callbacks, epochs=1)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PLAIN), str(tmp_path / "net.keras")],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["0.5", "3"], done.stderr[-2000:]


# --- QAT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pruned_weights_are_integer_zeros_in_the_file(pattern):
    qat, pruning = kq.quantize(float_net()), Pruning(RAMP, pattern=PATTERNS[pattern])
    train(qat, [pruning, GradientClipping(kq.clipping.ByNorm(1.0))])
    stored = sorted(
        (
            tensor.data
            for tensor in kq.freeze(qat).tensors.values()
            if tensor.data is not None and tensor.data.dtype == "int8"
        ),
        key=lambda data: data.size,
    )
    kernels = sorted((np.asarray(target.variable) for target in pruning.targets), key=lambda kernel: kernel.size)
    assert len(kernels) == 3 and len(stored) == 4
    for integers, kernel in zip(stored[1:], kernels, strict=True):
        removed = np.moveaxis(kernel, -1, 0) == 0  # TFLite: outputs first
        assert removed.mean() == pytest.approx(0.5, abs=0.03)
        assert np.all(integers.reshape(removed.shape)[removed] == 0)
        assert np.mean(integers == 0) < 0.56  # hardly any others
        if pattern == "n_of_m":
            assert np.all(np.count_nonzero(integers.reshape(-1, 4), axis=1) <= 2)  # as the file's kernels lie


def test_a_pruned_float_model_keeps_its_zeros_through_quantization_aware_training():
    model = train(float_net(), [Pruning(schedules.OneShot(0.5))], epochs=1)
    qat = kq.quantize(model)
    before = {layer.name: np.asarray(layer.layer.kernel) == 0 for layer in qat.layers if hasattr(layer, "layer")}
    train(qat, [Pruning(schedules.OneShot(0.5))], epochs=1)
    for name in ("conv", "conv_2", "dense"):
        assert np.array_equal(before[name], np.asarray(qat.get_layer(name).layer.kernel) == 0) and before[name].any()


def test_rules_name_the_layers_of_a_qat_model_as_explain_does():
    qat = kq.quantize(float_net())
    assert list(targets_of(qat)) == ["conv/kernel", "conv_2/kernel", "dense/kernel"]
    found = targets_of(qat, [kq.Rule("classes", 0.5), kq.Rule(layers.Conv2D, None)], pattern=Channels())
    assert list(found) == ["dense/kernel", "classes/dense/kernel"]
    companions = targets_of(qat, pattern=Channels())["conv/kernel"].companions
    assert [vector.name for vector in companions] == ["gamma", "beta"]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "sparsity": (lambda: Pruning(1.0), "below 1"),
    "negative": (lambda: Pruning(-0.5), "at least 0"),
    "backwards": (lambda: Pruning(schedules.Polynomial(0.0, 0.5, 10, 2)), "begin=10, end=2"),
    "no_schedule": (lambda: Pruning(None), "kq.schedules"),
    "pattern": (lambda: Pruning(0.5, pattern="2:4"), "NofM"),
    "criterion": (lambda: Pruning(0.5, criterion="size"), "'magnitude'"),
    "scope": (lambda: Pruning(0.5, scope="model"), "'global'"),
    "unit": (lambda: Pruning(0.5, unit="batches"), "'epochs'"),
    "floor": (lambda: Pruning(0.5, floor=1.5), "floor"),
    "floor_and_sparsity": (lambda: Pruning(0.95, scope="global", floor=0.1), "no room"),
    "rule": (lambda: Pruning(0.5, [("conv", None)]), "kq.Rule"),
    "rule_value": (lambda: Pruning(0.5, [kq.Rule("conv", "half")]), "kq.schedules"),
    "n_of_m": (lambda: NofM(4, 4), "1 <= n < m"),
    "blocks": (lambda: Blocks(0, 4), "0 x 4"),
    "n_of_m_and_schedule": (lambda: Pruning(0.3, pattern=NofM(2, 4)), "Let it end at 0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


def only_last():
    return keras.Sequential([keras.Input((8, 8, 4)), layers.Flatten(), layers.Dense(3, name="last")])


def frozen():
    model = small()
    model.trainable = False
    model.get_layer("classes").trainable = True
    return model


@pytest.mark.parametrize(
    "model, callbacks, message",
    [
        (small, lambda: [Pruning(0.5, [kq.Rule("typo*", None)])], r"match no layer: \['typo\*'\]"),
        (only_last, lambda: [Pruning(0.5)], "no layer to prune.*last"),
        (frozen, lambda: [Pruning(0.5)], "no layer to prune"),
        (small, lambda: [Pruning(0.5, [kq.Rule("*", None)])], "no layer to prune"),
        (small, lambda: [Pruning(0.5), Pruning(0.5)], r"Two Pruning callbacks.*'conv'"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_the_first_step(model, callbacks, message):
    net = model()
    before = net.get_weights()
    with pytest.raises(ValueError, match=message):
        train(net, callbacks())
    assert all(np.array_equal(a, b) for a, b in zip(before, net.get_weights(), strict=True))


def test_two_callbacks_on_different_layers():
    both = [Pruning(0.5, [kq.Rule("dense", None)]), Pruning(0.75, [kq.Rule("dense", Policy()), kq.Rule("*", None)])]
    model = train(tiny(), both, epochs=1)
    assert [zeros(model.get_layer(name).kernel) for name in ("conv", "dense")] == [0.5, 0.75]


def test_a_model_that_was_not_compiled():
    pruning = Pruning(0.5)
    with pytest.raises(ValueError, match="compile"):
        fit(small(), [pruning])
    pruning.set_model(small())
    with pytest.raises(ValueError, match=r"model\.compile"):
        pruning.on_train_begin()
