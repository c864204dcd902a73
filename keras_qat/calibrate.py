"""Ranges from data without training: post-training quantization."""

import keras
import numpy as np
import tensorflow as tf

from keras_qat.data import as_called, input_values
from keras_qat.layers import FakeQuant, calibrating, require_qat

_METHODS = ("minmax",)


def calibrate(
    qat: keras.Model, data, method: str = "minmax", steps: int | None = None, batch_size: int = 32
) -> keras.Model:
    """Sets the ranges of a QAT model from data, in place; weights and batch norms stay as they are.

    Args:
        qat: What `kq.quantize` returned.
        data: A `tf.data.Dataset`, an iterable or a list of batches (inputs, or `(inputs, targets)`), or an array of
            samples (a list or dict of arrays for several inputs).
        method: "minmax": the smallest and largest value that any batch has.
        steps: How many batches to use at the most.
        batch_size: For arrays.

    Returns:
        `qat`.
    """
    if data is None:
        raise ValueError("There is nothing to calibrate with. Expected arrays, a dataset or batches. Received: None")
    if method not in _METHODS:
        raise ValueError(f"Unknown calibration method. Expected one of {_METHODS}. Received: {method!r}")
    require_qat(qat)
    layers = [layer for layer in qat.layers if isinstance(layer, FakeQuant) and layer.quantizer.observes]
    before = [[variable.numpy() for variable in layer.weights] for layer in layers]

    @tf.function(autograph=False, reduce_retracing=True)
    def observe(batch):
        with calibrating():
            return qat(batch, training=False)

    try:
        for layer in layers:
            layer.quantizer.forget()
        count = 0
        for batch in _batches(qat, data, batch_size):
            if steps is not None and count >= steps:
                break
            observe(_checked(qat, batch))
            count += 1
        if count == 0:
            raise ValueError("There is nothing to calibrate with: the data holds no batch. Pass at least one sample.")
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            for variable, value in zip(layer.weights, values, strict=True):
                variable.assign(value)
        raise
    return qat


def _batches(qat, data, batch_size):
    """Batches of inputs, without targets."""
    if _is_list_of_batches(qat, data):
        data = iter(data)
    if isinstance(data, tf.data.Dataset) or hasattr(data, "__next__") or hasattr(data, "num_batches"):
        for batch in data if not hasattr(data, "num_batches") else (data[i] for i in range(data.num_batches)):
            yield batch[0] if isinstance(batch, tuple) else batch
    elif isinstance(data, (list, tuple, dict)) or hasattr(data, "shape"):
        arrays = keras.tree.map_structure(np.asarray, data)
        size = len(keras.tree.flatten(arrays)[0]) if keras.tree.flatten(arrays) else 0
        for start in range(0, size, batch_size):
            yield keras.tree.map_structure(lambda x: x[start : start + batch_size], arrays)
    else:
        for batch in data:
            yield batch[0] if isinstance(batch, tuple) else batch


def _is_list_of_batches(qat, data) -> bool:
    """Whether a list holds batches for the only input, rather than one array for each input."""
    if not isinstance(data, (list, tuple)) or len(data) < 2 or len(qat.inputs) > 1:
        return False
    batches = [batch[0] if isinstance(batch, tuple) and batch else batch for batch in data]
    return all(tuple(np.shape(batch)[1:]) == tuple(qat.inputs[0].shape[1:]) for batch in batches)


def _checked(qat, batch):
    """The batch as the model is called with it, if its shapes fit and all its numbers are finite."""
    values = input_values(qat, batch)
    if len(values) != len(qat.inputs):
        shapes = {tensor._keras_history.operation.name: ("batch", *tensor.shape[1:]) for tensor in qat.inputs}
        raise ValueError(
            f"The model has {len(qat.inputs)} input(s). Expected arrays of shapes {shapes}. Received: a batch of "
            f"{len(values)} arrays of shapes {[np.shape(value) for value in values]}"
        )
    for value, tensor in zip(values, qat.inputs, strict=True):
        name = tensor._keras_history.operation.name
        if tuple(value.shape[1:]) != tuple(tensor.shape[1:]):
            raise ValueError(
                f"Calibration data for input {name!r} has the wrong shape. Expected: {('batch', *tensor.shape[1:])}. "
                f"Received: {tuple(value.shape)}"
            )
        if np.issubdtype(np.asarray(value).dtype, np.floating) and not np.all(np.isfinite(value)):
            raise ValueError(f"Calibration data for input {name!r} holds NaN or infinite values. Clean it first.")
    return as_called(qat, [tf.convert_to_tensor(value) for value in values])
