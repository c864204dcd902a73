"""From a float model to a verified int8 `.tflite`, on scikit-learn's handwritten digits, in a minute.

Trains a small convolutional net in float, quantizes it without training (PTQ) and with (QAT), and measures all of them
on the files themselves.

    python recipes/digits.py --out=model.tflite --epochs=12
"""

import pathlib
import tempfile

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

_EPOCHS = flags.DEFINE_integer("epochs", 12, "Epochs in float.", lower_bound=1)
_QAT_EPOCHS = flags.DEFINE_integer("qat_epochs", 4, "Epochs of quantization-aware fine-tuning.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "model.tflite", "Where the quantization-aware model goes.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 2e-3, "In float; a tenth of it for fine-tuning.")


def load_data(seed: int):
    """8×8 digits with raw values 0..16, split into train and test."""
    digits = load_digits()
    images = digits.images[..., None].astype("float32")
    return train_test_split(images, digits.target, test_size=0.25, random_state=seed, stratify=digits.target)


def build_model() -> keras.Model:
    inputs = keras.Input((8, 8, 1), name="image")
    x = layers.Rescaling(1 / 16)(inputs)
    for filters in (16, 32):
        x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization()(x)
        x = layers.ReLU()(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dropout(0.3)(x)
    return keras.Model(inputs, layers.Dense(10, activation="softmax", name="digit")(x), name="digits")


def train(model: keras.Model, images, labels, epochs: int, learning_rate: float, what: str) -> None:
    print(f"\n{what}: {epochs} epochs")
    model.compile(keras.optimizers.Adam(learning_rate), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, labels, batch_size=32, epochs=epochs, verbose=2)


def float_tflite(model: keras.Model) -> bytes:
    """The float model as TFLiteConverter writes it: what the int8 files are measured against."""
    return tf.lite.TFLiteConverter.from_keras_model(model).convert()


def accuracy(tflite: bytes, images, labels) -> float:
    """Accuracy of a file, run by LiteRT. The images are quantized as the file asks for."""
    return float(np.mean(np.argmax(tflite_export.predict(tflite, images), axis=-1) == labels))


def parity(report: kq.ExportReport, runtime: str) -> str:
    found = [result for result in report.parity.results if result.runtime == runtime]
    return f"{100 * found[0].mismatch:.2f} % differ, max {found[0].max_lsb} LSB" if found else "not installed"


def main(argv) -> None:
    del argv
    keras.utils.set_random_seed(_SEED.value)
    x_train, x_test, y_train, y_test = load_data(_SEED.value)
    model = build_model()
    train(model, x_train, y_train, _EPOCHS.value, _LEARNING_RATE.value, "Training in float")
    float_file = float_tflite(model)

    print("\nWhat quantize will do:")
    print(kq.explain(model, input_range=(0, 16)))
    ptq = kq.calibrate(kq.quantize(model, input_range=(0, 16)), x_train)
    qat = kq.quantize(model, input_range=(0, 16))
    train(qat, x_train, y_train, _QAT_EPOCHS.value, _LEARNING_RATE.value / 10, "Training quantization-aware")

    print("\nWriting and verifying ...")
    with tempfile.TemporaryDirectory() as folder:
        ptq_report = kq.export(ptq, pathlib.Path(folder) / "ptq.tflite", verify_with=x_test)
        ptq_file = pathlib.Path(ptq_report.path).read_bytes()
    report = kq.export(qat, _OUT.value, verify_with=x_test)
    qat_file = pathlib.Path(report.path).read_bytes()

    rows = [
        ("float", f"{100 * accuracy(float_file, x_test, y_test):.2f}", f"{len(float_file):,}", *["-"] * 4),
        *[
            (
                name,
                f"{100 * accuracy(file, x_test, y_test):.2f}",
                f"{len(file):,}",
                *(parity(found, runtime) for runtime in ("litert", "xnnpack", "tflm")),
                "-" if found.parity.arena_bytes is None else f"{found.parity.arena_bytes:,}",
            )
            for name, file, found in (("PTQ int8", ptq_file, ptq_report), ("QAT int8", qat_file, report))
        ],
    ]
    heading = ("model", "accuracy %", "bytes", "LiteRT reference", "LiteRT XNNPACK", "TFLM", "TFLM arena bytes")
    print(f"\nMeasured on the .tflite files, on {len(x_test)} digits that no training saw:\n")
    print(table(heading, rows))
    print(f"\n{report.path}: {'full int8' if report.summary.is_full_int8 else 'NOT full int8'}. Ship it.")


if __name__ == "__main__":
    app.run(main)
