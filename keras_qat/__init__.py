"""Quantization-aware training for Keras 3, to full-int8 `.tflite` files that compute what training saw."""

import keras

from keras_qat import callbacks, clipping, pruning, quantizers, schedules
from keras_qat.calibrate import calibrate
from keras_qat.errors import Problem, UnsupportedModelError
from keras_qat.export import ExportError, ExportReport, export
from keras_qat.graph.freeze import freeze
from keras_qat.quantize import Explanation, explain, quantize
from keras_qat.spec import Rule, Scheme, Spec
from keras_qat.version import __version__

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"keras_qat runs on Keras's TensorFlow backend. Received: {keras.backend.backend()!r}. Set "
        "KERAS_BACKEND=tensorflow before keras is imported."
    )

__all__ = [
    "Explanation",
    "ExportError",
    "ExportReport",
    "Problem",
    "Rule",
    "Scheme",
    "Spec",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "callbacks",
    "clipping",
    "explain",
    "export",
    "freeze",
    "pruning",
    "quantize",
    "quantizers",
    "schedules",
]
