"""Whole channels pruned, then taken out: what the smaller network costs, next to the masked one, down to the device.

    python benchmarks/shrinking.py [--networks=ResNet50]

Half of the channels are pruned while the network trains for some steps. Then `kq.pruning.shrink` takes them out, and both
networks are quantized, calibrated, written and run. Each has a process of its own.
"""

import pathlib
import tempfile

import keras
import numpy as np
from absl import app, flags
from isolated import in_own_process
from keras import layers
from nets import u_net
from printout import default_out, heading, publish, write

import keras_qat as kq
import tflite_export
from tflite_export.table import table

_SIZE, _CLASSES, _IMAGES, _STEPS, _BATCH = 64, 10, 64, 8, 16
_COLUMNS = ("network", "", "parameters", "MACs", "file bytes", "LiteRT µs", "TFLM arena", "exact", "difference")


def application(name: str, **options) -> keras.Model:
    build = getattr(keras.applications, name)
    return build(input_shape=(_SIZE, _SIZE, 3), weights=None, classes=_CLASSES, **options)


def dense_net() -> keras.Model:
    hidden = [layers.Dense(units, activation="relu") for units in (256, 128, 64)]
    top = layers.Dense(_CLASSES, activation="softmax")
    return keras.Sequential([keras.Input((_SIZE // 4, _SIZE // 4, 3)), layers.Flatten(), *hidden, top])


NETWORKS = {
    "ResNet50": lambda: application("ResNet50"),
    "MobileNetV2": lambda: application("MobileNetV2"),
    "DenseNet121": lambda: application("DenseNet121"),
    "U-Net": lambda: u_net(keras, (_SIZE, _SIZE, 3)),
    "dense": dense_net,
}

_ONLY = flags.DEFINE_multi_enum("networks", list(NETWORKS), list(NETWORKS), "Which; give it once for each.")
_CHANNELS = flags.DEFINE_float("channels", 0.5, "Share of the channels that goes.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the text goes.")


def measure(name: str, share: float) -> list[tuple[str, ...]]:
    """Two rows: the masked network, and what is left of it."""
    keras.utils.set_random_seed(0)
    masked = NETWORKS[name]()
    x = np.random.default_rng(0).normal(size=(_IMAGES, *masked.input_shape[1:])).astype("float32")
    y = np.random.default_rng(1).integers(0, _CLASSES, (_IMAGES, *masked.output_shape[1:-1]))
    masked.compile(keras.optimizers.SGD(1e-3), "sparse_categorical_crossentropy")
    pruning = kq.callbacks.Pruning(kq.schedules.OneShot(share), pattern=kq.pruning.Channels())
    masked.fit(x, y, batch_size=_BATCH, epochs=_STEPS * _BATCH // _IMAGES, verbose=0, callbacks=[pruning])
    small = kq.pruning.shrink(masked)
    before, after = masked.predict(x, verbose=0), small.predict(x, verbose=0)
    error = np.max(np.abs(before - after)) / np.std(before)

    with tempfile.TemporaryDirectory() as folder:
        files, exact = [], []
        for index, model in enumerate((masked, small)):
            qat = kq.quantize(model)
            kq.calibrate(qat, x, batch_size=_BATCH)
            files.append(pathlib.Path(folder, f"{index}.tflite"))
            files[-1].write_bytes(tflite_export.write(kq.freeze(qat)))
            parity = tflite_export.verify(files[-1].read_bytes(), qat, x[:16], runtimes=("litert", "xnnpack"))
            exact.append(" / ".join("exact" if r.max_lsb == 0 else f"{r.max_lsb} LSB" for r in parity.results))
        compared = kq.pruning.compare(masked, small, files=files)
    rows = []
    for what, cost, equal in zip(("masked", "shrunk"), (compared.before, compared.after), exact, strict=True):
        rows.append((name, what, *_cells(cost), equal, f"{error:.1e}" if what == "shrunk" else ""))
    return rows


def _cells(cost) -> tuple[str, ...]:
    arena = "-" if cost.arena_bytes is None else f"{cost.arena_bytes:,}"
    return f"{cost.parameters:,}", f"{cost.macs:,}", f"{cost.file_bytes:,}", f"{1e3 * cost.milliseconds:,.0f}", arena


def main(_) -> None:
    rows = []
    title = "Channels pruned and taken out by kq.pruning.shrink; files in int8"
    settings = (
        f"{100 * _CHANNELS.value:.0f} % of the channels, random weights, {_STEPS} training steps, {_SIZE} px; files: "
        "against the QAT model on LiteRT's reference kernels / XNNPACK; difference: the largest one of shrunk from masked, "
        "in float, by the standard deviation of the outputs"
    )
    for name in _ONLY.value:
        rows += in_own_process(measure, name, _CHANNELS.value)
        print(" ", *rows[-1], flush=True)
        text = f"{heading(title, settings, with_peer=False)}\n\n{table(_COLUMNS, rows)}"
        write(text, _OUT.value)
    publish(text, _OUT.value)


if __name__ == "__main__":
    app.run(main)
