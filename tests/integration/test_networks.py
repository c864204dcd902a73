"""Whole networks: full int8, as lean as TFLiteConverter's, and the same answers on the runtimes."""

import collections

import keras
import numpy as np
import pytest
from models import converted

import keras_qat as kq
import tflite_export

_NETWORKS = {
    "MobileNetV2": lambda size: keras.applications.MobileNetV2((size, size, 3), 0.35, weights=None, classes=10),
    "ResNet50": lambda size: keras.applications.ResNet50(input_shape=(size, size, 3), weights=None, classes=10),
}


def _trained(name, size, steps):
    keras.utils.set_random_seed(0)
    model = _NETWORKS[name](size)
    generator = np.random.default_rng(0)
    images = generator.uniform(-1, 1, (200, size, size, 3)).astype("float32")
    labels = generator.integers(0, 10, 200)
    qat = kq.quantize(model)
    qat.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    qat.fit(images, labels, batch_size=16, steps_per_epoch=steps, verbose=0)
    return model, qat, images


def _ops(tflite):
    """What ops a file has. Ours averages few values with AVERAGE_POOL_2D, which rounds them alike everywhere."""
    counts = collections.Counter(op.kind for op in tflite_export.inspect(tflite).ops)
    counts["MEAN"] += counts.pop("AVERAGE_POOL_2D", 0)
    return counts


@pytest.mark.parametrize(
    "name, size, runtimes",
    [
        ("MobileNetV2", 32, ("litert", "xnnpack", "tflm")),
        pytest.param("MobileNetV2", 96, ("litert", "xnnpack", "tflm"), marks=pytest.mark.full),
        pytest.param("ResNet50", 96, ("litert", "xnnpack"), marks=pytest.mark.full),
    ],
)
def test_network(name, size, runtimes):
    model, qat, images = _trained(name, size, steps=4)
    tflite = tflite_export.write(kq.freeze(qat))
    assert tflite_export.inspect(tflite).is_full_int8
    parity = tflite_export.verify(tflite, qat, images, runtimes=runtimes)
    assert parity.top1 >= 0.995, parity
    ours, theirs = _ops(tflite), _ops(converted(model, images))
    assert not ours - theirs, f"ops that TFLiteConverter does without: {ours - theirs}"


def test_versions_are_those_of_the_converter():
    """An independent writer asks for the same version of every op that both use."""
    model, qat, images = _trained("MobileNetV2", 32, steps=1)
    versions = [
        {op.kind: op.version for op in tflite_export.inspect(file).ops}
        for file in (tflite_export.write(kq.freeze(qat)), converted(model, images))
    ]
    shared = versions[0].keys() & versions[1].keys()
    assert len(shared) >= 5
    assert {kind: versions[0][kind] for kind in shared} == {kind: versions[1][kind] for kind in shared}
