"""keras.ops, alone and between two dense layers, from Keras to the integers of three runtimes."""

import keras
import numpy as np
import pytest
from cases import inputs_for
from cases_ops import KERAS_OPS

import keras_qat as kq
import tflite_export

_RUNTIMES = ("litert", "xnnpack", "tflm")


def _parity(qat, inputs):
    tflite = tflite_export.write(kq.freeze(qat, portable=True))
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    return tflite_export.verify(tflite, qat, inputs, runtimes=_RUNTIMES)


def _assert_parity(case, parity):
    assert len(parity.results) == len(_RUNTIMES), parity.skipped
    assert parity.max_lsb <= 1, parity
    assert not case.exact or parity.mismatch <= 0.001, parity


@pytest.mark.parametrize("case", KERAS_OPS, ids=str)
def test_trained_saved_and_loaded(case, tmp_path):
    model = case.one_op()
    inputs = inputs_for(model)
    qat = kq.quantize(model)
    qat.compile("sgd", "mse")
    qat.fit(inputs, np.zeros((64, *qat.output_shape[1:]), "float32"), batch_size=32, verbose=0)
    qat.save(tmp_path / "qat.keras")
    loaded = keras.models.load_model(tmp_path / "qat.keras")
    assert np.array_equal(qat.predict(inputs, verbose=0), loaded.predict(inputs, verbose=0))
    _assert_parity(case, _parity(loaded, inputs))


@pytest.mark.parametrize("case", KERAS_OPS, ids=str)
def test_between_dense_layers(case):
    model = case.three_ops()
    inputs = inputs_for(model)
    _assert_parity(case, _parity(kq.calibrate(kq.quantize(model), inputs), inputs))
