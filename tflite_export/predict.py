"""Real values in, real values out: a `.tflite` as easy to use as a Keras model."""

import os
from typing import Any

import numpy as np

from tflite_export.inspect import inspect, load
from tflite_export.runtimes import run
from tflite_export.verify import grid_of, input_arrays


def predict(tflite: bytes | str | os.PathLike, inputs: Any, runtime: str = "xnnpack") -> np.ndarray | dict:
    """Runs a file on real values: quantizes the inputs and dequantizes the outputs as the file says.

    Args:
        tflite: The file's bytes, or its path.
        inputs: Samples along the first axis: an array, a list in the order of the inputs, or a dict by name.
        runtime: "xnnpack", "litert" (reference kernels) or "tflm".

    Returns:
        The output as an array; a dict by name where there are several.

    Example:
        >>> accuracy = np.mean(np.argmax(tflite_export.predict("model.tflite", x_test), -1) == y_test)
    """
    content = load(tflite)
    summary = inspect(content)
    values = run(runtime, content, input_arrays(inputs, summary.inputs)).outputs
    real = {
        port.name: grid_of(port.tensor).dequantize(array) for port, array in zip(summary.outputs, values, strict=True)
    }
    return real if len(real) > 1 else next(iter(real.values()))
