"""Models in every style that people write: quantize, train in every mode, save, load, export."""

import keras
import numpy as np
import pytest
from models import STYLES

import keras_qat as kq

_MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "many steps": {"steps_per_execution": 4},
}


def _data(qat, samples=64):
    generator = np.random.default_rng(0)
    inputs = keras.tree.map_structure(
        lambda x: generator.normal(size=(samples, *x.shape[1:])).astype("float32"), qat._inputs_struct
    )
    targets = keras.tree.map_structure(
        lambda x: generator.uniform(size=(samples, *x.shape[1:])).astype("float32"), qat._outputs_struct
    )
    return inputs, targets


def _train(qat, inputs, targets, **mode):
    qat.compile("sgd", loss=keras.tree.map_structure(lambda _: "mse", targets), **mode)
    qat.fit(inputs, targets, batch_size=16, verbose=0)


@pytest.mark.parametrize("style", STYLES)
def test_from_model_to_file(style, tmp_path):
    keras.utils.set_random_seed(0)
    model = STYLES[style]()
    qat = kq.quantize(model)
    inputs, targets = _data(qat)
    before = keras.tree.flatten(model.predict(inputs, verbose=0))
    _train(qat, inputs, targets)
    after = keras.tree.flatten(model.predict(inputs, verbose=0))
    assert all(np.array_equal(x, y) for x, y in zip(before, after)), "training the QAT model changed the float model"

    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    predictions = [keras.tree.flatten(m.predict(inputs, verbose=0)) for m in (qat, loaded)]
    assert all(np.array_equal(x, y) for x, y in zip(*predictions))

    report = kq.export(loaded, tmp_path / "model.tflite", verify_with=inputs)
    assert report.summary.is_full_int8
    assert report.parity.max_lsb <= 1, report


@pytest.mark.parametrize("mode", _MODES)
def test_training_modes(mode):
    """Trained with the same data from the same start, every mode ends at about the same weights."""
    weights = []
    for options in ({}, _MODES[mode]):
        keras.utils.set_random_seed(0)
        qat = kq.quantize(STYLES["functional"]())
        _train(qat, *_data(qat), **options)
        weights.append([w.numpy() for w in qat.trainable_weights])
    assert all(np.allclose(x, y, atol=1e-3) for x, y in zip(*weights))
