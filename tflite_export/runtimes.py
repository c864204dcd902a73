"""One small interface to what runs `.tflite` files: LiteRT's reference kernels, XNNPACK, TensorFlow Lite Micro.

A native interpreter can abort its whole process on a bad file, so all of them live in a worker process, which is
started when first needed, used again, and replaced when it died.
"""

import atexit
import dataclasses
import importlib.util
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RUNTIMES = {"litert": "ai_edge_litert", "xnnpack": "ai_edge_litert", "tflm": "tflite_micro"}  # name → its package
_LENGTH = struct.Struct("<Q")
_STDERR_LINES = 5


class RefusedModelError(RuntimeError):
    """A runtime answered that it cannot run the file (a missing op, say); the worker is alive."""


@dataclasses.dataclass
class RunResult:
    """What a run gave: the outputs in the model's order, TFLM's arena, and on request LiteRT's inner tensors."""

    outputs: list[np.ndarray]
    arena_bytes: int | None = None
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def available(runtime: str) -> bool:
    """Whether the package behind `runtime` is installed."""
    check_name(runtime)
    return importlib.util.find_spec(RUNTIMES[runtime]) is not None


def check_name(runtime: str) -> None:
    """Raises `ValueError` for a runtime that nobody knows."""
    if runtime not in RUNTIMES:
        raise ValueError(f"Unknown runtime. Expected one of: {', '.join(RUNTIMES)}. Received: {runtime!r}")


def run(runtime: str, model: bytes, inputs: Sequence[np.ndarray], per_layer: bool = False) -> RunResult:
    """Runs a `.tflite` on samples, in the worker process.

    A model with a static batch gets the samples in portions of that size (1, mostly), its state reset before each; on
    LiteRT a model with a dynamic batch gets many of them at once.

    Args:
        runtime: "litert" (reference kernels), "xnnpack" (LiteRT's default) or "tflm".
        model: the file's bytes.
        inputs: one array per model input, in the model's order and element types, the samples along the first axis.
        per_layer: also return every tensor that is computed, by name ("litert" alone can).

    Returns:
        A `RunResult`.

    Raises:
        RefusedModelError: the runtime says that it cannot run this model.
        RuntimeError: the runtime took the worker process down.

    Example:
        >>> run("tflm", content, [np.zeros((4, 96, 96, 1), np.int8)]).outputs[0].shape
    """
    check_name(runtime)
    if per_layer and runtime != "litert":
        raise ValueError(f"Inner tensors come from the runtime 'litert' alone. Received: per_layer=True on {runtime!r}")
    return _WORKER.call(runtime, (runtime, bytes(model), [np.asarray(array) for array in inputs], per_layer))


class _Worker:
    """The worker process, and pickles with their lengths in front over its two pipes."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._stderr = None
        self._lock = threading.Lock()

    def call(self, runtime: str, request: tuple) -> RunResult:
        with self._lock:
            self._start()
            self._stderr.truncate(0)
            try:
                send(self._process.stdin, request)
                is_good, answer = receive(self._process.stdout)
            except (EOFError, OSError):
                raise RuntimeError(self._obituary(runtime)) from None
            except BaseException:
                self._stop()  # an answer still under way must not meet the next question
                raise
        if is_good:
            return answer
        raise RefusedModelError(f"Runtime {runtime!r} cannot run this model: {answer}{self._last_words()}")

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:  # after a fork, the parent's counts as gone
            return
        self._stderr = tempfile.TemporaryFile("a+b")  # appending, so that it can be cut while the worker holds it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tflite_export.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            start_new_session=True,  # Ctrl-C is for the parent
        )

    def _obituary(self, runtime: str) -> str:
        code = self._process.wait()
        self._process = None
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return (
            f"Runtime {runtime!r} ended its process {how} while it ran this model. Expected a file that it can run; "
            f"look at it with tflite_export.inspect, or leave this runtime out.{self._last_words()}"
        )

    def _last_words(self) -> str:
        self._stderr.seek(0)
        text = self._stderr.read().replace(b"\0", b"").decode(errors="replace")
        latest = list(dict.fromkeys(line for line in reversed(text.splitlines()) if line.strip()))
        lines = latest[:_STDERR_LINES][::-1]
        return "".join(["\nIts last lines:", *(f"\n  {line}" for line in lines)]) if lines else ""

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()


def _environment() -> dict[str, str]:
    """The worker finds this package wherever it starts, and nothing that merely lies in the working directory."""
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONSAFEPATH": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def send(stream, message) -> None:
    """Writes one message of the worker's protocol."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def receive(stream):
    """Reads one message of the worker's protocol, or raises `EOFError` where the other side is gone."""
    return pickle.loads(_read(stream, _LENGTH.unpack(_read(stream, _LENGTH.size))[0]))


def _read(stream, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


_WORKER = _Worker()
atexit.register(_WORKER.close)
