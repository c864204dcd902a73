"""Callbacks for `fit`, for QAT models and for any other Keras model."""

from keras_qat.callbacks.gradient_clipping import GradientClipping
from keras_qat.callbacks.int8_evaluation import Int8Evaluation
from keras_qat.callbacks.pruning import Pruning
from keras_qat.callbacks.quantization_schedule import QuantizationSchedule

__all__ = ["GradientClipping", "Int8Evaluation", "Pruning", "QuantizationSchedule"]
