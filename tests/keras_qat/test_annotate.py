"""Where tensors get ranges, and which of them share one."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_qat as kq
from keras_qat.graph.walk import nodes_of
from keras_qat.layers import FakeQuant, Quantized
from keras_qat.quantizers import Fixed, MovingAverage

IMAGE = (8, 8, 4)
UNIT, SYMMETRIC = (0.0, 255 / 256), (-1.0, 127 / 128)


def qat_of(build, shapes=(IMAGE,), then=layers.Flatten, **options):
    """Flattened, which has no range of its own: quantize renames the operations that make outputs."""
    inputs = [keras.Input(shape, name=f"in{i}") for i, shape in enumerate(shapes)]
    outputs = keras.tree.map_structure(lambda y: then()(y), build(*inputs))
    return kq.quantize(keras.Model(inputs, outputs), **options)


def ranges_of(qat) -> list:
    """The groups of tensors with a range of their own: the names in it, or the limits where they are fixed."""
    found = []
    for layer in qat.layers:
        if isinstance(layer, FakeQuant):
            fixed = isinstance(layer.quantizer, Fixed)
            found.append((layer.quantizer.low, layer.quantizer.high) if fixed else sorted(layer.sites))
    return sorted(found, key=str)


def rounded(qat) -> list[str]:
    """The operations with a FakeQuant right behind them, each as often as there is one."""
    quants = [node for node in nodes_of(qat) if isinstance(node.operation, FakeQuant)]
    quants = [node for node in quants if not node.arguments.kwargs.get("peek")]
    return sorted(node.input_tensors[0]._keras_history.operation.name for node in quants)


def conv(name="conv", **options):
    return layers.Conv2D(4, 3, padding="same", name=name, **options)


def norm(x, name="norm"):
    return layers.BatchNormalization(name=name)(x)


def join(tensors):
    return ops.concatenate(tensors, axis=-1)


def fan_out(x):
    y = conv()(x)
    return layers.Concatenate(name="join")([norm(y), layers.ReLU(name="relu")(y)])


# name: (build, number of inputs, ranges)
CASES = {
    "conv": (conv(), 1, [["conv"], ["in0"]]),
    "conv_relu": (lambda x: layers.ReLU(name="relu")(conv()(x)), 1, [["in0"], ["relu"]]),
    "conv_relu_argument": (conv(activation="relu"), 1, [["conv.re_lu"], ["in0"]]),
    "conv_relu6": (lambda x: layers.ReLU(6.0, name="relu")(conv()(x)), 1, [["in0"], ["relu"]]),
    "conv_norm": (lambda x: norm(conv()(x)), 1, [["conv"], ["in0"]]),
    "conv_norm_relu": (lambda x: layers.ReLU(name="relu")(norm(conv()(x))), 1, [["in0"], ["relu"]]),
    "conv_dropout_relu": (
        lambda x: layers.ReLU(name="relu")(layers.SpatialDropout2D(0.5)(conv()(x))), 1, [["in0"], ["relu"]],
    ),
    "add_relu": (lambda x, y: ops.relu(layers.Add(name="add")([x, y])), 2, [["in0"], ["in1"], ["relu"]]),
    "relu_alone": (lambda x: layers.ReLU(name="relu")(x), 1, [["in0"], ["relu"]]),
    "relu_behind_pool": (
        lambda x: layers.ReLU(name="relu")(layers.MaxPooling2D(name="pool")(x)), 1, [["in0"], ["relu"]],
    ),
    "relu_of_conv_that_fans_out": (
        lambda x: [layers.ReLU(name="relu")(y := conv()(x)), layers.Dense(2, name="other")(y)],
        1,
        [["conv"], ["in0"], ["other"], ["relu"]],
    ),
    "conv_is_output_too": (
        lambda x: [layers.ReLU(name="relu")(y := conv()(x)), y], 1, [["conv"], ["in0"], ["relu"]],
    ),
    "sigmoid": (lambda x: ops.sigmoid(conv()(x)), 1, [UNIT, ["conv"], ["in0"]]),
    "softmax": (lambda x: layers.Softmax(name="softmax")(conv()(x)), 1, [UNIT, ["conv"], ["in0"]]),
    "tanh": (lambda x: ops.tanh(conv()(x)), 1, [SYMMETRIC, ["conv"], ["in0"]]),
    "moves": (lambda x: layers.Flatten()(layers.Permute((2, 1, 3))(x[:, 1:])), 1, [["in0"]]),
    "pools": (lambda x: layers.AveragePooling2D(2)(layers.MaxPooling2D(2)(x)), 1, [["in0"]]),
    "concat": (lambda x, y: layers.Concatenate()([x, y]), 2, [["in0", "in1"]]),
    "concat_behind_pool": (
        lambda x, y: layers.Concatenate()([layers.MaxPooling2D()(x), layers.MaxPooling2D()(conv()(y))]),
        2,
        [["conv", "in0"], ["in1"]],
    ),
    "concats_in_a_chain": (
        lambda x, y, z: join([join([x, y]), z]), 3, [["in0", "in1", "in2"]],
    ),
    "concat_of_sigmoids": (lambda x, y: join([ops.sigmoid(x), ops.sigmoid(y)]), 2, [UNIT, ["in0"], ["in1"]]),
    "concat_of_sigmoid_and_other": (
        lambda x, y: join([layers.Activation("sigmoid", name="gate")(x), y]),
        2,
        [UNIT, ["gate.requantized", "in1"], ["in0"]],
    ),
    "concat_of_sigmoid_and_tanh": (
        lambda x: join([layers.Activation("sigmoid", name="a")(x), layers.Activation("tanh", name="b")(x)]),
        1,
        [SYMMETRIC, UNIT, ["a.requantized", "b.requantized"], ["in0"]],
    ),
    "maximum": (lambda x, y: ops.maximum(x, y), 2, [["in0", "in1"]]),
    "conv_norm_fans_out": (
        fan_out,
        1,
        [["conv"], ["in0"], ["norm", "relu"], ["norm.multiplier"], ["norm.offset"], ["norm.product"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("build, inputs, expected", CASES.values(), ids=CASES)
def test_ranges(build, inputs, expected):
    qat = qat_of(build, (IMAGE,) * inputs)
    assert ranges_of(qat) == sorted(expected, key=str)


@pytest.mark.parametrize("kind", [layers.Conv2D, layers.DepthwiseConv2D, layers.Conv2DTranspose])
def test_nothing_is_rounded_between_convolution_and_batch_norm(kind):
    arguments = (3,) if kind is layers.DepthwiseConv2D else (4, 3)
    qat = qat_of(lambda x: ops.relu(norm(kind(*arguments, name="conv")(x))))
    (wrapped,) = [layer for layer in qat.layers if isinstance(layer, Quantized)]
    assert isinstance(wrapped.layer, kind) and isinstance(wrapped.batch_norm, layers.BatchNormalization)
    assert rounded(qat) == ["in0", "relu"]


def test_batch_norm_of_a_convolution_that_fans_out_is_not_folded():
    qat = qat_of(fan_out)
    wrapped = {layer.name: layer for layer in qat.layers if isinstance(layer, Quantized)}
    assert wrapped["conv"].batch_norm is None and "norm" not in wrapped
    assert {"conv", "norm", "norm.product", "relu"} < set(rounded(qat))


def test_relu_is_fused_only_where_alone():
    assert rounded(qat_of(CASES["conv_relu"][0])) == ["in0", "relu"]
    assert rounded(qat_of(CASES["relu_of_conv_that_fans_out"][0])) == ["conv", "in0", "other", "relu"]


def test_averages_are_rounded_again_without_a_say_in_the_range():
    qat = qat_of(lambda x: layers.AveragePooling2D(2, name="mean")(x))
    assert rounded(qat) == ["in0", "mean"]
    qat(np.full((1, *IMAGE), 3.0), training=True)
    (layer,) = [layer for layer in qat.layers if isinstance(layer, FakeQuant)]
    assert layer.quantizer.seen.numpy()[:, 2].tolist() == [1]


def test_ranges_behind_relu_are_known_to_be_nonnegative():
    qat = qat_of(CASES["conv_relu"][0])
    flags = {layer.sites: layer.quantizer.nonnegative for layer in qat.layers if isinstance(layer, FakeQuant)}
    assert flags == {("in0",): (False,), ("relu",): (True,)}


def test_relu_with_a_maximum_has_a_fixed_range():
    assert ranges_of(qat_of(lambda x: layers.ReLU(1.0)(conv()(x)))) == [(0.0, 1.0), ["in0"]]


def test_requantized_copy_serves_only_those_that_need_it():
    """The sigmoid keeps its own range for its other reader."""

    def build(x, y):
        gate = layers.Activation("sigmoid", name="gate")(x)
        return [join([gate, y]), layers.Conv2D(2, 1, name="other")(gate)]

    qat = qat_of(build, (IMAGE, IMAGE))
    assert rounded(qat) == ["gate", "gate.requantized", "in0", "in1", "other"]
    other = next(node for node in nodes_of(qat) if node.operation.name == "other")
    grid = other.input_tensors[0]._keras_history.operation
    assert isinstance(grid.quantizer, Fixed)


@pytest.mark.parametrize(
    "input_range, expected",
    [
        ((0, 255), {"in0": (0, 255), "in1": (0, 255)}),
        ({"in1": (-1, 1)}, {"in0": None, "in1": (-1, 1)}),
        ({"in0": (2, 5)}, {"in0": (0, 5), "in1": None}),  # zero must be on the grid
        (None, {"in0": None, "in1": None}),
    ],
)
def test_input_range_is_fixed(input_range, expected):
    qat = qat_of(lambda x, y: x + y, (IMAGE, IMAGE), input_range=input_range)
    quantizers = {layer.sites: layer.quantizer for layer in qat.layers if isinstance(layer, FakeQuant)}
    for name, pair in expected.items():
        quantizer = quantizers[(name,)]
        assert isinstance(quantizer, MovingAverage) if pair is None else (quantizer.low, quantizer.high) == pair
    qat([np.full((1, *IMAGE), 1e3)] * 2, training=True)
    for name, pair in expected.items():
        if pair is not None:
            assert (quantizers[(name,)].low, quantizers[(name,)].high) == pair


@pytest.mark.parametrize(
    "input_range", [(1, 0), (1, 1), (0, float("nan")), (0, float("inf")), (0,), (0, 1, 2), {"nobody": (0, 1)}]
)
def test_bad_input_range_is_refused(input_range):
    with pytest.raises(ValueError, match="Received") as error:
        qat_of(conv(), input_range=input_range)
    assert "in0" in str(error.value)


@pytest.mark.parametrize("dtype, limits", [("uint8", (0, 255)), ("int8", (-128, 127))])
def test_integer_inputs_have_the_range_of_their_type(dtype, limits):
    inputs = keras.Input(IMAGE, dtype=dtype, name="raw")
    qat = kq.quantize(keras.Model(inputs, conv()(layers.Rescaling(0.1)(inputs))))
    assert limits in ranges_of(qat)


def test_probabilities_at_the_output_are_left_alone_in_training():
    """The loss needs their logarithm."""
    x = np.random.default_rng(0).normal(size=(16, *IMAGE)).astype("float32")
    qat = qat_of(lambda x: layers.Softmax(name="softmax")(conv()(x)), then=layers.Identity)
    on_grid = lambda y: np.mean(np.asarray(y) * 256 % 1 == 0)
    assert on_grid(qat(x, training=True)) < 0.5 and on_grid(qat(x, training=False)) == 1


def test_calibration_sees_what_a_limit_of_its_own_leaves():
    """Nothing but its grid limits it in integers, and calibration rounds to no grid."""
    inputs = keras.Input((4,))
    outputs = layers.Concatenate()([ops.clip(inputs, -0.5, 0.25) * 4.0, inputs])
    qat = kq.calibrate(kq.quantize(keras.Model(inputs, outputs)), np.array([[-1.0, 1.0, 0.0, 0.5]], "float32"))
    shared = next(layer for layer in qat.layers if isinstance(layer, FakeQuant) and len(layer.sites) == 2)
    assert [float(end) for end in shared.quantizer.known_limits()] == [-2.0, 1.0]
