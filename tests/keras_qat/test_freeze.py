"""QAT model → integers: those that training saw, and what the runtimes make of them."""

import keras
import numpy as np
import pytest
from cases import with_lively_batch_norms
from keras import layers, ops
from keras.src.applications.convnext import LayerScale
from models import STYLES

import keras_qat as kq
import tflite_export
from keras_qat.layers import Quantized

SHAPE = (8, 8, 4)


def model_of(*inner, shape=SHAPE, **input_options):
    keras.utils.set_random_seed(0)
    inputs = x = keras.Input(shape, name="image", **input_options)
    for layer in inner:
        x = layer(x)
    return with_lively_batch_norms(keras.Model(inputs, x))


def data(shape=SHAPE, count=32, low=-2.0, high=2.0):
    return np.random.default_rng(5).uniform(low, high, (count, *shape)).astype("float32")


def calibrated(model, x=None, **options):
    qat = kq.quantize(model, **options)
    return kq.calibrate(qat, data(model.input_shape[1:]) if x is None else x)


def wrapper_of(qat) -> Quantized:
    (wrapper,) = [layer for layer in qat.layers if isinstance(layer, Quantized)]
    return wrapper


def constants(program, kind) -> list:
    return [t for t in program.tensors.values() if t.is_constant and t.dtype == kind and t.name.endswith(
        "/weights" if kind == "int8" else "/bias")]  # fmt: skip


# --- weights and biases ----------------------------------------------------------------------------------------------

# The kernel in TFLite's layout, and its axis of output channels.
LAYOUTS = {
    "dense": (lambda **o: layers.Dense(6, name="mine", **o), lambda k: k.T, 0),
    "conv": (lambda **o: layers.Conv2D(6, 3, name="mine", **o), lambda k: np.moveaxis(k, 3, 0), 0),
    "depthwise": (
        lambda **o: layers.DepthwiseConv2D(3, depth_multiplier=2, name="mine", **o),
        lambda k: k.reshape(1, 3, 3, 8),
        3,
    ),
    "transposed": (
        lambda **o: layers.Conv2DTranspose(6, 3, name="mine", **o), lambda k: np.moveaxis(k, 2, 0), 0,
    ),
}  # fmt: skip


def per_channel(kernel, axis):
    return np.abs(kernel).max(axis=tuple(i for i in range(kernel.ndim) if i != axis), keepdims=True)


@pytest.mark.parametrize("make, to_tflite, axis", LAYOUTS.values(), ids=LAYOUTS)
def test_integers_in_front_of_a_batch_norm_are_the_rounded_weights(make, to_tflite, axis):
    """`round(w / (max|w| / 127))` per channel, turned around where the batch norm's factor is negative."""
    model = model_of(make(), layers.BatchNormalization(name="norm"))
    norm = model.get_layer("norm")
    norm.gamma.assign(np.abs(norm.gamma) * np.resize([1, -1], norm.gamma.shape[0]))
    qat = calibrated(model)
    (tensor,) = constants(kq.freeze(qat), "int8")
    kernel = to_tflite(np.asarray(wrapper_of(qat).layer.kernel))
    expected = np.round(kernel / (per_channel(kernel, axis) * np.float32(1 / 127)))
    shape = [-1 if i == axis else 1 for i in range(kernel.ndim)]
    expected = expected * np.sign(norm.gamma.numpy()).reshape(shape)
    assert tensor.dtype == "int8" and tensor.axis == axis and tensor.zero_point == 0
    np.testing.assert_array_equal(tensor.data, expected)
    assert set(np.abs(expected).max(axis=tuple(i for i in range(kernel.ndim) if i != axis)).tolist()) == {127}
    factors = np.abs(norm.gamma.numpy()) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    scales = per_channel(kernel, axis).ravel() / 127 * factors
    np.testing.assert_allclose(tensor.scale, scales, rtol=0.06)  # moved a little for the kernels


@pytest.mark.parametrize("name, use_bias", [*((name, True) for name in LAYOUTS), ("conv", False)])
def test_integers_without_a_batch_norm(name, use_bias):
    """The scale may be larger than `max|w| / 127`, never smaller; the integers are the weights rounded to it."""
    make, to_tflite, axis = LAYOUTS[name]
    qat = calibrated(model_of(make(use_bias=use_bias, bias_initializer="normal")))
    program = kq.freeze(qat)
    (tensor,), (bias,) = constants(program, "int8"), constants(program, "int32")
    layer = wrapper_of(qat).layer
    kernel = to_tflite(np.asarray(layer.kernel))
    shape = [-1 if i == axis else 1 for i in range(kernel.ndim)]
    scale = np.float32(tensor.scale).reshape(shape)
    assert np.all(scale >= per_channel(kernel, axis) / 127 * (1 - 1e-6))
    exact = kernel.astype(np.float64) / scale
    is_clear = np.abs(exact % 1 - 0.5) > 1e-4
    np.testing.assert_array_equal(tensor.data[is_clear], np.round(exact)[is_clear])
    assert is_clear.mean() > 0.99
    steps = np.float64(program.tensors[program.inputs["image"]].scale[0]) * np.float64(tensor.scale)
    np.testing.assert_allclose(bias.scale, steps, rtol=1e-6)
    if use_bias:
        np.testing.assert_allclose(bias.data, layer.bias / steps, atol=0.51)
    else:
        assert not np.any(bias.data)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("make", [row[0] for row in LAYOUTS.values()], ids=LAYOUTS)
def test_integers_of_the_file_are_those_of_inference(make, norm):
    """What `Quantized` computes with while predicting, not only something close to it."""
    qat = calibrated(model_of(make(bias_initializer="normal"), *([layers.BatchNormalization()] if norm else [])))
    program, wrapper = kq.freeze(qat), wrapper_of(qat)
    grids = [program.tensors[name].scale[0] for name in (*program.inputs.values(), *program.outputs.values())]
    integers = wrapper.integers(*[keras.ops.convert_to_tensor(scale, "float32") for scale in grids])
    (weights,), (bias,) = constants(program, "int8"), constants(program, "int32")
    np.testing.assert_array_equal(np.sort(weights.data.ravel()), np.sort(np.ravel(integers.kernel)))
    np.testing.assert_array_equal(bias.data, integers.bias)


def test_biases_are_int32_with_zero_point_0():
    inner = layers.Conv2D(6, 3), layers.Flatten(), layers.Dense(3, bias_initializer="normal"), layers.Dense(3)
    biases = constants(kq.freeze(calibrated(model_of(*inner))), "int32")
    assert len(biases) == 2  # FULLY_CONNECTED does without a bias of zeros
    for bias in biases:
        assert bias.data.dtype == np.int32 and bias.zero_point == 0 and len(bias.scale) == len(bias.data)
        assert np.all(np.abs(bias.data.astype(np.int64)) < 2**30)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_fewer_bits_use_fewer_integers(bits):
    scheme = kq.Scheme("few", weights=kq.Spec(bits=bits, symmetric=True, per_channel=True))
    program = kq.freeze(calibrated(model_of(layers.Conv2D(6, 3)), scheme=scheme))
    (tensor,) = constants(program, "int8")
    assert np.abs(tensor.data).max() <= 2 ** (bits - 1) - 1


def test_weights_of_a_layer_called_twice_are_stored_once():
    qat = kq.quantize(STYLES["shared"]())
    x = {name: data((12, 12, 3)) for name in ("left", "right")}
    kq.calibrate(qat, x)
    program = kq.freeze(qat)
    kernels = [t for t in constants(program, "int8") if t.shape == (6, 3, 3, 3)]
    np.testing.assert_array_equal(kernels[0].data, kernels[-1].data)
    content = tflite_export.write(program)
    assert content.count(kernels[0].data.tobytes()) == 1
    assert tflite_export.verify(content, qat, x, runtimes=("litert", "xnnpack")).passed


# --- the rim ---------------------------------------------------------------------------------------------------------

SCALINGS = {
    "nothing": lambda: (),
    "rescaling": lambda: (layers.Rescaling(1 / 255),),
    "rescaling_with_offset": lambda: (layers.Rescaling(1 / 127.5, -1.0),),
    "normalization": lambda: (layers.Normalization(mean=127.5, variance=5000.0),),
    "two": lambda: (layers.Rescaling(1 / 255), layers.Rescaling(2.0, -1.0)),
    "augmentation": lambda: (layers.RandomFlip(), layers.Rescaling(1 / 255)),
}


@pytest.mark.parametrize(
    "scaling, padding",
    [
        *((scaling, "same") for scaling in SCALINGS),
        *((scaling, "valid") for scaling in ("rescaling", "rescaling_with_offset", "normalization")),
    ],
)
def test_pixels_go_in_as_they_are(scaling, padding):
    """Scale 1, zero point -128: a device feeds `pixel - 128`, and no op is spent on the scaling."""
    model = model_of(*SCALINGS[scaling](), layers.Conv2D(6, 3, 2, padding, name="conv"), layers.ReLU())
    x = np.random.default_rng(0).integers(0, 256, (32, *SHAPE)).astype("float32")
    qat = calibrated(model, x, input_range=(0, 255))
    program = kq.freeze(qat)
    tensor = program.tensors[program.inputs["image"]]
    assert (tensor.scale, tensor.zero_point, tensor.dtype) == ((1.0,), -128, "int8")
    np.testing.assert_array_equal(tensor.quantize(np.arange(256)), np.arange(-128, 128))
    kinds = {op.kind for op in program.ops}
    # Where the border is not zero any more, an ADD moves the zero point there, and XNNPACK computes all of it.
    assert kinds <= {"CONV_2D", "ADD"} and (padding == "same" or kinds == {"CONV_2D"})
    difference = np.abs(qat(x, training=False) - model(x, training=False))
    scale = program.tensors[next(iter(program.outputs.values()))].scale[0]
    # The pad value of an input scaling with an offset is rounded to whole pixels, like any pixel.
    assert difference.max() < 8 * scale
    parity = tflite_export.verify(tflite_export.write(program), qat, x)
    assert parity.max_lsb <= 1 and parity.mismatch <= 1e-3 and not parity.skipped, parity


@pytest.mark.parametrize(
    "input_type, output_type",
    [("int8", "int8"), ("uint8", "uint8"), ("float32", "float32"), ("uint8", "float32"), ("float32", "int8")],
)
def test_types_at_the_rim(input_type, output_type):
    head = layers.Dense(3, activation="softmax", name="classes")
    qat = calibrated(model_of(layers.Conv2D(4, 3), layers.Flatten(), head))
    plain = kq.freeze(qat)
    program = kq.freeze(qat, input_type, output_type)
    content = tflite_export.write(program)
    summary = tflite_export.inspect(content)
    (source,), (result,) = summary.inputs, summary.outputs
    assert (source.tensor.dtype, result.tensor.dtype) == (input_type, output_type)
    assert (source.name, result.name) == ("image", "classes")
    inner_names = plain.inputs["image"], plain.outputs["classes"]
    for port, dtype, inner in zip((source, result), (input_type, output_type), inner_names, strict=True):
        if dtype != "float32":
            assert port.tensor.scale == pytest.approx(plain.tensors[inner].scale)
            shift = 128 if dtype == "uint8" else 0
            assert list(port.tensor.zero_point) == [plain.tensors[inner].zero_point + shift]
    assert tflite_export.verify(content, qat, data()).passed
    np.testing.assert_allclose(tflite_export.predict(content, data()), qat(data()), atol=1.01 / 256)


def test_inputs_next_to_ties_land_on_the_integers_of_the_file():
    """Both sides round in float64: in float32 they part at about one in a million of arbitrary inputs."""
    qat = calibrated(model_of(layers.Flatten()))
    program = kq.freeze(qat)
    tensor = program.tensors[program.inputs["image"]]
    ties = (np.arange(-127.5, 127.5) - tensor.zero_point) * np.float64(np.float32(tensor.scale[0]))
    x = np.concatenate([np.nextafter(np.float32(ties), np.float32(side)) for side in (-np.inf, 0, np.inf)])
    x = np.resize(x, (3, *SHAPE))
    found = np.round(np.asarray(qat(x)) / tensor.scale[0]) + tensor.zero_point
    np.testing.assert_array_equal(found, tensor.quantize(x).reshape(3, -1))
    assert tflite_export.verify(tflite_export.write(program), qat, x).exact


DYNAMIC = {
    "conv": lambda: (layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)),
    "transposed": lambda: (layers.Conv2DTranspose(4, 3, 2), layers.GlobalAveragePooling2D(), layers.Dense(3)),
    "reshape": lambda: (layers.Reshape((16, 16)), layers.Conv1D(4, 3), layers.Permute((2, 1)), layers.Dense(3)),
}


@pytest.mark.parametrize("make", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_batch(make):
    qat = calibrated(model_of(*make()))
    content = tflite_export.write(kq.freeze(qat, dynamic_batch=True))
    assert tflite_export.inspect(content).inputs[0].tensor.has_dynamic_batch
    assert not tflite_export.inspect(tflite_export.write(kq.freeze(qat))).inputs[0].tensor.has_dynamic_batch
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content)
    source, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    x = data(count=5)
    interpreter.resize_tensor_input(source["index"], x.shape)
    interpreter.allocate_tensors()
    program = kq.freeze(qat)
    interpreter.set_tensor(source["index"], program.tensors[program.inputs["image"]].quantize(x))
    interpreter.invoke()
    output = program.tensors[next(iter(program.outputs.values()))]
    found, expected = interpreter.get_tensor(result["index"]), output.quantize(qat(x))
    assert found.shape == expected.shape and len(found) == 5
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_names_of_the_signature():
    qat = kq.quantize(STYLES["shared"]())
    kq.calibrate(qat, {name: data((12, 12, 3)) for name in ("left", "right")})
    assert set(kq.freeze(qat).inputs) == {"left", "right"}
    qat = calibrated(STYLES["two_outputs"](), data((16, 16, 3)))
    program = kq.freeze(qat)
    assert list(program.inputs) == ["image"] and set(program.outputs) == {"label", "size"}
    shapes = {name: program.tensors[tensor].shape for name, tensor in program.outputs.items()}
    assert shapes == {"label": (1, 5), "size": (1, 1)}


# --- extremes --------------------------------------------------------------------------------------------------------


def zeros(weights):
    return [np.zeros_like(weight) for weight in weights]


def without_kernel(weights):
    return [np.zeros_like(weights[0]), *weights[1:]]


def with_dead_channel(weights):
    return [np.where(np.arange(weights[0].shape[-1]) == 1, 0, weights[0]), weights[1] + 0.3]


def with_tiny_channel(weights):
    return [weights[0] * np.where(np.arange(weights[0].shape[-1]) == 1, 1e-9, 1), weights[1] + 0.3]


def norm_with(which, value, channel=2):
    """Weights of a BatchNormalization: gamma, beta, moving mean, moving variance."""

    def change(weights):
        weights = [weight.copy() for weight in weights]
        weights[["gamma", "beta", "mean", "variance"].index(which)][channel] = value
        return weights

    return change


# name: (layers, layer to change, change of its weights)
NORMED = lambda: (layers.Conv2D(6, 3, name="mine"), layers.BatchNormalization(name="norm"), layers.ReLU())
EXTREMES = {
    "dense_all_zero": (lambda: (layers.Dense(6, name="mine"),), "mine", zeros),
    "dense_without_kernel": (
        lambda: (layers.Dense(6, bias_initializer="normal", name="mine"),), "mine", without_kernel,
    ),
    "conv_all_zero": (lambda: (layers.Conv2D(6, 3, name="mine"), layers.ReLU()), "mine", zeros),
    "conv_dead_channel": (lambda: (layers.Conv2D(6, 3, name="mine"),), "mine", with_dead_channel),
    "conv_tiny_channel": (lambda: (layers.Conv2D(6, 3, name="mine"),), "mine", with_tiny_channel),
    "depthwise_all_zero": (lambda: (layers.DepthwiseConv2D(3, name="mine"), layers.Conv2D(3, 1)), "mine", zeros),
    "transposed_all_zero": (lambda: (layers.Conv2DTranspose(3, 3, name="mine"),), "mine", zeros),
    "zero_then_softmax": (lambda: (layers.Dense(6, name="mine"), layers.Softmax()), "mine", zeros),
    "zero_then_sigmoid_dense": (
        lambda: (layers.Dense(6, name="mine"), layers.Activation("sigmoid"), layers.Dense(3)), "mine", zeros,
    ),
    "zero_then_pool": (lambda: (layers.Conv2D(6, 3, name="mine"), layers.AveragePooling2D(2)), "mine", zeros),
    "zero_then_swish": (lambda: (layers.Conv2D(6, 3, activation="swish", name="mine"),), "mine", zeros),
    "conv_zero_and_norm": (NORMED, "mine", zeros),
    "tiny_variance": (NORMED, "norm", norm_with("variance", 1e-12)),
    "zero_variance": (NORMED, "norm", norm_with("variance", 0.0)),
    "huge_variance": (NORMED, "norm", norm_with("variance", 1e12)),
    "gamma_zero": (NORMED, "norm", norm_with("gamma", 0.0)),
    "gamma_all_zero": (NORMED, "norm", norm_with("gamma", 0.0, slice(None))),
    "gamma_tiny": (NORMED, "norm", norm_with("gamma", 1e-20)),
    "gamma_zero_alone": (lambda: (layers.BatchNormalization(name="norm"),), "norm", norm_with("gamma", 0.0)),
    "beta_large": (NORMED, "norm", norm_with("beta", 1e3)),
    "mean_large": (NORMED, "norm", norm_with("mean", -1e3)),
}  # fmt: skip


def verified(qat, x):
    program = kq.freeze(qat)
    for tensor in program.tensors.values():
        assert np.all(np.isfinite(tensor.scale)) and np.all(np.float32(tensor.scale) > 0)
    parity = tflite_export.verify(tflite_export.write(program), qat, x)
    assert {result.runtime for result in parity.results} == {"litert", "xnnpack", "tflm"} and not parity.skipped
    return parity


@pytest.mark.parametrize("make, name, change", EXTREMES.values(), ids=EXTREMES)
def test_extreme_weights_are_exact_on_all_runtimes(make, name, change):
    model = model_of(*make())
    layer = model.get_layer(name)
    layer.set_weights(change(layer.get_weights()))
    qat = calibrated(model)
    parity = verified(qat, data())
    assert parity.exact, parity
    difference = np.abs(qat(data()) - model(data()))
    assert difference.max() <= 0.03 * max(np.abs(model(data())).max(), 1e-4)


@pytest.mark.parametrize(
    "value, then",
    [
        (0.0, layers.ReLU),
        (0.0, layers.Softmax),
        (0.0, lambda: layers.Activation("swish")),
        (3.0, layers.ReLU),
        (-3.0, layers.Softmax),
        (1e-7, lambda: layers.Activation("swish")),
        (1e4, layers.Flatten),
    ],
)
def test_constant_activations_are_exact_on_all_runtimes(value, then):
    x = np.full((8, *SHAPE), value, "float32")
    qat = calibrated(model_of(layers.Conv2D(6, 3), then(), layers.Flatten(), layers.Dense(3)), x)
    parity = verified(qat, x)
    assert parity.exact, parity
    assert np.all(np.isfinite(qat(x)))


@pytest.mark.parametrize("gamma", [0.0, 1e-12, 1e-4, 3e-4])
def test_channel_with_almost_no_factor_is_almost_constant(gamma):
    """Its many weights must add what gamma says and no more, though int32 cannot hold the bias in their steps."""
    model = model_of(layers.Dense(3, name="mine"), layers.BatchNormalization(name="norm"), shape=(2048,))
    model.get_layer("mine").kernel.assign(np.abs(model.get_layer("mine").kernel))
    model.get_layer("norm").set_weights(list(np.array([[gamma] * 3, [0.7, -0.4, 0.2], [0] * 3, [1] * 3])))
    x = data((2048,), low=0.0) * np.linspace(0, 1, 32, dtype="float32")[:, None]
    qat = calibrated(model, x, input_range=(0, 2))
    program = kq.freeze(qat)
    scale = program.tensors[next(iter(program.outputs.values()))].scale[0]
    found = np.asarray(qat(x))
    assert np.abs(found - model(x)).max() <= 0.75 * scale
    if gamma < 1e-6:
        assert np.all(np.ptp(found, axis=0) == 0)
    parity = verified(qat, x)
    assert parity.max_lsb <= 1 and parity.mismatch <= 0.02, parity


def test_exactness_can_fail():
    """One weight of the file changed by 1 shows in `verify`."""
    qat = calibrated(model_of(layers.Flatten(), layers.Dense(3)))
    program = kq.freeze(qat)
    assert tflite_export.verify(tflite_export.write(program), qat, data()).exact
    (tensor,) = constants(program, "int8")
    tensor.data[0, :20] ^= 16
    assert not tflite_export.verify(tflite_export.write(program), qat, data()).exact


def test_freezing_leaves_the_model_alone():
    qat = calibrated(model_of(*NORMED()))
    before, weights = qat(data()), qat.get_weights()
    first, second = (tflite_export.write(kq.freeze(qat)) for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(qat(data()), before)
    for one, other in zip(qat.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any(isinstance(layer, Quantized) for layer in qat.layers)


_SCALED = {
    "a number": (lambda x: layers.Conv2D(4, 3)(x) * 0.17, ["CONV_2D"]),
    "a negative number, plus one, relu": (lambda x: ops.relu(layers.Conv2D(4, 3)(x) * -0.5 + 0.3), ["CONV_2D"]),
    "one per channel": (lambda x: layers.Conv2D(4, 3)(x) / np.arange(1, 5, dtype="float32"), ["CONV_2D"]),
    "learned": (lambda x: LayerScale(0.3, 4)(layers.Conv2D(4, 3)(x)), ["CONV_2D"]),
    "read twice": (lambda x: (lambda y: y * 0.3 + y)(layers.Conv2D(4, 3)(x)), ["CONV_2D", "MUL", "ADD"]),
    "behind a relu": (lambda x: ops.relu(layers.Conv2D(4, 3)(x)) * 0.3, ["CONV_2D", "MUL"]),
}


@pytest.mark.parametrize("build, expected", _SCALED.values(), ids=_SCALED)
def test_what_scales_a_layers_result_is_folded_into_it(build, expected, tmp_path):
    inputs = keras.Input(SHAPE)
    model = keras.Model(inputs, build(inputs))
    qat = kq.quantize(model)
    qat.compile("sgd", "mse")
    x = data()
    qat.fit(x, model(x), verbose=0)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(qat(x), loaded(x))
    content = tflite_export.write(kq.freeze(loaded))
    assert [op.kind for op in tflite_export.inspect(content).ops] == expected
    assert tflite_export.verify(content, loaded, x, runtimes=("litert", "xnnpack")).exact
    assert np.abs(qat(x) - model(x)).max() < 0.1 * np.ptp(model(x))


REDUCED = {
    "average": (lambda: layers.GlobalAveragePooling2D(), {"MEAN": 1, "CONV_2D": 2}),
    "largest": (lambda: layers.GlobalMaxPooling2D(), {"REDUCE_MAX": 1, "CONV_2D": 2}),
    "kept": (lambda: layers.GlobalAveragePooling2D(keepdims=True), {"MEAN": 1, "CONV_2D": 2}),
}


@pytest.mark.parametrize("name", REDUCED)
def test_a_reduction_keeps_its_axes_itself(name):
    """What squeeze-and-excitation does: no RESHAPE between the pooling and the convolution over single pixels."""
    pooling, expected = REDUCED[name]
    model = model_of(layers.Conv2D(8, 2), pooling(), layers.Reshape((1, 1, 8)), layers.Conv2D(4, 1))
    x = data()
    qat = calibrated(model, x)
    program = kq.freeze(qat)
    kinds = [op.kind for op in program.ops]
    assert {kind: kinds.count(kind) for kind in kinds} == expected
    assert verified(qat, x).max_lsb == 0


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_a_batch_norm_alone_is_exact_though_its_channels_differ_a_lot(activation):
    """Some channels of a trained net fill a hundredth of their tensor's range: one step in makes many steps out."""
    norm = layers.BatchNormalization()
    model = model_of(layers.MaxPooling2D(2, 1), norm, layers.Activation(activation), shape=(8, 8, 64))
    generator, spread = np.random.default_rng(0), np.exp(np.linspace(np.log(0.01), 0, 64)).astype("float32")
    norm.set_weights([np.where(np.arange(64) % 5, 1.0, -1.0), generator.normal(size=64), 0.3 * spread, spread**2])
    x = data((8, 8, 64)) * spread
    qat = kq.calibrate(kq.quantize(model, scheme=kq.Scheme(per_channel_norms=True)), x)
    (layer,) = [layer for layer in qat.layers if isinstance(layer, Quantized)]
    assert np.ptp(np.abs(np.asarray(layer.integers(np.float32(0.016), np.float32(0.04)).kernel))) > 20
    assert verified(qat, x).max_lsb == 0
    assert np.abs(qat(x, training=False) - model(x, training=False)).max() < 1.6  # half a step in, of 1/127 by 100


def test_equal_paddings_are_one_tensor():
    model = model_of(layers.ZeroPadding2D(1), layers.MaxPooling2D(2, 1), layers.ZeroPadding2D(1), layers.MaxPooling2D())
    x = data()
    program = kq.freeze(calibrated(model, x))
    pads = [op for op in program.ops if op.kind == "PAD"]
    assert len(pads) == 2 and pads[0].inputs[1] == pads[1].inputs[1]
    assert verified(calibrated(model, x), x).max_lsb == 0


def test_weights_that_became_nan_are_named():
    qat = calibrated(model_of(layers.Conv2D(3, 3, name="conv")))
    wrapper_of(qat).layer.kernel.assign(np.full((3, 3, 4, 3), np.nan))
    with pytest.raises(ValueError, match="Layer 'conv.*weights hold NaN.*checkpoint.*GradientClipping"):
        kq.freeze(qat)


def test_upsampling_whose_ties_xnnpack_rounds_otherwise_is_told_how_to_be_exact(tmp_path):
    larger = [layers.UpSampling2D(2, interpolation="bilinear") for _ in range(2)]
    model = model_of(layers.Dense(32), larger[0], layers.Dense(32), larger[1], layers.Dense(64))
    x = data(count=64)
    with pytest.raises(kq.ExportError, match="exact_upsampling=True"):
        kq.export(calibrated(model, x), tmp_path / "model.tflite", x)
    qat = kq.calibrate(kq.quantize(model, scheme=kq.Scheme(exact_upsampling=True)), x)
    assert kq.export(qat, tmp_path / "model.tflite", x).parity.exact


def test_a_file_that_microcontrollers_refuse_says_so_and_how_to_write_another(tmp_path):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, activation="gelu"), layers.Dense(2)])
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    qat = kq.calibrate(kq.quantize(model), x)
    report = kq.export(qat, tmp_path / "model.tflite", x)
    assert "exact on litert, xnnpack\n" in str(report) and "portable=True writes GELU as a look-up" in str(report)
    report = kq.export(qat, tmp_path / "model.tflite", x, portable=True)
    assert "exact; TFLM arena" in str(report) and not report.parity.skipped
