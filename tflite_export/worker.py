"""The process that the native interpreters live in: reads a model and inputs, answers with outputs.

Started by `tflite_export.runtimes` as `python -m tflite_export.worker`. Runtimes are imported when first asked for.
"""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tflite_export.inspect import inspect
from tflite_export.runtimes import RunResult, receive, send

_ARENA_SIZES = (4 << 20, 64 << 20, 512 << 20)  # tried in turn
_DYNAMIC_BATCH = 64


def _litert(model: bytes, inputs: list[np.ndarray], resolver: str, per_layer: bool = False) -> RunResult:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=model,
        experimental_op_resolver_type=OpResolverType[resolver],
        experimental_preserve_all_tensors=per_layer,
    )
    interpreter.allocate_tensors()
    targets = [details["index"] for details in interpreter.get_output_details()]
    inner = _computed_tensors(model) if per_layer else {}

    def step(portion):
        _set_inputs(interpreter, portion)
        interpreter.invoke()
        return [interpreter.get_tensor(index) for index in (*targets, *inner.values())]

    arrays = _in_portions(step, inputs, _portion_size(interpreter.get_input_details()))
    return RunResult(arrays[: len(targets)], tensors=dict(zip(inner, arrays[len(targets) :])))


def _portion_size(sources: list[dict]) -> int:
    """The file's batch, or where that is free as much as any machine has memory for."""
    shape, signature = sources[0]["shape"], sources[0]["shape_signature"]
    if -1 in signature[:1]:
        return _DYNAMIC_BATCH
    return int(shape[0]) if len(shape) else 1


def _set_inputs(interpreter, portion: list[np.ndarray]) -> None:
    """Sets all inputs and a fresh state, after resizing inputs of unknown size where the portion asks for it."""
    pairs = list(zip(interpreter.get_input_details(), portion))
    unfit = [
        (source["index"], array.shape)
        for source, array in pairs
        if -1 in source["shape_signature"] and tuple(source["shape"]) != array.shape
    ]
    for index, shape in unfit:
        interpreter.resize_tensor_input(index, shape)
    if unfit:
        interpreter.allocate_tensors()
    interpreter.reset_all_variables()
    for source, array in pairs:
        interpreter.set_tensor(source["index"], array)


def _computed_tensors(model: bytes) -> dict[str, int]:
    """Name → index of what the first subgraph computes, its inputs included."""
    summary = inspect(model)
    names = {port.tensor.name for port in summary.inputs}
    names.update(name for op in summary.ops if op.subgraph == 0 for name in op.outputs)
    tensors = [tensor for tensor in summary.tensors if tensor.subgraph == 0]
    return {tensor.name: index for index, tensor in enumerate(tensors) if tensor.name in names}


def _tflm(model: bytes, inputs: list[np.ndarray]) -> RunResult:
    interpreter = _tflm_interpreter(model)
    count = len(inspect(model).outputs)

    def step(portion):
        interpreter.reset()
        for index, array in enumerate(portion):
            interpreter.set_input(array, index)
        interpreter.invoke()
        return [np.array(interpreter.get_output(index)) for index in range(count)]

    shape = interpreter.get_input_details(0)["shape"]
    outputs = _in_portions(step, inputs, int(shape[0]) if len(shape) else 1)
    return RunResult(outputs, arena_bytes=_arena_bytes(interpreter))


def _tflm_interpreter(model: bytes):
    from tflite_micro.python.tflite_micro import runtime

    for size in _ARENA_SIZES:
        try:
            return runtime.Interpreter.from_bytes(model, arena_size=size)
        except RuntimeError as error:  # it says the same of a small arena and of an op it does not know
            failure = error
    raise failure


def _arena_bytes(interpreter) -> int | None:
    """What the recording allocator counted, which it only ever prints."""
    with _captured_stderr() as read:
        interpreter.print_allocations()
        text = read()
    found = re.search(r"Arena allocation total (\d+) bytes", text)
    return int(found[1]) if found else None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _in_portions(step: Callable, inputs: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Feeds the samples to `step` in portions, and joins what it returns."""
    starts = range(0, len(inputs[0]), size)
    portions = [[np.ascontiguousarray(array[start : start + size]) for array in inputs] for start in starts]
    return [_joined(parts, len(portions[0][0])) for parts in zip(*map(step, portions))]


def _joined(parts: Sequence[np.ndarray], size: int) -> np.ndarray:
    has_sample_axis = parts[0].ndim and parts[0].shape[0] == size
    return np.concatenate(parts) if has_sample_axis else np.stack(parts)


def _answer(runtime: str, model: bytes, inputs: list[np.ndarray], per_layer: bool) -> RunResult:
    if runtime == "tflm":
        return _tflm(model, inputs)
    return _litert(model, inputs, "BUILTIN_REF" if runtime == "litert" else "AUTO", per_layer)


def main() -> None:
    """Answers requests until the other side closes its pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # natives print where they like; from here on that is stderr
    while True:
        try:
            request = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send(answers, (True, _answer(*request)))
        except Exception as error:  # whatever it is, the other side must hear of it
            send(answers, (False, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
