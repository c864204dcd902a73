"""Shrinking: the same outputs from fewer channels, whatever the network, and exactly what goes."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import layers, ops
from models import STYLES

import keras_qat as kq
from keras_qat.pruning import compare, report, shrink

TOLERANCE = 1e-5


def arranged(model, share=0.4, seed=0):
    """That share of all channels dead, and random norms and biases, so that they are constants other than zero."""
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        for variable in layer._trainable_variables + layer._non_trainable_variables:
            shape = variable.shape
            if variable.name in ("gamma", "moving_variance"):
                variable.assign(generator.uniform(0.5, 1.5, shape))
            elif variable.name in ("beta", "moving_mean", "bias"):
                variable.assign(generator.normal(0.0, 0.3, shape))
        kill(layer, share, generator)
    return model


def kill(layer, share, generator):
    if isinstance(layer, layers.MultiHeadAttention):
        heads = generator.permutation(layer.num_heads)[: int(share * layer.num_heads)]
        zero(layer.output_dense.kernel, 0, heads)
    elif isinstance(layer, (layers.SeparableConv1D, layers.SeparableConv2D)):
        zero_some(layer.pointwise_kernel, -1, share, generator)
    elif isinstance(layer, (layers.Dense, layers.Conv1D, layers.Conv2D)):
        zero_some(layer.kernel, -1, share, generator)
    elif isinstance(layer, (layers.Conv2DTranspose, layers.DepthwiseConv2D)):
        zero_some(layer.kernel, -2, share, generator)


def zero_some(variable, axis, share, generator):
    channels = variable.shape[axis]
    zero(variable, axis, generator.permutation(channels)[: int(share * channels)])


def zero(variable, axis, places):
    values = np.asarray(variable).copy()
    np.moveaxis(values, axis, 0)[places] = 0
    variable.assign(values)


def inputs_of(model, count=4, seed=9):
    generator = np.random.default_rng(seed)

    def random(tensor):
        shape = (count, *(24 if size is None else size for size in tensor.shape[1:]))
        if "int" in tensor.dtype:
            return generator.integers(0, 10, shape).astype(tensor.dtype)
        return generator.normal(size=shape).astype("float32")

    functional = getattr(model, "_functional", model)
    subclassed = keras.KerasTensor((None, 16, 16, 3))  # what models.py has of that kind
    return keras.tree.map_structure(random, getattr(functional, "_inputs_struct", subclassed))


def error(model, smaller, x):
    """The largest difference of any output next to the largest value."""
    # With training unset, Keras's Resizing turns it on for the layers behind it.
    pairs = zip(*(keras.tree.flatten(each(x, training=False)) for each in (model, smaller)), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in (map(np.asarray, pair) for pair in pairs))


# --- networks --------------------------------------------------------------------------------------------------------


def doubled_tanh(x):
    return 2.0 * ops.tanh(x)


def dense_net():
    return keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(32, activation="relu"),
            layers.Dropout(0.2),
            layers.Dense(24, activation="gelu"),
            layers.BatchNormalization(),
            layers.Dense(16, activation=doubled_tanh, use_bias=False),
            layers.Dense(5, activation=ops.sigmoid, name="classes"),
        ]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((16, 16, 3), name="image"),
            layers.Rescaling(1 / 127.5, -1.0),
            layers.Conv2D(12, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.ZeroPadding2D(1),
            layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2),
            layers.PReLU(shared_axes=(1, 2)),
            layers.SeparableConv2D(16, 3),
            layers.LeakyReLU(),
            layers.Flatten(),
            layers.Dense(24, activation="relu6"),
            layers.Dense(5, name="classes"),
        ]
    )


def residual():
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 3, padding="same")(inputs)
    for stride in (1, 2):
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 1, strides=stride, use_bias=False)(x)))
        y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same", use_bias=False)(y)))
        y = layers.BatchNormalization()(layers.Conv2D(16, 1)(y))
        x = layers.BatchNormalization()(layers.Conv2D(16, 1, strides=stride)(x))
        x = layers.ReLU()(layers.Add()([x, y]))
    gate = layers.Dense(16, activation="sigmoid")(layers.GlobalAveragePooling2D()(x))
    x = layers.Multiply()([x, layers.Reshape((1, 1, 16))(gate)])
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalMaxPooling2D()(x)))


def densely_connected():
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3)(inputs)
    for _ in range(3):
        y = layers.ReLU()(layers.BatchNormalization()(x))
        y = layers.Conv2D(16, 1, use_bias=False)(y)
        y = layers.Conv2D(8, 3, padding="same", use_bias=False)(layers.ReLU()(layers.BatchNormalization()(y)))
        x = layers.Concatenate()([x, y])
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


def u_net():
    """Fully convolutional, so of no fixed size."""
    inputs = keras.Input((None, None, 3), name="image")
    x, skips = inputs, []
    for filters in (8, 12):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu")(x)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    x = layers.Conv2DTranspose(12, 2, strides=2, activation="relu")(x)
    x = layers.Conv2D(12, 3, padding="same", activation="relu")(layers.Concatenate()([x, skips[1]]))
    x = layers.UpSampling2D(interpolation="bilinear")(x)
    x = layers.Conv2D(8, 1, activation="relu")(layers.Concatenate()([x, skips[0]]))
    return keras.Model(inputs, layers.Conv2D(2, 1, name="mask")(x))


def transformer():
    inputs = keras.Input((6, 10))
    x = layers.Dense(16)(inputs)
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(5, 4)(y, y)])
    y = layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
    x = layers.Add()([x, layers.Dense(16)(y)])
    y = layers.Dense(12, activation="relu")(x)
    x = layers.MultiHeadAttention(4, 3, value_dim=5, output_shape=12)(y, layers.Dense(8, activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


def grouped():
    """Groups block, unless there is one for each channel."""
    inputs = keras.Input((9, 9, 4))
    x = layers.Conv2D(8, 3, activation="relu")(inputs)
    x = layers.Conv2D(16, 3, groups=8, activation="relu")(x)
    x = layers.Conv2D(8, 1, activation="relu")(x)
    x = layers.Conv2D(8, 3, groups=2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(layers.Conv2D(8, 1)(x))))


def sequences():
    tokens = keras.Input((8,), dtype="int32", name="tokens")
    x = layers.Embedding(10, 12)(tokens)
    zero(x._keras_history.operation.embeddings, -1, [1, 5, 6])
    x = layers.Conv1D(12, 3, padding="causal", activation="relu")(x)
    x = layers.SpatialDropout1D(0.1)(layers.Conv1D(16, 2, dilation_rate=2, activation="swish")(x))
    x = layers.LSTM(6, return_sequences=True)(x)
    x = layers.Conv1D(9, 1)(layers.Bidirectional(layers.GRU(4, return_sequences=True))(x))
    return keras.Model(tokens, layers.Dense(3)(layers.Flatten()(x)))


def masked():
    """Padding tokens leave a mask behind."""
    tokens = keras.Input((8,), dtype="int32")
    x = layers.Embedding(10, 12, mask_zero=True)(tokens)
    x = layers.Dense(12, activation="relu")(x)
    x = layers.MultiHeadAttention(4, 3)(x, x)
    x = layers.GlobalAveragePooling1D()(layers.Dense(12, activation="relu")(x))
    return keras.Model(tokens, layers.Dense(3)(layers.Dense(8)(x)))


def shared_layers():
    """One convolution and one norm, called on two inputs, of which it knows different constants."""
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    conv, norm = layers.Conv2D(12, 3), layers.BatchNormalization()
    second, third = layers.Conv2D(10, 3, activation="relu"), layers.Conv2D(8, 1)
    a = norm(conv(left))
    b = layers.ReLU()(norm(layers.Conv2D(12, 3)(right)))
    a, b = third(second(a)), third(second(b))
    return keras.Model({"left": left, "right": right}, layers.Dense(4)(layers.Flatten()(a - 0.5 * b)))


def raw_operations():
    inputs = keras.Input((8, 8, 3))
    x = ops.relu(layers.Conv2D(12, 3)(inputs))
    x = ops.pad(x[:, 1:], [[0, 0], [1, 0], [0, 0], [0, 0]])
    x = layers.Conv2D(12, 1)(ops.transpose(x, (0, 2, 1, 3)) * 0.5 + 1.0)
    x = ops.concatenate([x, ops.maximum(x, 0.1), -x], axis=1)
    x = ops.mean(layers.Conv2D(10, 1)(x) * ops.sigmoid(layers.Conv2D(1, 1)(x)), axis=(1, 2))
    x = layers.Dense(8)(ops.reshape(ops.expand_dims(x, 1), (-1, 10)))
    return keras.Model(inputs, layers.Dense(3)(ops.split(x, 2, axis=-1)[0]))


@keras.saving.register_keras_serializable("keras_qat_tests")
class Scaled(keras.layers.Layer):
    """A custom layer with a weight: nobody knows what it does with channels."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="random_normal")

    def call(self, x):
        return ops.cumsum(x * self.scale, axis=-1)


@keras.saving.register_keras_serializable("keras_qat_tests")
class Tied(keras.layers.Layer):
    """A custom layer that reads the weights of a layer inside of it, and is built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(6, use_bias=False)

    def call(self, x):
        return ops.matmul(self.inner(x), ops.transpose(self.inner.kernel))


@keras.saving.register_keras_serializable("keras_qat_tests")
class Decided(keras.layers.Layer):
    """A custom layer that no symbolic tensor goes through, with a loss of its own."""

    def call(self, x):
        self.add_loss(ops.mean(x))
        return x if bool(ops.max(x) > -9.0) else -x

    def compute_output_shape(self, shape):
        return shape


def custom():
    inputs = keras.Input((10,))
    x = Scaled()(layers.Dense(8, activation="relu")(inputs))
    tied = Tied()
    x = tied(layers.Dense(8, activation="relu")(layers.Dense(8, activation="relu")(tied(x))))
    x = Decided()(layers.Dense(8)(layers.Dense(9)(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.Lambda(ops.relu)(layers.Dense(8)(x))))


NETS = {
    f.__name__: f
    for f in (
        dense_net, cnn, residual, densely_connected, u_net, transformer, grouped, sequences, masked, shared_layers,
        raw_operations, custom,
    )
}  # fmt: skip
NETS |= STYLES
APPLICATIONS = {
    "MobileNetV2": {"alpha": 0.35},
    "ResNet50": {},
    "DenseNet121": {},
    "MobileNetV3Small": {},
    "EfficientNetB0": {},
    "ConvNeXtTiny": {},
}


@pytest.mark.parametrize("name", NETS)
def test_same_outputs_with_fewer_parameters(name, tmp_path):
    keras.utils.set_random_seed(0)
    model = arranged(NETS[name]())
    before, x = [np.array(w) for w in model.get_weights()], inputs_of(model)
    config = None if name == "subclassed" else model.to_json()
    smaller = shrink(model)
    assert error(model, smaller, x) < TOLERANCE
    assert smaller.count_params() < model.count_params()
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert config is None or config == model.to_json()
    smaller.save(tmp_path / "small.keras")
    assert error(smaller, keras.models.load_model(tmp_path / "small.keras"), x) < 1e-6
    again = shrink(smaller)
    assert again.count_params() == smaller.count_params() and error(smaller, again, x) < 1e-6


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "MobileNetV2" else pytest.mark.full) for name in APPLICATIONS]
)
def test_applications(name, tmp_path):
    keras.utils.set_random_seed(0)
    options = {"input_shape": (32, 32, 3), "weights": None, "classes": 10, "classifier_activation": None}
    model = arranged(getattr(keras.applications, name)(**options, **APPLICATIONS[name]))
    smaller, x = shrink(model), inputs_of(model)
    assert error(model, smaller, x) < TOLERANCE
    assert smaller.count_params() < 0.9 * model.count_params()
    assert smaller.output_names == model.output_names
    smaller.save(tmp_path / "small.keras")
    assert error(smaller, keras.models.load_model(tmp_path / "small.keras"), x) < 1e-6


# --- what goes -------------------------------------------------------------------------------------------------------


def two_convolutions(activation="relu"):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="first")(inputs)
    x = layers.Activation(activation)(layers.BatchNormalization(name="norm")(x))
    x = layers.Conv2D(6, 3, padding="same", activation=activation, name="second")(x)
    return keras.Model(inputs, layers.Dense(4, name="classes")(layers.Flatten()(x)))


def test_exactly_what_is_dead_goes():
    model = two_convolutions()
    zero(model.get_layer("first").kernel, -1, [0, 3, 5])
    zero(model.get_layer("second").kernel, -1, [2, 4])
    zero(model.get_layer("norm").gamma, 0, [7])  # with beta = 0
    smaller = shrink(model)
    assert error(model, smaller, inputs_of(model)) < TOLERANCE
    first, second, classes = 3 * 3 * 3 * 4 + 4 * 4, 3 * 3 * 4 * 4 + 4, 64 * 4 * 4 + 4
    assert smaller.count_params() == first + second + classes
    rows = {row.layer: row for row in report(smaller).rows}
    assert [rows[name].macs for name in ("first", "second", "classes")] == [64 * 108, 64 * 144, 1024]
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]


def test_what_is_not_read_goes():
    model = two_convolutions()
    zero(model.get_layer("second").kernel, -2, [1, 2])  # its readers' weights are zero, its own are not
    smaller = shrink(model)
    assert smaller.get_layer("first").filters == 6 and error(model, smaller, inputs_of(model)) < TOLERANCE


def test_a_channel_that_is_only_read_by_dead_ones_goes_with_them():
    model = two_convolutions()
    zero(model.get_layer("second").kernel, -1, [0, 1, 2, 3, 4])
    kernel = np.asarray(model.get_layer("second").kernel).copy()
    kernel[:, :, :6, 5] = 0
    model.get_layer("second").kernel.assign(kernel)
    smaller = shrink(model)
    assert [smaller.get_layer(name).filters for name in ("first", "second")] == [2, 1]
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


@pytest.mark.parametrize("padding, filters", [("same", 8), ("valid", 7)])
def test_a_constant_beside_zero_padding_stays(padding, filters):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, bias_initializer="ones", name="conv")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 3, padding=padding)(x))
    zero(model.get_layer("conv").kernel, -1, [3])
    smaller = shrink(model)
    assert smaller.get_layer("conv").filters == filters and error(model, smaller, inputs_of(model)) < TOLERANCE


@pytest.mark.parametrize(
    "beside_zeros",
    [layers.ZeroPadding2D(1), lambda x: ops.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]]), lambda x: ops.sum(x, axis=1)],
)
def test_a_constant_that_zeros_come_beside_stays(beside_zeros):
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, bias_initializer="ones", name="conv")(inputs)
    model = keras.Model(inputs, layers.Dense(4)(beside_zeros(x)))
    zero(model.get_layer("conv").kernel, -1, [3, 4])
    zero(model.get_layer("conv").bias, 0, [4])
    smaller = shrink(model)
    assert smaller.get_layer("conv").filters == 7 and error(model, smaller, inputs_of(model)) < TOLERANCE


def test_a_convolution_that_pads_nothing_takes_constants():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 1, bias_initializer="ones", name="conv")(inputs)
    model = keras.Model(inputs, layers.Conv2D(4, 2, strides=2, padding="same")(x))
    zero(model.get_layer("conv").kernel, -1, [3])
    assert shrink(model).get_layer("conv").filters == 7


def test_a_batch_norm_takes_what_a_convolution_has_no_bias_for():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, bias_initializer="ones", name="first")(inputs)
    model = keras.Model(
        inputs, layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, use_bias=False, name="second")(x))
    )
    zero(model.get_layer("first").kernel, -1, [3, 4])
    smaller = shrink(model)
    assert not smaller.get_layer("second").use_bias and np.any(smaller.get_layer("norm").moving_mean)
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


@pytest.mark.parametrize("dead, filters", [((True, False), 8), ((True, True), 5)])
def test_an_addition_keeps_what_one_side_needs(dead, filters):
    inputs = keras.Input((8, 8, 3))
    left, right = layers.Conv2D(8, 3, name="left"), layers.Conv2D(8, 3, name="right")
    model = keras.Model(inputs, layers.Dense(4)(layers.ReLU()(layers.Add()([left(inputs), right(inputs)]))))
    for layer, is_dead in zip((left, right), dead, strict=True):
        zero(layer.kernel, -1, [1, 2, 6] if is_dead else [])
    smaller = shrink(model)
    assert smaller.get_layer("left").filters == smaller.get_layer("right").filters == filters
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


def test_a_residual_stream_that_nothing_reads_in_the_end_goes():
    inputs = keras.Input((8,))
    x = layers.Dense(6, name="stream")(inputs)
    for index in range(2):
        x = layers.Add()([x, layers.Dense(6, name=f"out_{index}")(layers.Dense(5, name=f"in_{index}")(x))])
    model = keras.Model(inputs, layers.Dense(3, name="classes")(x))
    zero(model.get_layer("classes").kernel, 0, [0, 1])
    for index in range(2):
        kernel = np.asarray(model.get_layer(f"out_{index}").kernel).copy()
        kernel[0, 2:] = 0  # this neuron writes only to what nobody reads, and it alone reads that
        model.get_layer(f"out_{index}").kernel.assign(kernel)
        kernel = np.asarray(model.get_layer(f"in_{index}").kernel).copy()
        kernel[:2, 1:] = 0
        model.get_layer(f"in_{index}").kernel.assign(kernel)
    smaller = shrink(model)
    assert [smaller.get_layer(name).units for name in ("stream", "in_0", "in_1")] == [4, 4, 4]
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


def attention(**options):
    inputs = keras.Input((6, 10))
    layer = layers.MultiHeadAttention(4, 3, name="attention", **options)
    model = keras.Model(inputs, layers.Dense(4)(layer(inputs, inputs)))
    keras.utils.set_random_seed(0)
    model.set_weights([np.random.normal(size=weight.shape) for weight in model.get_weights()])
    return model, layer


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("role, axis", [("output", 0), ("value", 1)])
def test_dead_heads_go(role, axis, use_bias):
    model, layer = attention(use_bias=use_bias)
    zero(getattr(layer, f"{role}_dense").kernel, axis, [0, 2])
    smaller = shrink(model)
    assert smaller.get_layer("attention").num_heads == 2
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


def test_attention_that_may_see_nothing_keeps_constant_values():
    inputs, mask = keras.Input((6, 10)), keras.Input((6, 6), dtype="bool")
    layer = layers.MultiHeadAttention(4, 3, name="attention", bias_initializer="ones")
    model = keras.Model([inputs, mask], layer(inputs, inputs, attention_mask=mask))
    zero(layer.value_dense.kernel, 1, [0, 2])
    zero(layer.value_dense.bias, 0, [2])
    smaller, generator = shrink(model), np.random.default_rng(0)
    assert smaller.get_layer("attention").num_heads == 3
    x = [generator.normal(size=(4, 6, 10)).astype("float32"), generator.random((4, 6, 6)) < 0.2]
    assert not x[1].any(axis=-1).all() and error(model, smaller, x) < TOLERANCE


@pytest.mark.parametrize("times", [1, 2])
def test_attention_whose_scores_are_read_keeps_its_heads(times):
    inputs = keras.Input((6, 10))
    layer = layers.MultiHeadAttention(4, 3, name="attention")
    x, scores = layer(inputs, inputs, return_attention_scores=True)
    x = layer(x, inputs) if times > 1 else x
    model = keras.Model(inputs, [layers.Dense(3)(layers.Dense(8)(x)), scores])
    zero(layer.output_dense.kernel, 0, [0, 2])
    smaller = shrink(model)
    assert smaller.get_layer("attention").num_heads == 4 and error(model, smaller, inputs_of(model)) < TOLERANCE


def test_one_channel_of_everything_stays():
    model = two_convolutions()
    for name in ("first", "second"):
        model.get_layer(name).kernel.assign(ops.zeros_like(model.get_layer(name).kernel))
    model.get_layer("second").bias.assign(np.arange(1.0, 7.0))
    smaller = shrink(model)
    assert [smaller.get_layer(name).filters for name in ("first", "second")] == [1, 1]
    assert error(model, smaller, inputs_of(model)) < TOLERANCE


@pytest.mark.parametrize("name", ["cnn", "nested", "transformer"])
def test_nothing_to_remove(name):
    model = NETS[name]()
    smaller = shrink(model)
    ours, theirs = (sorted(each.get_weights(), key=lambda w: (w.shape, w.tobytes())) for each in (model, smaller))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert error(model, smaller, inputs_of(model)) < 1e-7


# --- names, shapes, what is left of a layer --------------------------------------------------------------------------


def test_names_and_shapes_stay():
    model = arranged(STYLES["two_outputs"]())
    smaller = shrink(model)
    assert smaller.name == model.name and smaller.input_shape == model.input_shape
    assert set(smaller.output) == {"label", "size"} and smaller.output_names == model.output_names
    assert shrink(arranged(dense_net())).output_names == ["classes"]
    nested = arranged(STYLES["nested"]())
    assert shrink(nested).output_names == nested.output_names == ["head"]
    inputs = keras.Input(batch_shape=(2, 10), name="rows")
    fixed = shrink(arranged(keras.Model(inputs, layers.Dense(3)(layers.Dense(9)(inputs)))))
    assert fixed.input_shape == (2, 10) and fixed.inputs[0].name == "rows"


def test_what_a_layer_has_besides_weights_stays():
    inputs = keras.Input((10,))
    first = layers.Dense(8, kernel_regularizer="l2", kernel_constraint="max_norm", trainable=False, name="first")
    model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.25)(first(inputs))))
    zero(first.kernel, -1, [0, 1])
    smaller = shrink(model)
    first = smaller.get_layer("first")
    assert first.units == 6 and not first.trainable
    assert first.kernel_regularizer is not None and first.kernel_constraint is not None
    assert [layer.rate for layer in smaller.layers if isinstance(layer, layers.Dropout)] == [0.25]


PLAIN = """
    import sys
    import keras
    model = keras.models.load_model(sys.argv[1])
    assert not any(name.startswith("keras_qat") for name in sys.modules)
    print(model.count_params())
"""


def test_the_smaller_model_needs_nothing_of_ours(tmp_path):
    smaller = shrink(arranged(residual()))
    smaller.save(tmp_path / "small.keras")
    command = [sys.executable, "-c", textwrap.dedent(PLAIN), str(tmp_path / "small.keras")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(smaller.count_params())], done.stderr[-2000:]


# --- from pruning to the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "u_net"])
def test_the_smaller_model_quantizes(name, tmp_path):
    model = arranged(NETS[name]() if name == "cnn" else sized_u_net())
    smaller, x = shrink(model), inputs_of(model, 8)
    files = [tmp_path / "before.tflite", tmp_path / "after.tflite"]
    for each, file in zip((model, smaller), files, strict=True):
        qat = kq.calibrate(kq.quantize(each), x)
        assert kq.export(qat, file, verify_with=x).parity.passed
    found = compare(model, smaller, files)
    for field in ("parameters", "macs", "bytes", "zipped_bytes", "file_bytes", "arena_bytes"):
        assert getattr(found.after, field) < getattr(found.before, field), found
    assert found.after.milliseconds > 0 and "arena bytes" in str(found)
    assert found.to_dict()["after"]["parameters"] == smaller.count_params()


def sized_u_net():
    inputs = keras.Input((16, 16, 3))
    return keras.Model(inputs, u_net()(inputs))


def test_what_the_callback_prunes_goes():
    keras.utils.set_random_seed(0)
    model = two_convolutions("swish")
    x = np.random.default_rng(0).normal(size=(64, 8, 8, 3)).astype("float32")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruning = kq.callbacks.Pruning(kq.schedules.OneShot(0.5), pattern=kq.pruning.Channels())
    model.fit(x, x[:, :4, 0, 0].argmax(1), verbose=0, callbacks=[pruning])
    smaller = shrink(model)
    assert [smaller.get_layer(name).filters for name in ("first", "second")] == [4, 3]
    assert error(model, smaller, x) < TOLERANCE


def test_compare():
    model = arranged(transformer())
    found = compare(model, shrink(model))
    assert found.before.parameters == model.count_params() and found.after.macs < found.before.macs
    assert found.before.file_bytes is None and "file" not in str(found)


def test_compare_counts_no_ranges():
    model = two_convolutions()
    assert compare(model, kq.quantize(model)).after.parameters == model.count_params()


# --- refused ---------------------------------------------------------------------------------------------------------


class Undecided(keras.Model):
    def call(self, x):
        return x if ops.sum(x) > 0 else -x


def test_refused():
    with pytest.raises(ValueError, match="Shrink the float model first"):
        shrink(kq.quantize(two_convolutions()))
    with pytest.raises(ValueError, match=r"keras\.Model"):
        shrink(layers.Dense(3))
    with pytest.raises(ValueError, match="not built"):
        shrink(Undecided())
    undecided = Undecided(name="undecided")
    undecided(np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match="'undecided' cannot be taken apart"):
        shrink(undecided)


def test_a_loss_of_the_model_itself_is_pointed_out():
    class Penalized(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = layers.Dense(8), layers.Dense(3)

        def call(self, x):
            y = self.first(x)
            self.add_loss(ops.mean(y**2))
            return self.second(y)

    model, x = Penalized(), np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    model(x)
    with pytest.warns(UserWarning, match="adds a loss in its `call`"):
        smaller = shrink(arranged(model))
    assert smaller.layers[1].units == 5 and error(model, smaller, x) < TOLERANCE


def test_a_weight_that_is_read_without_its_layer():
    inputs = keras.Input((10,))
    layer = layers.Dense(8)
    layer.build((None, 10))
    x = ops.matmul(inputs, layer.kernel)
    with pytest.raises(ValueError, match="reads the weight"):
        shrink(keras.Model(inputs, x))
