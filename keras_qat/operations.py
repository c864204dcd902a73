"""The table: what each Keras operation is to the integer world. Annotate, freeze and explain all read it.

To add an op, add a row here and a function to one of graph/emit/ that writes it. The ranges a row can have:

    own      the result gets a range of its own, observed in training
    same     values are only moved or chosen: the result shares its inputs' range and needs no rounding
    rounded  shares its input's range, but its values have to be rounded to that grid again (averages)
    joined   shares its input's range and has a say in it
    fixed    TFLite prescribes the range
    clamp    relu and its like: fused into the op in front of it where that op can, one range behind it
    train    does something in training only, and is not in the file
    tied     is not in the file either; all tensors that such a layer is called on share one range
    index    whole numbers that count something (the winner of an argmax), not values on a grid
    float    stays in float, because a rule says so
    constant a tensor that no op of the file computes, on a range of its own
    look-up  a function of single numbers; `graph/lookups.py` makes a `Pointwise` of it, with a range of its own
"""

import dataclasses
import types
from collections.abc import Callable

import keras

from keras_qat import ties
from keras_qat.compounds import Probabilities
from keras_qat.graph.emit import arithmetic, functions, pooling, resizing, shapes, truths, weighted, wide
from keras_qat.graph.lookups import LOOKUPS, SINGLE_OPS, constants_of
from keras_qat.graph.passed_masks import MASKING_IS_REFUSED
from keras_qat.graph.rows import batch_axis
from keras_qat.graph.walk import is_index, key_of


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation.

    Args:
        op: The TFLite op(s), for people.
        range: See above; or a function of the node that says which.
        emit: Writes the op into a program.
        channels: The axes of the kernel that number the output channels; for layers with quantized weights.
        fuses: The TFLite op takes a fused activation.
        limits: The prescribed range of a "fixed" row.
        refuses: `node -> (reason, way out)` for the configurations that TFLite cannot express, else None.
        factors: `(node, scales of its inputs) -> {"factors": scales, ...}`, whose product is the scale of the op's
            accumulator, for an op whose range can be moved so that all kernels round alike (see `FakeQuant.call`).
        bits: Of the result, where they are more than those of what it reads.
        ties: Of a "rounded" row, `node -> which way its kernel rounds ties`: "away" from the integer zero, or "up".
        activation: What a "clamp" is as the fused activation of the op in front of it; None where the grid does it all.
    """

    op: str
    range: str | Callable
    emit: Callable | None = None
    channels: tuple[int, ...] = ()
    fuses: bool = False
    limits: tuple[float, float] | None = None
    refuses: Callable | None = None
    factors: Callable = lambda node, scales: None
    bits: int = 8
    ties: Callable = lambda node: "away"
    activation: str | None = None

    def range_kind(self, node) -> str:
        return self.range(node) if callable(self.range) else self.range


def _channels_last(node):
    if getattr(node.operation, "data_format", "channels_last") != "channels_last":
        return "It runs in channels_first, which TFLite does not have.", "Build it with data_format='channels_last'."
    return None


def _transposed(node):
    if any(rate != 1 for rate in node.operation.dilation_rate):
        return "TFLite has no dilated transposed convolution.", "Use dilation_rate=1."
    return _channels_last(node)


def _batch_norm(node):
    axis, rank = node.operation.axis, len(node.input_tensors[0].shape)
    if axis % rank != rank - 1:
        return f"It normalizes axis {axis}, not the last one.", "Use BatchNormalization(axis=-1)."
    return None


def _softmax(node):
    axis, rank = node.operation.axis, len(node.input_tensors[0].shape)
    if not isinstance(axis, int) or axis % rank != rank - 1:
        return f"TFLite's SOFTMAX works on axes of a sample; this one has axis={axis}.", "Name another axis."
    return None


def _two_tensors(node):
    if len(node.input_tensors) != 2:
        return "One of its operands is a constant of a shape it cannot fold.", "Use one number, or one per channel."
    return None


def _slices(node):
    keys = shapes.slice_keys(node)
    steps = [k for k in keys if isinstance(k, slice)]
    if any(not isinstance(k, (int, slice, type(None), type(Ellipsis))) for k in keys):
        return f"Only numbers and slices can stand in the brackets. Received: {keys}", "Use ops.take for the rest."
    if any(k.step is not None and k.step < 0 for k in steps):
        return "A slice runs backwards.", "Use a positive step."
    rank, batch = len(node.input_tensors[0].shape), batch_axis(node.input_tensors[0])
    if batch is not None and shapes.expanded(keys, rank)[batch] != slice(None):
        return "It slices the batch axis.", "Slice other axes only."
    return None


def _both_inputs(node, scales):
    return {"factors": scales}


def _product_factors(node, scales):
    one, other = node.input_tensors
    return {"factors": scales, **({"square": True} if one is other else {})}


def _mean_factors(node, scales):
    count = pooling.values_per_mean(node)
    return {"factors": scales[:1], "constant": 1.0 / count, "count": count} if _is_mean(node) else None


def _is_mean(node) -> bool:
    return ties.has_divisors(pooling.values_per_mean(node))


def _mean_range(node):
    return "own" if _is_mean(node) else "rounded"


def _reduces(node):
    axes, rank = pooling.reduced_axes(node), len(node.input_tensors[0].shape)
    is_over_batch = batch_axis(node.input_tensors[0]) in axes
    return ("It reduces the batch axis.", f"Name the axes: axis={tuple(range(1, rank))}.") if is_over_batch else None


def _matmuls(node):
    if len(node.input_tensors) != 2:
        return "It multiplies a constant matrix from the left.", "Write it as x @ w, with the constant on the right."
    if not 3 <= max(len(x.shape) for x in node.input_tensors) <= 5:
        return "BATCH_MATMUL takes 3 to 5 axes, the batch included.", "Reshape the tensors."
    return None


def _takes(node):
    axis, rank = node.operation.axis, len(node.input_tensors[0].shape)
    if axis is None or (len(node.input_tensors) == 1 and axis % rank == batch_axis(node.input_tensors[0])):
        return "It takes from the batch axis.", "Name another axis."
    return None


def _selects(node):
    condition = node.arguments.args[0]
    if isinstance(condition, keras.KerasTensor) and not _is_truth(condition):
        return (
            "Its mask depends on values on a grid; truth values come from whole numbers alone.",
            "Compute the mask from an input of type int32 or bool, or multiply by a mask of 0 and 1; a function of one tensor "
            "can be looked up.",
        )
    return None


def _one_tensor(node):
    if constants_of(node):
        return (
            "It computes with several constants, one for each channel; only one function of single numbers can be looked up.",
            "Use one number, or write it with + - * minimum and maximum, which take one for each channel.",
        )
    tensors = {id(tensor) for tensor in node.input_tensors}
    if len(tensors) != 1:
        return (
            "It combines several tensors; only a function of single numbers can be looked up.",
            "Write it with + - * and functions of one tensor.",
        )
    if node.outputs[0].dtype == "bool":
        return (
            "Truth values are not in the integer graph.",
            "Use it inside of ops.where with values of the same tensor.",
        )
    return None


def _keeps_batch_of_one(node):
    before, after = node.input_tensors[0].shape, node.outputs[0].shape
    if len(before) == len(after) and after[0] in (None, before[0]):
        return None
    return f"It changes the batch axis ({before} → {after}).", "Broadcast behind the batch axis only."


def _global_average(call):
    """MEAN where all kernels round it alike, else AVERAGE_POOL_2D on the grid of its input."""
    pooling.mean(call) if _is_mean(call.node) else pooling.global_average_pool(call)


def _concatenates(node):
    axis, rank = node.operation.axis, len(node.outputs[0].shape)
    is_batch = axis % rank == batch_axis(node.outputs[0])
    return ("It joins tensors along the batch axis.", "Use axis=-1, or another behind axis 0.") if is_batch else None


def _relu_with_options(node):
    op = node.operation
    if op.threshold != 0 or op.negative_slope != 0 or not op.max_value:
        return (
            "TFLite has no relu with a threshold, or with both a slope and a maximum.",
            "Use relu, relu6, leaky_relu.",
        )
    return None


def _keeps_batch(node):
    shape_in, shape_out = node.input_tensors[0].shape, node.outputs[0].shape
    if max(shape_in.count(None), shape_out.count(None)) > 1:
        return f"It mixes the batch into another axis ({shape_in} → {shape_out}).", "Keep the batch axis as it is."
    return None


def _pad_range(node):
    return "same" if shapes.pad_value(node) == 0 else "rounded"


def _upsampling_range(node):
    return "rounded" if resizing.interpolates(node) else "same"


def _hides(node):
    if len(node.input_tensors) == 2 and not _is_truth(node.input_tensors[1]):
        return (
            "What it hides depends on values on a grid; truth values come from whole numbers alone.",
            "Compute the mask from an input of type int32 or bool, or give it as one.",
        )
    return None


def _is_truth(tensor) -> bool:
    """Whether a tensor holds truth values in the file too: not where a look-up makes numbers of them."""
    operation, index, _ = tensor._keras_history
    row = row_of(operation)
    if row is not None and row.range == "same":
        return _is_truth(operation._inbound_nodes[index].input_tensors[0])
    return tensor.dtype == "bool" and (row is None or row.range == "index")


def _casts(node):
    if is_index(node.input_tensors[0]) and not is_index(node.outputs[0]):
        return (
            "It computes with whole numbers of an input that counts something.",
            "Compare it (ids != 0) before you make real numbers of it, or give the model what comes of it as an input.",
        )
    return None


def _resizes(node):
    op = node.operation
    if op.antialias or op.crop_to_aspect_ratio or op.pad_to_aspect_ratio or len(node.input_tensors[0].shape) != 4:
        return (
            "TFLite resizes batches of images without antialiasing, cropping or padding.",
            "Do these by other layers.",
        )
    return _upsamples(node)


def _upsamples(node):
    if getattr(node.operation, "interpolation", "nearest") not in ("nearest", "bilinear"):
        return f"interpolation={node.operation.interpolation!r} has no TFLite op.", "Use 'nearest' or 'bilinear'."
    return _channels_last(node)


GONE = ("train", "tied")  # kinds of operations that are not in the file
_MOVES = dict(range="same", refuses=_keeps_batch)
_POOL = dict(fuses=False, refuses=_channels_last)
_SIGMOID = Row("LOGISTIC", "fixed", arithmetic.logistic, limits=(0.0, 255 / 256))
_TANH = Row("TANH", "fixed", arithmetic.tanh, limits=(-1.0, 127 / 128))
_SOFTMAX = Row("SOFTMAX", "fixed", arithmetic.softmax, limits=(0.0, 255 / 256), refuses=_softmax)
_MAX_POOL = Row("MAX_POOL_2D", "same", pooling.max_pool, **_POOL)
_AVERAGE_POOL = Row("AVERAGE_POOL_2D", "rounded", pooling.average_pool, **_POOL)
_GLOBAL_MAX_POOL = Row("REDUCE_MAX", "same", pooling.largest, **_POOL)
_GLOBAL_AVERAGE_POOL = Row("MEAN / AVERAGE_POOL_2D", _mean_range, _global_average, factors=_mean_factors, **_POOL)
_PAD = Row("PAD, PADV2 or MIRROR_PAD", _pad_range, shapes.pad, refuses=_channels_last)
_RESIZE = dict(op="RESIZE_BILINEAR / RESIZE_NEAREST_NEIGHBOR", range=_upsampling_range, emit=resizing.resize)
_UPSAMPLING = Row(**_RESIZE, refuses=_upsamples)
_RESHAPE = Row("RESHAPE", emit=shapes.reshape, **_MOVES)
_TRAINING_ONLY = Row("-", "train")

OPERATIONS: dict[str, Row] = {
    # weights
    "Dense": Row("FULLY_CONNECTED", "own", weighted.fully_connected, channels=(-1,), fuses=True),
    "Conv1D": Row("CONV_2D", "own", weighted.conv_1d, channels=(-1,), fuses=True, refuses=_channels_last),
    "Conv2D": Row("CONV_2D", "own", weighted.conv_2d, channels=(-1,), fuses=True, refuses=_channels_last),
    "DepthwiseConv1D": Row(
        "DEPTHWISE_CONV_2D", "own", weighted.depthwise_conv_1d, (1, 2), True, refuses=_channels_last
    ),
    "DepthwiseConv2D": Row(
        "DEPTHWISE_CONV_2D", "own", weighted.depthwise_conv_2d, (2, 3), True, refuses=_channels_last
    ),
    "Conv2DTranspose": Row("TRANSPOSE_CONV", "own", weighted.conv_2d_transpose, (2,), True, refuses=_transposed),
    "ChannelScale": Row("DEPTHWISE_CONV_2D", "own", weighted.channel_scale, channels=(0,), fuses=True),
    "Rescale": Row("MUL", "own", arithmetic.rescale, fuses=True),
    "BatchNormalization": Row(
        "folded, DEPTHWISE_CONV_2D, or MUL and ADD", "own", arithmetic.batch_norm, refuses=_batch_norm
    ),
    # arithmetic
    "ops.Add": Row("ADD", "own", arithmetic.add, fuses=True, refuses=_two_tensors),
    "ops.Subtract": Row("SUB", "own", arithmetic.subtract, fuses=True, refuses=_two_tensors),
    "Sum": Row("ADD / SUB", "own", arithmetic.sum_of_two, fuses=True),
    "ops.Multiply": Row("MUL", "own", arithmetic.multiply, fuses=True, refuses=_two_tensors, factors=_product_factors),
    "ops.Maximum": Row("MAXIMUM", "same", arithmetic.maximum, refuses=_two_tensors),
    "ops.Minimum": Row("MINIMUM", "same", arithmetic.minimum, refuses=_two_tensors),
    # activations
    "ops.Relu": Row("RELU", "clamp", arithmetic.relu, activation="RELU"),
    "ops.Relu6": Row("RELU6", "clamp", arithmetic.relu6, activation="RELU6"),
    "ops.ReLU": Row("RELU", "clamp", arithmetic.relu, refuses=_relu_with_options, activation="RELU"),
    "Clamp": Row("the end of a grid, or MUL", "clamp", arithmetic.clamp),
    "ops.Clip": Row("CAST + ADD + GATHER", "look-up", refuses=_one_tensor),
    "Slope": Row("PRELU", "joined", arithmetic.slope),
    "HardSwish": Row("HARD_SWISH", "own", arithmetic.hard_swish),
    "ops.Sigmoid": _SIGMOID,
    "ops.Tanh": _TANH,
    "ops.Softmax": _SOFTMAX,
    # pooling
    "MaxPooling1D": _MAX_POOL,
    "MaxPooling2D": _MAX_POOL,
    "AveragePooling1D": _AVERAGE_POOL,
    "AveragePooling2D": _AVERAGE_POOL,
    "GlobalMaxPooling1D": _GLOBAL_MAX_POOL,
    "GlobalMaxPooling2D": _GLOBAL_MAX_POOL,
    "GlobalAveragePooling1D": _GLOBAL_AVERAGE_POOL,
    "GlobalAveragePooling2D": _GLOBAL_AVERAGE_POOL,
    # shape
    "ZeroPadding1D": _PAD,
    "ZeroPadding2D": _PAD,
    "ops.Pad": _PAD,
    "UpSampling1D": _UPSAMPLING,
    "UpSampling2D": _UPSAMPLING,
    "ops.Resize": Row(**_RESIZE, refuses=_resizes),
    "ExactUpsampling": Row(
        "RESIZE_NEAREST_NEIGHBOR, MIRROR_PAD, DEPTHWISE_CONV_2D",
        "rounded",
        resizing.exact_upsampling,
        ties=lambda node: "up",
    ),
    "Reshape": _RESHAPE,
    "Flatten": _RESHAPE,
    "ops.Reshape": _RESHAPE,
    "ops.ExpandDims": _RESHAPE,
    "ops.Squeeze": _RESHAPE,
    "ops.Transpose": Row("TRANSPOSE", "same", shapes.transpose),
    "ops.DepthToSpace": Row("DEPTH_TO_SPACE", "same", shapes.depth_to_space, refuses=_channels_last),
    "ops.SpaceToDepth": Row("SPACE_TO_DEPTH", "same", shapes.space_to_depth, refuses=_channels_last),
    "ops.GetItem": Row("STRIDED_SLICE", "same", shapes.strided_slice, refuses=_slices),
    "ops.Concatenate": Row("CONCATENATION", "same", shapes.concatenation, refuses=_concatenates),
    "ops.Take": Row("GATHER", "same", shapes.take, refuses=_takes),
    "ops.Stack": Row("PACK", "same", shapes.stack),
    "ops.Where": Row("SELECT_V2", "same", shapes.select, refuses=_selects),
    "ops.BroadcastTo": Row("BROADCAST_TO", "same", shapes.broadcast, refuses=_keeps_batch_of_one),
    "Constant": Row("-", "constant", shapes.constant_tensor),
    "NormMultiplier": Row("-", "constant", arithmetic.norm_multiplier),
    "NormOffset": Row("-", "constant", arithmetic.norm_offset),
    "InFloat": Row("float", "float", lambda call: emit_in_float(call)),
    # products and reductions
    "ops.Matmul": Row("BATCH_MATMUL", "own", arithmetic.batch_matmul, refuses=_matmuls, factors=_both_inputs),
    "TransposedMatmul": Row("BATCH_MATMUL", "own", arithmetic.transposed_matmul, factors=_both_inputs),
    "ops.Mean": Row("MEAN / AVERAGE_POOL_2D", _mean_range, _global_average, refuses=_reduces, factors=_mean_factors),
    "ops.Max": Row("REDUCE_MAX", "same", pooling.largest, refuses=_reduces),
    "ops.Min": Row("REDUCE_MIN", "same", pooling.smallest, refuses=_reduces),
    "ops.Argmax": Row("ARG_MAX", "index", pooling.index_of_largest),
    "ops.Argmin": Row("ARG_MIN", "index", pooling.index_of_smallest),
    # inside of normalizations, attention and recurrent cells
    "InverseRoot": Row("RSQRT or a look-up", "own", functions.inverse_root),
    "Mask": Row("MINIMUM or SELECT_V2", "rounded", truths.mask, refuses=_hides),
    "Comparison": Row("NOT_EQUAL and the like", "index", truths.comparison),
    "Logic": Row("LOGICAL_AND, LOGICAL_OR", "index", truths.logic),
    "Number": Row("SELECT_V2", "fixed", truths.number, limits=(0.0, 1.0)),
    "Not": Row("LOGICAL_NOT", "index", truths.negation),
    "Narrow": Row("QUANTIZE", "own", wide.narrow, factors=_both_inputs),
    "Probabilities": Row("SOFTMAX", "fixed", wide.probabilities, limits=Probabilities.LIMITS, bits=16),
    "WideAdd": Row("ADD", "own", wide.wide_add, bits=16),
    "Widen": Row("QUANTIZE", "same", wide.widen, bits=16),
    "WideMatmul": Row("BATCH_MATMUL", "own", wide.wide_matmul, bits=16),
    "Scores": Row("the end of a grid", "clamp", wide.scores),
    # functions of single numbers
    "Pointwise": Row("look-up", "own", functions.pointwise),
    **{key: Row(SINGLE_OPS.get(key, "CAST + ADD + GATHER"), "look-up", refuses=_one_tensor) for key in sorted(LOOKUPS)},
    "OneGrid": Row("-", "tied"),
    # training only, or refused
    "Masking": Row("-", "train", refuses=lambda node: MASKING_IS_REFUSED),
    "Identity": _TRAINING_ONLY,
    "ops.Cast": dataclasses.replace(_TRAINING_ONLY, refuses=_casts),
    "ops.ConvertToTensor": _TRAINING_ONLY,
    "ops.Copy": _TRAINING_ONLY,
    "ops.StopGradient": _TRAINING_ONLY,
    "SpatialDropout3D": _TRAINING_ONLY,
    "StochasticDepth": _TRAINING_ONLY,
    "ops.Identity": _TRAINING_ONLY,
    "ActivityRegularization": _TRAINING_ONLY,
    "AddedLoss": _TRAINING_ONLY,
    "AlphaDropout": _TRAINING_ONLY,
    "Dropout": _TRAINING_ONLY,
    "SpatialDropout1D": _TRAINING_ONLY,
    "SpatialDropout2D": _TRAINING_ONLY,
    "GaussianDropout": _TRAINING_ONLY,
    "GaussianNoise": _TRAINING_ONLY,
    **dict.fromkeys(("AugMix", "CutMix", "MixUp", "RandAugment", "Solarization"), _TRAINING_ONLY),
    **{
        f"Random{what}": _TRAINING_ONLY
        for what in [
            "Flip",
            "Rotation",
            "Zoom",
            "Translation",
            "Contrast",
            "Brightness",
            "Hue",
            "Saturation",
            "Sharpness",
            "Shear",
            "ColorJitter",
            "ColorDegeneration",
            "Erasing",
            "Grayscale",
            "Invert",
            "Perspective",
            "Posterization",
            "GaussianBlur",
            "ElasticTransform",
        ]
    },
}


def emit_in_float(call) -> None:
    """Writes an operation that a rule leaves in float, by the function of its own row."""
    inner, node = call.operation.operation, call.node
    node = types.SimpleNamespace(
        operation=inner, arguments=node.arguments, input_tensors=node.input_tensors, outputs=node.outputs
    )
    OPERATIONS[key_of(inner)].emit(dataclasses.replace(call, operation=inner, node=node))


def row_of(operation) -> Row | None:
    """The row of an operation, or None where the table has none."""
    return OPERATIONS.get(key_of(operation))
