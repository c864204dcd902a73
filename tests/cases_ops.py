"""keras.ops as people use them in models and custom layers: the table for the whole-path test of test_ops.py."""

import numpy as np
from cases import SERIES, VECTOR, Case
from keras import layers, ops

_MATRIX = np.random.default_rng(0).normal(size=(8, 5)).astype("float32")
_TABLE = np.random.default_rng(1).normal(size=(16, 8)).astype("float32")


_PLACES = np.random.default_rng(4).integers(0, 16, (1, 5, 8))
_LIMITS = np.arange(1, 9, dtype="float32") / 4


def _positive(x):
    return ops.square(x) + 0.3


def _conv(x):
    return layers.Conv2D(8, 3, padding="same")(x)


def _joined_sums(x):
    """Four on one grid, which two of their terms are on as well."""
    x = _conv(x)
    first = layers.AveragePooling2D(3, 1, "same")(x) + _conv(x)
    second = _conv(first) - x
    third = _conv(second) - _conv(x)
    return layers.Concatenate()([x, first, second, third, _conv(x) + third])


def _sums_in_a_circle(x):
    """The grid of the first sum depends on that of its first term, and that one's on it."""
    term = _conv(x)
    one = term + _conv(x)
    other = layers.Multiply()([one, _conv(x)]) + _conv(x)
    return layers.Concatenate()([term, one * 0.5 + other])


def _gate(x):
    return layers.Conv2D(1, 1, activation="sigmoid")(x)


def _joined_product(x):
    """As an attention gate in front of a decoder."""
    return layers.Concatenate()([_conv(x), layers.ReLU()(_conv(x)), _conv(x) * _gate(x)])


def _products_in_a_circle(x):
    """Each is of a tensor that shares the other's grid."""
    one, other = _conv(x), _conv(x)
    first, second = one * _gate(x), other * _gate(x)
    return layers.Concatenate()([_conv(layers.Concatenate()([one, second])), layers.Concatenate()([other, first])])


FUNCTIONS = [
    Case(name, lambda x, f=f: f(x), (SERIES,))
    for name, f in {
        "abs": ops.abs,
        "arctan": ops.arctan,
        "celu": ops.celu,
        "cos": ops.cos,
        "elu": ops.elu,
        "equal_to_zero": lambda x: ops.cast(ops.equal(ops.relu(x), 0.0), "float32"),
        "erf": ops.erf,
        "exp": ops.exp,
        "floor": ops.floor,
        "gelu": ops.gelu,
        "gelu_exact": lambda x: ops.gelu(x, approximate=False),
        "hard_tanh": ops.hard_tanh,
        "in_a_range": lambda x: x * ops.cast(ops.logical_and(x > -0.5, ops.logical_not(x > 1.0)), "float32"),
        "is_positive": lambda x: ops.cast(x > 0, "float32"),
        "log": lambda x: ops.log(_positive(x)),
        "log1p": lambda x: ops.log1p(ops.abs(x)),
        "log_sigmoid": ops.log_sigmoid,
        "mish": lambda x: x * ops.tanh(ops.softplus(x)),
        "modulo": lambda x: x // 0.5 + ops.mod(x, 0.5),
        "no_nan": lambda x: ops.where(ops.isnan(x), 0.0, x),
        "power": lambda x: ops.power(_positive(x), 1.7),
        "power_2": lambda x: x**2,
        "reciprocal": lambda x: 1.0 / (ops.abs(x) + 0.5),
        "round": ops.round,
        "rsqrt": lambda x: ops.rsqrt(_positive(x)),
        "selu": ops.selu,
        "sign": ops.sign,
        "sin": ops.sin,
        "softplus": ops.softplus,
        "softsign": ops.softsign,
        "sqrt": lambda x: ops.sqrt(_positive(x)),
        "square": ops.square,
        "where_of_one_tensor": lambda x: ops.where(x > 0.5, x, ops.sin(x)),
    }.items()
]
ARITHMETIC = [
    Case("negative", lambda x: -x, (SERIES,)),
    Case("clip", lambda x: ops.clip(x, -1, 1), (SERIES,)),
    Case("clip_of_a_dense", lambda x: ops.clip(layers.Dense(8)(x), -1.0, 1.5), (SERIES,)),
    Case("clip_above_zero", lambda x: ops.clip(x, 0.5, 1), (SERIES,)),
    Case("maximum_of_a_number", lambda x: ops.maximum(x, -0.5), (SERIES,)),
    Case("joined_sums", _joined_sums, exact=True),
    Case("joined_product", _joined_product, exact=True),
    Case("products_in_a_circle", _products_in_a_circle),
    Case("sums_in_a_circle", _sums_in_a_circle, exact=True),
    Case("gated_by_another", lambda x, y: y * ops.cast(x > 0.2, "float32"), (SERIES, SERIES)),
    Case("times_truth", lambda x: x * (x > 0), (SERIES,)),
    Case("hypotenuse", ops.hypot, (SERIES, SERIES)),
    Case("logarithm_of_a_sum", ops.logaddexp, (SERIES, SERIES)),
    Case(
        "batch_norm_by_ops",
        lambda x: ops.batch_normalization(x, _LIMITS, _LIMITS, -1, offset=_LIMITS[::-1], scale=-_LIMITS),
        (SERIES,),
    ),
    Case("divide", lambda x, y: x / (ops.abs(y) + 1.0), (SERIES, SERIES)),
    Case("plus_array", lambda x: x + _TABLE, (SERIES,)),
    Case("minus_array", lambda x: ops.subtract(_TABLE, x), (SERIES,)),
    Case("times_column", lambda x: x * _TABLE[:, :1], (SERIES,)),
    Case("matmul", lambda x, y: ops.matmul(x, ops.transpose(y, (0, 2, 1))), (SERIES, SERIES)),
    Case("matmul_of_four_axes", lambda x, y: ops.matmul(x, y), ((2, 5, 8), (2, 8, 6))),
    Case("matmul_by_array", lambda x: x @ _MATRIX, (SERIES,), True),
]
REDUCTIONS = [
    Case("mean_of_last", lambda x: ops.mean(x, -1, keepdims=True), (SERIES,)),
    Case("mean_of_last_squeezed", lambda x: ops.mean(x, -1), (SERIES,)),
    Case("mean_of_steps", lambda x: ops.mean(x, 1), (SERIES,)),
    Case("mean_of_few_steps", lambda x: ops.mean(x, 1), ((7, 8),)),
    Case("mean_of_image", lambda x: ops.mean(x, (1, 2), keepdims=True)),
    Case("mean_of_rows", lambda x: ops.mean(x, 1)),
    Case("mean_of_all", lambda x: ops.mean(x, (1, 2, 3), keepdims=True)),
    Case("sum_of_steps", lambda x: ops.sum(x, 1), (SERIES,)),
    Case("sum_of_last", lambda x: ops.sum(x, -1), (SERIES,)),
    Case("max_of_steps", lambda x: ops.max(x, 1), (SERIES,)),
    Case("min_of_last", lambda x: ops.min(x, -1, keepdims=True), (SERIES,)),
    Case("variance", lambda x: ops.var(x, -1), (SERIES,)),
    Case("deviation", lambda x: ops.std(x, 1), (SERIES,)),
    Case("logsumexp", lambda x: ops.logsumexp(x, -1), (SERIES,)),
    Case("log_softmax", lambda x: ops.log_softmax(x), (SERIES,)),
    Case("cumulative_sum", lambda x: ops.cumsum(x, 1), (SERIES,)),
    Case("norm", lambda x: ops.norm(x, axis=-1), (SERIES,)),
    Case("norm_1", lambda x: ops.norm(x, 1, -1, keepdims=True), (SERIES,)),
    Case("moments", lambda x: ops.moments(x, [1])[1], (SERIES,)),
    Case("average", lambda x: ops.average(x, 1), (SERIES,)),
    Case("average_with_weights", lambda x: ops.average(x, 1, weights=np.arange(1.0, 17.0)), (SERIES,)),
    Case("count_of_positive", lambda x: ops.count_nonzero(ops.relu(x), 1), (SERIES,)),
    Case("product", lambda x: ops.prod(ops.tanh(x) + 1.0, 1), ((5, 8),)),
    Case("trace", lambda x: ops.trace(x, 1, 1, 3), ((5, 4, 7),)),
    Case("largest_less_smallest", lambda x: ops.amax(x, 1) - ops.amin(x, 1), (SERIES,)),
    Case("average_of_squares", lambda x: layers.AveragePooling1D(2)(ops.square(x)), (SERIES,), True),
    Case(
        "average_of_swish", lambda x: layers.AveragePooling2D(4)(layers.Conv2D(8, 1, activation="swish")(x)), exact=True
    ),
]
MOVES = [
    Case("split", lambda x: ops.split(x, 2, -1)[1] * ops.split(x, 2, -1)[0], (SERIES,)),
    Case("stack", lambda x, y: ops.stack([x, y], 2), (SERIES, SERIES)),
    Case("unstack", lambda x: ops.unstack(x, axis=1)[3], (SERIES,)),
    Case("take", lambda x: ops.take(x, [0, 3, -1], axis=1), (SERIES,)),
    Case("take_along_axis", lambda x: ops.take_along_axis(x, _PLACES, axis=1), (SERIES,)),
    Case("where_of_a_mask", lambda x, y: ops.where(np.arange(8) % 2 == 0, x, y), (SERIES, SERIES)),
    Case("repeat", lambda x: ops.repeat(x, 2, 1), (SERIES,)),
    Case("tile", lambda x: ops.tile(x, (1, 2, 1)), (SERIES,)),
    Case("flip", lambda x: ops.flip(x, 1), (SERIES,)),
    Case("roll", lambda x: ops.roll(x, 3, 1), (SERIES,)),
    Case("quarter_turns", lambda x: ops.concatenate([ops.rot90(x, k, (1, 2)) for k in (1, 2, 3)], -1)),
    Case("depth_to_space", lambda x: ops.depth_to_space(x, 2)),
    Case("space_to_depth_by_ops", lambda x: ops.space_to_depth(x, 3)),
    Case("diagonal", lambda x: ops.diagonal(x, -1, 1, 2)),
    Case("window", lambda x: ops.slice(x, (0, 2, 1), (-1, 9, 4)), (SERIES,)),
    Case("window_filled_in", lambda x, y: ops.slice_update(x, (0, 3, 1), y), (SERIES, (9, 4))),
    Case("unfold", lambda x: ops.unfold(x, (2, 3), padding=1, stride=2)),
    Case("choices", lambda x, y: ops.select([_LIMITS > 1.5, _LIMITS > 0.5], [x, y], 0.3), (SERIES, SERIES)),
    Case("turns", lambda x: ops.fori_loop(0, 3, lambda turn, y: ops.tanh(y) + 0.5 * turn, x), (SERIES,)),
    Case(
        "scan",
        lambda x: ops.scan(lambda a, b: (a + b, a + b), ops.zeros_like(x[:, 0]), ops.transpose(x, (1, 0, 2)))[0],
        ((5, 8),),
    ),
    Case("swapaxes", lambda x: ops.swapaxes(x, 1, 2), (SERIES,)),
    Case("moveaxis", lambda x: ops.moveaxis(x, 1, -1)),
    Case("softmax_of_rows_and_columns", lambda x: layers.Softmax(axis=(1, 2))(x)),
    Case("softmax_of_steps", lambda x: layers.Softmax(axis=1)(x), (SERIES,)),
    Case("repeat_vector", lambda x: layers.RepeatVector(4)(x), (VECTOR,)),
    Case("expand_and_squeeze", lambda x: ops.squeeze(ops.expand_dims(x, 2) * 2.0, 2), (SERIES,)),
    Case("patches", lambda x: ops.image.extract_patches(x, 4)),
    Case("patches_of_a_part", lambda x: ops.image.extract_patches(x, 5, padding="same")),
    Case("patches_that_overlap", lambda x: ops.image.extract_patches(x, 3, 2, padding="same")),
    Case("patches_with_holes", lambda x: ops.image.extract_patches(x, (2, 3), 1, 2)),
    Case(
        "crop_images",
        lambda x: ops.image.crop_images(x, top_cropping=1, left_cropping=2, target_height=5, target_width=4),
    ),
    Case(
        "crop_from_behind",
        lambda x: ops.image.crop_images(x, bottom_cropping=1, right_cropping=2, target_height=5, target_width=4),
    ),
    Case("pad_reflect", lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 3), (0, 0)), "reflect")),
    Case("pad_symmetric", lambda x: ops.pad(x, ((0, 0), (2, 1), (0, 0)), "symmetric"), (SERIES,)),
    Case("pad_images", lambda x: ops.image.pad_images(x, 1, 2, target_height=16, target_width=17)),
    Case("difference", lambda x: ops.diff(x, 2, 1), (SERIES,)),
    Case("triangles", lambda x: ops.triu(x, 1) + ops.tril(x), ((7, 7),)),
    Case("hstack_and_append", lambda x, y: ops.append(ops.hstack([x, y]), x, 1), (SERIES, SERIES)),
    Case("matrix_on_the_left", lambda x: ops.matmul(_MATRIX.T[:, :8] @ np.ones((8, 16), "float32"), x), (SERIES,)),
    Case("clip_per_channel", lambda x: ops.clip(x, -_LIMITS, _LIMITS), (SERIES,)),
    Case("where_of_values", lambda x: ops.where(x > 0.5, x, 0.0), (SERIES,)),
    Case("flatten_channels_first", lambda x: layers.Flatten(data_format="channels_first")(x)),
    Case("average_channels_first", lambda x: layers.GlobalAveragePooling1D(data_format="channels_first")(x), (SERIES,)),
    Case("max_channels_first", lambda x: layers.GlobalMaxPooling2D(data_format="channels_first")(x)),
    Case("dead_beside_alive", lambda x: x + layers.ReLU()(x - 50.0), (SERIES,)),
    Case("relu_on_a_shared_grid", lambda x, y: ops.concatenate([ops.relu(x), 3.0 * y, x], -1), (SERIES, SERIES), True),
    Case(
        "residual_of_vectors", lambda x: layers.Dense(24)(x + layers.Dense(24, activation="relu")(x)), (VECTOR,), True
    ),
    Case(
        "space_to_depth",
        lambda x: ops.reshape(ops.transpose(ops.reshape(x, (-1, 6, 2, 6, 2, 8)), (0, 1, 3, 2, 4, 5)), (-1, 6, 6, 32)),
    ),
]
KERAS_OPS = [*FUNCTIONS, *ARITHMETIC, *REDUCTIONS, *MOVES]
_VOLUME = (4, 6, 6, 3)
_KERNEL = np.random.default_rng(2).normal(size=(3, 3, 8, 4)).astype("float32")
LAYERS = [
    Case(f"activation_{name}", lambda x, name=name: layers.Dense(6, activation=name)(x), (SERIES,))
    for name in (
        "celu",
        "elu",
        "exponential",
        "gelu",
        "hard_tanh",
        "log_sigmoid",
        "mish",
        "selu",
        "softplus",
        "softsign",
    )
] + [
    Case("elu_layer", lambda x: layers.ELU()(x), (SERIES,)),
    Case("prelu", lambda x: layers.PReLU("uniform")(x), (SERIES,)),
    Case("prelu_shared", lambda x: layers.PReLU("uniform", shared_axes=[1, 2])(layers.Conv2D(4, 3)(x))),
    Case("glu", lambda x: ops.glu(x), (SERIES,)),
    Case("batch_norm_of_steps", lambda x: layers.BatchNormalization(axis=1)(x), (SERIES,)),
    Case("conv1d_transposed", lambda x: layers.Conv1DTranspose(5, 3, 2, "same", activation="relu")(x), (SERIES,), True),
    Case("depthwise1d", lambda x: layers.DepthwiseConv1D(3)(x), (SERIES,), True),
    Case("conv3d", lambda x: layers.Conv3D(5, 3, activation="relu")(x), (_VOLUME,), True),
    Case("conv3d_same_strided", lambda x: layers.Conv3D(5, (2, 3, 3), 2, "same")(x), (_VOLUME,), True),
    Case("max_pool_3d", lambda x: layers.MaxPooling3D(2)(x), (_VOLUME,)),
    Case("max_pool_3d_same", lambda x: layers.MaxPooling3D(3, 2, "same")(x), (_VOLUME,)),
    Case("conv3d_dilated", lambda x: layers.Conv3D(5, 3, padding="same", dilation_rate=2)(x), (_VOLUME,), True),
    Case("average_pool_3d_same", lambda x: layers.AveragePooling3D(3, 2, "same")(x), (_VOLUME,)),
    Case("average_pool_3d", lambda x: layers.AveragePooling3D(2)(x), (_VOLUME,)),
    Case("conv3d_of_groups", lambda x: layers.Conv3D(6, 3, groups=3, activation="relu")(x), (_VOLUME,), True),
    Case("conv3d_transposed", lambda x: layers.Conv3DTranspose(5, (3, 2, 3), (2, 2, 1))(x), (_VOLUME,), True),
    Case(
        "conv3d_transposed_same",
        lambda x: layers.Conv3DTranspose(5, 3, 2, "same", output_padding=1, activation="relu")(x),
        (_VOLUME,),
        True,
    ),
    Case("conv1d_transposed_padded", lambda x: layers.Conv1DTranspose(5, 3, 2, "same", 1)(x), (SERIES,), True),
    Case("global_average_3d", lambda x: layers.GlobalAveragePooling3D()(x), (_VOLUME,)),
    Case("global_max_3d", lambda x: layers.GlobalMaxPooling3D()(x), (_VOLUME,)),
    Case("zero_padding_3d", lambda x: layers.ZeroPadding3D(1)(x), (_VOLUME,)),
    Case("cropping_3d", lambda x: layers.Cropping3D(1)(x), (_VOLUME,)),
    Case("upsampling_3d", lambda x: layers.UpSampling3D(2)(x), (_VOLUME,)),
    Case("upsampling_1d", lambda x: layers.UpSampling1D(2)(x), (SERIES,)),
    Case("conv_by_ops", lambda x: ops.conv(x, _KERNEL, 2, "same"), exact=True),
    Case("depthwise_by_ops", lambda x: ops.depthwise_conv(x, _KERNEL[..., :1]), exact=True),
    Case(
        "separable_by_ops", lambda x: ops.separable_conv(x, _KERNEL[..., :2], _KERNEL[:1, :1].repeat(2, 2)), exact=True
    ),
    Case("pools_by_ops", lambda x: ops.max_pool(ops.average_pool(x, 2), 2)),
    Case("adaptive_average", lambda x: layers.AdaptiveAveragePooling2D(3)(x)),
    Case("adaptive_average_uneven", lambda x: layers.AdaptiveAveragePooling2D((5, 7))(x)),
    Case("adaptive_max_1d", lambda x: layers.AdaptiveMaxPooling1D(4)(x), (SERIES,)),
    Case("resizing_nearest", lambda x: layers.Resizing(7, 5, interpolation="nearest")(x)),
    Case("resizing_bicubic", lambda x: ops.image.resize(x, (24, 18), interpolation="bicubic")),
    Case("resizing_antialiased", lambda x: ops.image.resize(x, (5, 6), antialias=True)),
    Case("resizing_cropped", lambda x: layers.Resizing(6, 4, crop_to_aspect_ratio=True)(x), ((12, 16, 8),)),
    Case("resizing_padded", lambda x: layers.Resizing(6, 4, "lanczos3", pad_to_aspect_ratio=True)(x), ((12, 16, 8),)),
    Case("upsampling_bicubic", lambda x: layers.UpSampling2D(2, interpolation="bicubic")(x)),
    Case("blur", lambda x: ops.image.gaussian_blur(x, (5, 4), (1.5, 1.0))),
    Case("fourier_of_both_axes", lambda x: ops.fft2((x, ops.zeros_like(x)))[0], (SERIES,)),
    Case("fourier", lambda x, y: ops.concatenate(ops.fft((x, y)), -1), (SERIES, SERIES)),
    Case("fourier_of_real", lambda x: ops.concatenate(ops.rfft(x, 12), -1), (SERIES,)),
    Case("fourier_back", lambda x, y: ops.ifft2((x, y))[1], (SERIES, SERIES)),
    Case("center_crop", lambda x: layers.CenterCrop(4, 4)(x)),
    Case("gray", lambda x: ops.image.rgb_to_grayscale(x), ((8, 8, 3),)),
    Case("lambda", lambda x: layers.Lambda(lambda t: ops.relu(t) * 2.0 + ops.mean(t, -1, keepdims=True))(x), (SERIES,)),
]
KERAS_OPS += LAYERS
