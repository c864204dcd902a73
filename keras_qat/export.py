"""`export`: freeze, write, verify, and only then put the file in its place."""

import dataclasses
import os
import pathlib
import tempfile

import keras
import numpy as np
import tensorflow as tf

import tflite_export
from keras_qat.data import as_called, input_values
from keras_qat.graph.freeze import freeze, taps
from keras_qat.graph.lookups import SINGLE_OPS
from keras_qat.graph.walk import input_names
from keras_qat.layers import is_qat
from tflite_export.ops import BUILTINS
from tflite_export.runtimes import available


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how well it agrees with the QAT model; prints as text.

    Args:
        path: Of the file.
        summary: What is in it (see `tflite_export.inspect`).
        parity: How the runtimes compare with the model's own prediction (see `tflite_export.verify`).
    """

    path: str
    summary: tflite_export.Summary
    parity: tflite_export.Parity

    def __str__(self) -> str:
        kind = "full int8" if self.summary.is_full_int8 else "NOT full int8"
        return f"{self.path}: {self.summary.file_bytes:,} bytes, {kind}\n{self.parity}"

    def to_dict(self) -> dict:
        return {"path": self.path, "summary": self.summary.to_dict(), "parity": self.parity.to_dict()}


class ExportError(RuntimeError):
    """The file was not written because it does not compute what the QAT model does; `parity` has the figures."""

    def __init__(self, message: str, parity: tflite_export.Parity):
        super().__init__(message)
        self.parity = parity

    def __reduce__(self):
        return type(self), (str(self), self.parity)


def export(
    qat: keras.Model,
    path: str | os.PathLike,
    verify_with=None,
    *,
    input_type="int8",
    output_type="int8",
    dynamic_batch: bool = False,
    portable: bool = False,
    runtimes: tuple[str, ...] = ("litert", "xnnpack", "tflm"),
) -> ExportReport:
    """Writes a QAT model as a `.tflite`, if and only if the runtimes agree with it.

    Args:
        qat: What `kq.quantize` returned, trained or calibrated.
        path: Of the file. A file that is there already survives until the new one is right.
        verify_with: Real inputs (array, list, dict or a dataset, of which 256 samples are taken). `None`: random ones
            from the observed input ranges.
        input_type, output_type: "int8", "uint8" or "float32" at the rim of the file; or such a type of NumPy or
            TensorFlow.
        dynamic_batch: The file takes any batch size instead of 1.
        portable: Only ops that TensorFlow Lite Micro has too (see `kq.freeze`).
        runtimes: Which to verify on.

    Returns:
        An `ExportReport`.

    Raises:
        ExportError: if a runtime disagrees with the model.
    """
    path = _path(path)
    content = tflite_export.write(freeze(qat, input_type, output_type, dynamic_batch, portable))
    samples = _random_inputs(qat) if verify_with is None else input_values(qat, _samples(verify_with))
    parity = tflite_export.verify(content, lambda x: qat.predict(as_called(qat, x), verbose=0), samples, runtimes)
    summary = tflite_export.inspect(content)
    if not parity.passed:
        resizes = "RESIZE_BILINEAR" in summary.op_counts
        raise ExportError(
            f"{path} was not written: the runtimes disagree with the QAT model.\n{parity}\nTo see which layer is the first: "
            "tflite_export.verify(tflite_export.write(kq.freeze(qat)), qat, x, per_layer=True). Outputs that are nearly tied "
            "count too: train the model for some epochs before you judge it."
            + (
                f" {_OTHER_TIES}"
                if resizes and {r.runtime for r in parity.results if not r.passed} == {"xnnpack"}
                else ""
            ),
            parity,
        )
    _write_atomically(path, content)
    single = [op for op in summary.op_counts if op in SINGLE_OPS.values() and not BUILTINS[op].micro]
    if (
        single
        and "tflm" in runtimes
        and available("tflm")
        and not any(result.runtime == "tflm" for result in parity.results)
    ):
        parity.skipped.append(
            f"tflm: portable=True writes {', '.join(single)} as a look-up, which TensorFlow Lite Micro has. The integers are the same."
        )
    return ExportReport(str(path), summary, parity)


_OTHER_TIES = (
    "XNNPACK rounds ties of RESIZE_BILINEAR otherwise than the other runtimes: with "
    "kq.quantize(model, scheme=kq.Scheme(exact_upsampling=True)) they all agree, and upsampling takes longer."
)


def _path(path: str | os.PathLike) -> pathlib.Path:
    if not os.fspath(path):
        raise ValueError("path says where the file goes. Expected a file name like 'model.tflite'. Received: ''")
    return pathlib.Path(path)


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes beside the target, then renames: whatever goes wrong, what was there before survives."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"Cannot write to folder {str(path.parent)!r}: {error.strerror}. Choose another path.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"Could not write {str(path)!r}: {error.strerror}. What was there before is unchanged."
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _samples(data, enough: int = 256):
    """Arrays as they are; of a dataset as many batches of inputs as make enough samples."""
    if not isinstance(data, tf.data.Dataset):
        return data
    batches, count = [], 0
    for batch in data.as_numpy_iterator():
        batches.append(batch[0] if isinstance(batch, tuple) else batch)
        count += len(keras.tree.flatten(batches[-1])[0])
        if count >= enough:
            break
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *batches)


def _random_inputs(qat, samples: int = 64) -> list[np.ndarray]:
    """Uniform noise over the range of each input."""
    generator = np.random.default_rng(0)
    return [
        generator.uniform(*_range_of(qat, name), (samples, *tensor.shape[1:])).astype(tensor.dtype)
        for name, tensor in zip(input_names(qat), qat.inputs, strict=True)
    ]


def _range_of(qat, input_name: str) -> tuple[float, float]:
    layer = next(layer for layer in qat.layers if input_name in getattr(layer, "sites", ()))
    scale, zero_point = layer.parameters()
    return (layer.spec.qmin - zero_point) * scale, (layer.spec.qmax - zero_point) * scale


@tflite_export.reference_tensors.register(keras.Model)
def _reference_tensors(qat: keras.Model, inputs) -> dict[str, np.ndarray]:
    """The QAT model's own values of the file's tensors, for the per-layer view of `verify`."""
    if not is_qat(qat):
        raise ValueError(
            f"per_layer=True compares with the tensors inside of a QAT model. Expected what kq.quantize returned, or a "
            f"dict of arrays by tensor name. Received: {qat!r}. Leave per_layer out to compare its outputs."
        )
    names, model = taps(qat)
    values = model.predict(as_called(qat, input_values(qat, inputs)), verbose=0)
    tensors = dict(zip(names, values if isinstance(values, list) else [values], strict=True))
    # A one-dimensional operation writes an image of one row, which is then reshaped (see emit.Call.image_output).
    return {**tensors, **{f"{name}/result": value for name, value in tensors.items()}}
