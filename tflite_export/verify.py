"""Does a `.tflite` compute what its model computes? Integer by integer, on every runtime."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tflite_export.inspect import Port, Summary, TensorSummary, inspect, load
from tflite_export.program import Tensor
from tflite_export.runtimes import RUNTIMES, RefusedModelError, available, check_name, run
from tflite_export.table import table

MAX_LSB = 1
MAX_RMS = 1.0
MIN_TOP1 = 0.995


@dataclasses.dataclass
class OutputParity:
    """How one output agrees on one runtime.

    Args:
        runtime, output: Their names.
        elements: How many integers were compared.
        mismatch: The share of them that differ.
        max_lsb: The largest difference, in steps of the integers.
        rms: The root mean square of all differences, in the same steps.
        top1: The share of rows with the same winner; None where the last axis has less than two entries.
    """

    runtime: str
    output: str
    elements: int
    mismatch: float
    max_lsb: int
    rms: float
    top1: float | None

    @property
    def passed(self) -> bool:
        """At most 1 LSB everywhere; or else 1 LSB in the root mean square, and where there are classes 99.5 % top-1."""
        if self.max_lsb <= MAX_LSB:
            return True
        return self.rms <= MAX_RMS and (self.top1 is None or self.top1 >= MIN_TOP1)


@dataclasses.dataclass
class LayerParity:
    """How one inner tensor agrees, and the op that writes it ("INPUT" for a model input)."""

    tensor: str
    op: str
    mismatch: float
    max_lsb: int


@dataclasses.dataclass
class Parity:
    """What `verify` measured.

    `mismatch` is a share of elements; `max_lsb` and `rms` (root mean square) count steps of the output's integers.
    """

    results: list[OutputParity]
    samples: int
    skipped: list[str] = dataclasses.field(default_factory=list)
    arena_bytes: int | None = None
    layers: list[LayerParity] = dataclasses.field(default_factory=list)

    @property
    def exact(self) -> bool:
        return bool(self.results) and self.max_lsb == 0

    @property
    def max_lsb(self) -> int:
        return max((result.max_lsb for result in self.results), default=0)

    @property
    def mismatch(self) -> float:
        """The worst share of differing elements."""
        return max((result.mismatch for result in self.results), default=0.0)

    @property
    def rms(self) -> float:
        """The largest root mean square difference of an output."""
        return max((result.rms for result in self.results), default=0.0)

    @property
    def top1(self) -> float | None:
        """The worst top-1 agreement, or None where no output has classes."""
        return min((result.top1 for result in self.results if result.top1 is not None), default=None)

    @property
    def passed(self) -> bool:
        """Every output on every runtime differs by at most 1 LSB everywhere.

        Or else by at most 1 LSB in the root mean square, with the same top-1 class for 99.5 % of the rows where the
        output has classes.
        """
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def first_divergence(self) -> LayerParity | None:
        """The first tensor, in running order, with any difference."""
        return next((layer for layer in self.layers if layer.max_lsb), None)

    def __str__(self) -> str:
        verdict = "exact" if self.exact else "passed" if self.passed else "FAILED"
        if self.skipped and self.results:
            verdict += f" on {', '.join(dict.fromkeys(result.runtime for result in self.results))}"
        arena = "" if self.arena_bytes is None else f"; TFLM arena {self.arena_bytes:,} bytes"
        sections = [f"parity on {self.samples} samples: {verdict}{arena}", self._results_table(), self._layers_table()]
        sections += [f"note: {note}" for note in self.skipped]
        return "\n".join(section for section in sections if section)

    def _results_table(self) -> str:
        return table(
            ("runtime", "output", "elements", "differing", "max LSB", "rms LSB", "top-1 equal"),
            [(r.runtime, r.output, r.elements, *_cells(r), f"{r.rms:.4f}", _percent(r.top1)) for r in self.results],
        )

    def _layers_table(self) -> str:
        return table(
            ("tensor", "op", "differing", "max LSB"),
            [(layer.tensor, layer.op, *_cells(layer)) for layer in self.layers],
        )

    def to_dict(self) -> dict:
        return {
            "exact": self.exact,
            "passed": self.passed,
            "max_lsb": self.max_lsb,
            "mismatch": self.mismatch,
            "rms": self.rms,
            "top1": self.top1,
            "first_divergence": self.first_divergence and dataclasses.asdict(self.first_divergence),
            **dataclasses.asdict(self),
        }


def _cells(row: OutputParity | LayerParity) -> tuple[str, int]:
    return _percent(row.mismatch), row.max_lsb


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.4%}"


def verify(
    tflite: bytes | str | os.PathLike,
    reference: Any,
    inputs: Any,
    runtimes: str | Sequence[str] = ("litert", "xnnpack", "tflm"),
    per_layer: bool = False,
) -> Parity:
    """Compares a `.tflite` with its reference on real inputs, as integers on the file's own output grid.

    Real values become integers by `clip(floor(x / scale + 0.5) + zero_point)`, with the file's scales, both for what
    goes in and for what the reference gives. Float32 outputs are compared on the grid of the tensor in front of their
    DEQUANTIZE.

    Args:
        tflite: the file's bytes, or its path.
        reference: something with `predict` (a Keras model), a callable that takes `inputs`, or its real-valued outputs:
            an array, a list in the order of the model's outputs, or a dict by signature name.
        inputs: real values, samples along the first axis: an array, a list in the order of the model's inputs, or a
            dict by signature name.
        runtimes: any of "litert" (reference kernels), "xnnpack", "tflm".
        per_layer: also compare the inner tensors that `reference_tensors(reference, inputs)` knows, on the reference
            kernels.

    Returns:
        A `Parity`. Runtimes that are not installed, and models that TFLM refuses, are told in `skipped`.

    Raises:
        ValueError: inputs or reference do not fit the file or contain NaN, or a runtime is unknown.
        RuntimeError: LiteRT cannot run the file, or a runtime crashed on it.

    Example:
        >>> parity = tflite_export.verify("model.tflite", qat, x_val)
        >>> assert parity.passed, parity
    """
    names = (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    if not names:
        raise ValueError(f"Expected at least one of the runtimes {', '.join(RUNTIMES)}. Received: {runtimes!r}")
    for name in names:
        check_name(name)
    content = load(tflite)
    summary = inspect(content)
    arrays = input_arrays(inputs, summary.inputs)
    expected = _expected_outputs(reference, inputs, summary, len(arrays[0]))
    parity = Parity([], samples=len(arrays[0]))
    for name in names:
        _verify_on(name, content, arrays, summary, expected, parity)
    if per_layer:
        parity.layers = _compare_layers(content, arrays, summary, reference_tensors(reference, inputs))
    return parity


def _verify_on(name: str, content: bytes, arrays: list, summary: Summary, expected: list, parity: Parity) -> None:
    """Runs one runtime and adds what it found, or why it was left out, to `parity`."""
    if not available(name):
        package = RUNTIMES[name].replace("_", "-")
        extra = "keras_qat[micro]" if name == "tflm" else package
        parity.skipped.append(f"{name}: {package} is not installed. Install the extra: pip install {extra}")
        return
    try:
        result = run(name, content, arrays)
    except RefusedModelError as error:
        if name != "tflm":
            raise
        parity.skipped.append(str(error))  # TFLM knows fewer ops than LiteRT, and a phone does not mind
        return
    if name == "tflm":
        parity.arena_bytes = result.arena_bytes
        if any(port.tensor.has_dynamic_batch for port in summary.inputs):
            parity.skipped.append("tflm: the file has a dynamic batch; TFLM ran it at batch 1")
    for port, (reference, grid), values in zip(summary.outputs, expected, result.outputs):
        integers = grid.quantize(values) if port.tensor.is_float else values
        parity.results.append(_compare_output(name, port.name, reference, integers))


def input_arrays(inputs: Any, ports: list[Port]) -> list[np.ndarray]:
    """One array per model input, in the element type that the file reads."""
    arrays = [_checked_input(values, port) for values, port in zip(_by_port(inputs, ports, "inputs"), ports)]
    counts = {port.name: len(array) for port, array in zip(ports, arrays)}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise ValueError(f"Expected the same number of samples, at least one, in every input. Received: {counts}")
    return [grid_of(port.tensor).quantize(array) for port, array in zip(ports, arrays)]


def _by_port(values: Any, ports: list[Port], what: str) -> list:
    """`values` in the order of `ports`, whether they came as one array, as a list or by name."""
    names = [port.name for port in ports]
    if isinstance(values, Mapping):
        missing = [port.name for port in ports if port.name not in values and port.tensor.name not in values]
        if missing:
            raise ValueError(f"The {what} lack {missing}. Expected the names {names}. Received: {list(values)}")
        return [values[port.name] if port.name in values else values[port.tensor.name] for port in ports]
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    if len(listed) != len(ports):
        raise ValueError(
            f"The file has {len(ports)} {what}: {names}. Expected one array for each, as a list in this order or as a "
            f"dict by name. Received: {len(listed)}"
        )
    return listed


def _checked_input(values: Any, port: Port) -> np.ndarray:
    array = np.asarray(values)
    sizes = (port.tensor.signature or port.tensor.shape)[1:]
    batch = 1 if port.tensor.has_dynamic_batch else max(port.tensor.shape[:1], default=1)
    fits = array.ndim == len(sizes) + 1 and all(size in (-1, got) for size, got in zip(sizes, array.shape[1:]))
    if not fits or len(array) % batch:
        samples = "samples" if batch == 1 else f"a multiple of {batch} samples"
        raise ValueError(
            f"Input {port.name!r} has another shape than the file reads. Expected: ({samples}, "
            f"{', '.join(map(str, sizes))}). Received: {array.shape}"
        )
    _refuse_nan(array, f"Input {port.name!r}")
    return array


def _refuse_nan(array: np.ndarray, what: str) -> None:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{what}: expected real numbers. Received: dtype {array.dtype}")
    count = int(np.isnan(array).sum()) if array.dtype.kind == "f" else 0
    if count:
        raise ValueError(f"{what} contains NaN. Expected real numbers. Received: {count} NaN of {array.size} elements")


def _expected_outputs(reference: Any, inputs: Any, summary: Summary, samples: int) -> list[tuple[np.ndarray, Tensor]]:
    """The reference's outputs as integers of the file, and their grids."""
    outputs = _by_port(_reference_outputs(reference, inputs), summary.outputs, "outputs")
    return [_expected_output(values, port, summary, samples) for values, port in zip(outputs, summary.outputs)]


def _expected_output(values: Any, port: Port, summary: Summary, samples: int) -> tuple[np.ndarray, Tensor]:
    array = np.asarray(values)
    if array.ndim == 0 or len(array) != samples:
        raise ValueError(
            f"The reference's output {port.name!r} does not go with the inputs. Expected {samples} samples along its "
            f"first axis. Received: {array.shape}"
        )
    _refuse_nan(array, f"The reference's output {port.name!r}")
    grid = _output_grid(port, summary, array)
    return grid.quantize(array), grid


def _reference_outputs(reference: Any, inputs: Any) -> Any:
    if hasattr(reference, "predict"):
        return reference.predict(inputs, verbose=0)
    return reference(inputs) if callable(reference) else reference


def grid_of(tensor: TensorSummary) -> Tensor:
    """The `Program`'s view of a tensor in a file: it knows how to quantize."""
    zero_point = tensor.zero_point[0] if tensor.zero_point else 0
    return Tensor(tensor.name, tensor.shape, tensor.dtype, tensor.scale, zero_point)


def _output_grid(port: Port, summary: Summary, reference: np.ndarray) -> Tensor:
    """The integers of an output; for a float one, those in front of its DEQUANTIZE.

    An output that is computed in float is compared in steps of 1/255 of the reference's range.
    """
    tensor = port.tensor
    if not tensor.is_float:
        return grid_of(tensor)
    ops = [op for op in summary.ops if op.subgraph == tensor.subgraph and tensor.name in op.outputs]
    sources = [op.inputs[0] for op in ops if op.kind == "DEQUANTIZE"]
    inner = [inner for inner in summary.tensors if inner.subgraph == tensor.subgraph and inner.name in sources]
    if not inner:
        low, high = float(reference.min()), float(reference.max())
        scale = max(high - low, 1e-6) / 255
        return Tensor(tensor.name, tensor.shape, "int16", (scale,))
    return grid_of(inner[0])


def _compare_output(runtime: str, name: str, expected: np.ndarray, received: np.ndarray) -> OutputParity:
    received = _like(expected, received, name)
    steps = _steps(expected, received)
    rms = float(np.sqrt(np.mean(np.square(steps, dtype=np.float64))))
    return OutputParity(runtime, name, expected.size, *_difference(steps), rms, _top1(expected, received))


def _like(expected: np.ndarray, received: np.ndarray, name: str) -> np.ndarray:
    """`received` in the shape of `expected`: a reference may leave out axes of size 1."""
    if expected.size != received.size:
        raise ValueError(
            f"The reference's {name!r} has another shape than the file's. Expected: {received.shape}. "
            f"Received: {expected.shape}"
        )
    return received.reshape(expected.shape)


def _steps(expected: np.ndarray, received: np.ndarray) -> np.ndarray:
    return np.abs(expected.astype(np.int64) - received.astype(np.int64))


def _difference(steps: np.ndarray) -> tuple[float, int]:
    return float(np.mean(steps > 0)), int(steps.max(initial=0))


def _top1(expected: np.ndarray, received: np.ndarray) -> float | None:
    """The share of rows whose winner is a winner of the reference too; the reference may have several, all equal."""
    if expected.ndim < 2 or expected.shape[-1] < 2:
        return None
    winner = received.argmax(-1)[..., None]
    return float(np.mean(np.take_along_axis(expected, winner, -1)[..., 0] == expected.max(-1)))


@functools.singledispatch
def reference_tensors(reference: Any, inputs: Any) -> dict[str, np.ndarray]:
    """Real values of a model's inner tensors by their names in the file, for `verify(..., per_layer=True)`.

    Register a handler for a new kind of reference. A mapping stands for itself.

    Args:
        reference: what `verify` received.
        inputs: what `verify` received.

    Returns:
        Tensor name → array, samples along the first axis. Names that the file does not have are ignored.

    Example:
        >>> @reference_tensors.register
        ... def _(reference: MyModel, inputs):
        ...     return {"dense": reference.dense(inputs)}
    """
    raise TypeError(
        f"No inner tensors are known of a {type(reference).__name__}. Expected for per_layer=True: a model made by "
        "keras_qat.quantize, a dict {tensor name: array} with the outputs too, or a type registered with "
        "`tflite_export.reference_tensors.register`."
    )


@reference_tensors.register
def _(reference: Mapping, inputs: Any) -> dict[str, np.ndarray]:
    return dict(reference)


def _compare_layers(content: bytes, arrays: list, summary: Summary, references: dict) -> list[LayerParity]:
    """One row for each integer tensor that both sides know, in running order."""
    computed = run("litert", content, arrays, per_layer=True).tensors
    tensors = {tensor.name: tensor for tensor in summary.tensors if tensor.subgraph == 0 and not tensor.is_float}
    writers = {port.tensor.name: "INPUT" for port in summary.inputs}
    writers.update((name, op.kind) for op in summary.ops if op.subgraph == 0 for name in op.outputs)
    return [
        _compare_layer(tensors[name], kind, references[name], computed[name])
        for name, kind in writers.items()
        if name in references and name in computed and name in tensors
    ]


def _compare_layer(tensor: TensorSummary, kind: str, reference: Any, received: np.ndarray) -> LayerParity:
    values = np.asarray(reference)
    if values.size == received.size:  # what is one-dimensional in the model may be an image of one row in the file
        values = values.reshape(received.shape)
    _refuse_nan(values, f"The reference's tensor {tensor.name!r}")
    expected = grid_of(tensor).quantize(values)
    return LayerParity(tensor.name, kind, *_difference(_steps(expected, _like(expected, received, tensor.name))))
