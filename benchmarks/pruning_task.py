"""What `pruning_accuracy` has both libraries do: the same nets, data, batches, optimizer, steps and layers to prune.

Knows nothing of either library, and of Keras only what is handed in: Keras 3 or tf_keras.
"""

import dataclasses
import math
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow as tf

BATCH = 64
FLOAT_STEPS, FLOAT_RATE = 768, 2e-3
TUNE_STEPS, TUNE_RATE = 512, 1e-3
PRUNE_UNTIL, PRUNE_EVERY = 320, 32  # steps; tfmot reaches its final sparsity only where one divides the other
LEVELS = {"50 %": 0.5, "80 %": 0.8, "90 %": 0.9, "95 %": 0.95, "2:4": 0.5}
WIDTHS = (16, 32, 64, 64)  # filters of three convolutions, then units of the hidden dense layer
PRUNED = ("conv_0", "conv_1", "conv_2", "hidden")  # all with a kernel but the last, as our callback has it by default


@dataclasses.dataclass(frozen=True)
class Task:
    """A net and what it learns.

    Args:
        shape: Of one sample. Time series are pictures of width 1, because tfmot refuses 2:4 for Conv1D.
        kernel, strides: Of all convolutions.
        scale: What samples are multiplied by.
        samples: How many of the training split to train on.
        classes: How many there are.
    """

    shape: tuple[int, int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    scale: float
    samples: int
    classes: int


TASKS = {
    "fashion_mnist": Task((28, 28, 1), (3, 3), (2, 2), 1 / 255, 8192, 10),
    "har": Task((52, 1, 3), (5, 1), (2, 1), 1e-3, 2730, 4),
}


def build(keras: ModuleType, task: Task, widths=WIDTHS) -> Any:
    """Three blocks of strided convolution, batch norm and relu, and two dense layers."""
    layers = keras.layers
    inputs = keras.Input(task.shape)
    x = layers.Rescaling(task.scale, name="scale")(inputs)
    for index, filters in enumerate(widths[:3]):
        name = f"conv_{index}"
        x = layers.Conv2D(filters, task.kernel, task.strides, padding="same", use_bias=False, name=name)(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm_{index}")(x)
        x = layers.ReLU(name=f"relu_{index}")(x)
    x = layers.Dense(widths[3], activation="relu", name="hidden")(layers.Flatten(name="flat")(x))
    return keras.Model(inputs, layers.Dense(task.classes, activation="softmax", name="class")(x))


def load(data_dir: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x_train, y_train, x_test, y_test."""
    task = TASKS[name]
    with np.load(pathlib.Path(data_dir) / f"{name}.npz") as file:
        x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    x_train, x_test = (x.reshape(-1, *task.shape).astype("float32") for x in (x_train, x_test))
    return x_train[: task.samples], y_train[: task.samples], x_test, y_test


def fit(keras: ModuleType, model: Any, x, y, steps: int, rate: float, seed: int, callbacks=()) -> None:
    """Trains for some steps. The order of the samples depends on the seed alone."""
    generator = np.random.default_rng(seed)
    order = np.concatenate([generator.permutation(len(x)) for _ in range(math.ceil(steps * BATCH / len(x)))])
    batches = tf.data.Dataset.from_tensor_slices(order).batch(BATCH)
    batches = batches.map(lambda places: (tf.gather(x, places), tf.gather(y, places))).take(steps)
    schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(batches, epochs=1, steps_per_epoch=steps, callbacks=list(callbacks), shuffle=False, verbose=0)


def accuracy(model: Any, x, y) -> float:
    return float(np.mean(np.argmax(model.predict(x, batch_size=256, verbose=0), axis=-1) == y))


def sparsity(model: Any) -> float:
    """The share of zeros in the kernels that are pruned."""
    kernels = [np.asarray(model.get_layer(name).kernel) for name in PRUNED]
    return 1.0 - sum(map(np.count_nonzero, kernels)) / sum(kernel.size for kernel in kernels)


def save_weights(model: Any, path: pathlib.Path) -> None:
    """Layer by layer, so that another Keras can read them."""
    arrays = {
        f"{layer.name}/{index}": array for layer in model.layers for index, array in enumerate(layer.get_weights())
    }
    np.savez(path, **arrays)


def load_weights(model: Any, path: pathlib.Path) -> Any:
    with np.load(path) as file:
        for layer in model.layers:
            layer.set_weights([file[f"{layer.name}/{index}"] for index in range(len(layer.get_weights()))])
    return model
