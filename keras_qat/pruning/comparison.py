"""What a smaller model costs next to the larger one."""

import dataclasses
import math
import os
import pathlib
import time

import keras
import numpy as np

import tflite_export
from keras_qat.layers import FakeQuant, Quantized, is_qat
from keras_qat.pruning.report import report
from keras_qat.pruning.shrink import flattened
from tflite_export.runtimes import run
from tflite_export.table import table

_BURST = 0.05
_ROUNDS = 9


@dataclasses.dataclass(frozen=True)
class Size:
    """What a model costs.

    Args:
        parameters: All of its weights, in number; without the ranges that quantization-aware training keeps.
        macs: Multiplications by a weight for one input; None where an operation does not tell.
        bytes, zipped_bytes: Of the kernels, in the weights' own type.
        file_bytes: Of its `.tflite`.
        milliseconds: For one input of the file, on LiteRT with one thread: the median of some rounds.
        arena_bytes: What TensorFlow Lite Micro allocates for the file; None if it cannot run it.
    """

    parameters: int
    macs: int | None
    bytes: int
    zipped_bytes: int
    file_bytes: int | None = None
    milliseconds: float | None = None
    arena_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models side by side; prints as a table."""

    before: Size
    after: Size

    def __str__(self) -> str:
        rows = []
        for field in dataclasses.fields(Size):
            values = [getattr(size, field.name) for size in (self.before, self.after)]
            if any(value is not None for value in values):
                known = None not in values and values[0]
                ratio = f"{values[1] / values[0]:.1%}" if known else "unknown"
                rows.append((field.name.replace("_", " "), *map(_cell, values), ratio))
        return table(("", "before", "after", "left"), rows)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def _cell(value) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def compare(before: keras.Model, after: keras.Model, files=None) -> Comparison:
    """Parameters, MACs and bytes of two models; with files of them also what these cost on a device.

    Args:
        before: The model as it was.
        after: What became of it, mostly by `kq.pruning.shrink`.
        files: The paths of a `.tflite` of each, mostly by `kq.export`.

    Example:
        ```python
        small = kq.pruning.shrink(model)
        print(kq.pruning.compare(model, small))
        ```
    """
    sizes = [_size(model) for model in (before, after)]
    if files is not None:
        contents = [pathlib.Path(os.fspath(file)).read_bytes() for file in files]
        latencies = _latencies(contents)
        sizes = [
            dataclasses.replace(
                size, file_bytes=len(content), milliseconds=milliseconds, arena_bytes=_arena_bytes(content)
            )
            for size, content, milliseconds in zip(sizes, contents, latencies, strict=True)
        ]
    return Comparison(*sizes)


def _size(model) -> Size:
    total = report(model if is_qat(model) else flattened(model).model()).total
    return Size(_parameters(model), total.macs, total.bytes, total.zipped_bytes)


def _parameters(model) -> int:
    own = [
        layer._non_trainable_variables for layer in model._flatten_layers() if isinstance(layer, (FakeQuant, Quantized))
    ]
    return model.count_params() - sum(math.prod(variable.shape) for variables in own for variable in variables)


def _arena_bytes(content: bytes) -> int | None:
    ports = tflite_export.inspect(content).inputs
    try:  # there are no samples, so nothing runs: allocating is what tells
        return run("tflm", content, [np.zeros((0, *p.tensor.shape[1:]), p.tensor.dtype) for p in ports]).arena_bytes
    except RuntimeError:
        return None


def _latencies(contents: list[bytes]) -> list[float]:
    """Milliseconds, the files in turn: a machine that gets slower or faster favours none."""
    from ai_edge_litert.interpreter import Interpreter

    interpreters = [Interpreter(model_content=content, num_threads=1) for content in contents]
    repeats = []
    for interpreter in interpreters:
        interpreter.allocate_tensors()
        for details in interpreter.get_input_details():
            interpreter.set_tensor(details["index"], np.zeros(details["shape"], details["dtype"]))
        _seconds(interpreter, 1)
        repeats.append(max(1, int(_BURST / _seconds(interpreter, 3))))
    rounds = [[_seconds(*each) for each in zip(interpreters, repeats, strict=True)] for _ in range(_ROUNDS)]
    return [float(1e3 * np.median(column)) for column in zip(*rounds, strict=True)]


def _seconds(interpreter, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        interpreter.invoke()
    return (time.perf_counter() - start) / repeats
