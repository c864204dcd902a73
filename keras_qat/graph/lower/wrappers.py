"""Layers that apply other layers along time: TimeDistributed and Bidirectional."""

import math

import keras
from keras import ops

from keras_qat.graph.lower.moves import reshaped
from keras_qat.graph.lower.recurrent import RULES as _RECURRENT
from keras_qat.graph.lower.recurrent import steps_of, unrolled
from keras_qat.graph.walk import config_of, key_of


def _bidirectional(layer, args, kwargs):
    """Both layers over the same sequence; the steps of the second one are put in order where they are stacked."""
    both = (layer.forward_layer, layer.backward_layer)
    if any(key_of(one) not in _RECURRENT for one in both):
        return None
    runs = [unrolled(one, prefix) for one, prefix in zip(both, ("forward.", "backward."), strict=True)]
    merge = _merge(layer.merge_mode)

    def call(sequence, initial_state=None, mask=None, training=None):
        results, states = [], []
        for one, run, given in zip(both, runs, _halves(initial_state), strict=True):
            outputs, last = run(sequence, given, mask)
            ordered = outputs[:: -1 if one is layer.backward_layer else 1]
            results.append(ops.stack(ordered, axis=1) if layer.return_sequences else outputs[-1])
            states += last
        merged = merge(*results)
        if not layer.return_state:
            return merged
        return (*(merged if layer.merge_mode is None else [merged]), *states)

    return call


def _halves(initial_state):
    if initial_state is None:
        return None, None
    half = len(initial_state) // 2
    return initial_state[:half], initial_state[half:]


def _merge(mode):
    return {
        "concat": lambda one, other: ops.concatenate([one, other], axis=-1),
        "sum": ops.add,
        "ave": lambda one, other: ops.multiply(ops.add(one, other), 0.5),
        "mul": ops.multiply,
        None: lambda *both: both,
    }[mode]


def _time_distributed(layer, args, kwargs):
    """All steps at once where the inner layer can do that; else it is called step by step."""
    inner, shape = layer.layer, args[0].shape
    at_once = _AT_ONCE.get(key_of(inner), lambda inner, shape: None)(inner, shape)

    def call(inputs, training=None, mask=None):
        _refuse_mask(inputs, mask)
        if at_once is not None:
            return at_once(inputs)
        return ops.stack([inner(x) for x in steps_of(inputs)], axis=1)

    _refuse_mask(args[0], kwargs.get("mask"))
    return call


def _refuse_mask(sequence, mask) -> None:
    if mask is not None or getattr(sequence, "_keras_mask", None) is not None:
        raise ValueError(
            "Which of its steps count depends on the data (a Masking layer, or Embedding(mask_zero=True)). Cut or pad the "
            "sequences to one length and train on them without a mask."
        )


# --- inner layers that take all steps at once: `(layer, shape of the sequence) -> callable`, or None -----------------


def _pointwise(inner, shape):
    """It looks at single numbers, wherever they are."""
    return inner


def _per_last_axis(inner, shape):
    """It works along the last axis, and broadcasts over all others."""
    return inner if getattr(inner, "axis", -1) in (-1, [-1], (-1,)) and len(shape) <= 4 else None


def _batch_norm(inner, shape):
    """Another one, of the sequence's rank. In training it normalizes all steps together."""
    if inner.axis not in (-1, len(shape) - 2) or len(shape) > 4:
        return None
    return _rebuilt(keras.layers.BatchNormalization, {**config_of(inner), "axis": -1}, inner, shape)


def _along_rows(inner, shape):
    """A layer on series becomes one on images whose rows are the steps, with a window one row high."""
    config = config_of(inner)
    if config["padding"] == "causal" or config["data_format"] != "channels_last":
        return None
    for key in ("kernel_size", "pool_size", "strides", "dilation_rate"):
        if key in config:
            config[key] = (1, *config[key])
    return _rebuilt(getattr(keras.layers, key_of(inner).replace("1D", "2D")), config, inner, shape)


def _below_each_other(inner, shape):
    """Images below each other are one image, as long as no window reaches from one into the next."""
    window, stride = getattr(inner, "kernel_size", None) or inner.pool_size, inner.strides
    if window[0] > stride[0] or shape[2] % stride[0] or inner.data_format != "channels_last":
        return None

    def call(x):
        steps, rows, *others = x.shape[1:]
        y = inner(ops.reshape(x, (-1, steps * rows, *others)))
        return ops.reshape(y, (-1, steps, y.shape[1] // steps, *y.shape[2:]))

    return call


def _whole_average(inner, shape):
    return _pooled(keras.layers.AveragePooling2D, inner, shape)


def _whole_maximum(inner, shape):
    return _pooled(keras.layers.MaxPooling2D, inner, shape)


def _pooled(pooling, inner, shape):
    """A pooling over all of each step is one over the rows of an image whose rows are the steps."""
    if inner.data_format != "channels_last":
        return None
    *places, channels = shape[2:]
    pool = pooling((1, math.prod(places)), name=inner.name)
    kept = [1] * len(places) if inner.keepdims else []

    def call(x):
        rows = reshaped(x, (-1, x.shape[1], math.prod(places), channels))
        return ops.reshape(pool(rows), (-1, x.shape[1], *kept, channels))

    return call


def _reshape(inner, shape):
    target = inner.compute_output_shape((None, *shape[2:]))[1:]
    return lambda x: reshaped(x, (-1, x.shape[1], *target))


def _rebuilt(kind, config, inner, shape):
    """A layer of this kind with the weights of `inner`, built on all steps."""
    layer = kind.from_config(config)
    layer.build((None, *shape[1:]))
    layer.trainable = inner.trainable
    for new, old in zip(layer.weights, inner.weights, strict=True):
        new.assign(ops.reshape(old, new.shape))
    return layer


_AT_ONCE = {
    **dict.fromkeys(["Activation", "ReLU", "LeakyReLU", "ELU", "Rescaling"], _pointwise),
    **dict.fromkeys(["Identity", "AlphaDropout", "Dropout", "GaussianDropout", "GaussianNoise"], _pointwise),
    **dict.fromkeys(["Dense", "Embedding", "LayerNormalization", "RMSNormalization", "Softmax"], _per_last_axis),
    "UnitNormalization": _per_last_axis,
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(["Conv1D", "DepthwiseConv1D", "SeparableConv1D"], _along_rows),
    **dict.fromkeys(["AveragePooling1D", "MaxPooling1D"], _along_rows),
    **dict.fromkeys(["Conv2D", "DepthwiseConv2D", "SeparableConv2D"], _below_each_other),
    **dict.fromkeys(["AveragePooling2D", "MaxPooling2D"], _below_each_other),
    **dict.fromkeys(["GlobalAveragePooling1D", "GlobalAveragePooling2D"], _whole_average),
    **dict.fromkeys(["GlobalMaxPooling1D", "GlobalMaxPooling2D"], _whole_maximum),
    **dict.fromkeys(["Flatten", "Reshape"], _reshape),
}
RULES = {"Bidirectional": _bidirectional, "TimeDistributed": _time_distributed}
