"""Any model → one flat model that computes the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import OPERATIONS, inputs_for, with_lively_batch_norms
from keras import layers, ops
from models import STYLES

from keras_qat.graph.lower import lowering_of
from keras_qat.graph.trace import trace
from keras_qat.graph.walk import nodes_of
from keras_qat.operations import row_of


def flattened(model, **options):
    graph, problems = trace(model, lambda operation: row_of(operation) is not None, lowering_of, **options)
    return graph.model(), problems


def sample_for(model, count=4):
    flat, _ = flattened(model)
    generator = np.random.default_rng(0)
    arrays = [generator.normal(size=(count, *x.shape[1:])).astype("float32") for x in flat.inputs]
    return keras.tree.pack_sequence_as(flat._inputs_struct, arrays)


def assert_same(one, other, **tolerance):
    keras.tree.assert_same_structure(one, other)
    for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(other), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


@pytest.mark.parametrize("make", STYLES.values(), ids=STYLES)
def test_flat_model_computes_the_same(make):
    model = with_lively_batch_norms(make())
    x = sample_for(model)
    flat, problems = flattened(model)
    assert not problems
    assert_same(flat(x), model(x))
    assert all(row_of(node.operation) is not None for node in nodes_of(flat))


@pytest.mark.parametrize("style", ["functional", "shared"])
def test_that_would_be_noticed(style):
    """The test above can fail: with one weight changed the outputs differ."""
    model = with_lively_batch_norms(STYLES[style]())
    x = sample_for(model)
    flat, _ = flattened(model)
    flat.trainable_weights[0].assign_add(ops.ones_like(flat.trainable_weights[0]))
    with pytest.raises(AssertionError):
        assert_same(flat(x), model(x))


@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_lowered_operations_compute_the_same(case):
    model = case.one_op()
    x = inputs_for(model, 4)
    flat, problems = flattened(model)
    assert not problems
    assert_same(flat(x, training=False), model(x, training=False))


APPLICATIONS = {
    "MobileNetV2": lambda: keras.applications.MobileNetV2((32, 32, 3), 0.35, weights=None, classes=7),
    "ResNet50": lambda: keras.applications.ResNet50(input_shape=(32, 32, 3), weights=None, classes=7),
}


@pytest.mark.parametrize("make", APPLICATIONS.values(), ids=APPLICATIONS)
def test_applications(make):
    model = make()
    x = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype("float32")
    flat, problems = flattened(model)
    assert not problems
    assert_same(flat(x), model(x), atol=1e-5)
    names = [layer.name for layer in flat.layers]
    missing = [layer.name for layer in model.layers if layer.weights and layer.name not in names]
    assert not missing  # in a functional model each layer keeps its name


@pytest.mark.parametrize("make", STYLES.values(), ids=STYLES)
def test_float_model_is_left_untouched(make):
    model = with_lively_batch_norms(make())
    x = sample_for(model)
    everything = list({id(layer): layer for layer in model._flatten_layers()}.values())

    def state():
        counts = [(layer.name, len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in everything]
        config = model.get_config() if not type(model).__name__ == "Subclassed" else None
        return counts, config, [weight.path for weight in model.weights], [layer.built for layer in everything]

    before, weights, prediction = state(), model.get_weights(), model(x)
    for _ in range(2):  # idempotent too
        flat, _ = flattened(model)
    for weight in flat.weights:
        if weight.dtype.startswith("float"):
            weight.assign(ops.ones_like(weight) * 7)
    assert state() == before
    for now, then in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(now, then)
    assert_same(model(x), prediction, rtol=0, atol=0)


@pytest.mark.parametrize("make", STYLES.values(), ids=STYLES)
def test_names_are_unique(make):
    flat, _ = flattened(make())
    operations = {id(node.operation): node.operation for node in nodes_of(flat)}
    names = [operation.name for operation in operations.values()]
    assert len(set(names)) == len(names) and not any("/" in name for name in names)


NAMES = {
    "functional": ["classes", "global_average_pooling2d", "add"],
    "nested": ["backbone.conv2d", "backbone.batch_normalization", "head.dense", "head.flatten"],
    "subclassed": ["residual.conv2d_1", "residual.batch_normalization", "residual_1.conv2d_3", "average_pooling2d"],
    "two_outputs": ["label", "size", "label.softmax"],
}


@pytest.mark.parametrize("style, expected", NAMES.items(), ids=NAMES)
def test_names_are_recognisable(style, expected):
    keras.utils.clear_session()
    flat, _ = flattened(STYLES[style]())
    names = [node.operation.name for node in nodes_of(flat)]
    assert not [name for name in expected if name not in names], names


def test_layers_called_twice_keep_sharing_their_weights():
    model = STYLES["shared"]()
    flat, _ = flattened(model)
    assert flat.count_params() == model.count_params()
    convolutions = [node.operation for node in nodes_of(flat) if isinstance(node.operation, layers.Conv2D)]
    assert len(convolutions) == 2 and convolutions[0] is convolutions[1]


def test_layer_with_activation_called_twice_keeps_sharing():
    dense = layers.Dense(6, "swish")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, dense(dense(inputs)))
    flat, _ = flattened(model)
    assert flat.count_params() == model.count_params()
    assert_same(flat(np.eye(6)), model(np.eye(6)))


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("training", [False, True, None])
def test_nested_backbone_trains_as_in_the_float_model(training, trainable):
    """Keras lets `fit` overrule `backbone(x, training=False)`, but not `trainable=False`: so do we."""
    inputs = keras.Input((6,))
    backbone = keras.Model(inputs, layers.BatchNormalization()(inputs), name="backbone")
    backbone.trainable = trainable
    outer = keras.Input((6,))
    options = {} if training is None else {"training": training}
    model = with_lively_batch_norms(keras.Model(outer, layers.Dense(3)(backbone(outer, **options))))
    flat, _ = flattened(model)
    kwargs = next(node.arguments.kwargs for node in nodes_of(flat) if "batch_norm" in node.operation.name)
    assert kwargs.get("training") == training
    assert len(flat.trainable_weights) == len(model.trainable_weights)
    x = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
    before = [weight.numpy() for weight in flat.non_trainable_weights]
    for mode in (None, False, True, None):
        assert_same(flat(x, training=mode), model(x, training=mode))
    for one, other in zip(flat.weights, model.weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    is_frozen = all(np.array_equal(*pair) for pair in zip(before, flat.non_trainable_weights, strict=True))
    assert is_frozen != trainable


def test_frozen_layers_stay_frozen():
    model = STYLES["nested"]()
    model.get_layer("backbone").trainable = False
    flat, _ = flattened(model)
    assert len(flat.trainable_weights) == len(model.trainable_weights) == 2


# --- what cannot be opened -------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("keras_qat_tests")
class UsesTensorFlow(layers.Layer):
    def call(self, x):
        return tf.nn.relu(tf.abs(x))

    def compute_output_shape(self, input_shape):
        return input_shape


class Block(layers.Layer):
    """Holds another layer, so that its path has two parts."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return self.inner(x) + x


class ReadsShape(layers.Layer):
    def call(self, x):
        if ops.sum(x) > 0:  # data-dependent control flow
            return x
        return -x

    def compute_output_shape(self, input_shape):
        return input_shape


class CumulativeSum(layers.Layer):
    def call(self, x):
        return ops.sort(x, axis=1)


SERIES = (8, 4)
CLOSED = {
    "tensorflow": (lambda: UsesTensorFlow(name="mine"), "mine", "UsesTensorFlow"),
    "tensorflow_inside": (lambda: Block(UsesTensorFlow(name="mine"), name="block"), "block/mine", "UsesTensorFlow"),
    "control_flow": (lambda: ReadsShape(name="mine"), "mine", "ReadsShape"),
    "sort": (lambda: lambda x: ops.sort(x, axis=1), "sort", "Sort"),
    "sort_inside": (lambda: Block(CumulativeSum(name="mine"), name="block"), "block/mine", "Sort"),
    "lambda": (lambda: layers.Lambda(lambda x: ops.sort(x, axis=1), name="memory"), "memory", "Sort"),
}


@pytest.mark.parametrize("make, path, operation", CLOSED.values(), ids=CLOSED)
def test_what_cannot_be_opened_is_reported_by_its_path(make, path, operation):
    inputs = keras.Input(SERIES)
    model = keras.Model(inputs, layers.Dense(3)(make()(layers.Dense(4)(inputs))))
    _, problems = flattened(model)
    assert [problem.layer for problem in problems] == [path]
    assert problems[0].operation == operation
    assert problems[0].reason and problems[0].way_out


def test_a_layer_that_an_activation_calls_stays_the_users():
    """Keras does not know of it, so nothing tells that it is not one that a rule made."""
    inner = layers.Dense(8, name="inner")
    inner.build((None, 8))
    inputs = keras.Input((8,))
    flat, problems = flattened(keras.Model(inputs, layers.Dense(8, activation=lambda x: inner(x))(inputs)))
    assert not problems and inner.name == "inner"
    assert len(flat.weights) == 4 and all(weight is not inner.kernel for weight in flat.weights)


def test_all_problems_are_found_in_one_go():
    keras.utils.clear_session()
    x = inputs = keras.Input(SERIES)
    x = layers.Lambda(lambda x: ops.sort(x, axis=1), name="memory")(x)
    x = ops.sort(layers.Dense(4)(x), axis=1)
    model = keras.Model(inputs, UsesTensorFlow(name="mine")(x))
    _, problems = flattened(model)
    assert [problem.layer for problem in problems] == ["memory", "sort", "mine"]


def test_float_model_is_left_untouched_by_a_failed_attempt():
    inner = UsesTensorFlow(name="mine")
    inputs = keras.Input(SERIES)
    model = keras.Model(inputs, Block(inner, name="block")(inputs))
    before = [len(layer._inbound_nodes) for layer in (*model.layers, inner)]
    flattened(model)
    assert [len(layer._inbound_nodes) for layer in (*model.layers, inner)] == before


def test_inputs_may_be_given_for_a_model_that_never_saw_data():
    model = keras.Sequential([layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2)])
    flat, problems = flattened(model, inputs=keras.Input((8, 8, 3)))
    assert not problems and flat.input_shape == (None, 8, 8, 3)


class TakesADict(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, inputs):
        return self.dense(ops.concatenate([inputs["left"], inputs["right"]], axis=-1))


def test_inputs_of_a_dict_have_its_keys_as_names():
    model = TakesADict()
    model({"left": np.ones((2, 3), "float32"), "right": np.ones((2, 4), "float32")})
    flat, _ = flattened(model)
    assert [tensor.name for tensor in flat.inputs] == ["left", "right"]
    assert flat({"left": np.ones((2, 3)), "right": np.ones((2, 4))}).shape == (2, 2)


class TwoOfAName(keras.Layer):
    """Sub-layers named alike, and one named as an operation of keras.ops is."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = [keras.layers.Dense(4, name="part"), keras.layers.Dense(4, name="part")]
        self.mean = keras.layers.Dense(4, name="mean")

    def build(self, input_shape):
        for layer in (*self.parts, self.mean):
            layer.build((*input_shape[:-1], 4))

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x - keras.ops.mean(self.mean(x), axis=1, keepdims=True)


def test_names_used_twice_inside_of_a_layer():
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, TwoOfAName(name="two")(inputs))
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    expected = model(x)
    flat, problems = flattened(model)
    assert not problems
    assert_same(flat(x), expected)
    layer = model.get_layer("two")
    assert [part.name for part in (*layer.parts, layer.mean)] == ["part", "part", "mean"]
