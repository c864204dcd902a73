"""Measures the model that ships, the int8 file on LiteRT, at the end of epochs."""

import contextlib
import itertools
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

import tflite_export
from keras_qat.data import as_called, input_values
from keras_qat.graph.freeze import freeze, output_names
from keras_qat.graph.walk import input_names
from keras_qat.layers import require_qat
from tflite_export.runtimes import available

_PORTION_BYTES = 2**27  # of inputs that are held at a time: a dataset may be larger than the memory
_METRIC_SAMPLES = 4096  # whose outputs go into the metrics at a time


class Int8Evaluation(keras.callbacks.Callback):
    """Freezes the model in memory, runs the int8 program on LiteRT, and puts the model's own metrics of it in the logs.

    For each metric of `compile`, and the loss, the logs get `val_int8_<metric>` and `val_int8_<metric>_gap`: what the file
    has more than the model's own prediction of the same data, which simulates it. (The loss is that of `compile`, without
    regularizers.) The program is the one that `kq.export` writes with its default options.

    Give it to `fit` in front of the callbacks that read these logs.

    Args:
        x: Inputs as for `evaluate`: an array, a list or a dict of arrays; or a `tf.data.Dataset` or a
            `keras.utils.PyDataset` of batches `(x, y)` or `(x, y, sample_weight)`.
        y: The targets, if `x` does not bring them along.
        every: 1 evaluates at the end of each epoch, 2 at that of every other one, and so on.
        sample_weight: Weights of the samples, if `x` does not bring them along.
        batch_size: Of the simulation, for arrays.
        steps: How many batches of a dataset to use at the most; None: all.
        runtime: "xnnpack" (LiteRT's default), "litert" (its reference kernels) or "tflm".

    Example:
        ```python
        callbacks = [
            kq.callbacks.Int8Evaluation(x_val, y_val),
            keras.callbacks.ModelCheckpoint("best.keras", monitor="val_int8_accuracy", mode="max", save_best_only=True),
        ]
        qat.fit(x, y, epochs=10, callbacks=callbacks)
        ```
    """

    def __init__(
        self,
        x,
        y=None,
        every: int = 1,
        *,
        sample_weight=None,
        batch_size: int = 32,
        steps: int | None = None,
        runtime: str = "xnnpack",
    ):
        super().__init__()
        for name, value in (("every", every), ("batch_size", batch_size), ("steps", 1 if steps is None else steps)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is a whole number, 1 or more. Received: {value!r}")
        is_dataset = isinstance(x, (tf.data.Dataset, keras.utils.PyDataset))
        if is_dataset and (y is not None or sample_weight is not None):
            raise ValueError("A dataset brings its targets and sample weights along. Leave out y and sample_weight.")
        if not is_dataset and y is None:
            raise ValueError(
                "There are no targets to measure with. Expected x and y, or a tf.data.Dataset of (x, y). Received: y=None"
            )
        if is_dataset and steps is None and _is_endless(x):
            raise ValueError("This dataset has no end. Say with steps=... how many of its batches to use.")
        if not available(runtime):
            raise ImportError(f"Runtime {runtime!r} is not installed: pip install keras_qat[micro].")
        self.data = x if is_dataset else _checked_arrays(x, y, sample_weight)
        self.every, self.batch_size, self.steps, self.runtime = every, batch_size, steps, runtime

    def on_train_begin(self, logs=None):
        require_qat(self.model)
        if not self.model.compiled:
            raise ValueError(
                f"Int8Evaluation measures by the metrics of compile, and model {self.model.name!r} has none. Call "
                "model.compile(optimizer, loss, metrics=[...]) first."
            )
        self._check_data()

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None and (epoch + 1) % self.every == 0:
            logs.update(self.evaluate())

    def evaluate(self) -> dict:
        """What goes into the logs, measured now."""
        content = tflite_export.write(freeze(self.model))
        parts = [
            (self._simulated(x, batch_size), self._on_runtime(content, x), y, weight)
            for x, y, weight, batch_size in self._portions()
        ]
        simulated, real, y, weight = tree.map_structure(_joined, *parts)
        with _kept(self.model.metrics_variables):
            expected, found = self._metrics(simulated, y, weight), self._metrics(real, y, weight)
        gaps = {f"val_int8_{name}_gap": value - expected[name] for name, value in found.items()}
        return {**{f"val_int8_{name}": value for name, value in found.items()}, **gaps}

    def _simulated(self, inputs: list, batch_size: int):
        return self.model.predict(as_called(self.model, inputs), batch_size=batch_size, verbose=0)

    def _on_runtime(self, content: bytes, inputs: list):
        outputs = tflite_export.predict(content, inputs, self.runtime)
        listed = [outputs[name] for name in output_names(self.model)] if isinstance(outputs, dict) else [outputs]
        return tree.pack_sequence_as(self.model._outputs_struct, listed)

    def _metrics(self, outputs, y, sample_weight) -> dict:
        """The model's metrics of all samples, as `evaluate` gives them."""
        model = self.model
        model.reset_metrics()
        for start in range(0, _count(outputs), _METRIC_SAMPLES):
            part = tree.map_structure(
                lambda array: None if array is None else ops.convert_to_tensor(array[start : start + _METRIC_SAMPLES]),  # noqa: B023
                (y, outputs, sample_weight),
            )
            if model._compile_loss is not None:
                model._loss_tracker.update_state(model._compile_loss(*part), sample_weight=_count(part[1]))
            model.compute_metrics(None, *part)
        results = model.get_metrics_result()
        has_loss = model._compile_loss is not None
        return {name: _plain(value) for name, value in results.items() if has_loss or name != "loss"}

    def _portions(self) -> Iterator[tuple]:
        """Inputs in the order of the model's, targets, sample weights and the size of a batch, in portions."""
        batches, size = [], 0
        for batch in self._batches():
            x, y, weight = keras.utils.unpack_x_y_sample_weight(batch)
            batches.append((input_values(self.model, x), y, weight))
            size += sum(np.asarray(array).nbytes for array in batches[-1][0])
            if size >= _PORTION_BYTES:
                yield (*tree.map_structure(_joined, *batches), _count(batches[0][0]))
                batches, size = [], 0
        if batches:
            yield (*tree.map_structure(_joined, *batches), _count(batches[0][0]))

    def _batches(self) -> Iterator:
        if isinstance(self.data, tf.data.Dataset):
            batches = self.data.as_numpy_iterator()
        elif isinstance(self.data, keras.utils.PyDataset):
            indices = itertools.count() if _is_endless(self.data) else range(self.data.num_batches)
            batches = (self.data[index] for index in indices)
        else:
            starts = range(0, _count(self.data), self.batch_size)
            batches = (
                tree.map_structure(lambda x: x if x is None else x[start : start + self.batch_size], self.data)  # noqa: B023
                for start in starts
            )
        return itertools.islice(batches, self.steps)

    def _check_data(self) -> None:
        """Whether the data fits the model: told before the first epoch, not behind it."""
        example = self.data.element_spec if isinstance(self.data, tf.data.Dataset) else next(self._batches())
        x, y, _ = keras.utils.unpack_x_y_sample_weight(example)
        if y is None:
            raise ValueError("The data of Int8Evaluation brings no targets. Expected batches (x, y). Received: x alone")
        inputs = input_values(self.model, x)
        expected = [tuple(tensor.shape[1:]) for tensor in self.model.inputs]
        received = [_sample_shape(value) for value in inputs]
        fits = len(expected) == len(received) and all(map(_fits, received, expected))
        if not fits:
            raise ValueError(
                f"The data of Int8Evaluation does not fit model {self.model.name!r}. Expected samples of the shapes "
                f"{dict(zip(input_names(self.model), expected, strict=True))}. Received: {received}"
            )


def _checked_arrays(x, y, sample_weight):
    """As arrays, if all have the same number of samples."""
    data = tree.map_structure(lambda value: None if value is None else np.asarray(value), (x, y, sample_weight))
    counts = {len(array) if array.ndim else 0 for array in tree.flatten(data) if array is not None}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            f"x, y and sample_weight hold the same number of samples, 1 or more. Received: {sorted(counts)}"
        )
    return data


def _is_endless(data) -> bool:
    if isinstance(data, tf.data.Dataset):
        return int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
    return isinstance(data, keras.utils.PyDataset) and data.num_batches is None


def _sample_shape(value) -> tuple | None:
    """The shape without the batch; None where a dataset does not know it."""
    shape = tf.TensorShape(value.shape if hasattr(value, "shape") else np.shape(value))
    return None if shape.rank is None else tuple(shape[1:])


def _fits(received: tuple | None, expected: tuple) -> bool:
    if received is None:
        return True
    return len(received) == len(expected) and all(a is None or a == b for a, b in zip(received, expected, strict=True))


def _count(structure) -> int:
    """How many samples arrays hold."""
    return len(next(array for array in tree.flatten(structure) if array is not None))


def _joined(*arrays):
    return None if arrays[0] is None else np.concatenate([np.asarray(array) for array in arrays])


def _plain(value):
    value = ops.convert_to_numpy(value)
    return float(value) if value.ndim == 0 else value


@contextlib.contextmanager
def _kept(variables) -> Iterator[None]:
    """Gives variables their values back in the end: those of the training's own metrics."""
    before = [ops.convert_to_numpy(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
