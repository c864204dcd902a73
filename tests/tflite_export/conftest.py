"""Programs written by hand, their results in integer numpy, and files that TFLiteConverter wrote."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tflite_export import Op, Program, Tensor, write


@dataclasses.dataclass
class Dense:
    """A FULLY_CONNECTED with per-channel weights; `reference` is its exact real-valued result."""

    program: Program
    content: bytes
    inputs: np.ndarray

    def accumulate(self, inputs) -> np.ndarray:
        x, weights, bias = (self.program.tensors[name] for name in ("x", "w", "b"))
        return (x.quantize(inputs).astype(np.int64) - x.zero_point) @ weights.data.T.astype(np.int64) + bias.data

    def reference(self, inputs) -> np.ndarray:
        scales = np.float32(self.program.tensors["b"].scale).astype(np.float64)
        return self.accumulate(inputs) * scales

    @property
    def quantized_inputs(self) -> np.ndarray:
        return self.program.tensors["x"].quantize(self.inputs)

    @property
    def integers(self) -> np.ndarray:
        return self.program.tensors["y"].quantize(self.reference(self.inputs))


def _dense_program(dynamic_batch: bool, then_softmax: bool) -> Program:
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.001, 0.02, 10).astype(np.float32)
    weights, bias = rng.integers(-127, 128, (10, 16), np.int8), rng.integers(-1000, 1000, 10, np.int32)
    program = Program(dynamic_batch=dynamic_batch, inputs={"image": "x"}, outputs={"logits": "y"})
    program.add(Tensor("x", (1, 16), "int8", (0.0625,), 3))
    program.add(Tensor("w", (10, 16), "int8", tuple(scales.tolist()), axis=0, data=weights))
    program.add(Tensor("b", (10,), "int32", tuple((scales * 0.0625).tolist()), axis=0, data=bias))
    program.add(Tensor("y", (1, 10), "int8", (0.5,), -5))
    program.ops.append(Op("FULLY_CONNECTED", ["x", "w", "b"], ["y"]))
    if then_softmax:
        program.outputs = {"classes": program.add(Tensor("p", (1, 10), "int8", (1 / 256,), -128))}
        program.ops.append(Op("SOFTMAX", ["y"], ["p"], {"beta": 1.0}))
    return program


@pytest.fixture
def make_dense():
    def make(dynamic_batch=False, then_softmax=False, samples=50, **io_types) -> Dense:
        program = _dense_program(dynamic_batch, then_softmax)
        inputs = np.random.default_rng(1).normal(scale=3, size=(samples, 16)).astype(np.float32)
        return Dense(program, write(program, **io_types), inputs)

    return make


@pytest.fixture
def dense(make_dense):
    return make_dense()


def _convert(converter, **settings) -> bytes:
    for name, value in settings.items():
        setattr(converter, name, value)
    return converter.convert()


@pytest.fixture(scope="session")
def image_net() -> keras.Model:
    layers = keras.layers
    inputs = keras.Input((16, 16, 3), batch_size=1)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)
    x = layers.Conv2D(8, 1, groups=2)(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


@pytest.fixture(scope="session")
def foreign_files(image_net) -> dict[str, bytes]:
    """What TFLiteConverter makes of one net: float, hybrid, and int8 with float and with int8 rim."""
    samples = np.random.default_rng(0).random((8, 1, 16, 16, 3)).astype(np.float32)
    optimized = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    calibrated = optimized | {"representative_dataset": lambda: ([sample] for sample in samples)}
    int8_only = tf.lite.TargetSpec(supported_ops=[tf.lite.OpsSet.TFLITE_BUILTINS_INT8])
    integer_rim = {"inference_input_type": tf.int8, "inference_output_type": tf.int8}
    settings = {
        "float": {},
        "hybrid": optimized,
        "float_rim": calibrated,
        "int8": calibrated | integer_rim | {"target_spec": int8_only},
    }
    make = tf.lite.TFLiteConverter.from_keras_model
    return {name: _convert(make(image_net), **values) for name, values in settings.items()}


class _TwoFunctions(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32, name="x")])
    def loop(self, x):
        step = lambda count, y: (count + 1, y * tf.cast(count, tf.float32))  # noqa: E731
        return {"y": tf.while_loop(lambda count, y: tf.cast(count, tf.float32) < tf.reduce_sum(x), step, [0, x])[1]}

    @tf.function(
        input_signature=[tf.TensorSpec((2, 3, 4), tf.float32, name="a"), tf.TensorSpec((2, 5, 4), tf.float32, name="b")]
    )
    def product(self, a, b):
        return {"p": tf.matmul(a, b, transpose_b=True)}


@pytest.fixture(scope="session")
def two_signatures(tmp_path_factory) -> bytes:
    """A file of several subgraphs: a loop with its body, and a batched product."""
    folder = str(tmp_path_factory.mktemp("two_signatures"))
    module = _TwoFunctions()
    tf.saved_model.save(module, folder, signatures={"loop": module.loop, "product": module.product})
    return tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["loop", "product"]).convert()


@pytest.fixture(scope="session")
def unknown_to_tflm() -> bytes:
    """A TOPK_V2, which LiteRT runs and TFLM does not have."""

    @tf.function(input_signature=[tf.TensorSpec((1, 8), tf.int32, name="x")])
    def top(x):
        return tf.math.top_k(x, 3).values

    return tf.lite.TFLiteConverter.from_concrete_functions([top.get_concrete_function()]).convert()
