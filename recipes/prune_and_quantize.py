"""Smaller by pruning, then int8: what single weights and whole channels gain, each measured on its file.

Trains a small convolutional net in float. One copy of it loses 80 % of its single weights and is then trained
quantization-aware, with the zeros kept and the gradients clipped. Another one loses half of its channels, is shrunk to
what is left, and is then trained quantization-aware.

    python recipes/prune_and_quantize.py
    python recipes/prune_and_quantize.py --data=fashion_mnist --data_dir=path/to/data --samples=10000

With --data_dir it reads fashion_mnist.npz or har.npz, with the keys x_train, y_train, x_test, y_test.
"""

import pathlib
import zlib

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from keras import layers
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_qat as kq
import tflite_export
from tflite_export.table import table

# data → what its numbers are multiplied by at first, and their range if it is known
_SCALES = {"digits": (1 / 16, (0, 16)), "fashion_mnist": (1 / 255, (0, 255)), "har": (1e-3, None)}

_DATA = flags.DEFINE_enum("data", "digits", list(_SCALES), "What to learn: digits comes with scikit-learn.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with fashion_mnist.npz and har.npz.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Train on the first ones only.", lower_bound=1)
_SPARSITY = flags.DEFINE_float("sparsity", 0.8, "The share of single weights to remove.", 0.0, 0.99)
_CHANNELS = flags.DEFINE_float("channels", 0.5, "The share of channels to remove.", 0.0, 0.99)
_EPOCHS = flags.DEFINE_integer("epochs", 12, "Epochs in float.", lower_bound=1)
_TUNE_EPOCHS = flags.DEFINE_integer(
    "tune_epochs", 6, "Epochs of pruning, and of each training after it.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "In float; half of it to prune, a tenth to quantize.")
_OUT = flags.DEFINE_string("out", "pruned", "Folder for the four files.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.")


def load_data():
    """x_train, y_train, x_test, y_test with raw values; pictures have a last axis of one channel."""
    if _DATA.value == "digits":
        x, y = load_digits(return_X_y=True)
        split = train_test_split(x.reshape(-1, 8, 8), y, test_size=0.25, random_state=_SEED.value, stratify=y)
        x_train, x_test, y_train, y_test = split
    elif _DATA_DIR.value is None:
        raise app.UsageError(f"--data={_DATA.value} needs --data_dir, the folder with {_DATA.value}.npz.")
    else:
        with np.load(pathlib.Path(_DATA_DIR.value) / f"{_DATA.value}.npz") as file:
            x_train, y_train, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    x_train, x_test = x_train.astype("float32"), x_test.astype("float32")
    if _DATA.value != "har":
        x_train, x_test = x_train[..., None], x_test[..., None]
    return x_train[: _SAMPLES.value], y_train[: _SAMPLES.value], x_test, y_test


def build_model(shape: tuple, classes: int) -> keras.Model:
    """Three convolutions over pictures or, where the shape has no width, over time."""
    is_picture = len(shape) == 3
    convolution, pooling = (layers.Conv2D, layers.MaxPooling2D) if is_picture else (layers.Conv1D, layers.MaxPooling1D)
    inputs = keras.Input(shape, name="input")
    x = layers.Rescaling(_SCALES[_DATA.value][0])(inputs)
    for filters in (16, 32, 64):
        x = convolution(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)  # epochs are short: the averages must keep up with the pruning
        x = layers.ReLU()(x)
        x = pooling()(x)
    x = layers.Dropout(0.3)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(classes, activation="softmax", name="class")(x), name=_DATA.value)


def copy_of(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def train(what: str, model: keras.Model, x, y, epochs: int, learning_rate: float, callbacks=()) -> None:
    print(f"\n{what}: {epochs} epochs")
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=2, callbacks=list(callbacks))


def rising_to(sparsity: float) -> kq.schedules.Schedule:
    """Reached after two thirds of the epochs, so that what is left has time to adapt."""
    return kq.schedules.Polynomial(0.0, sparsity, begin=0, end=_TUNE_EPOCHS.value * 2 / 3)


def write_float(model: keras.Model, path: pathlib.Path) -> None:
    path.write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


def row(name: str, model: keras.Model, path: pathlib.Path, before: tuple[keras.Model, pathlib.Path], x, y) -> tuple:
    """What a file gets right and what it costs, measured in turn with the one before."""
    accuracy = np.mean(np.argmax(tflite_export.predict(path, x), axis=-1) == y)
    cost = kq.pruning.compare(before[0], model, files=(before[1], path)).after
    return (
        name,
        f"{100 * accuracy:.2f}",
        cost.parameters,
        f"{100 * kq.pruning.report(model).total.sparsity:.0f} %",
        cost.macs,
        cost.file_bytes,
        len(zlib.compress(path.read_bytes(), 9)),
        f"{1e3 * cost.milliseconds:.1f}",
        "-" if cost.arena_bytes is None else f"{cost.arena_bytes:,}",
    )


def main(argv) -> None:
    del argv
    keras.utils.set_random_seed(_SEED.value)
    x_train, y_train, x_test, y_test = load_data()
    folder = pathlib.Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("float.tflite", "pruned.tflite", "pruned_int8.tflite", "shrunk_int8.tflite")]
    rate, tune_epochs, input_range = _LEARNING_RATE.value, _TUNE_EPOCHS.value, _SCALES[_DATA.value][1]

    model = build_model(x_train.shape[1:], int(y_train.max()) + 1)
    train("Training in float", model, x_train, y_train, _EPOCHS.value, rate)

    pruned = copy_of(model)
    pruning = kq.callbacks.Pruning(rising_to(_SPARSITY.value), unit="epochs")
    train("Pruning single weights", pruned, x_train, y_train, tune_epochs, rate / 2, [pruning])

    clipping = kq.callbacks.GradientClipping(kq.clipping.ByGlobalNorm(5.0))
    pruned_qat = kq.quantize(pruned, input_range=input_range)
    what = "Training the pruned net quantization-aware"  # the same callback again keeps the zeros where they are
    train(what, pruned_qat, x_train, y_train, tune_epochs, rate / 10, [pruning, clipping])

    with_dead_channels = copy_of(model)
    channels = kq.callbacks.Pruning(rising_to(_CHANNELS.value), pattern=kq.pruning.Channels(), unit="epochs")
    train("Pruning channels", with_dead_channels, x_train, y_train, tune_epochs, rate / 2, [channels])

    shrunk = kq.pruning.shrink(with_dead_channels)
    shrunk_qat = kq.quantize(shrunk, input_range=input_range)
    what = "Training the shrunk net quantization-aware"
    train(what, shrunk_qat, x_train, y_train, tune_epochs, rate / 10, [clipping])

    print("\nWriting, verifying and measuring ...")
    write_float(model, files[0])
    write_float(pruned, files[1])
    kq.export(pruned_qat, files[2], verify_with=x_test[:256])
    kq.export(shrunk_qat, files[3], verify_with=x_test[:256])
    nets = {"float": model, "pruned": pruned, "pruned + QAT": pruned_qat, "shrunk + QAT": shrunk_qat}
    rows = [
        row(name, net, file, (model, files[0]), x_test, y_test)
        for (name, net), file in zip(nets.items(), files, strict=True)
    ]
    heading = ("net", "accuracy %", "parameters", "zeros", "MACs", "bytes", "zipped", "LiteRT µs", "TFLM arena")
    print(f"\nMeasured on the .tflite files in {folder}, on {len(x_test):,} samples that no training saw:\n")
    print(table(heading, rows))
    print(
        "\nZeros among single weights make no file smaller and no kernel faster by themselves: they pay once the file\n"
        "is zipped, or compressed by Vela for Ethos-U. Channels that are taken out pay everywhere."
    )


if __name__ == "__main__":
    app.run(main)
