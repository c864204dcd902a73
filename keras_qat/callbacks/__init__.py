"""Callbacks for `fit`, for QAT models and for any other Keras model."""

from keras_qat.callbacks.gradient_clipping import GradientClipping
from keras_qat.callbacks.pruning import Pruning

__all__ = ["GradientClipping", "Pruning"]
