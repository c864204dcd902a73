"""GradientClipping in `fit`: against Keras's own clipping, in every mode of training, and what it leaves behind."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, optimizers
from tensorboard.backend.event_processing import event_accumulator

import keras_qat as kq
from keras_qat import clipping
from keras_qat.callbacks import GradientClipping
from keras_qat.layers import FakeQuant
from keras_qat.quantizers import MovingAverage

X = 3 * np.random.default_rng(0).normal(size=(40, 5)).astype("float32")
Y = X.sum(1, keepdims=True)
EPOCHS = 2  # of 5 batches: 10 steps

MODES = {
    "graph": {},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "several_steps": {"steps_per_execution": 3},
}


def net():
    """Layers of one weight each."""
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(6, "relu", use_bias=False, name="first"), layers.Dense(4, use_bias=False, name="second")]
    return keras.Sequential([keras.Input((5,)), *stack, layers.Dense(1, use_bias=False, name="head")])


def train(optimizer, callbacks=(), model=None, x=X, y=Y, epochs=EPOCHS, **options):
    model = model or net()
    model.compile(optimizer, "mse", **options)
    if model.built and not model.optimizer.built:
        # ScheduleFreeAdamW starts from zeros where it is built inside of the graph, as Keras does when left to itself.
        model.optimizer.build(model.trainable_variables)
    fit(model, callbacks, x, y, epochs)
    return model


def fit(model, callbacks=(), x=X, y=Y, epochs=EPOCHS):
    return model.fit(x, y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)).history


def assert_same_weights(model, other, atol=1e-6):
    assert model.count_params() == other.count_params()
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=atol)


def differ(model, other):
    return any(np.abs(a - b).max() > 1e-3 for a, b in zip(model.get_weights(), other.get_weights(), strict=True))


# --- the same as Keras's own -----------------------------------------------------------------------------------------

PAIRS = {
    "clipnorm": (clipping.ByNorm(0.8), {"clipnorm": 0.8}),
    "global_clipnorm": (clipping.ByGlobalNorm(0.8), {"global_clipnorm": 0.8}),
    "clipvalue": (clipping.ByValue(0.3), {"clipvalue": 0.3}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_same_weights_as_with_keras_after_10_steps(name, mode):
    policy, option = PAIRS[name]
    ours = train(optimizers.SGD(0.1, momentum=0.9), [GradientClipping(policy)], **MODES[mode])
    assert_same_weights(ours, train(optimizers.SGD(0.1, momentum=0.9, **option), **MODES[mode]))
    assert differ(ours, train(optimizers.SGD(0.001, momentum=0.9)))


EVERY = sorted(
    name
    for name, value in vars(optimizers).items()
    if isinstance(value, type)
    and issubclass(value, optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
)


@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer(name):
    make = getattr(optimizers, name)
    ours = train(make(learning_rate=0.02), [GradientClipping(clipping.ByGlobalNorm(0.5))])
    assert_same_weights(ours, train(make(learning_rate=0.02, global_clipnorm=0.5)), atol=5e-6)


def scaled(**clip):
    return optimizers.LossScaleOptimizer(optimizers.SGD(0.1, **clip), initial_scale=1024.0)


def multi(**clip):
    inner = [optimizers.SGD(0.1, **clip) for _ in range(2)]
    return optimizers.MultiOptimizer(optimizers.OptimizerMap(inner[0], {"second/.*": inner[1]}))


def multi_scaled(**clip):
    inner = optimizers.MultiOptimizer(optimizers.OptimizerMap(optimizers.SGD(0.1, **clip)))
    return optimizers.LossScaleOptimizer(inner, initial_scale=1024.0)


WRAPPED = {
    "loss_scale_optimizer": scaled,
    "loss_scale_factor": lambda **clip: optimizers.SGD(0.1, loss_scale_factor=256.0, **clip),
    "accumulation": lambda **clip: optimizers.SGD(0.1, gradient_accumulation_steps=2, **clip),
    "scaled_accumulation": lambda **clip: optimizers.LossScaleOptimizer(
        optimizers.SGD(0.1, gradient_accumulation_steps=2, **clip), initial_scale=1024.0
    ),
    "ema": lambda **clip: optimizers.SGD(0.1, use_ema=True, ema_overwrite_frequency=3, **clip),
    "multi": multi,
    "multi_scaled": multi_scaled,
    "schedule": lambda **clip: optimizers.SGD(optimizers.schedules.ExponentialDecay(0.1, 3, 0.5), **clip),
}


@pytest.mark.parametrize(
    "name, jit_compile", [*((name, False) for name in WRAPPED), ("scaled_accumulation", True), ("multi_scaled", True)]
)
def test_wrapped_and_accumulating_optimizers(name, jit_compile):
    ours = train(WRAPPED[name](), [GradientClipping(clipping.ByNorm(0.8))], jit_compile=jit_compile)
    assert_same_weights(ours, train(WRAPPED[name](clipnorm=0.8), jit_compile=jit_compile))


def test_a_global_norm_spans_all_optimizers_of_a_multi_optimizer():
    ours = train(multi(), [GradientClipping(clipping.ByGlobalNorm(0.8))])
    assert_same_weights(ours, train(optimizers.SGD(0.1, global_clipnorm=0.8)))


def test_clipnorm_also_set():
    """Whichever is tighter decides."""
    tight, loose = clipping.ByNorm(0.5), clipping.ByNorm(50.0)
    expected = train(optimizers.SGD(0.1, clipnorm=0.5))
    assert_same_weights(train(optimizers.SGD(0.1, clipnorm=0.5), [GradientClipping(loose)]), expected)
    assert_same_weights(train(optimizers.SGD(0.1, clipnorm=50.0), [GradientClipping(tight)]), expected)


@keras.saving.register_keras_serializable("tests")
class CustomStep(keras.Model):
    """A training step of the user's own, which hands over gradients and variables in its own order."""

    by_pairs = True

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        variables = self.trainable_variables[::-1]
        gradients = tape.gradient(loss, variables)
        if self.by_pairs:
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        else:
            self.optimizer.apply(gradients, variables)
        return {"my_loss": loss}


@pytest.mark.parametrize("by_pairs", [True, False])
def test_custom_train_step(by_pairs):
    def model():
        plain = net()
        made = CustomStep(plain.inputs, plain.outputs)
        made.by_pairs = by_pairs
        return made

    ours = train(optimizers.SGD(0.1), [GradientClipping(clipping.ByGlobalNorm(0.8))], model())
    assert_same_weights(ours, train(optimizers.SGD(0.1, global_clipnorm=0.8), model=model()))
    assert {"my_loss", "clipped"} <= set(ours.history.history)


def test_two_callbacks_compose():
    both = [GradientClipping(clipping.ByValue(0.3)), GradientClipping(clipping.ByGlobalNorm(0.4))]
    chain = [GradientClipping([clipping.ByValue(0.3), clipping.ByGlobalNorm(0.4)])]
    assert_same_weights(train(optimizers.SGD(0.1), both), train(optimizers.SGD(0.1), chain))


MIRRORED = """
    import keras, numpy as np, tensorflow as tf
    from keras import optimizers
    import keras_qat as kq
    from test_gradient_clipping import X, Y, net, fit, assert_same_weights, scaled, multi
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

    def trained(make, strategy, x=X):
        with strategy.scope():
            model = net()
            model.compile(make(), "mse")
        policy = [kq.clipping.ByGlobalNorm(0.5), kq.clipping.Percentile(60, 4), kq.clipping.TopK(0.5, True)]
        pruning = kq.callbacks.Pruning(kq.schedules.Polynomial(0.0, 0.5, 0, 8), criterion="taylor")
        return model, fit(model, [kq.callbacks.GradientClipping(policy), pruning], x)

    broken = X.copy()
    broken[14] = np.nan  # in the second replica's half of the second batch
    # Of Keras's own LossScaleOptimizer, only the first replica decides what is finite: no broken data for it.
    for make, inputs in {(lambda: optimizers.Adam(0.1)): (X, broken), scaled: (X, broken), multi: (broken,)}.items():
        for x in inputs:
            one, history = trained(make, tf.distribute.get_strategy(), x)
            two, other = trained(make, tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), x)
            assert_same_weights(one, two, 1e-5)
            assert [np.mean(w == 0) for w in two.get_weights()] == [0.5, 0.5, 0.0]
            assert history["skipped_steps"] == other["skipped_steps"] == [x is broken] * 2, history
            for name in ("grad_norm", "grad_norm_clipped", "clipped", "sparsity"):
                np.testing.assert_allclose(history[name], other[name], rtol=1e-4)
    print("all the same")
"""


def test_mirrored_strategy_equals_one_replica():
    script = textwrap.dedent(MIRRORED)
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        cwd=__file__.rsplit("/", 1)[0],
        timeout=600,
    )
    assert "all the same" in done.stdout, done.stderr[-3000:]


# --- rules and groups ------------------------------------------------------------------------------------------------


def test_rules_choose_layers_and_the_first_match_wins():
    tiny = clipping.Scale(1e-6)
    rules = [kq.Rule("second", None), kq.Rule("*", tiny)]
    before = net()
    ours = train(optimizers.SGD(0.001), [GradientClipping(None, rules)], epochs=1)
    moved = [np.abs(a - b).max() > 1e-4 for a, b in zip(before.get_weights(), ours.get_weights(), strict=True)]
    assert moved == [False, True, False]
    by_class = [kq.Rule("head", None), kq.Rule(layers.Dense, tiny)]
    ours = train(optimizers.SGD(0.001), [GradientClipping(None, by_class)], epochs=1)
    moved = [np.abs(a - b).max() > 1e-4 for a, b in zip(before.get_weights(), ours.get_weights(), strict=True)]
    assert moved == [False, False, True]


def nested():
    keras.utils.set_random_seed(0)
    block = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, name="inner"), layers.Dense(3, name="inner_2")], name="block"
    )
    inputs = keras.Input((5,))
    return keras.Model(inputs, layers.Dense(1, name="head")(block(inputs)))


def test_a_rule_on_a_block_holds_for_all_in_it():
    clip = GradientClipping(clipping.ByValue(1.0), [kq.Rule("block", clipping.Scale(0.5)), kq.Rule("head", None)])
    train("sgd", [clip], nested())
    assert set(clip.report().to_dict()["rows"][0].values()) >= {"block", 10}
    assert [row.group for row in clip.report().rows] == ["block"]


def test_rules_that_match_nothing_are_refused_before_the_first_step():
    model = net()
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"match no layer: \['haed'\].*first, second, head"):
        fit(model, [GradientClipping(None, [kq.Rule("haed", clipping.Sign())])])
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_rules_that_come_too_late_are_reported():
    rules = [kq.Rule("*", clipping.Sign()), kq.Rule("head", None)]
    with pytest.warns(UserWarning, match=r"\['head'\]"):
        train("sgd", [GradientClipping(None, rules)])


class Trained(MovingAverage):
    """A quantizer whose range learns."""

    def build(self, layer):
        super().build(layer)
        self.gain = layer.add_weight(name="gain", shape=(), initializer="ones")

    def limits(self, x, site=0, observe=False):
        low, high = super().limits(x, site, observe)
        return low * self.gain, high * self.gain


def with_trained_ranges():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    x, _ = FakeQuant(Trained(), name="grid")(layers.Dense(4, name="first")(inputs))
    return keras.Model(inputs, layers.Dense(1, name="head")(x))


def test_trained_ranges_are_a_group_of_their_own():
    clip = GradientClipping(clipping.ByGlobalNorm(0.1))
    train("sgd", [clip], with_trained_ranges())
    assert [row.group for row in clip.report().rows] == ["", "ranges"]
    assert {"clipped", "clipped/ranges", "grad_norm/ranges"} <= set(clip.epoch_logs())
    clip = GradientClipping(None, [kq.Rule("ranges/*", clipping.Sign()), kq.Rule("*", None)])
    train("sgd", [clip], with_trained_ranges())
    assert [row.group for row in clip.report().rows] == ["ranges/*"]


def test_a_qat_model_trains_with_rules_on_its_layers():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(inputs)))
    qat = kq.quantize(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))
    rules = [kq.Rule("conv", clipping.Adaptive()), kq.Rule("head", clipping.ByNorm(1.0))]
    clip = GradientClipping(clipping.ByValue(0.1), rules)
    x = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype("float32")
    train("adam", [clip], qat, x, x.mean((1, 2))[:, :2])
    assert {row.group for row in clip.report().rows} == {"conv", "head", ""}
    assert all(row.steps == 4 for row in clip.report().rows)
    kq.freeze(qat)


# --- what it did, and what it leaves behind --------------------------------------------------------------------------


def test_history_tells_norms_and_the_share_of_clipped_steps():
    rules = [kq.Rule("head", clipping.ByValue(1e9))]
    history = fit(compiled := train("sgd", epochs=0), [GradientClipping(clipping.ByGlobalNorm(0.5), rules)])
    assert compiled.optimizer.iterations == 10
    assert history["clipped"] == [1.0, 1.0] and history["clipped/head"] == [0.0, 0.0]
    assert np.allclose(history["grad_norm_clipped"], 0.5) and min(history["grad_norm"]) > 0.5
    assert history["grad_norm/head"] == history["grad_norm_clipped/head"]
    assert history["skipped_steps"] == [0.0, 0.0]


def test_norms_in_the_history_are_those_of_the_gradients():
    model = train("sgd", epochs=0)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(X[:8]) - Y[:8]) ** 2)
    expected = float(tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables)))
    history = fit(model, [GradientClipping(clipping.ByGlobalNorm(0.5))], X[:8], Y[:8], epochs=1)
    assert history["grad_norm"][0] == pytest.approx(expected, rel=1e-6)


class Recorder(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("steps_per_execution", [1, 2, 5])
def test_callbacks_earlier_in_the_list_see_it_too(steps_per_execution):
    early, late = Recorder(), Recorder()
    model = train("sgd", epochs=0, steps_per_execution=steps_per_execution)
    history = model.fit(
        X, Y, batch_size=8, epochs=2, verbose=0, validation_data=(X, Y),
        callbacks=[early, GradientClipping(clipping.ByValue(0.5)), late],
    ).history  # fmt: skip
    assert early.seen == late.seen and {"grad_norm", "clipped", "val_loss"} <= set(early.seen[0])
    assert history["grad_norm"] == [logs["grad_norm"] for logs in early.seen]
    assert not any(name.startswith("val_") and name != "val_loss" for name in history)


def scalars_in(folder) -> dict[str, list[float]]:
    """What TensorBoard would draw: the name of each curve → its values."""
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    read = {name: events.Tensors(name) for name in events.Tags()["tensors"]}
    return {name: [float(tf.make_ndarray(event.tensor_proto)) for event in curve] for name, curve in read.items()}


@pytest.mark.parametrize("first", [True, False])
def test_tensorboard_shows_it(first, tmp_path):
    board = keras.callbacks.TensorBoard(tmp_path, write_graph=False)
    clip = GradientClipping(clipping.ByValue(0.5))
    history = train("sgd", [board, clip] if first else [clip, board]).history.history
    curves = scalars_in(tmp_path / "train")
    for name in ("grad_norm", "clipped", "loss"):
        assert curves[f"epoch_{name}"] == pytest.approx(history[name])


def test_log_dir_writes_without_the_callback(tmp_path):
    history = train("sgd", [GradientClipping(clipping.ByValue(0.5), log_dir=str(tmp_path))]).history.history
    curves = scalars_in(tmp_path / "train")
    for name in ("grad_norm", "clipped"):
        assert curves[f"epoch_{name}"] == pytest.approx(history[name])


def test_log_dir_without_tensorboard_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        GradientClipping(clipping.ByValue(0.5), log_dir="logs")


def test_table_at_the_end_on_request(capsys):
    train("sgd", [GradientClipping(clipping.ByGlobalNorm(0.5))])
    assert "clipped steps" not in capsys.readouterr().out
    train("sgd", [GradientClipping(clipping.ByGlobalNorm(0.5), table=True)])
    printed = capsys.readouterr().out
    assert "all others" in printed and "100.0%" in printed and "skipped steps" in printed


def test_the_optimizer_is_as_it_was_even_between_steps():
    model, seen = train(optimizers.Adam(0.1), epochs=0), []
    before = set(vars(model.optimizer))

    def look(batch, logs):
        seen.append(set(vars(model.optimizer)) - before)

    fit(model, [GradientClipping(clipping.ByValue(0.5)), keras.callbacks.LambdaCallback(on_train_batch_end=look)])
    assert not any(seen) and set(vars(model.optimizer)) == before
    assert "make_train_function" not in vars(model) and type(model.train_function).__name__ == "function"


def test_a_fit_without_the_callback_is_no_longer_clipped():
    model = train(optimizers.SGD(0.001), [GradientClipping(clipping.ByValue(1e-9))])
    assert_same_weights(model, net())
    fit(model, epochs=1)
    assert differ(model, net())


@pytest.mark.parametrize("compiled_again", [False, True])
def test_an_interrupted_fit_leaves_nothing_behind(compiled_again):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = train(optimizers.SGD(0.001), epochs=0)
    with pytest.raises(KeyboardInterrupt):
        fit(model, [GradientClipping(clipping.ByValue(1e-9)), Interrupt()])
    assert_same_weights(model, net())
    if compiled_again:
        model.compile(optimizers.SGD(0.001), "mse")
    fit(model, epochs=1)
    assert differ(model, net()) and "make_train_function" not in vars(model)


def test_an_error_in_the_middle_of_a_step_leaves_the_optimizer_alone():
    class Broken(CustomStep):
        def train_step(self, data):
            super().train_step(data)
            raise RuntimeError("behind the step")

    plain = net()
    model = Broken(plain.inputs, plain.outputs)
    with pytest.raises(RuntimeError, match="behind the step"):
        train(optimizers.SGD(0.1), [GradientClipping(clipping.ByValue(0.5))], model)
    assert not {"apply", "_all_reduce_sum_gradients"} & set(vars(model.optimizer))


def test_another_callback_may_make_the_train_function_anew():
    """Ones that freeze layers have to."""

    class Freeze(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.get_layer("first").trainable = epoch == 0
            self.model.make_train_function(force=True)

    model = train(optimizers.SGD(0.1), epochs=0)
    history = fit(model, [GradientClipping(clipping.ByValue(1e-9)), Freeze()], epochs=3)
    assert_same_weights(model, net())
    assert history["clipped"] == [1.0] * 3


def test_a_train_on_batch_in_between_does_not_end_the_clipping():
    class Extra(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            weights = self.model.get_weights()
            self.model.train_on_batch(X[:8], Y[:8])
            self.model.set_weights(weights)

    model = train(optimizers.SGD(0.1), epochs=0)
    fit(model, [GradientClipping(clipping.ByValue(1e-9)), Extra()], epochs=3)
    assert_same_weights(model, net())


def test_a_changed_policy_holds_in_the_next_fit():
    clip = GradientClipping(clipping.ByValue(1e-9))
    model = train(optimizers.SGD(0.1), [clip])
    clip.clip = clipping.ByGlobalNorm(0.8)
    fit(model, [clip])
    assert_same_weights(model, train(optimizers.SGD(0.1, global_clipnorm=0.8)))
    assert clip.report().rows[0].steps == 10


def test_state_goes_on_in_a_second_fit():
    once = train(
        optimizers.SGD(0.1), [GradientClipping([clipping.Percentile(30, 8), clipping.TopK(0.5, True)])], epochs=4
    )
    clip = GradientClipping([clipping.Percentile(30, 8), clipping.TopK(0.5, True)])
    twice = train(optimizers.SGD(0.1), [clip])
    fit(twice, [clip])
    assert_same_weights(once, twice)


# --- not finite ------------------------------------------------------------------------------------------------------

BROKEN = X.copy()
BROKEN[17] = np.inf  # in the third of five batches
WITHOUT = np.delete(X, range(16, 24), axis=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_left_out_and_counted(mode, value):
    broken = X.copy()
    broken[17] = value
    clip = GradientClipping(clipping.ByNorm(5.0))
    ours = train(optimizers.Adam(0.1), [clip], x=broken, epochs=1, **MODES[mode])
    kept = train(optimizers.Adam(0.1), [GradientClipping(clipping.ByNorm(5.0))], x=WITHOUT, y=WITHOUT.sum(1), epochs=1)
    assert_same_weights(ours, kept)
    for a, b in zip(ours.optimizer.variables, kept.optimizer.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert clip.report().skipped_steps == 1 and clip.report().rows[0].steps == 4
    assert ours.history.history["skipped_steps"] == [1.0]


def test_it_never_gets_into_accumulated_gradients():
    def make():
        return optimizers.SGD(0.1, gradient_accumulation_steps=2, clipvalue=0.5)

    ours = train(make(), [GradientClipping(None)], x=BROKEN, epochs=1)
    kept = train(make(), x=WITHOUT, y=WITHOUT.sum(1), epochs=1)
    assert_same_weights(ours, kept)


def test_a_loss_scale_optimizer_skips_by_itself_and_it_is_counted():
    clip = GradientClipping(clipping.ByNorm(5.0))
    ours = train(scaled(), [clip], x=BROKEN, epochs=1)
    assert clip.report().skipped_steps == 1
    assert float(ours.optimizer.dynamic_scale) == 512.0
    assert all(np.all(np.isfinite(weight)) for weight in ours.get_weights())


def test_infinity_can_be_kept_by_choice():
    clip = GradientClipping(clipping.ByNorm(5.0), nonfinite="keep")
    ours = train(optimizers.SGD(0.1), [clip], x=BROKEN, epochs=1)
    assert clip.report().skipped_steps >= 1 and np.any(np.isnan(ours.get_weights()[0]))


# --- any model -------------------------------------------------------------------------------------------------------


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = [layers.Dense(4, use_bias=False), layers.Dense(1, use_bias=False)]
        self.unused = None

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return x


BUILD_LATER = {
    "sequential": lambda: keras.Sequential([layers.Dense(4, use_bias=False), layers.Dense(1, use_bias=False)]),
    "subclassed": Subclassed,
}


@pytest.mark.parametrize("name", BUILD_LATER)
def test_a_model_that_fit_builds(name):
    def trained(callbacks, **option):
        keras.utils.set_random_seed(1)
        return train(optimizers.SGD(0.1, **option), callbacks, BUILD_LATER[name]())

    assert_same_weights(trained([GradientClipping(clipping.ByNorm(0.8))]), trained([], clipnorm=0.8))


def test_weights_without_a_gradient_and_frozen_ones_are_left_out():
    class Half(CustomStep):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables[:1]), self.trainable_variables[:1])
            return {"loss": loss}

    plain = net()
    plain.get_layer("second").trainable = False
    model = Half(plain.inputs, plain.outputs)
    clip = GradientClipping(clipping.ByNorm(0.8), [kq.Rule("head", clipping.TopK(0.5, error_feedback=True))])
    train(optimizers.SGD(0.1), [clip], model)
    before = net().get_weights()
    moved = [np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights(), strict=True)]
    assert moved == [True, False, False] and [row.steps for row in clip.report().rows] == [10, 0]


SPARSE = {"sgd": lambda: optimizers.SGD(0.01), "momentum": lambda: optimizers.SGD(0.01, momentum=0.9), "multi": multi}


@pytest.mark.parametrize("optimizer", SPARSE.values(), ids=SPARSE)
def test_embeddings_have_sparse_gradients(optimizer):
    keras.utils.set_random_seed(0)
    tokens = np.random.default_rng(0).integers(0, 5, (40, 6))

    def model():
        keras.utils.set_random_seed(0)
        stack = [layers.Embedding(20, 4, name="tokens"), layers.Flatten(), layers.Dense(1, name="head")]
        return keras.Sequential([keras.Input((6,), dtype="int32"), *stack])

    ours = train(optimizer(), [GradientClipping(clipping.ByGlobalNorm(1e9))], model(), tokens)
    assert_same_weights(ours, train(optimizer(), model=model(), x=tokens))
    left_alone = GradientClipping(clipping.ByGlobalNorm(1e9), [kq.Rule(layers.Embedding, None)])
    assert_same_weights(train(optimizer(), [left_alone], model(), tokens), ours)


def test_mixed_precision():
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(4, dtype="mixed_float16"), layers.Dense(1, dtype="mixed_float16")]
    model = train(
        "sgd", [clip := GradientClipping(clipping.ByGlobalNorm(0.5))], keras.Sequential([keras.Input((5,)), *stack])
    )
    assert clip.report().rows[0].norm_clipped == pytest.approx(0.5, rel=1e-3)
    assert all(np.all(np.isfinite(weight)) for weight in model.get_weights())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GradientClipping(0.5), "kq.clipping"),
        (lambda: GradientClipping(None, [("head", None)]), "kq.Rule"),
        (lambda: GradientClipping(None, [kq.Rule(3, None)]), "kq.Rule"),
        (lambda: GradientClipping(None, [kq.Rule("head", 0.5)]), "kq.clipping"),
        (lambda: GradientClipping(None, nonfinite="raise"), "'skip' or 'keep'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_that_was_not_compiled():
    model, clip = net(), GradientClipping(clipping.ByValue(0.5))
    with pytest.raises(ValueError, match="compile"):
        fit(model, [clip])
    clip.set_model(model)
    with pytest.raises(ValueError, match=r"model\.compile"):
        clip.on_train_begin()


def test_a_model_that_cannot_be_built():
    class Odd(keras.Model):
        def call(self, x, y):
            return x

    model = Odd()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="Call it once on a batch before fit"):
        fit(model, [GradientClipping(clipping.ByValue(0.5))])
