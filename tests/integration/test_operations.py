"""Every operation, alone and between two dense layers, from Keras to the integers of three runtimes."""

import keras
import numpy as np
import pytest
from cases import OPERATIONS, inputs_for

import keras_qat as kq
import tflite_export

_RUNTIMES = ("litert", "xnnpack", "tflm")


def _calibrated(model, scheme, inputs, folder):
    return kq.calibrate(kq.quantize(model, scheme), inputs)


def _trained(model, scheme, inputs, folder):
    """For two steps, then saved and loaded."""
    qat = kq.quantize(model, scheme)
    qat.compile("sgd", "mse")
    qat.fit(inputs, np.zeros((64, *qat.output_shape[1:]), "float32"), batch_size=32, verbose=0)
    qat.save(folder / "qat.keras")
    return keras.models.load_model(folder / "qat.keras")


def _measure(model, scheme, prepared, folder):
    inputs = inputs_for(model)
    qat = prepared(model, scheme, inputs, folder)
    tflite = tflite_export.write(kq.freeze(qat))
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    return tflite_export.verify(tflite, qat, inputs, runtimes=_RUNTIMES)


def _assert_parity(parity, exact, apart=()):
    """The bar of at most 1 LSB; of runtimes that stand apart, in the mean."""
    assert len(parity.results) == len(_RUNTIMES), parity.skipped
    assert all(result.max_lsb <= 1 for result in parity.results if result.runtime not in apart), parity
    assert all(result.rms <= 1 for result in parity.results), parity
    assert not exact or parity.mismatch <= 0.001, parity


@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_one_op(case, tmp_path):
    _assert_parity(_measure(case.one_op(), case.scheme, _trained, tmp_path), case.exact)


@pytest.mark.parametrize("case", OPERATIONS, ids=str)
def test_three_ops(case, tmp_path):
    _assert_parity(_measure(case.three_ops(), case.scheme, _calibrated, tmp_path), case.exact, case.apart)
