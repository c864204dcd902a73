"""Accuracy of modern architectures, float against int8 on LiteRT: a small ViT, a stack of ConvNeXt blocks, a GRU, and a
DenseNet, whose batch norms stand alone: as MUL and ADD, and as depthwise convolutions.

Trains each in float, quantizes it, without training (PTQ) and with (QAT), and measures the files, and that of TFLiteConverter's
PTQ of the same float model. Reads .npz files with x_train, y_train, x_test, y_test from a folder:

    python benchmarks/architectures.py --data_dir=path/to/data --nets=vit,convnext,gru
"""

import dataclasses
import itertools
import pathlib
import sys
import tempfile
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from keras import layers
from printout import default_out, heading, publish, write

import keras_qat as kq
import tflite_export
from tflite_export.table import table

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from models import converted  # noqa: E402

_CALIBRATION = 512

_DATA = flags.DEFINE_string("data_dir", None, "Folder with fashion_mnist.npz, fsdd.npz and har.npz.", required=True)
_NETS = flags.DEFINE_list("nets", ["vit", "convnext", "gru", "densenet", "densenet_per_channel"], "Which nets to run.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "How many seeds each.", lower_bound=1)
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the table goes.")


@keras.saving.register_keras_serializable("keras_qat_benchmarks")
class Positions(layers.Layer):
    """Adds a learned embedding of each position."""

    def build(self, input_shape):
        self.embedding = self.add_weight(shape=input_shape[1:], initializer="random_normal")

    def call(self, x):
        return x + self.embedding


def vit(width: int = 32, depth: int = 2) -> keras.Model:
    """Patches of 4×4 pixels, attention and GELU between layer normalizations."""
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(width, 4, strides=4)(layers.Rescaling(1 / 255)(inputs))
    x = Positions()(layers.Reshape((49, width))(x))
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, width // 2)(y, y)
        y = layers.Dense(2 * width, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="vit")


def convnext(width: int = 24, depth: int = 3) -> keras.Model:
    """Depthwise 5×5, layer normalization, and a wide GELU between two dense layers, on log-mel pictures of speech."""
    inputs = keras.Input((49, 32, 1))
    x = layers.Conv2D(width, 4, strides=4)(layers.Rescaling(1 / 255)(inputs))
    for _ in range(depth):
        y = layers.LayerNormalization()(layers.DepthwiseConv2D(5, padding="same")(x))
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(y))
        x = x + y
    x = layers.LayerNormalization()(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="convnext")


def gru(units: int = 24) -> keras.Model:
    """Two seconds of a wrist's acceleration, in g."""
    inputs = keras.Input((52, 3))
    x = layers.GRU(units)(layers.Rescaling(1e-3)(inputs))
    return keras.Model(inputs, layers.Dense(4, activation="softmax")(x), name="gru")


def densenet(growth: int = 12, layers_each: int = 4) -> keras.Model:
    """Batch norm and relu in front of each convolution, which everything before it reaches."""
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(2 * growth, 3, strides=2, padding="same")(layers.Rescaling(1 / 255)(inputs))
    for block in range(2):
        for layer in range(layers_each):
            y = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"block{block}_{layer}_bn")(x))
            x = layers.Concatenate()([x, layers.Conv2D(growth, 3, padding="same", use_bias=False)(y)])
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9, name=f"block{block}_bn")(x))
        if block == 0:
            x = layers.AveragePooling2D(2)(layers.Conv2D(x.shape[-1] // 2, 1, use_bias=False)(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax")(x), name="densenet")


@dataclasses.dataclass(frozen=True)
class Task:
    """A net, its data, how many samples to train on, epochs in float and quantized, and rules for `kq.quantize`."""

    build: Callable[[], keras.Model]
    data: str
    samples: int
    epochs: int
    qat_epochs: int
    rules: tuple[kq.Rule, ...] = ()


_DENSENET = Task(densenet, "fashion_mnist", 20000, 4, 2)
_PER_CHANNEL = kq.Rule("*", kq.Scheme(per_channel_norms=True))
_TASKS = {
    "vit": Task(vit, "fashion_mnist", 20000, 5, 2),
    "convnext": Task(convnext, "fsdd", 2700, 12, 4),
    "gru": Task(gru, "har", 2730, 15, 4),
    "densenet": _DENSENET,
    "densenet_per_channel": dataclasses.replace(_DENSENET, rules=(_PER_CHANNEL,)),
}


def _data(name: str, samples: int):
    with np.load(pathlib.Path(_DATA.value) / f"{name}.npz") as file:
        x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    x_train, x_test = (x.astype("float32") for x in (x_train, x_test))
    if x_train.ndim == 3 and name == "fashion_mnist":
        x_train, x_test = x_train[..., None], x_test[..., None]
    return x_train[:samples], y_train[:samples], x_test, y_test


def _fit(model, x, y, epochs: int, rate: float) -> None:
    steps = epochs * -(-len(x) // 64)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=2)


def _accuracy(probabilities, y) -> float:
    return float(np.mean(np.argmax(probabilities, -1) == y))


def _row(net: str, seed: int) -> tuple:
    task = _TASKS[net]
    x_train, y_train, x_test, y_test = _data(task.data, task.samples)
    keras.utils.set_random_seed(seed)
    model = task.build()
    _fit(model, x_train, y_train, task.epochs, 2e-3)
    accuracies = [_accuracy(model.predict(x_test, verbose=0), y_test)]
    ptq = kq.calibrate(kq.quantize(model, rules=task.rules), x_train[:_CALIBRATION])
    qat = kq.quantize(model, rules=task.rules)
    _fit(qat, x_train, y_train, task.qat_epochs, 3e-4)
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "model.tflite")
        accuracies.append(_accuracy_of_peer(model, path, x_train, x_test, y_test))
        for quantized in (ptq, qat):
            report = kq.export(quantized, path, verify_with=x_test[:200], runtimes=("litert", "xnnpack"))
            accuracies.append(_accuracy(tflite_export.predict(path, x_test), y_test))
    shown = ["-" if accuracy is None else f"{100 * accuracy:.2f}" for accuracy in accuracies]
    lost = f"{100 * (accuracies[0] - accuracies[-1]):+.2f}"
    worst = f"{report.parity.mismatch:.3%}, {report.parity.max_lsb} LSB"
    size = f"{report.summary.file_bytes:,}"
    return (
        net,
        task.data,
        seed,
        *shown,
        lost,
        worst,
        len(report.summary.ops),
        "yes" if report.summary.is_full_int8 else "no",
        size,
    )


def _accuracy_of_peer(model, path: str, x_train, x_test, y_test) -> float | None:
    """None where TFLiteConverter makes no int8 file: of a GRU."""
    try:
        pathlib.Path(path).write_bytes(converted(model, x_train, _CALIBRATION))
    except Exception as error:  # it raises a type of its own for each step
        print(f"TFLiteConverter: {str(error)[:200]}")
        return None
    return _accuracy(tflite_export.predict(path, x_test), y_test)


def main(_) -> None:
    headings = (
        "net",
        "data",
        "seed",
        "float",
        "peer",
        "PTQ",
        "QAT",
        "lost, points",
        "parity",
        "ops",
        "full int8",
        "bytes",
    )
    settings = "accuracy in % on the test split, the quantized ones on LiteRT (peer: TFLiteConverter's PTQ); parity of the QAT file on 200 samples"
    title = heading("Architectures in int8", settings, with_peer=False)
    rows = []
    for net, seed in itertools.product(_NETS.value, range(_SEEDS.value)):
        rows.append(_row(net, seed))
        write(f"{title}\n\n{table(headings, rows)}", _OUT.value)
    publish(f"{title}\n\n{table(headings, rows)}", _OUT.value)


if __name__ == "__main__":
    app.run(main)
