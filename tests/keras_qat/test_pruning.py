"""Pruning: the masks against numpy, what is chosen, and the report."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from pruned import (
    Deep,
    X,
    best,
    float_net,
    n_of_m,
    small,
    targets_of,
    train,
    zeros,
)

import keras_qat as kq
from keras_qat import schedules
from keras_qat.callbacks import Pruning
from keras_qat.pruning import Blocks, Channels, NofM, Policy, Weights, report, shrink
from keras_qat.pruning.patterns import mask_in_weights
from keras_qat.pruning.selection import keep_count, largest, largest_of_all
from keras_qat.pruning.targets import last_layers
from keras_qat.weighted import Layout, layout_of

# --- masks -----------------------------------------------------------------------------------------------------------

CONV, DENSE = Layout(-2, (-1,)), Layout(-2, (-1,))


def scores_of(shape, seed=0):
    return np.random.default_rng(seed).random(shape).astype("float32")


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
