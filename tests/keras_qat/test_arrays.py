"""The arithmetic of integers gives the same bits in numpy as in TensorFlow."""

import keras
import numpy as np
import pytest
from cases import with_lively_batch_norms
from keras import layers

import keras_qat as kq
from keras_qat.arrays import ops
from keras_qat.layers import FakeQuant, Quantized


@pytest.mark.parametrize("name", ["where", "maximum", "clip"])
def test_a_tensor_among_the_operands_makes_a_tensor(name):
    array, tensor = np.float32([1.0, -2.0]), keras.ops.convert_to_tensor([0.5, 0.5])
    arguments = {"where": (array > 0, array, tensor), "maximum": (array, tensor), "clip": (tensor, array[1], 1.0)}[name]
    assert keras.ops.is_tensor(getattr(ops, name)(*arguments))
    plain = [np.asarray(x) for x in arguments]
    result = getattr(ops, name)(*plain)
    assert isinstance(result, np.ndarray)
    np.testing.assert_array_equal(result, getattr(ops, name)(*arguments))


@pytest.fixture(scope="module")
def qat():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.Rescaling(1 / 127.5, -1.0)(inputs)
    for strides in (1, 2):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(16, 3, strides, use_bias=strides == 2)(x)))
        x = layers.ReLU()(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(x)))
    x = layers.Dense(5)(layers.GlobalAveragePooling2D()(layers.Conv2D(8, 1)(x) * layers.Conv2D(8, 1)(x)))
    model = with_lively_batch_norms(keras.Model(inputs, x))
    images = np.random.default_rng(0).uniform(0, 255, (32, 8, 8, 3)).astype("float32")
    return kq.calibrate(kq.quantize(model), images)


@pytest.mark.parametrize("scales", [(0.02, 0.03), (0.004, 0.7), (1.0, 0.05)])
def test_integers_of_weights(qat, scales):
    scales = [np.float32(scale) for scale in scales]
    found = [layer for layer in qat.layers if isinstance(layer, Quantized)]
    assert len(found) == 7
    for layer in found:
        in_numpy, in_keras = layer.integers(*scales), layer.integers(*map(keras.ops.convert_to_tensor, scales))
        for name in ("kernel", "step", "bias", "snapped"):
            one, other = getattr(in_numpy, name), getattr(in_keras, name)
            assert not keras.ops.is_tensor(one)
            np.testing.assert_array_equal(one, other)


def test_grids_of_tensors(qat):
    for layer in qat.layers:
        if isinstance(layer, FakeQuant):
            for factors in (None, [0.01], [0.013, 0.02]):
                scale, zero_point = layer.parameters(factors)
                assert type(scale) is np.float32 and type(zero_point) is int
                tensor = keras.ops.zeros((1, 4))
                options = {} if factors is None else {"factors": [keras.ops.convert_to_tensor(f) for f in factors]}
                assert float(layer(tensor, **options)[1]) == scale
