"""Command line: look into a `.tflite` file, or run it on random inputs.

python -m tflite_export inspect model.tflite [--json]
python -m tflite_export run model.tflite --runtime=tflm [--samples=8] [--seed=0]
"""

import json
import sys

import numpy as np
from absl import app, flags

from tflite_export.inspect import Summary, TensorSummary, inspect, load
from tflite_export.runtimes import RUNTIMES, run
from tflite_export.table import table

_JSON = flags.DEFINE_bool("json", False, "inspect: print JSON instead of tables.")
_RUNTIME = flags.DEFINE_enum("runtime", "litert", list(RUNTIMES), "run: what runs the file.")
_SAMPLES = flags.DEFINE_integer("samples", 8, "run: how many random samples.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "run: seed of the random inputs.")


def _inspect(path: str) -> str:
    summary = inspect(path)
    return json.dumps(summary.to_dict(), indent=2) if _JSON.value else str(summary)


def _run(path: str) -> str:
    content = load(path)
    summary = inspect(content)
    rng = np.random.default_rng(_SEED.value)
    inputs = [_random_input(port.tensor, rng, _SAMPLES.value) for port in summary.inputs]
    result = run(_RUNTIME.value, content, inputs)
    arena = "" if result.arena_bytes is None else f"\narena: {result.arena_bytes:,} bytes"
    return _statistics(summary, result.outputs) + arena


def _random_input(tensor: TensorSummary, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Any integer of a quantized input, normal floats, and zeros for indices, which are valid everywhere."""
    batch = 1 if tensor.has_dynamic_batch else max(tensor.shape[:1], default=1)
    shape = (samples * batch, *tensor.shape[1:])
    if tensor.is_float:
        return rng.standard_normal(shape).astype(tensor.dtype)
    if not tensor.scale:
        return np.zeros(shape, tensor.dtype)
    limits = np.iinfo(tensor.dtype)
    return rng.integers(limits.min, limits.max, shape, tensor.dtype, endpoint=True)


def _statistics(summary: Summary, outputs: list[np.ndarray]) -> str:
    return table(
        ("output", "shape", "dtype", "min", "max", "mean", "std", "distinct"),
        [
            (port.name, "x".join(map(str, values.shape)), str(values.dtype), f"{values.min()}", f"{values.max()}")
            + (f"{values.mean():.3f}", f"{values.std():.3f}", len(np.unique(values)))
            for port, values in zip(summary.outputs, outputs)
        ],
    )


_COMMANDS = {"inspect": _inspect, "run": _run}


def main(argv: list[str]) -> int:
    if len(argv) != 3 or argv[1] not in _COMMANDS:
        raise app.UsageError(f"Expected: {' | '.join(_COMMANDS)}, then one file. Received: {' '.join(argv[1:])!r}")
    try:
        print(_COMMANDS[argv[1]](argv[2]))
    except (ValueError, OSError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def _parse_flags(argv: list[str]) -> list[str]:
    """absl ends --help with exit code 1, as if something had gone wrong."""
    if {"-h", "--help", "--helpshort"} & set(argv[1:]):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
