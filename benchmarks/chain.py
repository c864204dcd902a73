"""Whether the way to a file grows linearly with the model: seconds per node on chains of 100 to 5,000 layers.

    python benchmarks/chain.py [--sizes=100 --sizes=1000] [--profile=quantize]

The chains do nothing useful: dense layers and relus in turn; convolutions, batch norms and relus; products, sums and relus
of keras.ops. Every chain has a process of its own. Building it is Keras's work and stands beside ours for comparison; ranges
come from one look at the numbers -1 and 1, because calibrating runs the model, which is TensorFlow's work.
"""

import concurrent.futures
import cProfile
import pstats
import sys
import threading
import time
from collections.abc import Callable

import keras
import numpy as np
from absl import app, flags
from isolated import in_own_process
from keras import layers, ops
from printout import default_out, heading, publish

import keras_qat as kq
import tflite_export
from keras_qat.layers import FakeQuant
from tflite_export.table import table

_STEPS = ("build", "quantize", "freeze", "write")
_OURS = ("quantize", "freeze", "write")
_STACK = 1 << 29  # bytes: Keras recurses once or more per layer where it builds a functional model


def _dense(size: int) -> keras.Model:
    inputs = x = keras.Input((8,))
    for index in range(size):
        x = layers.ReLU()(x) if index % 2 else layers.Dense(8)(x)
    return keras.Model(inputs, x)


def _convolutions(size: int) -> keras.Model:
    inputs = x = keras.Input((8, 8, 4))
    for index in range(size):
        block = (layers.Conv2D(4, 3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU())
        x = block[index % 3](x)
    return keras.Model(inputs, x)


def _functions(size: int) -> keras.Model:
    inputs = x = keras.Input((8,))
    for index in range(size):
        calls = (lambda x: ops.multiply(x, 0.9), lambda x: ops.add(x, inputs), ops.relu)
        x = calls[index % 3](x)
    return keras.Model(inputs, x)


CHAINS: dict[str, Callable[[int], keras.Model]] = {
    "dense": _dense,
    "convolutions": _convolutions,
    "keras.ops": _functions,
}

_CHAINS = flags.DEFINE_multi_enum("chains", list(CHAINS), list(CHAINS), "Which chains; give it once for each.")
_SIZES = flags.DEFINE_multi_integer("sizes", [100, 1000, 5000], "Layers of a chain; give it once for each.")
_PROFILE = flags.DEFINE_enum(
    "profile", None, _STEPS, "Prints where the largest chain spends this step; profiling slows it."
)
_OUT = flags.DEFINE_string("out", default_out(__file__), "File for the results.")


def measure(chain: str, size: int, profile: str | None = None) -> dict[str, float]:
    """Seconds of each step, on a small chain first: what happens once only does not count."""
    _seconds(CHAINS[chain], 10, None)
    return _seconds(CHAINS[chain], size, profile)


def _seconds(build: Callable[[int], keras.Model], size: int, profile: str | None) -> dict[str, float]:
    seconds = {}

    def timed(step, call):
        profiler = cProfile.Profile() if step == profile else None
        start = time.perf_counter()
        result = call() if profiler is None else profiler.runcall(call)
        seconds[step] = time.perf_counter() - start
        if profiler is not None:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        return result

    model = timed("build", lambda: build(size))
    qat = timed("quantize", lambda: kq.quantize(model))
    _observe(qat)
    program = timed("freeze", lambda: kq.freeze(qat))
    timed("write", lambda: tflite_export.write(program))
    return seconds


def _observe(qat: keras.Model) -> None:
    for layer in qat.layers:
        if isinstance(layer, FakeQuant) and layer.quantizer.observes:
            for site in range(len(layer.sites)):
                layer.quantizer.include(np.float32([-1, 1]), site)


def measured(*arguments) -> dict[str, float] | str:
    """`measure` in a fresh process and on a large stack; or why there is no result."""
    try:
        return in_own_process(_on_large_stack, *arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:150]


def _on_large_stack(*arguments) -> dict[str, float]:
    sys.setrecursionlimit(1_000_000)
    threading.stack_size(_STACK)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(measure, *arguments).result()


def row(chain: str, size: int, seconds: dict[str, float] | str) -> tuple:
    """A line of the table: seconds of each step, and milliseconds of each layer."""
    if isinstance(seconds, str):
        return (chain, size, *["-"] * (len(_STEPS) + 2), seconds)
    ours = sum(seconds[step] for step in _OURS)
    figures = [f"{value:.2f}" for value in (*(seconds[step] for step in _STEPS), ours)]
    return (chain, size, *figures, f"{1e3 * ours / size:.2f}", "")


def main(_) -> None:
    rows = []
    for chain in _CHAINS.value:
        for size in _SIZES.value:
            profile = _PROFILE.value if size == max(_SIZES.value) else None
            rows.append(row(chain, size, measured(chain, size, profile)))
            print("  ", *rows[-1], flush=True)
    title = "Seconds to quantize, freeze and write chains of layers"
    settings = f"one run each; {' + '.join(_OURS)} is the sum, its milliseconds per layer should not grow"
    columns = ("chain", "layers", *_STEPS, "sum", "ms / layer", "")
    publish(heading(title, settings, with_peer=False) + "\n\n" + table(columns, rows), _OUT.value)


if __name__ == "__main__":
    app.run(main)
