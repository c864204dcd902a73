"""Normalizations, attention and contractions, from Keras to the integers of three runtimes."""

import keras
import numpy as np
import pytest
from cases import inputs_for
from cases_attention import ATTENTION, CONTRACTIONS, NORMS
from keras import layers

import keras_qat as kq
import tflite_export
from tflite_export.runtimes import run

_RUNTIMES = ("litert", "xnnpack", "tflm")
_CASES = [*NORMS, *ATTENTION, *CONTRACTIONS]


def _calibrated(model):
    inputs = inputs_for(model)
    qat = kq.calibrate(kq.quantize(model), inputs)
    program = kq.freeze(qat, portable=True)
    return inputs, qat, program, tflite_export.write(program)


def _parity(qat, tflite, inputs):
    summary = tflite_export.inspect(tflite)
    assert summary.is_full_int8, summary.reasons
    parity = tflite_export.verify(tflite, qat, inputs, runtimes=_RUNTIMES)
    assert len(parity.results) == len(_RUNTIMES), parity.skipped
    return parity


def _sqnr(model, inputs, program, tflite) -> float:
    """How far the file's output lies above its error against the float model, in dB."""
    arrays = inputs if isinstance(inputs, list) else [inputs]
    given = [program.tensors[name].quantize(x) for name, x in zip(program.inputs.values(), arrays, strict=True)]
    (name,), (integers,) = program.outputs.values(), run("litert", tflite, given).outputs
    exact = np.asarray(model(inputs))
    error = exact - program.tensors[name].dequantize(integers)
    return 10 * np.log10(np.sum(exact**2) / np.sum(error**2))


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_one_op(case):
    model = case.one_op()
    inputs, qat, program, tflite = _calibrated(model)
    parity = _parity(qat, tflite, inputs)
    assert parity.max_lsb <= 1, parity
    assert not case.exact or parity.mismatch <= 0.001, parity
    if case not in CONTRACTIONS:
        sqnr = _sqnr(model, inputs, program, tflite)
        print(f"{case}: {sqnr:.1f} dB, {len(program.ops)} ops")
        assert sqnr >= 30


@pytest.mark.parametrize("case", [*NORMS, *CONTRACTIONS], ids=str)
def test_three_ops(case):
    """A normalization is a dozen ops: where the first one rounds a tie the other way, a row of those behind moves.

    Attention has dense layers at both ends anyway.
    """
    inputs, qat, _, tflite = _calibrated(case.three_ops())
    parity = _parity(qat, tflite, inputs)
    assert parity.max_lsb <= (1 if case in CONTRACTIONS else 2), parity
    assert parity.mismatch <= (0.001 if case.exact else 0.01 if case in CONTRACTIONS else 0.002), parity


def _transformer():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 32))
    y = layers.LayerNormalization(epsilon=1e-6)(inputs)
    y = layers.MultiHeadAttention(2, 16, dropout=0.1)(y, y, use_causal_mask=True)
    x = layers.Add()([inputs, y])
    y = layers.Dense(64, activation="gelu")(layers.LayerNormalization(epsilon=1e-6)(x))
    x = layers.Add()([x, layers.Dense(32)(y)])
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def test_transformer_trains_saves_and_exports(tmp_path):
    model = _transformer()
    images, labels = inputs_for(model, 96), np.random.default_rng(0).integers(0, 5, 96)
    qat = kq.quantize(model)
    assert len(qat.trainable_variables) == len(model.trainable_variables)
    qat.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [variable.numpy() for variable in qat.trainable_variables]
    qat.fit(images, labels, batch_size=16, epochs=2, verbose=0)
    still = [v.path for v, old in zip(qat.trainable_variables, before, strict=True) if np.array_equal(v, old)]
    assert not still
    qat.save(tmp_path / "qat.keras")
    loaded = keras.saving.load_model(tmp_path / "qat.keras")
    np.testing.assert_array_equal(qat.predict(images, verbose=0), loaded.predict(images, verbose=0))
    tflite = tflite_export.write(kq.freeze(loaded, portable=True))
    parity = tflite_export.verify(tflite, loaded, images, runtimes=_RUNTIMES)
    assert parity.top1 >= 0.995, parity
