"""quantize, explain, calibrate and export as a user meets them: training, saving, and clear errors."""

import errno
import gc
import os
import pickle
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import with_lively_batch_norms
from keras import layers, ops
from models import STYLES

import keras_qat as kq
import tflite_export
from keras_qat.errors import Problem
from keras_qat.layers import FakeQuant
from keras_qat.spec import matches_path

SHAPE = (8, 8, 3)


def small():
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE, name="image")
    x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 3, name="conv", use_bias=False)(inputs)))
    return keras.Model(inputs, layers.Dense(3, activation="softmax", name="classes")(layers.Flatten()(x)))


def images(count=64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype("float32")


LABELS = (images().mean((1, 2)).argmax(-1)).astype("int32")


def ranges_of(qat) -> dict:
    return {layer.name: layer.parameters() for layer in qat.layers if isinstance(layer, FakeQuant)}


@pytest.fixture(scope="module")
def calibrated():
    return kq.calibrate(kq.quantize(small()), images())


def random_inputs(model, count=8):
    generator = np.random.default_rng(1)
    arrays = [generator.normal(size=(count, *x.shape[1:])).astype("float32") for x in model.inputs]
    return keras.tree.pack_sequence_as(model._inputs_struct, arrays)


# --- training --------------------------------------------------------------------------------------------------------

MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "several_steps": {"jit_compile": False, "steps_per_execution": 4},
}


def trained(**options):
    qat = kq.quantize(small())
    qat.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy", **options)
    history = qat.fit(images(), LABELS, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]
    return qat, history


@pytest.fixture(scope="module")
def trained_eagerly():
    return trained(run_eagerly=True)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_fit(options, trained_eagerly):
    """All ways of running a training step train the same weights and see the same ranges."""
    qat, history = trained_eagerly if options.get("run_eagerly") else trained(**options)
    assert history[-1] < history[0]
    start = kq.quantize(small())
    for old, new in zip(start.trainable_weights, qat.trainable_weights, strict=True):
        assert not np.array_equal(old, new)
    kq.freeze(qat)  # all ranges were observed
    for one, other in zip(qat.weights, trained_eagerly[0].weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4, err_msg=one.path)


def test_training_goes_through_the_rounding():
    """In training mode the model computes with rounded weights: a change below half a step changes nothing."""

    def output(change):
        model = small()
        kernel = model.get_layer("conv").kernel
        value = kernel.numpy()
        value[1, 1, 1, 1] = 0.4 * np.abs(value[..., 1]).max() / 127 + change * np.abs(value[..., 1]).max() / 127
        kernel.assign(value)
        return kq.quantize(model)(images(), training=True)

    np.testing.assert_array_equal(output(0), output(-0.1))
    assert not np.array_equal(output(0), output(0.3))


@pytest.mark.parametrize("style", ["nested", "shared", "subclassed"])
def test_float_model_is_left_untouched(style):
    model = with_lively_batch_norms(STYLES[style]())
    everything = list({id(layer): layer for layer in model._flatten_layers()}.values())
    counts = [(layer.name, len(layer._inbound_nodes)) for layer in everything]
    weights = model.get_weights()
    x = random_inputs(kq.quantize(model))
    before = keras.tree.flatten(model(x))
    qat = kq.quantize(model)
    qat(x, training=True)
    for weight in qat.trainable_weights:
        weight.assign(ops.zeros_like(weight))
    assert [(layer.name, len(layer._inbound_nodes)) for layer in everything] == counts
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(keras.tree.flatten(model(x)), before, strict=True):
        np.testing.assert_array_equal(one, other)


def separable():
    keras.utils.set_random_seed(0)
    inputs = keras.Input(SHAPE)
    layer = layers.SeparableConv2D(6, 3, name="separable")
    return keras.Model(inputs, layers.Flatten()(layer(layer(layers.Conv2D(6, 1)(inputs)))))


def test_what_a_rule_makes_belongs_to_the_qat_model_alone():
    """A layer called twice stays one; another quantize of the same model has weights of its own."""
    model = separable()
    one, other = kq.quantize(model), kq.quantize(model)
    assert len(one.trainable_weights) == len(model.trainable_weights)
    for weight in one.trainable_weights:
        weight.assign(ops.zeros_like(weight))
    x = random_inputs(other)
    kq.calibrate(other, x)
    assert np.abs(other(x) - model(x)).max() < 0.1 * np.ptp(model(x))


def test_garbage_is_collected_afterwards_and_variables_are_called_as_ever():
    qat = kq.quantize(small())
    with pytest.raises(ValueError):
        kq.freeze(qat)
    with pytest.raises(kq.UnsupportedModelError):
        kq.quantize(keras.Sequential([keras.Input((4,)), layers.Masking()]))
    assert gc.isenabled()
    assert {weight.path for weight in qat.weights} >= {"conv/kernel", "image.range/seen", "classes/bias"}


@pytest.mark.parametrize("make", STYLES.values(), ids=STYLES)
def test_qat_model_is_close_to_the_float_model(make):
    model = with_lively_batch_norms(make())
    qat = kq.quantize(model)
    x = random_inputs(qat, 64)
    kq.calibrate(qat, x)
    for one, other in zip(keras.tree.flatten(qat(x)), keras.tree.flatten(model(x)), strict=True):
        assert np.abs(one - other).max() < 0.1 * np.ptp(other)
    keras.tree.assert_same_structure(qat(x), model(x))


def test_output_names_stay():
    model = STYLES["two_outputs"]()
    qat = kq.quantize(model)
    assert set(qat.output) == {"label", "size"} and kq.quantize(small()).output_names == small().output_names
    qat.compile("sgd", {"label": "sparse_categorical_crossentropy", "size": "mse"}, metrics={"label": ["accuracy"]})
    x = random_inputs(qat, 8)
    qat.fit(x, {"label": np.zeros(8), "size": np.zeros(8)}, verbose=0)


class NeverCalls(keras.Model):
    def __init__(self):
        super().__init__()
        self.used, self.forgotten = layers.Dense(3, name="used"), layers.Dense(3, name="forgotten")
        self.also_forgotten = [layers.BatchNormalization(), layers.LSTM(3)]

    def call(self, x):
        return self.used(x)


def test_layers_that_are_never_called_do_not_matter():
    model, x = NeverCalls(), np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    expected = model.predict(x, verbose=0)
    qat = kq.calibrate(kq.quantize(model), x)
    assert not model.forgotten.built and kq.explain(model).supported
    np.testing.assert_allclose(qat.predict(x, verbose=0), expected, atol=0.1)


def pair(make):
    inputs = [keras.Input((8,), name="one"), keras.Input((8,), name="other")]
    return keras.Model(inputs, make(*inputs))


IDENTITIES = {
    "model": lambda: keras.Model(x := keras.Input((8,), name="one"), x),
    "list": lambda: keras.Model([x := keras.Input((8,), name="one")], [x]),
    "dict": lambda: keras.Model({"one": (x := keras.Input((8,), name="one"))}, {"one": x, "y": layers.Dense(2)(x)}),
    "input_and_result": lambda: pair(lambda x, y: [y, x, layers.Dense(2, name="one_1")(x)]),
    "result_twice": lambda: pair(lambda x, y: [z := layers.Add(name="sum")([x, y]), z]),
    "training_only": lambda: pair(lambda x, y: [layers.Dropout(0.5)(x), y]),
    "sequential": lambda: keras.Sequential([keras.Input((8,)), layers.GaussianNoise(0.1)]),
}


@pytest.mark.parametrize("make", IDENTITIES.values(), ids=IDENTITIES)
def test_models_that_pass_their_inputs_on(make, tmp_path):
    qat = kq.quantize(make())
    x = random_inputs(qat)
    kq.calibrate(qat, x)
    assert len(set(kq.freeze(qat).outputs)) == len(qat.outputs)
    assert kq.export(qat, tmp_path / "model.tflite", x).parity.exact


STRUCTURES = {"array": lambda x: x, "list": lambda x: [x], "tuple": lambda x: (x,), "dict": lambda x: {"image": x}}


@pytest.mark.parametrize("data", STRUCTURES)
@pytest.mark.parametrize("inputs", STRUCTURES)
def test_one_input_in_any_structure_goes_without_keras_warning_of_it(inputs, data, tmp_path, recwarn):
    image = keras.Input(SHAPE, name="image")
    model = keras.Model(STRUCTURES[inputs](image), layers.Dense(3)(layers.Flatten()(image)))
    x = STRUCTURES[data](images(8))
    qat = kq.calibrate(kq.quantize(model), x)
    kq.export(qat, tmp_path / "model.tflite", x, runtimes=("litert",))
    assert not [warning for warning in recwarn if "structure" in str(warning.message)]


# --- saving ----------------------------------------------------------------------------------------------------------

FRESH_PROCESS = """
import sys
import keras_qat, keras, numpy
for path in sys.argv[1:]:
    data = numpy.load(path + ".npz")
    model = keras.saving.load_model(path)
    inputs = [data[f"x{i}"] for i in range(len(model.inputs))]
    inputs = keras.tree.pack_sequence_as(model._inputs_struct, inputs)
    found = keras.tree.flatten(model.predict(inputs, verbose=0))
    for i, output in enumerate(found):
        assert numpy.array_equal(output, data[f"y{i}"]), (path, i, numpy.abs(output - data[f"y{i}"]).max())
    content = keras_qat.freeze(model)
    assert len(content.ops) == data["ops"], path
print("all equal", len(sys.argv) - 1)
"""


def test_saved_models_predict_the_same_bits_in_a_fresh_process(tmp_path):
    for name in ("shared", "subclassed"):
        make = STYLES[name]
        qat = kq.quantize(with_lively_batch_norms(make()))
        x = random_inputs(qat, 16)
        kq.calibrate(qat, x)
        path = tmp_path / f"{name}.keras"
        qat.save(path)
        outputs = keras.tree.flatten(qat.predict(x, verbose=0))
        arrays = {f"y{i}": y for i, y in enumerate(outputs)} | {f"x{i}": x for i, x in enumerate(keras.tree.flatten(x))}
        np.savez(f"{path}.npz", ops=len(kq.freeze(qat).ops), **arrays)
    paths = [str(path) for path in sorted(tmp_path.glob("*.keras"))]
    command = [sys.executable, "-c", textwrap.dedent(FRESH_PROCESS), *paths]
    folder = os.path.dirname(os.path.dirname(kq.__file__))
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": folder})
    assert f"all equal {len(paths)}" in result.stdout, result.stderr[-2000:]


# --- models that cannot be quantized ---------------------------------------------------------------------------------


def sequential(*inner, shape=SHAPE):
    return keras.Sequential([keras.Input(shape, name="image"), layers.Dropout(0.1), *inner])


def spoiled(value):
    model = small()
    weights = model.get_layer("conv").get_weights()
    weights[0].flat[3] = value
    model.get_layer("conv").set_weights(weights)
    return model


def spoiled_norm():
    inputs = keras.Input(SHAPE)
    norm = layers.BatchNormalization(name="norm")
    model = keras.Model(inputs, norm(layers.Conv2D(4, 3)(inputs)))
    norm.moving_variance.assign([1, 1, np.inf, 1])
    return model


UNSUPPORTED = {
    "dynamic_height": (
        lambda: sequential(layers.Conv2D(4, 3), layers.GlobalMaxPooling2D(), shape=(None, 8, 3)), "image",
    ),
    "dynamic_width": (lambda: sequential(layers.Conv2D(4, 3), shape=(8, None, 3)), "image"),
    "dynamic_time": (
        lambda: sequential(layers.Conv1D(4, 3), layers.GlobalAveragePooling1D(), shape=(None, 3)), "image",
    ),
    "dynamic_time_dense": (lambda: sequential(layers.Dense(4), shape=(None, 3)), "image"),
    "nan_weight": (lambda: spoiled(np.nan), "conv"),
    "inf_weight": (lambda: spoiled(np.inf), "conv"),
    "minus_inf_weight": (lambda: spoiled(-np.inf), "conv"),
    "inf_statistics": (spoiled_norm, "norm"),
    "relu_threshold": (lambda: sequential(layers.ReLU(threshold=0.5, name="relu")), "relu"),
    "dilated_transposed": (lambda: sequential(layers.Conv2DTranspose(4, 3, dilation_rate=2, name="up")), "up"),
    "backwards": (lambda: sequential(layers.Lambda(lambda x: x[:, ::-1], name="turned")), "turned"),
    "masking": (lambda: sequential(layers.Masking(name="memory"), shape=(8, 3)), "memory"),
    "batch_into_axis": (lambda: sequential(layers.Lambda(lambda x: ops.reshape(x, (-1, 3)), name="mix")), "mix"),
}  # fmt: skip


@pytest.mark.parametrize("make, layer", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_models_are_refused_by_layer_before_training(make, layer):
    model = make()
    with pytest.raises(kq.UnsupportedModelError) as error:
        kq.quantize(model)
    (problem,) = error.value.problems
    assert f"{problem.layer}/".startswith(f"{layer}/")
    assert problem.reason and problem.way_out and str(problem) in str(error.value)
    explanation = kq.explain(model)
    assert explanation.problems == error.value.problems and not explanation.supported
    assert str(problem) in str(explanation)
    assert explanation.to_dict()["problems"][0]["layer"] == problem.layer


@pytest.mark.parametrize("make, name", [
    (lambda: layers.ReLU(threshold=0.5, name="mine"), "mine"),
    (lambda: layers.Masking(name="mine"), "mine"),
    (lambda: layers.Conv1D(3, 3, padding="same", name="mine"), None),
    (lambda: layers.Conv1D(3, 3, padding="same", activation="tanh", name="mine"), None),
], ids=["relu", "masking", "conv", "conv_tanh"])  # fmt: skip
@pytest.mark.parametrize("style", ["functional", "sequential", "nested"])
def test_only_layer_of_a_model_keeps_its_name(make, name, style):
    inputs, layer = keras.Input((8, 3), name="series"), make()
    chain = keras.Sequential([keras.Input((8, 3)), layer], name="chain")
    outputs = {"functional": layer, "sequential": chain, "nested": chain}[style](inputs)
    model = chain if style == "sequential" else keras.Model(inputs, outputs)
    explanation = kq.explain(model)
    path = "chain/mine" if style == "nested" else "mine"
    if name is not None:
        assert [problem.layer for problem in explanation.problems] == [path]
    else:
        assert any(f"{row.layer}/".startswith(f"{path}/") for row in explanation.rows), str(explanation)


def test_of_a_mask_only_those_who_meet_it_are_named():
    """Not the comparison that makes it, which nobody wrote."""
    words, series = keras.Input((8,), dtype="int32"), keras.Input((8, 3))
    each = layers.TimeDistributed(layers.Dense(2), name="each")
    models = {
        ("each",): each(layers.Embedding(9, 4, mask_zero=True)(words)),
        ("mask",): layers.GRU(3, name="gru")(layers.Masking(name="mask")(series)),
    }
    for (names, outputs), inputs in zip(models.items(), (words, series), strict=True):
        problems = kq.explain(keras.Model(inputs, outputs)).problems
        assert {problem.layer for problem in problems} == set(names), problems


def test_a_comparison_of_ones_own_is_named_beside_other_problems():
    inputs = keras.Input((8, 3))
    greater = layers.Lambda(lambda x: ops.cast(x > ops.mean(x, -1, keepdims=True), "float32"), name="mine")(inputs)
    masked = layers.GRU(3, name="gru")(layers.Masking(name="mask")(greater))
    layers_named = [problem.layer for problem in kq.explain(keras.Model(inputs, masked)).problems]
    assert any(name.startswith("mine") for name in layers_named) and "mask" in layers_named
    assert not any("not_equal" in name for name in layers_named)


def test_explain_prints_a_row_per_layer():
    explanation = kq.explain(small())
    assert explanation.supported and not explanation.problems
    rows = {row.layer: row.integer_op for row in explanation.rows}
    assert rows["conv"] == "CONV_2D" and "FULLY_CONNECTED" in rows.values()
    for row in explanation.rows:
        assert row.layer in str(explanation)


FOLDED = {
    "conv": (lambda: [layers.Rescaling(0.5), layers.Conv2D(4, 3), layers.BatchNormalization()], [0, 2]),
    "chain": (
        lambda: [layers.Rescaling(0.5), layers.Normalization(mean=1.0, variance=2.0), layers.Conv2D(4, 3)],
        [0, 1],
    ),
    "behind": (lambda: [layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU(), layers.Conv2D(3, 1)], [1]),
    "not_folded": (lambda: [layers.ReLU(), layers.BatchNormalization(), layers.Rescaling(0.5), layers.ReLU()], []),
}


@pytest.mark.parametrize("make, folded", FOLDED.values(), ids=FOLDED)
def test_explain_has_a_row_for_what_is_folded(make, folded):
    inner = [*make(), layers.Flatten()]
    rows = kq.explain(sequential(*inner)).rows
    expected = [(inner[index].name, type(inner[index]).__name__) for index in folded]
    assert [(row.layer, row.operation) for row in rows if row.integer_op == "folded"] == expected
    places = [[layer.name in f"{row.layer}/".split("/") for row in rows].index(True) for layer in inner]
    assert places == sorted(places)  # in the order of the model


class Unrolled(layers.Layer):
    """Runs the same code for each step, as TimeDistributed does."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return ops.stack([self.function(x[:, step]) for step in range(x.shape[1])], axis=1)


REPEATED = {
    "unknown": (lambda x: ops.sort(x, axis=1), ["steps/sort"]),
    "refused": (lambda x: ops.max(x, axis=0, keepdims=True), ["steps/max"]),
    "two": (lambda x: ops.sort(ops.cumprod(x, axis=1), axis=1), ["steps/cumprod", "steps/sort"]),
}


@pytest.mark.parametrize("function, places", REPEATED.values(), ids=REPEATED)
def test_each_problem_is_listed_once(function, places):
    model = sequential(Unrolled(function, name="steps"), shape=(4, 5, 3))
    explanation = kq.explain(model)
    assert [problem.layer for problem in explanation.problems] == places
    assert len([row for row in explanation.rows if row.reason]) == 4 * len(places)  # but each row has its reason


def test_layers_with_the_same_problem_are_all_listed():
    model = sequential(*[layers.Conv2DTranspose(3, 3, dilation_rate=2, name=name) for name in ("a_1", "a_2")])
    assert [problem.layer for problem in kq.explain(model).problems] == ["a_1", "a_2"]


class ForeignModel:
    """What a tf_keras model looks like from here."""

    __module__ = "tf_keras.src.engine.functional"
    built, layers, inputs, outputs = True, [], [], []

    def call(self, x):
        return x


class Unbuilt(keras.Model):
    def call(self, x):
        return x


class Decides(layers.Layer):
    def call(self, x):
        return x if ops.sum(x) > 0 else -x


class Called(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.decides = layers.Dense(3), Decides()

    def call(self, x):
        return self.decides(self.dense(x))


def called():
    model = Called(name="mine")
    model(np.ones((2, 4), "float32"))
    return model


def test_what_stands_in_the_way_of_a_model_is_named():
    with pytest.raises(kq.UnsupportedModelError, match="'mine'.*decides by the data.*if ops.sum.*keras.ops.where"):
        kq.quantize(called(), inputs=keras.Input((4,)))


def test_functions_of_tensorflow_in_a_lambda_are_named():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Lambda(lambda x: tf.concat([tf.nn.softmax(x), x], 1), name="mine")(inputs))
    with pytest.raises(
        kq.UnsupportedModelError, match="'mine'.*keras.ops.concatenate for tf.concat, keras.ops.softmax"
    ):
        kq.quantize(model)


def test_layers_for_text_belong_in_front_of_the_model():
    words = keras.Input((1,), dtype="string")
    ids = layers.StringLookup(vocabulary=["a", "b"], name="words")(words)
    model = keras.Model(words, layers.Embedding(4, 3)(ids))
    with pytest.raises(kq.UnsupportedModelError, match="'words'.*Run it in front of the model"):
        kq.quantize(model)


NO_MODELS = {
    "called_subclass": (called, "'mine' was called, but Keras does not know.*inputs=keras.Input"),
    "foreign": (ForeignModel, "ForeignModel.*tf_keras"),
    "layer": (lambda: layers.Dense(3), "Dense"),
    "path": (lambda: "model.keras", "str"),
    "none": (lambda: None, "NoneType"),
    "unbuilt_sequential": (lambda: keras.Sequential([layers.Dense(3)], name="mine"), "'mine' is not built.*Input"),
    "unbuilt_subclass": (lambda: Unbuilt(name="mine"), "'mine' is not built.*Input"),
}


@pytest.mark.parametrize("verb", [kq.quantize, kq.explain])
@pytest.mark.parametrize("make, message", NO_MODELS.values(), ids=NO_MODELS)
def test_what_is_no_built_model_is_refused(make, message, verb):
    with pytest.raises(ValueError, match=message):
        verb(make())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scheme": "int3"}, "int8.*Received: 'int3'"),
        ({"scheme": None}, "int8.*Received: None"),
        ({"scheme": kq.Scheme(weights=kq.Spec())}, "symmetric.*Received"),
        ({"scheme": kq.Scheme(activations=kq.Spec(bits=4))}, "Activations.*Received"),
        ({"scheme": kq.Scheme(activations=kq.Spec(bits=16, symmetric=True))}, "Activations.*Received"),
        ({"scheme": kq.Scheme(weights=kq.Spec(bits=16, symmetric=True))}, "8 bits at the most.*Received"),
        ({"rules": ["conv"]}, "kq.Rule.*Received: 'conv'"),
        ({"rules": [kq.Rule("conv", "int3")]}, "Rule for 'conv'.*int8.*Received: 'int3'"),
    ],
)
def test_unknown_schemes_and_rules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        kq.quantize(small(), **options)


@pytest.mark.parametrize("bits", [0, 1, 9, 17])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits.*Received: bits={bits}"):
        kq.Spec(bits=bits)


FOUR_BITS = kq.Scheme("int4", weights=kq.Spec(bits=4, symmetric=True, per_channel=True))


def test_rules_that_match_nothing_warn():
    with pytest.warns(UserWarning, match="cnov.*The layers are: .*conv") as record:
        qat = kq.quantize(small(), rules=[kq.Rule("cnov", FOUR_BITS), kq.Rule("conv", FOUR_BITS)])
    assert "'conv'" not in str(record[0].message)
    assert qat.get_layer("conv").weight_quantizer.spec.bits == 4


@pytest.mark.parametrize("pattern", ["inner", "inner/*", "head", "head/*", "in*"])
def test_rules_match_a_layer_and_what_is_in_it(pattern, recwarn):
    """The last layer becomes "head/dense", and "inner" has its activation behind it as "inner/re_lu"."""
    inputs = keras.Input((8,))
    x = layers.Dense(4, activation="relu", name="inner")(inputs)
    qat = kq.quantize(keras.Model(inputs, layers.Dense(3, name="head")(x)), rules=[kq.Rule(pattern, FOUR_BITS)])
    bits = {layer.name: layer.weight_quantizer.spec.bits for layer in qat.layers if hasattr(layer, "weight_quantizer")}
    assert [name.split(".")[0] for name, each in bits.items() if each == 4] == ["inner" if "in" in pattern else "head"]
    assert not [w for w in recwarn if "rules" in str(w.message)]


@pytest.mark.parametrize(
    "pattern, matched",
    [
        ("head", {"head", "head/dense"}),
        ("head/*", {"head", "head/dense"}),
        ("*/*", {"head/dense"}),
        ("*", {"head", "head/dense", "heads"}),
        ("head?", {"heads"}),
    ],
)
def test_what_patterns_match(pattern, matched):
    assert {path for path in ("head", "head/dense", "heads") if matches_path(pattern, path)} == matched


def test_first_matching_rule_wins(recwarn):
    qat = kq.quantize(small(), rules=[kq.Rule("conv", FOUR_BITS), kq.Rule("*", "int8")])
    bits = {layer.name: layer.weight_quantizer.spec.bits for layer in qat.layers if hasattr(layer, "weight_quantizer")}
    assert bits.pop("conv") == 4 and set(bits.values()) == {8}
    assert not [w for w in recwarn if "rules" in str(w.message)]


# --- calibration -----------------------------------------------------------------------------------------------------

BAD_DATA = {
    "wrong_shape": (lambda: np.zeros((4, 8, 8, 1), "float32"), "'image' has the wrong shape.*Received"),
    "wrong_rank": (lambda: np.zeros((4, 8, 8), "float32"), "wrong shape"),
    "too_many_inputs": (lambda: [images(4), LABELS[:4]], r"1 input.*'image'.*8, 8, 3.*2 arrays.*\(4,\)"),
    "list_of_samples": (lambda: list(images(4)), r"1 input.*4 arrays.*\(8, 8, 3\)"),
    "nan_in_a_list_of_batches": (lambda: [images(4), images(4) * np.nan], "NaN"),
    "another_name": (lambda: {"picture": images(4)}, r"lacks \['image'\].*Received: \['picture'\]"),
    "empty_array": (lambda: images(0), "no batch"),
    "empty_list": (lambda: iter([]), "no batch"),
    "empty_dataset": (lambda: tf.data.Dataset.from_tensor_slices(images(4)).batch(2).take(0), "no batch"),
    "nan": (lambda: np.where(np.arange(3) == 1, np.nan, images(40)).astype("float32"), "'image'.*NaN"),
    "inf_in_a_later_batch": (lambda: iter([images(4), images(4) * np.inf]), "NaN or infinite"),
    "wrong_in_a_later_batch": (lambda: iter([50 * images(4), np.zeros((4, 8, 8, 1))]), "wrong shape"),
    "empty_python_list": (list, "."),
    "nothing": (lambda: None, "."),
}


@pytest.mark.parametrize("make, message", BAD_DATA.values(), ids=BAD_DATA)
def test_bad_calibration_data_is_refused_and_the_old_ranges_survive(make, message, calibrated):
    before = ranges_of(calibrated)
    with pytest.raises(ValueError, match=message):
        kq.calibrate(calibrated, make())
    assert ranges_of(calibrated) == before


def test_calibration_sets_the_ranges_of_the_data():
    qat = kq.quantize(small())
    weights = [weight.numpy() for weight in qat.trainable_weights]
    x = images(40)
    kq.calibrate(qat, 2 * images(8))
    batches = [x[:20], x[20:]]
    dataset = tf.data.Dataset.from_tensor_slices((x, x)).batch(16)
    for data in (x, [x], {"image": x}, dataset, iter(batches), batches, tuple(batches), list(dataset)):
        assert kq.calibrate(qat, data) is qat
        scale, zero_point = ranges_of(qat)["image.range"]
        ends = (-128 - zero_point) * scale, (127 - zero_point) * scale
        np.testing.assert_allclose(ends, (x.min(), x.max()), atol=scale)
    kq.calibrate(qat, iter([x[:8], 100 * x]), steps=1)
    assert ranges_of(qat)["image.range"][0] < 1
    for one, other in zip(qat.trainable_weights, weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_unknown_calibration_method_is_refused(calibrated):
    with pytest.raises(ValueError, match="minmax.*Received: 'magic'"):
        kq.calibrate(calibrated, images(4), method="magic")


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path):
    """A file that was there before."""
    path = tmp_path / "model.tflite"
    path.write_bytes(b"the old file")
    return path


def export(qat, path, **options):
    return kq.export(qat, path, images(8), **{"runtimes": ("litert",), **options})


def test_export_replaces_the_file_and_leaves_nothing_else(calibrated, target):
    report = export(calibrated, target)
    assert report.parity.passed and report.summary.is_full_int8 and report.path == str(target)
    assert target.read_bytes()[4:8] == b"TFL3" and os.listdir(target.parent) == [target.name]
    assert str(target) in str(report) and report.to_dict()["path"] == str(target)


@pytest.mark.parametrize("verb", [kq.freeze, lambda qat: export(qat, "/tmp/never.tflite")], ids=["freeze", "export"])
def test_export_before_any_training_names_the_tensors(verb):
    with pytest.raises(ValueError, match="never observed.*'image'.*calibrate"):
        verb(kq.quantize(small()))
    with pytest.raises(ValueError, match="not a QAT model.*quantize"):
        verb(small())


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_when_the_disk_is_full_the_old_file_survives(function, code, calibrated, target, monkeypatch):
    monkeypatch.setattr(os, function, failing(OSError(code, os.strerror(code))))
    with pytest.raises(OSError, match=f"model.tflite.*{os.strerror(code)}"):
        export(calibrated, target)
    assert target.read_bytes() == b"the old file" and os.listdir(target.parent) == [target.name]


def test_when_interrupted_the_old_file_survives(calibrated, target, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        export(calibrated, target)
    assert target.read_bytes() == b"the old file" and os.listdir(target.parent) == [target.name]


def test_file_that_disagrees_is_not_written(calibrated, target):
    """`verify_with` inputs on which the runtime computes something else: made by breaking the reference."""
    broken = kq.calibrate(kq.quantize(small()), images())
    predict = broken.predict
    broken.predict = lambda *args, **kwargs: 1 - predict(*args, **kwargs)
    with pytest.raises(kq.ExportError, match="not written") as error:
        export(broken, target)
    assert not error.value.parity.passed
    assert target.read_bytes() == b"the old file" and os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("path", ["absent/model.tflite", "file/model.tflite", "folder"])
def test_unwritable_paths_are_named(path, calibrated, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=path.split("/")[0]):
        export(calibrated, tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("path", ["", b""])
def test_no_path_is_refused(path, calibrated):
    with pytest.raises(ValueError, match="file name like 'model.tflite'"):
        export(calibrated, path)


@pytest.mark.parametrize("runtime", ["gpu", ""])
def test_unknown_runtimes_are_refused(runtime, calibrated, target):
    with pytest.raises(ValueError, match="litert.*Received"):
        export(calibrated, target, runtimes=(runtime,))
    assert target.read_bytes() == b"the old file"


@pytest.mark.parametrize("side", ["input_type", "output_type"])
def test_unknown_rim_types_are_refused(side, calibrated, target):
    with pytest.raises(ValueError, match=f"{side}.*Received.*int7"):
        export(calibrated, target, **{side: "int7"})


class ForeignType:
    """A type of another framework."""

    name = "uint8"

    def __repr__(self):
        return "foreign"


@pytest.mark.parametrize("dtype", ["uint8", tf.uint8, np.uint8, np.dtype("uint8"), ForeignType()], ids=str)
def test_rim_types_may_be_objects(dtype, calibrated, target):
    report = export(calibrated, target, input_type=dtype, output_type=dtype)
    assert [port.tensor.dtype for port in report.summary.inputs + report.summary.outputs] == ["uint8", "uint8"]


@pytest.mark.parametrize("dtype", [tf.int16, np.float64, None, 8, float, ["uint8"]], ids=str)
@pytest.mark.parametrize("side", ["input_type", "output_type"])
def test_other_types_are_refused(dtype, side, calibrated, target):
    with pytest.raises(ValueError, match=f"{side} is .*int8.*Received") as error:
        export(calibrated, target, **{side: dtype})
    assert "float32" in str(error.value) and target.read_bytes() == b"the old file"


@pytest.mark.parametrize("make", [small, lambda: sequential(layers.Flatten())], ids=["functional", "sequential"])
def test_float_models_have_no_layers_to_compare(make, calibrated, target):
    export(calibrated, target)
    with pytest.raises(ValueError, match="per_layer=True.*kq.quantize.*Received"):
        tflite_export.verify(target, with_head(make()), images(4), "litert", per_layer=True)


def with_head(model):
    """With the output of the file."""
    return keras.Sequential([model, layers.Flatten(), layers.Dense(3, name="classes")])


@keras.saving.register_keras_serializable("keras_qat_tests")
class Halved(keras.Model):
    """A functional model with a training step of its own, as Keras's guides show it."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = 0.5 * self.compute_loss(y=y, y_pred=self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"halved": loss}


class HoldsLayers(keras.Model):
    train_step = Halved.train_step

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def _fitted(model):
    model.compile("sgd", "mse")
    return model.fit(np.ones((8, 4), "float32"), np.ones((8, 3), "float32"), verbose=0).history


def test_a_functional_model_keeps_its_train_step(tmp_path):
    inputs = keras.Input((4,))
    qat = kq.quantize(Halved(inputs, layers.Dense(3)(inputs)))
    assert list(_fitted(qat)) == ["halved"]
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    assert list(_fitted(loaded)) == ["halved"]
    kq.export(loaded, tmp_path / "model.tflite", runtimes=("litert",))


def test_another_model_is_told_how_to_keep_its_train_step():
    model = HoldsLayers()
    model(np.ones((1, 4), "float32"))
    with pytest.warns(UserWarning, match="HoldsLayers has its own train_step.*qat.inputs, qat.outputs"):
        qat = kq.quantize(model)
    assert list(_fitted(qat)) == ["loss"]
    assert list(_fitted(Halved(qat.inputs, qat.outputs))) == ["halved"]


def test_errors_go_from_process_to_process():
    problem = Problem("a/b", "Mystery", "It is one.", "Solve it.")
    error = pickle.loads(pickle.dumps(kq.UnsupportedModelError([problem])))
    assert error.problems == [problem] and "Layer 'a/b' (Mystery)" in str(error)
    parity = tflite_export.Parity([], samples=3)
    error = pickle.loads(pickle.dumps(kq.ExportError("It differs.", parity)))
    assert str(error) == "It differs." and error.parity.samples == 3


class Rates(keras.Model):
    """Ids of users and of things in one array, as collaborative filters have them; the input's type is not known."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.embedding, self.dense = layers.Embedding(9, 4), layers.Dense(3)

    def call(self, ids):
        return self.dense(self.embedding(ids[:, 0]) + self.embedding(ids[:, 1]))


def test_ids_that_are_cut_out_stay_whole_numbers():
    ids = np.random.default_rng(0).integers(0, 9, (64, 2)).astype("int32")
    model = Rates()
    model(ids)
    qat = kq.calibrate(kq.quantize(model), ids)
    expected = model.predict(ids, verbose=0)
    assert np.mean((qat.predict(ids, verbose=0) - expected) ** 2) < 1e-3 * np.mean(expected**2)
    assert tflite_export.predict(tflite_export.write(kq.freeze(qat)), ids).shape == (64, 3)


ENCODINGS = {
    "one_hot": ((), lambda ids: ops.one_hot(ids, 6)),
    "one_hot_in_front": ((4,), lambda ids: ops.one_hot(ids, 6, axis=1)),
    "one_category": ((1,), lambda ids: layers.CategoryEncoding(6, output_mode="one_hot")(ids)),
    "several_categories": ((4,), lambda ids: layers.CategoryEncoding(6, output_mode="multi_hot")(ids)),
}


@pytest.mark.parametrize("shape, encode", ENCODINGS.values(), ids=ENCODINGS)
def test_categories_become_rows_of_zeros_and_ones(shape, encode):
    ids = keras.Input(shape, dtype="int32")
    model = keras.Model(ids, encode(ids))
    x = np.random.default_rng(0).integers(0, 6, (32, *shape)).astype("int32")
    qat = kq.calibrate(kq.quantize(model), x)
    result = tflite_export.predict(tflite_export.write(kq.freeze(qat)), x)
    np.testing.assert_allclose(result, model.predict(x, verbose=0), atol=1e-6)


def test_an_input_that_nothing_reads_stays_an_input():
    used, unused = keras.Input((5,), name="used"), keras.Input((3,), name="unused")
    model = keras.Model([used, unused], layers.Dense(2)(used))
    arrays = [np.ones((8, 5), "float32"), np.ones((8, 3), "float32")]
    qat = kq.calibrate(kq.quantize(model), arrays)
    assert list(kq.freeze(qat).inputs) == ["used", "unused"]
    assert tflite_export.verify(tflite_export.write(kq.freeze(qat)), qat, arrays).max_lsb == 0


def test_two_norms_of_a_shared_model_get_names_of_their_own():
    keras.backend.clear_session()  # names that begin with 0
    x = inputs = keras.Input((6,))
    for _ in range(2):
        x = layers.BatchNormalization()(layers.Dense(8, activation="tanh")(x))
    shared = keras.Model(inputs, x)
    pair = [keras.Input((6,)) for _ in range(2)]
    qat = kq.quantize(keras.Model(pair, layers.subtract([shared(one) for one in pair])))
    assert len({layer.name for layer in qat.layers}) == len(qat.layers)


class Unregistered(keras.regularizers.Regularizer):
    def __call__(self, x):
        return 0.01 * ops.sum(x**2)

    def get_config(self):
        return {}


@pytest.mark.parametrize("option", ["kernel_regularizer", "activity_regularizer"])
def test_regularizers_need_not_be_registered(option):
    inputs = keras.Input((8,))
    qat = kq.quantize(keras.Model(inputs, layers.Dense(3, **{option: Unregistered()})(inputs)))
    qat(np.ones((2, 8), "float32"))
    assert len(qat.losses) == 1


class Branches(layers.Layer):
    def call(self, x):
        return ops.cond(ops.sum(x) > 0, lambda: x, lambda: -x)


def test_branches_that_depend_on_the_data_are_refused():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, 2.0 * Branches(name="branches")(inputs))
    with pytest.raises(kq.UnsupportedModelError, match="'branches'.*which way to go.*\n?.*keras.ops.where"):
        kq.quantize(model)


def test_constants_for_each_channel_are_no_look_up():
    inputs = keras.Input((8,))
    model = keras.Model(inputs, ops.power(ops.abs(inputs), np.arange(8.0)))
    with pytest.raises(kq.UnsupportedModelError, match="several constants, one for each channel"):
        kq.quantize(model)
