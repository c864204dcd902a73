"""Layers that multiply and add constants."""

import keras
import numpy as np

from keras_qat.layers import ChannelScale


def _rescaling(layer, args, kwargs):
    return ChannelScale(np.ravel(layer.scale), np.ravel(layer.offset), name=layer.name)


def _normalization(layer, args, kwargs):
    """`(x - mean) / max(sqrt(variance), epsilon)`, or its inverse."""
    mean, deviation = np.ravel(layer.mean), np.maximum(np.sqrt(np.ravel(layer.variance)), keras.config.epsilon())
    if layer.invert:
        return ChannelScale(deviation, mean, name=layer.name)
    return ChannelScale(1.0 / deviation, -mean / deviation, name=layer.name)


RULES = {"Rescaling": _rescaling, "Normalization": _normalization}
