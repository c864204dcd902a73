"""The table of operations that every whole-path test runs over."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

import keras_qat as kq

IMAGE, SERIES, VECTOR = (12, 12, 8), (16, 8), (24,)
_EXACT = kq.Scheme(exact_upsampling=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """`build` maps symbolic tensors to a symbolic tensor.

    Args:
        exact: The sharper bar holds for it: at most 0.1 % of the elements differ.
        scheme: How it is quantized.
        apart: Runtimes whose kernel rounds otherwise than the others', by 1 LSB, which layers behind add up.
    """

    name: str
    build: Callable
    shapes: tuple[tuple[int, ...], ...] = (IMAGE,)
    exact: bool = False
    scheme: kq.Scheme = kq.Scheme()
    apart: tuple[str, ...] = ()

    def __str__(self):
        return self.name

    def one_op(self) -> keras.Model:
        return self._model(lambda x: x, lambda y: y)

    def three_ops(self) -> keras.Model:
        """The same between two dense layers."""
        return self._model(lambda x: layers.Dense(x.shape[-1])(x), lambda y: layers.Dense(6)(y))

    def _model(self, before, after) -> keras.Model:
        keras.utils.set_random_seed(7)
        inputs = [keras.Input(shape, name=f"in{i}") for i, shape in enumerate(self.shapes)]
        outputs = after(self.build(*[before(x) for x in inputs]))
        return with_lively_batch_norms(keras.Model(inputs, outputs))


def with_lively_batch_norms(model, seed=0):
    """Random statistics, and factors of both signs, in place of the ones and zeros of a fresh batch norm."""
    generator = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            size = layer.moving_mean.shape
            layer.moving_mean.assign(generator.normal(0, 0.5, size))
            layer.moving_variance.assign(generator.uniform(0.3, 2, size))
            if layer.scale:
                layer.gamma.assign(generator.uniform(-1.5, 1.5, size))
            if layer.center:
                layer.beta.assign(generator.normal(0, 0.5, size))
    return model


def inputs_for(model, samples=64, seed=1):
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(0, 1, (samples, *x.shape[1:])).astype("float32") for x in model.inputs]
    return arrays if len(arrays) > 1 else arrays[0]


def _bn(x):
    return layers.BatchNormalization()(x)


def _fan_out(x):
    y = layers.Conv2D(8, 3, padding="same")(x)
    return layers.Concatenate()([_bn(y), layers.ReLU()(y)])


def _activation(name):
    return lambda x: layers.Activation(name)(x)


WEIGHTS = [
    Case("dense", lambda x: layers.Dense(10)(x), (VECTOR,), True),
    Case("dense_no_bias", lambda x: layers.Dense(10, use_bias=False)(x), (VECTOR,), True),
    Case("dense_on_series", lambda x: layers.Dense(10)(x), (SERIES,), True),
    Case("dense_on_image", lambda x: layers.Dense(10)(x), (IMAGE,), True),
    Case("dense_relu", lambda x: layers.Dense(10, "relu")(x), (VECTOR,), True),
    Case("conv1d", lambda x: layers.Conv1D(10, 3, padding="same")(x), (SERIES,), True),
    Case("conv1d_strided", lambda x: layers.Conv1D(10, 3, strides=2)(x), (SERIES,), True),
    Case(
        "conv1d_causal_dilated", lambda x: layers.Conv1D(10, 3, padding="causal", dilation_rate=2)(x), (SERIES,), True
    ),
    Case("conv2d", lambda x: layers.Conv2D(10, 3)(x), exact=True),
    Case("conv2d_same_strided", lambda x: layers.Conv2D(10, 3, 2, "same")(x), exact=True),
    Case("conv2d_oblong", lambda x: layers.Conv2D(10, (1, 5), (1, 2), "same")(x), exact=True),
    Case("conv2d_dilated", lambda x: layers.Conv2D(10, 3, dilation_rate=2, padding="same")(x), exact=True),
    Case("conv2d_grouped", lambda x: layers.Conv2D(8, 3, groups=4, padding="same")(x), exact=True),
    Case("conv2d_relu6", lambda x: layers.Conv2D(10, 3, activation="relu6")(x), exact=True),
    Case("depthwise", lambda x: layers.DepthwiseConv2D(3, padding="same")(x), exact=True),
    Case("depthwise_strided_x2", lambda x: layers.DepthwiseConv2D(3, 2, depth_multiplier=2)(x), exact=True),
    Case("depthwise_dilated", lambda x: layers.DepthwiseConv2D(3, dilation_rate=2, padding="same")(x), exact=True),
    Case("separable1d", lambda x: layers.SeparableConv1D(10, 3, padding="same")(x), (SERIES,), True),
    Case("separable2d", lambda x: layers.SeparableConv2D(10, 3, padding="same", activation="relu")(x), exact=True),
    Case("transposed", lambda x: layers.Conv2DTranspose(6, 3, 2, "same")(x), exact=True),
    Case("transposed_valid", lambda x: layers.Conv2DTranspose(6, 3, 2)(x), exact=True),
    Case("transposed_relu", lambda x: layers.Conv2DTranspose(6, 2, 2, activation="relu")(x), exact=True),
]
BATCH_NORMS = [
    Case("bn_after_conv", lambda x: _bn(layers.Conv2D(10, 3, use_bias=False)(x)), exact=True),
    Case("bn_after_conv_bias", lambda x: _bn(layers.Conv2D(10, 3)(x)), exact=True),
    Case("bn_after_conv1d", lambda x: _bn(layers.Conv1D(10, 3)(x)), (SERIES,), True),
    Case("bn_after_depthwise", lambda x: _bn(layers.DepthwiseConv2D(3)(x)), exact=True),
    Case("bn_after_transposed", lambda x: _bn(layers.Conv2DTranspose(6, 3, 2, "same")(x)), exact=True),
    Case("bn_after_dense", lambda x: _bn(layers.Dense(10)(x)), (VECTOR,), True),
    Case("bn_before_conv", lambda x: layers.Conv2D(10, 3, padding="same")(_bn(x)), exact=True),
    Case("bn_alone", _bn, exact=True),
    Case("bn_alone_on_series", _bn, (SERIES,), True),
    Case("bn_alone_on_vector", _bn, (VECTOR,), True),
    Case("bn_after_relu", lambda x: _bn(layers.ReLU()(x)), exact=True),
    Case("bn_relu_after_add", lambda x, y: layers.ReLU()(_bn(x + y)), (IMAGE, IMAGE), True),
    Case("bn_conv_fans_out", _fan_out, exact=True),
    Case("bn_without_scale", lambda x: layers.BatchNormalization(scale=False)(layers.Conv2D(10, 3)(x)), exact=True),
    Case("bn_without_center", lambda x: layers.BatchNormalization(center=False)(layers.Conv2D(10, 3)(x)), exact=True),
]
ACTIVATIONS = [
    Case("relu_layer", lambda x: layers.ReLU()(x)),
    Case("relu6_layer", lambda x: layers.ReLU(6.0)(x * 4.0)),
    Case("relu_max_1", lambda x: layers.ReLU(1.0)(x)),
    Case("relu_activation", _activation("relu")),
    Case("relu_ops", lambda x: ops.relu(x)),
    Case("relu6_ops", lambda x: ops.relu6(x)),
    Case("leaky_relu_layer", lambda x: layers.LeakyReLU()(x)),
    Case("leaky_relu_ops", lambda x: ops.leaky_relu(x, 0.1)),
    Case("leaky_relu_argument", lambda x: layers.Conv2D(6, 3, activation="leaky_relu")(x)),
    Case("sigmoid", _activation("sigmoid")),
    Case("sigmoid_ops", lambda x: ops.sigmoid(x)),
    Case("tanh", _activation("tanh")),
    Case("tanh_ops", lambda x: ops.tanh(x)),
    Case("softmax_layer", lambda x: layers.Softmax()(x), (VECTOR,)),
    Case("softmax_ops", lambda x: ops.softmax(x), (SERIES,)),
    Case("softmax_argument", lambda x: layers.Dense(10, "softmax")(x), (VECTOR,)),
    Case("swish", _activation("swish")),
    Case("silu_ops", lambda x: ops.silu(x)),
    Case("swish_argument", lambda x: layers.Conv2D(6, 3, activation="swish")(x)),
    Case("hard_swish", _activation("hard_swish")),
    Case("hard_swish_ops", lambda x: ops.hard_silu(x)),
    Case("hard_sigmoid", _activation("hard_sigmoid")),
    Case("hard_sigmoid_ops", lambda x: ops.hard_sigmoid(x)),
    Case("hard_sigmoid_argument", lambda x: layers.Dense(10, "hard_sigmoid")(x), (VECTOR,)),
]
MERGES = [
    Case("add", lambda x, y: layers.Add()([x, y]), (IMAGE, IMAGE), True),
    Case("add_relu", lambda x, y: layers.ReLU()(layers.Add()([x, y])), (IMAGE, IMAGE), True),
    Case("add_4", lambda *x: layers.Add()(list(x)), (VECTOR,) * 4, True),
    Case("add_operator", lambda x, y: x + y, (SERIES, SERIES), True),
    Case("add_broadcast", lambda x, y: x + y, (IMAGE, (1, 1, 8)), True),
    Case("subtract", lambda x, y: layers.Subtract()([x, y]), (IMAGE, IMAGE)),
    Case("subtract_operator", lambda x, y: x - y, (VECTOR, VECTOR)),
    Case("multiply", lambda x, y: layers.Multiply()([x, y]), (IMAGE, IMAGE)),
    Case("multiply_operator", lambda x, y: x * y, (SERIES, SERIES)),
    Case("multiply_broadcast", lambda x, y: x * y, (IMAGE, (1, 1, 8))),
    Case("maximum", lambda x, y: layers.Maximum()([x, y]), (IMAGE, IMAGE)),
    Case("minimum", lambda x, y: ops.minimum(x, y), (IMAGE, IMAGE)),
    Case("average", lambda x, y: layers.Average()([x, y]), (IMAGE, IMAGE)),
    Case("average_3", lambda *x: layers.Average()(list(x)), (VECTOR,) * 3),
    Case("concatenate_2", lambda x, y: layers.Concatenate()([x, y]), (IMAGE, IMAGE)),
    Case("concatenate_8", lambda *x: ops.concatenate(list(x), axis=-1), (VECTOR,) * 8),
    Case("concatenate_axis_1", lambda x, y: layers.Concatenate(axis=1)([x, y]), (IMAGE, IMAGE)),
    Case(
        "concatenate_fixed",
        lambda x, y: layers.Concatenate()([ops.sigmoid(x), y]),
        (IMAGE, IMAGE),
    ),
    Case(
        "concatenate_both_fixed", lambda x, y: ops.concatenate([ops.sigmoid(x), ops.sigmoid(y)], -1), (VECTOR, VECTOR)
    ),
    Case("plus_constant", lambda x: x + 1.5),
    Case("minus_from_constant", lambda x: 1.0 - x),
    Case("times_constant", lambda x: x * 0.3),
    Case("divided", lambda x: x / 4.0),
    Case("times_and_plus", lambda x: x * -2.0 + 1.0),
    Case("times_per_channel", lambda x: x * np.linspace(0.1, 3, 8, dtype="float32")),
]
POOLING = [
    Case("max_pool_2d", lambda x: layers.MaxPooling2D()(x), exact=True),
    Case("max_pool_same", lambda x: layers.MaxPooling2D(3, 2, "same")(x), exact=True),
    Case("max_pool_1d", lambda x: layers.MaxPooling1D(2)(x), (SERIES,), True),
    Case("average_pool_2d", lambda x: layers.AveragePooling2D(2)(x), exact=True),
    Case("average_pool_3", lambda x: layers.AveragePooling2D(3, 2)(x), exact=True),
    Case("average_pool_same", lambda x: layers.AveragePooling2D(3, 1, "same")(x), exact=True),
    Case("average_pool_1d", lambda x: layers.AveragePooling1D(4)(x), (SERIES,), True),
    Case("global_average_2d", lambda x: layers.GlobalAveragePooling2D()(x), exact=True),
    Case("global_average_keep", lambda x: layers.GlobalAveragePooling2D(keepdims=True)(x), exact=True),
    Case("global_average_1d", lambda x: layers.GlobalAveragePooling1D()(x), (SERIES,), True),
    Case(
        "global_average_large",
        lambda x: layers.GlobalAveragePooling2D()(x),
        ((32, 32, 4),),
        True,
    ),
    Case("global_max_2d", lambda x: layers.GlobalMaxPooling2D()(x), exact=True),
    Case("global_max_1d", lambda x: layers.GlobalMaxPooling1D()(x), (SERIES,), True),
]
SHAPES = [
    Case("zero_padding_2d", lambda x: layers.ZeroPadding2D(((1, 2), (0, 3)))(x)),
    Case("zero_padding_1d", lambda x: layers.ZeroPadding1D(2)(x), (SERIES,)),
    Case("pad_then_conv", lambda x: layers.Conv2D(4, 3, 2)(layers.ZeroPadding2D(((0, 1), (0, 1)))(x)), exact=True),
    Case("ops_pad", lambda x: ops.pad(x, [[0, 0], [1, 1], [2, 0], [0, 0]])),
    Case("cropping_2d", lambda x: layers.Cropping2D(((1, 2), (0, 3)))(x)),
    Case("cropping_1d", lambda x: layers.Cropping1D(2)(x), (SERIES,)),
    Case("upsampling_nearest", lambda x: layers.UpSampling2D(2)(x)),
    Case("upsampling_oblong", lambda x: layers.UpSampling2D((1, 3))(x)),
    Case("upsampling_bilinear", lambda x: layers.UpSampling2D(2, interpolation="bilinear")(x), apart=("xnnpack",)),
    Case(
        "upsampling_exact",
        lambda x: layers.UpSampling2D((2, 4), interpolation="bilinear")(x),
        scheme=_EXACT,
        exact=True,
    ),
    Case("upsampling_bilinear_oblong", lambda x: layers.UpSampling2D((4, 3), interpolation="bilinear")(x)),
    Case("reshape", lambda x: layers.Reshape((36, 32))(x)),
    Case("reshape_minus_one", lambda x: ops.reshape(x, (-1, 24, 48))),
    Case("flatten", lambda x: layers.Flatten()(x)),
    Case("permute", lambda x: layers.Permute((3, 1, 2))(x)),
    Case("transpose_ops", lambda x: ops.transpose(x, (0, 2, 1)), (SERIES,)),
    Case("slice", lambda x: x[:, 1:9:2, ..., 2:]),
    Case("slice_index", lambda x: x[:, 3]),
    Case("slice_last", lambda x: x[:, -1, :], (SERIES,)),
    Case("slice_new_axis", lambda x: x[:, :, None, 2:], (SERIES,)),
]
SCALINGS = [
    Case("conv_times", lambda x: layers.Conv2D(8, 3, padding="same")(x) * 0.17 + x, exact=True),
    Case("conv_times_negative_plus_relu", lambda x: ops.relu(layers.Conv2D(6, 3)(x) * -0.5 + 0.3), exact=True),
    Case(
        "depthwise_times_per_channel",
        lambda x: layers.DepthwiseConv2D(3)(x) * np.linspace(-2, 2, 8, dtype="float32"),
        exact=True,
    ),
    Case("dense_plus", lambda x: layers.Dense(10)(x) + 1.5, (VECTOR,), True),
    Case("rescaling", lambda x: layers.Rescaling(0.5, 1.0)(x)),
    Case("rescaling_conv_valid", lambda x: layers.Conv2D(6, 3)(layers.Rescaling(0.5, 1.0)(x)), exact=True),
    Case("rescaling_conv_same", lambda x: layers.Conv2D(6, 3, 2, "same")(layers.Rescaling(0.5, 1.0)(x)), exact=True),
    Case("rescaling_twice_dense", lambda x: layers.Dense(6)(layers.Rescaling(0.5)(layers.Rescaling(2.0, -1.0)(x)))),
    Case(
        "normalization",
        lambda x: layers.Conv2D(6, 3, padding="same")(layers.Normalization(mean=0.3, variance=4.0)(x)),
        exact=True,
    ),
    Case(
        "normalization_per_channel",
        lambda x: layers.Conv2D(6, 3)(layers.Normalization(mean=np.arange(8.0), variance=np.arange(1.0, 9.0))(x)),
    ),
]
TRAINING_ONLY = [
    Case("dropout", lambda x: layers.Dropout(0.3)(layers.Dense(10)(x)), (VECTOR,), True),
    Case("dropout_relu", lambda x: layers.ReLU()(layers.Dropout(0.3)(layers.Dense(10)(x))), (VECTOR,), True),
    Case("gaussian_noise", lambda x: layers.Dense(10)(layers.GaussianNoise(0.1)(x)), (VECTOR,), True),
    Case("spatial_dropout", lambda x: layers.SpatialDropout2D(0.3)(layers.Conv2D(6, 3)(x)), exact=True),
    Case("augmentation", lambda x: layers.Conv2D(6, 3)(layers.RandomFlip()(x)), exact=True),
]
OPERATIONS = [*WEIGHTS, *BATCH_NORMS, *ACTIVATIONS, *MERGES, *POOLING, *SHAPES, *SCALINGS, *TRAINING_ONLY]
