"""Every network of keras.applications that the project promises, all the way to the integers of the runtimes.

    python benchmarks/applications.py [--networks=NASNetMobile]

Each one twice, with random weights: as it is, calibrated; and as a frozen backbone without its top, nested in a model
with a new head and augmentation in front, whose head is trained for some steps. Each has a process of its own.
"""

import dataclasses
import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from isolated import in_own_process
from keras import layers
from printout import default_out, heading, publish, write

import keras_qat as kq
import tflite_export
from tflite_export.table import table

# Name → the smallest size (a multiple of 32 that it takes), and whether it scales pixels itself.
NETWORKS = {
    "VGG16": (64, False),
    "ResNet50": (64, False),
    "ResNet50V2": (64, False),
    "InceptionV3": (96, False),
    "InceptionResNetV2": (96, False),
    "Xception": (96, False),
    "MobileNet": (64, False),
    "MobileNetV2": (64, False),
    "MobileNetV3Small": (64, True),
    "MobileNetV3Large": (64, True),
    "DenseNet121": (64, False),
    "NASNetMobile": (64, False),
    "EfficientNetB0": (64, True),
    "EfficientNetV2B0": (64, True),
    "ConvNeXtTiny": (64, True),
}
_RUNTIMES = ("litert", "xnnpack")
_IMAGES, _CLASSES, _STEPS, _BATCH = 64, 10, 2, 16
_GOAL, _TIMES = 5.0, 3
_COLUMNS = (
    "network",
    "as",
    "nodes",
    "ops",
    "int8",
    "quantize",
    "freeze, write",
    f"<= {_GOAL:.0f} s",
    *_RUNTIMES,
    "top-1",
    "verified",
)

_ONLY = flags.DEFINE_multi_enum("networks", list(NETWORKS), list(NETWORKS), "Which; give it once for each.")
_OUT = flags.DEFINE_string("out", default_out(__file__), "Where the text goes.")


@dataclasses.dataclass
class Result:
    """What came of one network in one role; `reason` is why nothing did."""

    nodes: int = 0
    ops: int = 0
    is_int8: bool = False
    quantizing: float = 0.0
    writing: float = 0.0
    differing: tuple[str, ...] = ("-",) * len(_RUNTIMES)
    top1: float = 0.0
    passed: bool = False
    reason: str = ""


def network(name: str) -> tuple[keras.Model, np.ndarray]:
    """As it is, and images for it."""
    size, scales = NETWORKS[name]
    model = getattr(keras.applications, name)(input_shape=(size, size, 3), weights=None, classes=_CLASSES)
    return model, _images(size, 0.0 if scales else -1.0, 255.0 if scales else 1.0)


def nested(name: str) -> tuple[keras.Model, np.ndarray]:
    """As people take it for another task."""
    size, scales = NETWORKS[name]
    backbone = getattr(keras.applications, name)(input_shape=(size, size, 3), weights=None, include_top=False)
    backbone.trainable = False
    inputs = keras.Input((size, size, 3), name="image")
    x = layers.RandomFlip("horizontal")(inputs)
    x = x if scales else layers.Rescaling(1 / 127.5, -1.0)(x)
    x = layers.GlobalAveragePooling2D()(backbone(x, training=False))
    model = keras.Model(inputs, layers.Dense(_CLASSES, activation="softmax")(layers.Dropout(0.2)(x)))
    return model, _images(size, 0.0, 255.0)


def _images(size: int, low: float, high: float) -> np.ndarray:
    """Noise of several sizes of grain, as photographs have it."""
    generator, images = np.random.default_rng(0), 0.0
    for grain in (1, 4, 16):
        coarse = generator.normal(size=(_IMAGES, size // grain, size // grain, 3))
        images = images + coarse.repeat(grain, axis=1).repeat(grain, axis=2)
    return np.clip((0.5 + images / 6) * (high - low) + low, low, high).astype("float32")


ROLES = {"network": network, "backbone": nested}


def measure(name: str, role: str) -> Result:
    keras.utils.set_random_seed(0)
    kq.quantize(keras.Sequential([keras.Input((2,)), layers.Dense(2)]))  # what only a process's first call does
    model, images = ROLES[role](name)
    qat, quantizing = timed(lambda: kq.quantize(model, input_range=(0, 255) if images.max() > 1 else None))
    result = Result(nodes=len(qat.layers), quantizing=quantizing)
    kq.calibrate(qat, images, batch_size=_BATCH)
    if role == "backbone":
        qat.compile("adam", "sparse_categorical_crossentropy")
        labels = np.arange(_IMAGES) % _CLASSES
        qat.fit(images, labels, batch_size=_BATCH, steps_per_epoch=_STEPS, verbose=0)
    content, result.writing = timed(lambda: tflite_export.write(kq.freeze(qat)))
    summary = tflite_export.inspect(content)
    result.ops, result.is_int8 = len(summary.ops), summary.is_full_int8
    parity = tflite_export.verify(content, qat, images, runtimes=_RUNTIMES)
    result.differing = tuple(
        "exact" if r.max_lsb == 0 else f"{100 * r.mismatch:.2f} % {r.max_lsb}" for r in parity.results
    )
    result.top1, result.passed = parity.top1, parity.passed
    return result


def timed(work: Callable) -> tuple[object, float]:
    """What comes of it, and the seconds it takes: the median of a few times, because other machines' work shows in single ones."""
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def measured(name: str, role: str) -> Result:
    try:
        return in_own_process(measure, name, role)
    except Exception as error:  # whatever it is, the table says it, and the next one has its turn
        return Result(reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")


def row(name: str, role: str, result: Result) -> tuple[str, ...]:
    if result.reason:
        return (name, role, result.reason)
    seconds = result.quantizing + result.writing
    return (
        name,
        role,
        str(result.nodes),
        str(result.ops),
        "full" if result.is_int8 else "NOT full",
        f"{result.quantizing:.2f}",
        f"{result.writing:.2f}",
        "met" if seconds <= _GOAL else "missed",
        *result.differing,
        f"{100 * result.top1:.1f} %",
        "passed" if result.passed else "FAILED",
    )


def main(_) -> None:
    rows = []
    title = "keras.applications: quantized, written, and compared on LiteRT's reference kernels and XNNPACK"
    settings = (
        f"random weights, {_IMAGES} images of noise, calibrated; backbones frozen, their head trained for {_STEPS} steps. "
        f"Seconds: medians of {_TIMES}. Cells: share of outputs that differ, largest difference in LSB; verified: what kq.export would say"
    )
    for name in _ONLY.value:
        for role in ROLES:
            rows.append(row(name, role, measured(name, role)))
            rows[-1] += ("",) * (len(_COLUMNS) - len(rows[-1]))
            print(" ", *rows[-1], flush=True)
            text = f"{heading(title, settings, with_peer=False)}\n\n{table(_COLUMNS, rows)}"
            write(text, _OUT.value)
    publish(text, _OUT.value)


if __name__ == "__main__":
    app.run(main)
