"""Pruning: the masks against numpy, what is chosen, and that zeros stay zeros through everything that happens to a model."""

import itertools
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops, optimizers

import keras_qat as kq
from keras_qat import schedules
from keras_qat.callbacks import GradientClipping, Pruning
from keras_qat.pruning import Blocks, Channels, NofM, Policy, Weights, report, shrink
from keras_qat.pruning.patterns import mask_in_weights
from keras_qat.pruning.selection import keep_count, largest, largest_of_all
from keras_qat.pruning.targets import find_targets, last_layers
from keras_qat.weighted import Layout, layout_of

# --- masks -----------------------------------------------------------------------------------------------------------

CONV, DENSE = Layout(-2, (-1,)), Layout(-2, (-1,))


def scores_of(shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype("float32")


def best(values, count):
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values.ravel(), kind="stable")[:count]] = True
    return mask.reshape(values.shape)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.9, 0.99])
@pytest.mark.parametrize("units", [1, 5, 10, 999, 100_000])
def test_counts_are_exact(units, sparsity):
    kept = max(np.round(np.float32(units) * (np.float32(1) - np.float32(sparsity))), 1)
    assert int(keep_count(units, sparsity)) == kept
    scores = scores_of(units) if units % 2 else np.ones(units, "float32")  # all alike: no more are kept than told
    assert np.array_equal(largest(tf.constant(scores), kept), best(scores, int(kept)))


def test_halves_are_rounded_to_even_as_in_tfmot():
    assert [int(keep_count(5, 0.5)), int(keep_count(7, 0.5)), int(keep_count(3, 0.99))] == [2, 4, 1]


def local_mask(pattern, scores, sparsity, layout):
    """The mask of one kernel by itself."""
    if isinstance(pattern, NofM):
        return pattern.mask(scores, sparsity, layout)
    units = pattern.unit_scores(scores, layout)
    return pattern.spread(largest(units, keep_count(units.shape[0], sparsity)), scores.shape, layout)


def test_golden_two_of_four():
    kernel = np.array([0.25, -1.33, 0.43, -0.11], "float32")[:, None]
    mask = local_mask(NofM(2, 4), abs(kernel), 0.5, DENSE)
    assert np.asarray(mask).ravel().tolist() == [False, True, True, False]


def n_of_m(scores, n, m, axis):
    """Row by row, group by group."""
    rows = np.moveaxis(scores, axis, -1)
    mask = np.zeros(rows.shape, bool)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], m):
            mask[index][start : start + m] = best(rows[index][start : start + m], n)
    return np.moveaxis(mask, -1, axis)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (5, 16), (2, 3)])
@pytest.mark.parametrize("shape, layout", [((16, 5), DENSE), ((3, 3, 10, 4), CONV), ((3, 3, 5, 12), Layout(-1, (-2,)))])
def test_any_n_of_m_along_the_axis_that_kernels_read(shape, layout, n, m):
    scores = scores_of(shape)
    mask = local_mask(NofM(n, m), scores, 1 - n / m, layout)
    assert np.array_equal(mask, n_of_m(scores, n, m, layout.inner))


def test_n_of_m_is_approached_step_by_step():
    scores = scores_of((8, 3))
    for sparsity, kept in [(0.0, 4), (0.2, 3), (0.5, 2), (0.74, 1), (0.75, 1)]:
        assert np.array_equal(local_mask(NofM(1, 4), scores, sparsity, DENSE), n_of_m(scores, kept, 4, -2))


@pytest.mark.parametrize("shape", [(6, 8), (7, 9), (3, 3, 5, 6), (1, 1)])
@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 4), (4, 1), (16, 16)])
def test_blocks(shape, rows, columns):
    scores, pattern = scores_of(shape), Blocks(rows, columns)
    matrices = scores.reshape(-1, *shape[-2:])
    blocks = [
        (k, slice(i, i + rows), slice(j, j + columns))
        for k in range(len(matrices))
        for i in range(0, shape[-2], rows)
        for j in range(0, shape[-1], columns)
    ]
    means = np.array([matrices[block].mean() for block in blocks])
    kept = best(means, max(round(len(means) * 0.4), 1))
    expected = np.zeros(matrices.shape, bool)
    for block, keep in zip(blocks, kept, strict=True):
        expected[block] = keep
    assert np.array_equal(local_mask(pattern, scores, 0.6, DENSE), expected.reshape(shape))
    assert pattern.unit_sizes(shape, DENSE).tolist() == [matrices[block].size for block in blocks]


@pytest.mark.parametrize(
    "shape, layout, axes",
    [
        ((6, 8), DENSE, (0,)),
        ((3, 3, 4, 10), CONV, (0, 1, 2)),
        ((3, 3, 10, 4), Layout(-1, (-2,)), (0, 1, 3)),
        ((3, 3, 5, 2), Layout(-2, (-2, -1)), (0, 1)),
        ((4, 3, 5), Layout(0, (1, 2)), (0,)),
    ],
)
def test_channels_go_as_a_whole(shape, layout, axes):
    scores = scores_of(shape)
    means = scores.mean(axes)
    expected = np.broadcast_to(np.expand_dims(best(means, round(means.size * 0.5)), axes), shape)
    assert np.array_equal(local_mask(Channels(), scores, 0.5, layout), expected)
    assert set(Channels().unit_sizes(shape, layout)) == {scores.size // means.size}


@pytest.mark.parametrize("pattern", [Weights(), Blocks(2, 3), Channels(), NofM(2, 4)], ids=str)
def test_a_pruned_kernel_shows_its_mask(pattern):
    weights = scores_of((3, 3, 8, 9)) + 0.1
    mask = np.asarray(local_mask(pattern, weights, 0.5, CONV))
    assert np.array_equal(mask_in_weights(pattern, weights * mask, CONV), mask)


def test_one_global_ranking_with_a_floor():
    rows = [scores_of(100), 0.01 * scores_of(60, 1), 10 + scores_of(40, 2)]
    sizes = [np.ones(len(row), "int64") for row in rows]
    kept = [np.asarray(mask) for mask in largest_of_all([tf.constant(row) for row in rows], sizes, 0.7, floor=0.1)]
    assert sum(mask.sum() for mask in kept) == 60 and kept[2].all() and kept[1].sum() == 6
    assert np.array_equal(kept[1], best(rows[1], 6)) and np.array_equal(kept[0], best(rows[0], 14))


def test_a_global_ranking_counts_weights_not_units():
    big, small = np.array([1.0, 5.0], "float32"), np.array([2.0, 3.0, 4.0, 6.0], "float32")
    kept = largest_of_all([tf.constant(big), tf.constant(small)], [np.array([10, 10]), np.array([5] * 4)], 0.5, floor=0)
    assert [np.asarray(mask).tolist() for mask in kept] == [[False, True], [False, False, True, True]]


# --- layouts and targets ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "dense": (layers.Dense(4), (None, 6), Layout(-2, (-1,))),
    "conv_1d": (layers.Conv1D(4, 3), (None, 9, 6), Layout(-2, (-1,))),
    "conv_2d": (layers.Conv2D(4, 3), (None, 9, 9, 6), Layout(-2, (-1,))),
    "conv_3d": (layers.Conv3D(4, 3), (None, 9, 9, 9, 6), Layout(-2, (-1,))),
    "transposed": (layers.Conv2DTranspose(4, 3), (None, 9, 9, 6), Layout(-1, (-2,))),
    "depthwise": (layers.DepthwiseConv2D(3, depth_multiplier=2), (None, 9, 9, 6), Layout(-2, (-2, -1))),
    "embedding": (layers.Embedding(9, 4), (None, 6), Layout(-1, (-1,))),
    "einsum": (layers.EinsumDense("abc,cde->abde", (None, 2, 5)), (None, 9, 6), Layout(0, (1, 2))),
    "einsum_out": (layers.EinsumDense("abcd,cde->abe", (None, 5)), (None, 9, 2, 6), Layout(1, (2,))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_of_kernels(name):
    layer, shape, expected = LAYOUTS[name]
    layer.build(shape)
    layout = layout_of(layer, layer.weights[0])
    rank = len(layer.weights[0].shape)
    assert layout.inner % rank == expected.inner % rank
    assert [axis % rank for axis in layout.channels] == [axis % rank for axis in expected.channels]


def small():
    """Of every kind of layer one."""
    keras.utils.set_random_seed(0)
    stack = [
        keras.Input((8, 8, 4)),
        layers.Conv2D(8, 3, name="conv"),
        layers.BatchNormalization(name="norm"),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, name="depthwise"),
        layers.SeparableConv2D(8, 3, name="separable"),
        layers.Flatten(),
        layers.Dense(12, name="dense"),
        layers.LayerNormalization(name="layer_norm"),
        layers.Dense(3, name="classes"),
    ]
    return keras.Sequential(stack)


X = np.random.default_rng(0).normal(size=(64, 8, 8, 4)).astype("float32")
Y = X[:, :3, 0, 0].argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
STEPS = 4  # batches of an epoch


def train(model, callbacks, epochs=3, optimizer="adam", x=X, y=Y, **options):
    model.compile(optimizer, LOSS, **options)
    fit(model, callbacks, epochs, x, y)
    return model


def fit(model, callbacks, epochs=3, x=X, y=Y, **options):
    return model.fit(
        x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **options
    ).history


def zeros(variable):
    return float(np.mean(ops.convert_to_numpy(variable) == 0))


def sparsities(model):
    return {v.path.split("/", 1)[-1]: zeros(v) for v in model.trainable_variables if zeros(v) not in (0, 1)}


def tiny():
    keras.utils.set_random_seed(0)
    convolved = [layers.Conv2D(8, 3, name="conv"), layers.BatchNormalization(name="norm"), layers.Flatten()]
    dense = [layers.Dense(12, name="dense"), layers.Dense(3, name="classes")]
    return keras.Sequential([keras.Input((8, 8, 4)), *convolved, *dense])


def targets_of(model, rules=(), **options):
    pruning = Pruning(0.5, rules, **options)
    found = find_targets(model, pruning.policy, pruning.rules)
    return {f"{target.path}/{target.variable.name}": target for target in found}


def test_norms_biases_depthwise_kernels_and_the_last_layer_are_left_alone():
    assert list(targets_of(small())) == ["conv/kernel", "separable/pointwise_kernel", "dense/kernel"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("classes", {"classes/kernel"}),
        ("depthwise", {"depthwise/kernel"}),
        ("separable", {"separable/depthwise_kernel", "separable/pointwise_kernel"}),
        (layers.BatchNormalization, {"norm/gamma", "norm/beta"}),
        ("dense/bias", {"dense/bias"}),
        ("*/bias", {"conv/bias", "depthwise/bias", "separable/bias", "dense/bias", "classes/bias"}),
    ],
)
def test_unless_a_rule_says_otherwise(pattern, expected):
    found = targets_of(small(), [kq.Rule(pattern, 0.5)])
    assert expected <= set(found)
    assert targets_of(small(), [kq.Rule(pattern, 0.5), kq.Rule("*", None)]).keys() == expected


def test_rules_take_schedules_patterns_sparsities_and_policies():
    half = schedules.OneShot(0.5)
    rules = [
        kq.Rule("conv", 0.9),
        kq.Rule("dense", half),
        kq.Rule("separable", NofM(2, 4)),
        kq.Rule("classes", Policy(half, Channels(), "taylor")),
    ]
    found = {name.split("/")[0]: target.policy for name, target in targets_of(small(), rules).items()}
    assert found["conv"] == Policy(schedules.Constant(0.9), Weights(), "magnitude")
    assert found["dense"].schedule == half and found["separable"].pattern == NofM(2, 4)
    assert found["classes"] == Policy(half, Channels(), "taylor")


def residual():
    inputs = keras.Input((4,))
    x = layers.Dense(6, name="stem")(inputs)
    both = layers.Add()([layers.Dense(6, name="branch")(x), x])
    inner = keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, name="inner"), layers.Dense(2, name="inner_out")], name="b"
    )
    return keras.Model(inputs, {"sum": layers.ReLU()(both), "block": layers.Softmax()(inner(x))})


def test_last_layers_of_branches_and_blocks():
    model = residual()
    last = last_layers(model)
    named = {layer.name for layer in model._flatten_layers() if id(layer) in last}
    assert named == {"branch", "stem", "inner_out"}


def test_channels_of_gates_and_heads_are_left_alone():
    inputs = keras.Input((6, 8))
    x = layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = layers.Dense(5, name="dense")(layers.LSTM(4, name="lstm")(x))
    model = keras.Model(inputs, layers.Dense(2, name="classes")(x))
    assert list(targets_of(model, pattern=Channels())) == ["dense/kernel"]
    assert [name.split("/")[0] for name in targets_of(model)] == ["attention"] * 4 + ["lstm"] * 2 + ["dense"]


def test_channels_take_their_bias_and_batch_norm_along():
    model = small()
    targets = targets_of(model, pattern=Channels())
    names = [v.path.split("/", 1)[-1] for v in targets["conv/kernel"].companions]
    assert names == [v.path.split("/", 1)[-1] for v in (model.layers[0].bias, *model.layers[1].trainable_variables)]
    train(model, [Pruning(schedules.OneShot(0.5), pattern=Channels())], epochs=1)
    conv, norm = model.get_layer("conv"), model.get_layer("norm")
    dead = np.all(np.asarray(conv.kernel) == 0, (0, 1, 2))
    assert dead.sum() == 4
    for vector in (conv.bias, norm.gamma, norm.beta):
        assert np.array_equal(np.asarray(vector)[dead], np.zeros(4))
    output = keras.Model(model.inputs, norm.output).predict(X, verbose=0)
    assert np.all(output[..., dead] == 0) and np.all(np.any(output[..., ~dead] != 0, (0, 1, 2)))


def two_branches():
    """Two blocks that end in one residual stream."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(6, 1, name="stem")(inputs)
    for block in ("one", "two"):
        y = layers.Conv2D(10, 3, padding="same", activation="relu", name=f"{block}_in")(x)
        x = x + layers.BatchNormalization()(layers.Conv2D(6, 1, use_bias=False, name=f"{block}_out")(y))
    return keras.Model(inputs, layers.Dense(3, name="classes")(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_channels_that_an_addition_ties_go_together(scope):
    """By the mean score of all of their weights; what is dead then can be taken out."""
    keras.utils.set_random_seed(1)
    model = two_branches()
    kernels = {name: np.asarray(model.get_layer(name).kernel) for name in ("stem", "one_out", "two_out")}
    train(model, [Pruning(0.5, pattern=Channels(), scope=scope)], epochs=1)
    dead = {name: np.all(np.asarray(model.get_layer(name).kernel) == 0, (0, 1, 2)) for name in kernels}
    assert all(np.array_equal(each, dead["stem"]) for each in dead.values())
    assert not np.array_equal(dead["stem"], np.all(np.asarray(model.get_layer("one_in").kernel) == 0, (0, 1, 2))[:6])
    if scope == "layer":
        means = np.concatenate([abs(kernel).reshape(-1, 6) for kernel in kernels.values()]).mean(0)
        assert np.array_equal(dead["stem"], means < np.sort(means)[3])
    smaller = shrink(model)
    assert smaller.get_layer("two_out").filters == np.sum(~dead["stem"])


def tied(kind):
    """A layer of a kind, its result added to what it reads."""
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(6, 1, name="stem")(inputs)
    x = x + kind(6, 3, padding="same", name="tied")(x)
    return keras.Model(inputs, layers.Dense(3, name="classes")(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))


@pytest.mark.parametrize(
    "kind, options, together",
    [
        (layers.Conv2D, {"pattern": Channels()}, {"stem/kernel", "tied/kernel"}),
        (layers.Conv2DTranspose, {"pattern": Channels()}, {"stem/kernel", "tied/kernel"}),
        (layers.SeparableConv2D, {"pattern": Channels()}, {"stem/kernel", "tied/pointwise_kernel"}),
        (
            layers.SeparableConv2D,
            {"pattern": Channels(), "rules": [kq.Rule("tied", 0.5)]},  # by name, the depthwise kernel too
            {"stem/kernel", "tied/pointwise_kernel"},
        ),
        (layers.Conv2D, {"rules": [kq.Rule("tied", Channels())]}, {"tied/kernel"}),  # of the others single weights go
    ],
)
def test_which_kernels_go_together(kind, options, together):
    keras.utils.set_random_seed(1)
    model = tied(kind)
    targets = targets_of(model, **options)
    assert {name for name, target in targets.items() if target.coupled is not None} == together
    assert len({targets[name].coupled for name in together}) == 1
    train(model, [Pruning(0.5, **options)], epochs=1)
    assert [zeros(target.variable) for target in targets.values()] == [0.5] * len(targets)


def test_without_a_graph_every_kernel_chooses_for_itself():
    class Undecided(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(8, name="first"), layers.Dense(3, name="second")

        def call(self, x):
            return self.second(self.first(x) if ops.sum(x) > 0 else self.first(-x))

    model = Undecided()
    model(np.ones((2, 4), "float32"))
    assert [target.coupled for target in targets_of(model, pattern=Channels()).values()] == [None]


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


class Deep(keras.Model):
    """Defined by its `call`, built by its first batch."""

    def __init__(self):
        super().__init__()
        self.first, self.block = layers.Dense(16), [layers.Dense(8), layers.Dense(3)]

    def call(self, x):
        x = ops.relu(self.first(ops.reshape(x, (-1, 256))))
        return self.block[1](ops.relu(self.block[0](x)))


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


def float_net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(8, 3, name="conv", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(x))
    x = layers.ReLU()(layers.Conv2D(16, 3, name="conv_2")(x))
    x = layers.Dense(12, name="dense")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(3, name="classes")(x))


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


# --- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
def test_report(quantized):
    model = kq.quantize(float_net()) if quantized else float_net()
    train(model, [Pruning(schedules.OneShot(0.5), [kq.Rule("conv_2", Channels())])], epochs=1)
    found = report(model)
    rows = {row.layer.split("/")[0]: row for row in found.rows}
    assert rows["conv"].macs == 36 * 3 * 3 * 4 * 8 and rows["conv"].useful_macs == rows["conv"].macs // 2
    assert rows["conv_2"].macs == 16 * 3 * 3 * 8 * 16 and rows["conv_2"].dead_channels == 8
    assert rows["dense"].macs == 256 * 12 and rows["classes"].sparsity == 0
    assert rows["dense"].bytes == 256 * 12 * (1 if quantized else 4) and rows["dense"].sparsity == 0.5
    assert rows["dense"].zipped_bytes < 0.75 * rows["dense"].bytes
    assert found.total.macs == sum(row.macs for row in found.rows)
    assert "through zip" in str(found) and found.to_dict()["total"]["weights"] == found.total.weights


def test_report_of_other_layers():
    inputs = keras.Input((8, 8, 4))
    x = layers.SeparableConv2D(6, 3, name="separable")(inputs)
    x = layers.Conv2DTranspose(5, 3, strides=2, name="transposed")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Reshape((-1, 5))(x)
    shared = layers.Dense(5, name="shared")
    x = layers.EinsumDense("abc,cde->abde", (None, 2, 3), name="einsum")(shared(shared(x)))
    rows = {row.layer: row for row in report(keras.Model(inputs, x)).rows}
    assert {name: row.macs for name, row in rows.items()} == {
        "separable": 36 * (9 * 4 + 4 * 6),
        "transposed": 36 * 9 * 6 * 5,
        "depthwise": 121 * 9 * 5,
        "shared": 2 * 121 * 25,
        "einsum": 121 * 5 * 6,
    }
    model = Deep()
    model(X[:1])
    assert all(row.macs is None for row in report(model).rows) and "unknown" in str(report(model))


class OwnConv(layers.Layer):
    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(3, 3, input_shape[-1], 8))

    def call(self, x):
        return ops.conv(x, self.kernel)


def test_macs_of_custom_layers_are_unknown():
    inputs = keras.Input((8, 8, 3))
    (row,) = report(keras.Model(inputs, OwnConv()(inputs))).rows
    assert (row.weights, row.macs) == (3 * 3 * 3 * 8, None)


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
