"""keras.ops, alone and between two dense layers, from Keras to the integers of three runtimes."""

import pytest
from cases import inputs_for
from cases_ops import KERAS_OPS

import keras_qat as kq
import tflite_export

_RUNTIMES = ("litert", "xnnpack", "tflm")


def _measure(model):
    inputs = inputs_for(model)
    qat = kq.calibrate(kq.quantize(model), inputs)
    tflite = tflite_export.write(kq.freeze(qat, portable=True))
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    return tflite_export.verify(tflite, qat, inputs, runtimes=_RUNTIMES)


@pytest.mark.parametrize("form", ["one_op", "three_ops"])
@pytest.mark.parametrize("case", KERAS_OPS, ids=str)
def test_operation(case, form):
    parity = _measure(getattr(case, form)())
    has_more_axes = any(len(shape) > 3 for shape in case.shapes) or case.name == "space_to_depth"
    assert len(parity.results) == len(_RUNTIMES) or has_more_axes, parity.skipped  # TFLM's kernels take four axes
    assert parity.max_lsb <= 1, parity
    assert not case.exact or parity.mismatch <= 0.001, parity
